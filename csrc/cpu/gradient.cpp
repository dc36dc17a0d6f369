// The gradient of a loss by the coefficients of a scaled sum  W = a + sum_n d_n diag(c_n)  (DAM,
// section 3.2; AdaMerging): per model and column the sum over rows of dL/dW times d_n, in one read.
#include "sums.h"

namespace mergecore::cpu {

// Matrices are gradient, base and models; sums[m] are those of model m.
template <int kMatrices>
void add_products(const Matrix (&matrices)[kMatrices], const Pieces& pieces, double* const* sums) {
  constexpr int kModels = kMatrices - 2;
  auto add = [&](auto as, int n, auto next, auto sheet, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes sum[kModels], g, a, x;
#pragma GCC unroll 2
    for (int m = 0; m < kModels; ++m) load(sums[m] + i, sum[m]);
    for (int p = 0; p < n; ++p) {
      next(p);
      load(sheet(0, p), g);
      load(sheet(1, p), a);
#pragma GCC unroll 2
      for (int m = 0; m < kModels; ++m) {
        load(sheet(2 + m, p), x);
        const auto d = x - a;
        multiply_add(g, d, sum[m]);
      }
    }
#pragma GCC unroll 2
    for (int m = 0; m < kModels; ++m) store(sum[m], sums[m] + i);
  };
  each_lanes(matrices, pieces, add);
}

// What sum_columns and sum_rows call.
auto gradient_adder(const Inputs& in, const Matrix& gradient) {
  return [&in, &gradient](const Pieces& pieces, double* to, int64_t to_stride) {
    double* sums[kMaxModels];
    for (int m = 0; m < in.count; ++m) sums[m] = to + m * to_stride;
    int m = 0;
    for (; m + 1 < in.count; m += 2) {
      add_products({gradient, in.base, in.models[m], in.models[m + 1]}, pieces, sums + m);
    }
    if (m < in.count) add_products({gradient, in.base, in.models[m]}, pieces, sums + m);
  };
}

void column_gradient(const Inputs& in, const Matrix& gradient, const Tile& tile, double* sums) {
  sum_columns(in.window, tile, sums, gradient_adder(in, gradient));
}

void row_gradient(const Inputs& in, const Matrix& gradient, double* sums, int64_t total_rows,
                  int64_t begin, int64_t end) {
  sum_rows(in.window, in.count, sums, total_rows, begin, end, gradient_adder(in, gradient));
}

}  // namespace mergecore::cpu
