// The gradient of a loss by the coefficients of a scaled sum  W = a + sum_n d_n diag(c_n)  (DAM,
// section 3.2; AdaMerging): per model and column the sum over rows of dL/dW times d_n, in one read.
#include "sums.h"

namespace mergecore::cpu {

// base == nullptr: the deltas are the entries themselves.
void add_model_gradient(const Matrix& matrix, const Pieces& pieces, const double* base,
                        const double* gradient, double* sums) {
  auto add = [&](auto as, auto count, const auto* model, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes sum, x, g;
    load(sums + i, sum);
    const double* outer = gradient + i;
    for (int p = 0; p < count; ++p, model += kPart, outer += kBlock) {
      load(model, x);
      load(outer, g);
      multiply_add(g, x, sum);
    }
    store(sum, sums + i);
  };
  auto add_delta = [&](auto as, auto count, const auto* model,
                       int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes sum, x, a, g;
    load(sums + i, sum);
    const double* outer = gradient + i;
    const double* start = base + i;
    for (int p = 0; p < count; ++p, model += kPart, outer += kBlock, start += kBlock) {
      load(model, x);
      load(start, a);
      load(outer, g);
      const auto d = x - a;
      multiply_add(g, d, sum);
    }
    store(sum, sums + i);
  };
  if (base == nullptr) return each_lanes(matrix, pieces, add);
  each_lanes(matrix, pieces, add_delta);
}

// out[p * kBlock + i] is entry i of piece p, exactly.
void load_pieces(const Matrix& matrix, const Pieces& pieces, double* out) {
  auto widen = [&](auto as, auto count, const auto* numbers, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes x;
    double* to = out + i;
    for (int p = 0; p < count; ++p, numbers += kPart, to += kBlock) {
      load(numbers, x);
      store(x, to);
    }
  };
  each_lanes(matrix, pieces, widen);
}

// What sum_columns and sum_rows call.
auto gradient_adder(const Inputs& in, const Matrix& gradient) {
  return [&in, &gradient](const Pieces& pieces, double* to, int64_t to_stride) {
    alignas(64) double entries[kPieces * kBlock];
    alignas(64) double outer[kPieces * kBlock];
    load_pieces(gradient, pieces, outer);
    const double* base = nullptr;
    if (in.base.data != nullptr) {
      load_pieces(in.base, pieces, entries);
      base = entries;
    }
    for (int m = 0; m < in.count; ++m) {
      add_model_gradient(in.models[m], pieces, base, outer, to + m * to_stride);
    }
  };
}

void column_gradient(const Inputs& in, const Matrix& gradient, double* sums, double* pending,
                     int64_t begin, int64_t end) {
  sum_columns(in.window, in.count, sums, pending, begin, end, gradient_adder(in, gradient));
}

void row_gradient(const Inputs& in, const Matrix& gradient, double* sums, int64_t total_rows,
                  int64_t begin, int64_t end) {
  sum_rows(in.window, in.count, sums, total_rows, begin, end, gradient_adder(in, gradient));
}

}  // namespace mergecore::cpu
