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

constexpr int kGroup = 3;  // models: of more the pairs do not fit the registers

// Sums go on from where they were left; a pair without a place is added up in vain.
template <int kCount, class Lanes>
inline __attribute__((always_inline)) void begin_sums(double* const (&to)[kCount], int i,
                                                      Lanes (&sums)[kCount]) {
#pragma GCC unroll 10
  for (int k = 0; k < kCount; ++k) {
    sums[k] = Lanes{};
    if (to[k] != nullptr) load(to[k] + i, sums[k]);
  }
}

template <int kCount, class Lanes>
inline __attribute__((always_inline)) void end_sums(const Lanes (&sums)[kCount], int i,
                                                    double* const (&to)[kCount]) {
#pragma GCC unroll 10
  for (int k = 0; k < kCount; ++k) {
    if (to[k] != nullptr) store(sums[k], to[k] + i);
  }
}

// All pairs of the base, matrix 0, and a group of models, of which nothing is dropped.
template <int kMatrices>
void add_within(const Matrix (&matrices)[kMatrices], const Pieces& pieces,
                double* const (&to)[kMatrices * (kMatrices + 1) / 2]) {
  constexpr int kPairs = kMatrices * (kMatrices + 1) / 2;
  auto add = [&](auto as, int n, auto next, auto sheet, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes sums[kPairs], v[kMatrices];
    begin_sums(to, i, sums);
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
        for (int other = m; other < kMatrices; ++other) multiply_add(v[m], v[other], sums[k++]);
      }
    }
    end_sums(sums, i, to);
  };
  each_lanes(matrices, pieces, add);
}

// The pairs of a whole group's models, which follow the base, with the others, those of another.
template <int kMatrices>
void add_across(const Matrix (&matrices)[kMatrices], const Pieces& pieces,
                double* const (&to)[kGroup * (kMatrices - 1 - kGroup)]) {
  constexpr int kOthers = kMatrices - 1 - kGroup;
  auto add = [&](auto as, int n, auto next, auto sheet, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes sums[kGroup * kOthers], v[kGroup], a, x;
    begin_sums(to, i, sums);
    for (int p = 0; p < n; ++p) {
      next(p);
      load(sheet(0, p), a);
#pragma GCC unroll 3
      for (int m = 0; m < kGroup; ++m) {
        load(sheet(1 + m, p), x);
        v[m] = x - a;
      }
#pragma GCC unroll 3
      for (int other = 0; other < kOthers; ++other) {
        load(sheet(1 + kGroup + other, p), x);
        const auto d = x - a;
#pragma GCC unroll 3
        for (int m = 0; m < kGroup; ++m) multiply_add(v[m], d, sums[m * kOthers + other]);
      }
    }
    end_sums(sums, i, to);
  };
  each_lanes(matrices, pieces, add);
}

// Calls f with a constant for a number of models.
template <class F>
void with_models(int count, const F& f) {
  switch (count) {
    case 0:
      return f(std::integral_constant<int, 0>{});
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    default:
      return f(std::integral_constant<int, kGroup>{});
  }
}

// What sum_runs and sum_columns call where nothing is dropped.
auto gram_adder(const Inputs& in) {
  return [&in](const Pieces& pieces, double* sums, int64_t stride) {
    const auto to = [&](int one, int other) {  // vector 0 is the base
      return sums + (int64_t{one} * (2 * in.count + 1 - one) / 2 + other) * stride;
    };
    const auto within = [&](int first, auto models) {
      Matrix matrices[1 + models()] = {in.base};
      std::copy_n(in.models + first, models(), matrices + 1);
      double* pairs[(1 + models()) * (2 + models()) / 2];
      int k = 0;
      for (int m = 0; m <= models(); ++m) {
        for (int other = m; other <= models(); ++other) {
          pairs[k++] = to(m == 0 ? 0 : first + m, other == 0 ? 0 : first + other);
        }
      }
      if (first != 0) pairs[0] = nullptr;  // the first group tells the base by itself
      add_within(matrices, pieces, pairs);
    };
    const auto across = [&](int first, int second, auto others) {
      if constexpr (others() != 0) {
        Matrix matrices[1 + kGroup + others()] = {in.base};
        std::copy_n(in.models + first, kGroup, matrices + 1);
        std::copy_n(in.models + second, others(), matrices + 1 + kGroup);
        double* pairs[kGroup * others()];
        int k = 0;
        for (int m = 1; m <= kGroup; ++m) {
          for (int other = 1; other <= others(); ++other) {
            pairs[k++] = to(first + m, second + other);
          }
        }
        add_across(matrices, pieces, pairs);
      }
    };
    int first = 0;
    do {
      with_models(in.count - first, [&](auto models) { within(first, models); });
      for (int second = first + kGroup; second < in.count; second += kGroup) {
        with_models(in.count - second, [&](auto others) { across(first, second, others); });
      }
    } while ((first += kGroup) < in.count);
  };
}

bool drops_nothing(const Inputs& in) {
  return in.drops == nullptr ||
         std::none_of(in.drops, in.drops + in.count, [](const Drop& d) { return drops_any(d); });
}

void run_grams(const Inputs& in, int64_t length, double* out, int64_t pair_stride,
               int64_t run_stride, int64_t begin, int64_t end) {
  const int64_t entries = in.window.rows * in.window.columns, pairs = gram_count(in.count);
  const auto place = [&](int64_t run, int64_t pair) {
    return out + pair * pair_stride + run * run_stride;
  };
  if (drops_nothing(in)) {
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
  if (drops_nothing(in)) return sum_columns(in.window, tile, sums, gram_adder(in));
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
