// out = cast( base_coefficient * base + sum_n c_n * d_n ), one pass, float64, one rounding.
#include <algorithm>

#include "chunk.h"
#include "quick.h"

namespace mergecore::cpu {

// sum[i] += c * (model[i] - base[i]), c per entry or the same for all.
MERGECORE_CLONES
void add_delta_chunk(const void* model, Dtype dtype, const double* base, const double* coefficient,
                     bool per_entry, int n, double* sum) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    const auto* bits = static_cast<const typename T::Bits*>(model);
    if (per_entry) {
      for (int i = 0; i < n; ++i) sum[i] = fma(coefficient[i], T::load(bits[i]) - base[i], sum[i]);
    } else {
      const double c = *coefficient;
      for (int i = 0; i < n; ++i) sum[i] = fma(c, T::load(bits[i]) - base[i], sum[i]);
    }
  });
}

MERGECORE_CLONES
void add_scaled_chunk(const double* delta, const double* coefficient, bool per_entry, int n,
                      double* sum) {
  if (per_entry) {
    for (int i = 0; i < n; ++i) sum[i] = fma(coefficient[i], delta[i], sum[i]);
  } else {
    const double c = *coefficient;
    for (int i = 0; i < n; ++i) sum[i] = fma(c, delta[i], sum[i]);
  }
}

constexpr int64_t kAhead = 2 * kChunk;  // entries between use and prefetch

void blend_chunk(const Blend& b, int64_t entry, int64_t row, int64_t column, int n,
                 int64_t& nonfinite, int64_t& overflow) {
  const Inputs& in = b.inputs;
  const Window& w = in.window;
  const bool has_base = in.base.data != nullptr;
  alignas(64) double base[kChunk] = {};
  alignas(64) double sum[kChunk];
  alignas(64) double keep[kChunk];
  alignas(64) double delta[kChunk];
  if (has_base) {
    prefetch(at(in.base, entry + kAhead), n * dtype_size(in.base.dtype));
    load_chunk(at(in.base, entry), in.base.dtype, n, base);
  }
  std::fill_n(sum, n, -0.0);  // the neutral element: adding -0.0 keeps +0.0 and -0.0
  for (int m = 0; m < in.count; ++m) {
    const double* c = b.coefficients + m * b.stride;
    if (b.axis == Axis::columns) c += column;
    if (b.axis == Axis::rows) c += w.first_row + row;
    const bool per_entry = b.axis == Axis::columns;
    const void* model = at(in.models[m], entry);
    const Dtype dtype = in.models[m].dtype;
    prefetch(at(in.models[m], entry + kAhead), n * dtype_size(dtype));
    if (in.drops != nullptr && drops_any(in.drops[m])) {
      const int64_t index = w.first_entry + w.first_row * w.columns + entry;
      kept_delta_chunk(in.drops[m], model, dtype, base, index, n, keep, delta);
      add_scaled_chunk(delta, c, per_entry, n, sum);
    } else {
      add_delta_chunk(model, dtype, base, c, per_entry, n, sum);
    }
  }
  void* out = static_cast<char*>(b.out) + entry * dtype_size(b.out_dtype);
  store_chunk(has_base ? base : nullptr, b.base_coefficient, sum, n, b.out_dtype, out, nonfinite,
              overflow);
}

void blend(const Blend& b, int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow) {
  const Inputs& in = b.inputs;
  const Window& w = in.window;
  QuickBlend quick(b);
  int rest = quick.applies() ? 0 : -1;  // chunks until the next try; never
  for (int64_t entry = begin; entry < end;) {
    const int64_t row = entry / w.columns, column = entry % w.columns;
    int64_t run = std::min<int64_t>(end - entry, kChunk);
    if (b.axis != Axis::tensor) run = std::min(run, w.columns - column);
    if (b.axis == Axis::columns && column % kQuick != 0)
      run = std::min(run, kQuick - column % kQuick);
    const int n = static_cast<int>(run);
    int done = 0;
    if (rest == 0) {
      done = n / kQuick * kQuick;
      if (done > 0 && !quick.store(entry, row, column, done)) {
        done = 0;
        rest = kPatience;
      }
    } else if (rest > 0) {
      --rest;
    }
    if (done < n) {
      blend_chunk(b, entry + done, row, column + done, n - done, nonfinite, overflow);
    }
    entry += n;
  }
  quick.finish();
}

}  // namespace mergecore::cpu
