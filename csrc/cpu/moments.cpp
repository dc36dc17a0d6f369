// Per-column moments of base and deltas in one read: WIDEN's disentanglement (section 3.3, eq.
// 1-2).
#include <utility>

#include "sums.h"

namespace mergecore::cpu {

constexpr int64_t kBlock = 128;  // entries of a piece at most

struct Moments {
  double* dd;
  double* dg;  // d.(x + a)
  double* xx;
};

template <class T, int... P>
inline __attribute__((always_inline)) void add_pieces(const void* model, int64_t stride,
                                                      const double* base, int n,
                                                      const Moments& sums,
                                                      std::integer_sequence<int, P...>) {
  const auto* bits = static_cast<const typename T::Bits*>(model);
  const typename T::Bits* piece[] = {bits + P * stride...};
  double* dd = sums.dd;
  double* dg = sums.dg;
  double* xx = sums.xx;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    double sum_dd = dd[i], sum_dg = dg[i], sum_xx = xx[i];
    auto add = [&](double x, double a) __attribute__((always_inline)) {
      double d = x - a;
      sum_dd = fma(d, d, sum_dd);
      sum_dg = fma(d, x + a, sum_dg);
      sum_xx = fma(x, x, sum_xx);
    };
    (add(T::load(piece[P][i]), base[P * kBlock + i]), ...);
    dd[i] = sum_dd;
    dg[i] = sum_dg;
    xx[i] = sum_xx;
  }
}

MERGECORE_CLONES
void add_model_pieces(const void* model, Dtype dtype, int64_t stride, int pieces,
                      const double* base, int n, Moments sums) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    if (pieces == kPieces) {
      return add_pieces<T>(model, stride, base, n, sums,
                           std::make_integer_sequence<int, kPieces>());
    }
    for (int p = 0; p < pieces; ++p) {
      const auto* bits = static_cast<const typename T::Bits*>(model) + p * stride;
      add_pieces<T>(bits, stride, base + p * kBlock, n, sums, std::make_integer_sequence<int, 1>());
    }
  });
}

// One piece whose deltas were already dropped and rescaled.
MERGECORE_CLONES
void add_delta_piece(const double* delta, const double* base, int n, Moments sums) {
  for (int i = 0; i < n; ++i) {
    double d = delta[i], x = base[i] + d;
    sums.dd[i] = fma(d, d, sums.dd[i]);
    sums.dg[i] = fma(d, x + base[i], sums.dg[i]);
    sums.xx[i] = fma(x, x, sums.xx[i]);
  }
}

MERGECORE_CLONES
void add_squares(const double* base, int pieces, int n, double* aa) {
  for (int p = 0; p < pieces; ++p) {
    for (int i = 0; i < n; ++i) aa[i] = fma(base[p * kBlock + i], base[p * kBlock + i], aa[i]);
  }
}

// Adds `pieces` (at most kPieces) pieces of n (at most kBlock) entries, `stride` entries apart.
void add_window_pieces(const Inputs& in, int64_t entry, int64_t stride, int pieces, int n,
                       double* sums, int64_t sum_stride) {
  alignas(64) double base[kPieces * kBlock] = {};
  alignas(64) double keep[kBlock];
  alignas(64) double delta[kBlock];
  const Window& w = in.window;
  for (int p = 0; p < pieces; ++p) {
    const int64_t ahead = entry + (p + kPieces) * stride;
    if (in.base.data != nullptr) prefetch(at(in.base, ahead), n * dtype_size(in.base.dtype));
    for (int m = 0; m < in.count; ++m) {
      prefetch(at(in.models[m], ahead), n * dtype_size(in.models[m].dtype));
    }
  }
  if (in.base.data != nullptr) {
    for (int p = 0; p < pieces; ++p) {
      load_chunk(at(in.base, entry + p * stride), in.base.dtype, n, base + p * kBlock);
    }
  }
  add_squares(base, pieces, n, sums);
  for (int m = 0; m < in.count; ++m) {
    double* first = sums + (1 + 3 * m) * sum_stride;
    const Moments model{first, first + sum_stride, first + 2 * sum_stride};
    const Matrix& matrix = in.models[m];
    if (in.drops == nullptr || !drops_any(in.drops[m])) {
      add_model_pieces(at(matrix, entry), matrix.dtype, stride, pieces, base, n, model);
      continue;
    }
    for (int p = 0; p < pieces; ++p) {
      const int64_t here = entry + p * stride;
      const int64_t index = w.first_entry + w.first_row * w.columns + here;
      kept_delta_chunk(in.drops[m], at(matrix, here), matrix.dtype, base + p * kBlock, index, n,
                       keep, delta);
      add_delta_piece(delta, base + p * kBlock, n, model);
    }
  }
}

void column_moments(const Inputs& in, double* sums, double* pending, int64_t begin, int64_t end) {
  sum_columns(in.window, moment_count(in.count), kBlock, sums, pending, begin, end,
              [&in](auto... pieces) { add_window_pieces(in, pieces...); });
}

void row_moments(const Inputs& in, double* sums, int64_t total_rows, int64_t begin, int64_t end) {
  sum_rows(in.window, moment_count(in.count), sums, total_rows, begin, end,
           [&in](auto... pieces) { add_window_pieces(in, pieces...); });
}

}  // namespace mergecore::cpu
