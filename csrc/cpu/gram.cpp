// All dot products of the base a and the deltas d_n, in one read: the Gram matrix of the geometry
// methods.
//
// Whole tensors, rows and columns are the same loop: pieces of up to 64 entries are added lane by
// lane, in order. Along a run of entries the pieces are consecutive and the lanes are halved at its
// end; for columns across rows a piece is one row's share of 64 columns, and every lane is a
// column's sum.
#include <algorithm>
#include <utility>
#include <vector>

#include "sums.h"

namespace mergecore::cpu {

constexpr int kHeld = kChunk / kLanes;  // pieces of all vectors held at once

MERGECORE_CLONES
void delta_chunk(const void* model, Dtype dtype, const double* base, int n, double* delta) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    const auto* bits = static_cast<const typename T::Bits*>(model);
    for (int i = 0; i < n; ++i) delta[i] = T::load(bits[i]) - base[i];
  });
}

template <int... P>
inline __attribute__((always_inline)) void add_pieces(const double* v, const double* w, int n,
                                                      double* sums,
                                                      std::integer_sequence<int, P...>) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    double sum = sums[i];
    ((sum = fma(v[P * kLanes + i], w[P * kLanes + i], sum)), ...);
    sums[i] = sum;
  }
}

// sums[i] += v[p][i] * w[p][i] over the pieces p, in order.
MERGECORE_CLONES
void add_products(const double* v, const double* w, int pieces, int n, double* sums) {
  if (pieces == kHeld && n == kLanes) {
    return add_pieces(v, w, kLanes, sums, std::make_integer_sequence<int, kHeld>());
  }
  for (int p = 0; p < pieces; ++p) {
    add_pieces(v + p * kLanes, w + p * kLanes, n, sums, std::make_integer_sequence<int, 1>());
  }
}

// vectors[v][p][i]: the base (v = 0) and the deltas at pieces of n entries, `stride` entries apart.
void load_vectors(const Inputs& in, int64_t entry, int64_t stride, int pieces, int n,
                  double* vectors) {
  alignas(64) double keep[kChunk];
  const Window& w = in.window;
  const bool joined = stride == kLanes && n == kLanes;  // one run
  const int parts = joined ? 1 : pieces, length = joined ? pieces * kLanes : n;
  for (int p = 0; p < parts; ++p) {
    const int64_t here = entry + p * stride, ahead = here + kHeld * stride;
    double* base = vectors + p * kLanes;
    if (in.base.data != nullptr) {
      prefetch(at(in.base, ahead), length * dtype_size(in.base.dtype));
      load_chunk(at(in.base, here), in.base.dtype, length, base);
    }
    for (int m = 0; m < in.count; ++m) {
      const Matrix& model = in.models[m];
      double* delta = base + (m + 1) * kChunk;
      prefetch(at(model, ahead), length * dtype_size(model.dtype));
      if (in.drops == nullptr || !drops_any(in.drops[m])) {
        delta_chunk(at(model, here), model.dtype, base, length, delta);
        continue;
      }
      const int64_t index = w.first_entry + w.first_row * w.columns + here;
      kept_delta_chunk(in.drops[m], at(model, here), model.dtype, base, index, length, keep, delta);
    }
  }
}

// Adds the products of all pairs of vectors: sums[pair][0 .. n), pairs `stride` numbers apart.
void add_pairs(const double* vectors, int count, int pieces, int n, double* sums, int64_t stride) {
  for (int i = 0; i < count; ++i) {
    for (int j = i; j < count; ++j, sums += stride) {
      add_products(vectors + i * kChunk, vectors + j * kChunk, pieces, n, sums);
    }
  }
}

// All pairs of the base and up to three models, of which nothing is dropped.
template <int kMatrices>
void add_grams(const Matrix (&matrices)[kMatrices], const Pieces& pieces, double* sums,
               int64_t stride) {
  constexpr int kPairs = kMatrices * (kMatrices + 1) / 2;
  auto add = [&](auto as, int n, auto next, auto sheet, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes sum[kPairs], v[kMatrices];
#pragma GCC unroll 10
    for (int k = 0; k < kPairs; ++k) load(sums + k * stride + i, sum[k]);
    for (int p = 0; p < n; ++p) {
      next(p);
      load(sheet(0, p), v[0]);
#pragma GCC unroll 4
      for (int m = 1; m < kMatrices; ++m) {
        load(sheet(m, p), v[m]);
        v[m] = v[m] - v[0];
      }
      int k = 0;
#pragma GCC unroll 4
      for (int m = 0; m < kMatrices; ++m) {
#pragma GCC unroll 4
        for (int other = m; other < kMatrices; ++other) multiply_add(v[m], v[other], sum[k++]);
      }
    }
#pragma GCC unroll 10
    for (int k = 0; k < kPairs; ++k) store(sum[k], sums + k * stride + i);
  };
  each_lanes(matrices, pieces, add);
}

constexpr int kFew = 3;  // models: of more the pairs do not fit the registers of AVX2

// Whether add_grams is for these; then gram_adder is what sum_runs and sum_columns call.
bool are_few(const Inputs& in) {
  const auto drops = [&](int m) { return in.drops != nullptr && drops_any(in.drops[m]); };
  bool any = false;
  for (int m = 0; m < in.count; ++m) any |= drops(m);
  return in.count >= 1 && in.count <= kFew && !any;
}

auto gram_adder(const Inputs& in) {
  return [&in](const Pieces& pieces, double* to, int64_t to_stride) {
    const Matrix *m = in.models, &base = in.base;
    if (in.count == 1) return add_grams({base, m[0]}, pieces, to, to_stride);
    if (in.count == 2) return add_grams({base, m[0], m[1]}, pieces, to, to_stride);
    add_grams({base, m[0], m[1], m[2]}, pieces, to, to_stride);
  };
}

void run_grams(const Inputs& in, int64_t length, double* out, int64_t pair_stride,
               int64_t run_stride, int64_t begin, int64_t end) {
  const int64_t entries = in.window.rows * in.window.columns, pairs = gram_count(in.count);
  const auto place = [&](int64_t run, int64_t pair) {
    return out + pair * pair_stride + run * run_stride;
  };
  if (are_few(in)) {
    return sum_runs(in.window, length, pairs, begin, end, gram_adder(in),
                    [&](int64_t run, int64_t pair, double sum) { *place(run, pair) = sum; });
  }
  const int count = in.count + 1;
  std::vector<double> vectors(static_cast<size_t>(count) * kChunk);  // zeros where there is no base
  std::vector<double> lanes(static_cast<size_t>(pairs) * kLanes);
  for (int64_t run = begin; run < end; ++run) {
    const int64_t last = std::min((run + 1) * length, entries);
    std::fill(lanes.begin(), lanes.end(), 0.0);
    for (int64_t entry = run * length; entry < last;) {
      const int64_t whole = (last - entry) / kLanes;
      const int pieces = static_cast<int>(std::clamp<int64_t>(whole, 1, kHeld));
      const int n = static_cast<int>(std::min<int64_t>(kLanes, last - entry));
      load_vectors(in, entry, kLanes, pieces, n, vectors.data());
      add_pairs(vectors.data(), count, pieces, n, lanes.data(), kLanes);
      entry += static_cast<int64_t>(pieces - 1) * kLanes + n;
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
      *place(run, pair) = sum_lanes(lanes.data() + pair * kLanes);
    }
  }
}

void column_gram(const Inputs& in, const Tile& tile, double* sums) {
  if (are_few(in)) return sum_columns(in.window, tile, sums, gram_adder(in));
  const Window& w = in.window;
  const int count = in.count + 1;
  std::vector<double> vectors(static_cast<size_t>(count) * kChunk);
  for (int64_t row = tile.row; row < tile.row + tile.rows; row += kHeld) {
    const int pieces = static_cast<int>(std::min<int64_t>(kHeld, tile.row + tile.rows - row));
    for (int64_t column = 0; column < tile.columns; column += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, tile.columns - column));
      const int64_t entry = row * w.columns + tile.column + column;
      load_vectors(in, entry, w.columns, pieces, n, vectors.data());
      add_pairs(vectors.data(), count, pieces, n, sums + column, tile.columns);
    }
  }
}

}  // namespace mergecore::cpu
