// Per-column moments of base and deltas in one read: WIDEN's disentanglement (section 3.3, eq.
// 1-2).
#include "sums.h"

namespace mergecore::cpu {

constexpr double kNoBase[kPieces * kBlock] = {};

struct Moments {
  double* dd;
  double* da;
  double* xx;
};

void add_model_pieces(const Matrix& matrix, const Pieces& pieces, const double* base,
                      Moments sums) {
  auto add = [&](auto as, auto count, const auto* model, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes dd, da, xx, x, a;
    load(sums.dd + i, dd);
    load(sums.da + i, da);
    load(sums.xx + i, xx);
    const double* start = base + i;
    for (int p = 0; p < count; ++p, model += kPart, start += kBlock) {
      load(model, x);
      load(start, a);
      const auto d = x - a;
      multiply_add(d, d, dd);
      multiply_add(d, a, da);
      multiply_add(x, x, xx);
    }
    store(dd, sums.dd + i);
    store(da, sums.da + i);
    store(xx, sums.xx + i);
  };
  each_lanes(matrix, pieces, add);
}

// Adds the squares and leaves the pieces in `base`.
void add_base_pieces(const Matrix& matrix, const Pieces& pieces, double* base, double* sums) {
  auto add = [&](auto as, auto count, const auto* numbers, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes aa, a;
    load(sums + i, aa);
    double* to = base + i;
    for (int p = 0; p < count; ++p, numbers += kPart, to += kBlock) {
      load(numbers, a);
      store(a, to);
      multiply_add(a, a, aa);
    }
    store(aa, sums + i);
  };
  each_lanes(matrix, pieces, add);
}

// One piece whose deltas were already dropped and rescaled.
MERGECORE_CLONES
void add_delta_piece(const double* delta, const double* base, int n, Moments sums) {
  for (int i = 0; i < n; ++i) {
    double d = delta[i], x = base[i] + d;
    sums.dd[i] = fma(d, d, sums.dd[i]);
    sums.da[i] = fma(d, base[i], sums.da[i]);
    sums.xx[i] = fma(x, x, sums.xx[i]);
  }
}

void add_dropped_pieces(const Drop& drop, const Matrix& matrix, const Window& w,
                        const Pieces& pieces, const double* base, const Moments& sums) {
  alignas(64) double keep[kBlock];
  alignas(64) double delta[kBlock];
  for (int p = 0; p < pieces.count; ++p) {
    const int64_t entry = pieces.entry + p * pieces.stride;
    const int64_t index = w.first_entry + w.first_row * w.columns + entry;
    prefetch(at(matrix, pieces.next + p * pieces.stride), pieces.n * dtype_size(matrix.dtype));
    kept_delta_chunk(drop, at(matrix, entry), matrix.dtype, base + p * kBlock, index, pieces.n,
                     keep, delta);
    add_delta_piece(delta, base + p * kBlock, pieces.n, sums);
  }
}

// What sum_columns and sum_rows call.
auto moment_adder(const Inputs& in) {
  return [&in](const Pieces& pieces, double* to, int64_t to_stride) {
    alignas(64) double entries[kPieces * kBlock];
    const double* base = kNoBase;
    if (in.base.data != nullptr) {
      add_base_pieces(in.base, pieces, entries, to);
      base = entries;
    } else {
      for (int i = 0; i < pieces.n; ++i) to[i] += 0.0;  // zeros are added as well: -0.0 becomes 0.0
    }
    for (int m = 0; m < in.count; ++m) {
      double* first = to + (1 + 3 * m) * to_stride;
      const Moments sums{first, first + to_stride, first + 2 * to_stride};
      if (in.drops == nullptr || !drops_any(in.drops[m])) {
        add_model_pieces(in.models[m], pieces, base, sums);
      } else {
        add_dropped_pieces(in.drops[m], in.models[m], in.window, pieces, base, sums);
      }
    }
  };
}

void column_moments(const Inputs& in, double* sums, double* pending, int64_t begin, int64_t end) {
  sum_columns(in.window, moment_count(in.count), sums, pending, begin, end, moment_adder(in));
}

void row_moments(const Inputs& in, double* sums, int64_t total_rows, int64_t begin, int64_t end) {
  sum_rows(in.window, moment_count(in.count), sums, total_rows, begin, end, moment_adder(in));
}

}  // namespace mergecore::cpu
