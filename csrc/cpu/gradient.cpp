// The gradient of a loss by the coefficients of a scaled sum  W = a + sum_n d_n diag(c_n)  (DAM,
// section 3.2; AdaMerging): per model and column the sum over rows of dL/dW times d_n, in one read.
#include <utility>

#include "sums.h"

namespace mergecore::cpu {

constexpr int kGradientBlock = 128;  // columns at once: gradient and base stay in the L1 cache

template <class T, int... P>
inline __attribute__((always_inline)) void add_gradient_pieces(const void* model, int64_t stride,
                                                               const double* base,
                                                               const double* gradient, int n,
                                                               double* sums,
                                                               std::integer_sequence<int, P...>) {
  const auto* bits = static_cast<const typename T::Bits*>(model);
  const typename T::Bits* piece[] = {bits + P * stride...};
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    double sum = sums[i];
    auto add = [&](double x, double a, double g)
                   __attribute__((always_inline)) { sum = fma(g, x - a, sum); };
    (add(T::load(piece[P][i]), base[P * kGradientBlock + i], gradient[P * kGradientBlock + i]),
     ...);
    sums[i] = sum;
  }
}

MERGECORE_CLONES
void add_model_gradient(const void* model, Dtype dtype, int64_t stride, int pieces,
                        const double* base, const double* gradient, int n, double* sums) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    if (pieces == kPieces) {
      return add_gradient_pieces<T>(model, stride, base, gradient, n, sums,
                                    std::make_integer_sequence<int, kPieces>());
    }
    for (int p = 0; p < pieces; ++p) {
      const auto* bits = static_cast<const typename T::Bits*>(model) + p * stride;
      add_gradient_pieces<T>(bits, stride, base + p * kGradientBlock, gradient + p * kGradientBlock,
                             n, sums, std::make_integer_sequence<int, 1>());
    }
  });
}

// What sum_columns and sum_rows call.
auto gradient_adder(const Inputs& in, const Matrix& gradient) {
  return [&in, &gradient](int64_t entry, int64_t stride, int pieces, int n, double* to,
                          int64_t to_stride) {
    alignas(64) double base[kPieces * kGradientBlock] = {};
    alignas(64) double outer[kPieces * kGradientBlock];
    auto load = [&](const Matrix& matrix, double* out) {
      for (int p = 0; p < pieces; ++p) {
        const int64_t here = entry + p * stride;
        prefetch(at(matrix, here + kPieces * stride), n * dtype_size(matrix.dtype));
        load_chunk(at(matrix, here), matrix.dtype, n, out + p * kGradientBlock);
      }
    };
    for (int m = 0; m < in.count; ++m) {
      const Matrix& model = in.models[m];
      for (int p = 0; p < pieces; ++p) {
        const int64_t ahead = entry + (p + kPieces) * stride;
        prefetch(at(model, ahead), n * dtype_size(model.dtype));
      }
    }
    load(gradient, outer);
    if (in.base.data != nullptr) load(in.base, base);
    for (int m = 0; m < in.count; ++m) {
      const Matrix& model = in.models[m];
      add_model_gradient(at(model, entry), model.dtype, stride, pieces, base, outer, n,
                         to + m * to_stride);
    }
  };
}

void column_gradient(const Inputs& in, const Matrix& gradient, double* sums, double* pending,
                     int64_t begin, int64_t end) {
  sum_columns(in.window, in.count, kGradientBlock, sums, pending, begin, end,
              gradient_adder(in, gradient));
}

void row_gradient(const Inputs& in, const Matrix& gradient, double* sums, int64_t total_rows,
                  int64_t begin, int64_t end) {
  sum_rows(in.window, in.count, sums, total_rows, begin, end, gradient_adder(in, gradient));
}

}  // namespace mergecore::cpu
