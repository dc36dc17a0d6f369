// What the blends in float64 (blend.cu) and in float32 (quick_blend.cu) share: how threads walk
// over a window, and counts.
#pragma once

#include "window.cuh"

namespace mergecore::cuda {

constexpr int kThreads = 128;
constexpr int kRows =
    8;  // rows of a thread at most: its columns' coefficients stay in the L1 cache

struct DeviceBlend {
  DeviceInputs in;
  Axis axis;
  const double* coefficients;
  int64_t stride;
  double base_coefficient;
  void* out;
  Dtype out_dtype;
  bool vectors;  // every access can be 16 bytes wide
  // The entries as the grid walks them: rows of the window, or any, where one coefficient goes for
  // all (Axis::tensor); the last one may be shorter.
  int64_t entries;
  int64_t columns;
  int64_t blocks;
  unsigned strips;  // blocks beside each other
  unsigned across;  // threads of a block beside each other; the others take further rows

  explicit DeviceBlend(const Blend& blend)
      : in(by_value(blend.inputs)),
        axis(blend.axis),
        coefficients(blend.coefficients),
        stride(blend.stride),
        base_coefficient(blend.base_coefficient),
        out(blend.out),
        out_dtype(blend.out_dtype) {
    const Window& w = in.window;
    const bool flat = axis == Axis::tensor;
    constexpr int64_t kBlock = kThreads * kEntries;
    entries = w.rows * w.columns;
    columns = flat ? divide_up(entries, kRows * kBlock) * kBlock : w.columns;
    const int64_t rows = divide_up(entries, columns), threads = divide_up(columns, kEntries);
    for (across = 1; across < kThreads && across < threads;) across *= 2;
    strips = static_cast<unsigned>(divide_up(threads, across));
    blocks = strips * divide_up(rows, kRows * (kThreads / across));
    vectors = in.aligned && aligned(out) && (flat ? entries : w.columns) % kEntries == 0 &&
              (axis != Axis::columns || (aligned(coefficients) && stride % 2 == 0));
  }
};

// Calls f(row, column, n) for every run of a thread: n entries of `row` from `column` on.
template <bool kVector, class F>
__device__ __forceinline__ void for_runs(const DeviceBlend& b, const F& f) {
  const int64_t strip = blockIdx.x % b.strips;
  const int64_t column = (strip * b.across + threadIdx.x % b.across) * kEntries;
  const unsigned down = kThreads / b.across;
  const int64_t left = b.columns - column;
  int64_t row =
      static_cast<int64_t>(blockIdx.x / b.strips) * (kRows * down) + threadIdx.x / b.across;
  for (int i = 0; i < kRows; ++i, row += down) {
    const int64_t last = b.entries - row * b.columns - column;
    const int64_t run = left < last ? left : last;
    if (run <= 0) break;
    f(row, column, run_of<kVector>(run));
  }
}

// Models whose loads are in flight together. Random numbers keep the arithmetic busy, and would
// come several times over in the code.
template <class T, bool kDrops>
constexpr int kTogether = kDrops ? 1 : kInFlight<T>;

template <class T, bool kVector, int kCount>
__device__ __forceinline__ void load_models(const DeviceInputs& in, int first, int64_t entry, int n,
                                            Entries<T> (&models)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i < in.count) models[i] = load<T, kVector>(in.models[first + i], entry, n);
  }
}

// The tensor's index of an entry that the grid walks over.
__device__ __forceinline__ int64_t index_of(const DeviceBlend& b, int64_t row, int64_t column) {
  const Window& w = b.in.window;
  return w.first_entry + w.first_row * w.columns + row * b.columns + column;
}

// base_coefficient * base + sum. A zero sum leaves the base bit for bit, the sign of its zeros
// included.
template <class Number>
__device__ __forceinline__ Number with_base(Number base_coefficient, Number base, Number sum) {
  const Number product = base_coefficient * base;
  return sum == Number{0} ? product : product + sum;
}

__device__ __forceinline__ void add_count(unsigned count, int64_t* total) {
  count = __reduce_add_sync(kAllLanes, count);
  if (count != 0 && threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(count));
  }
}

// The blend by float32 where that is enough (see quick_bounds.h), with device memory of
// quick_scratch() bytes; 0 where float32 is not tried.
int64_t quick_scratch(const DeviceBlend& b);
int quick_blend(const DeviceBlend& b, void* scratch, int64_t* counts, Stream stream);

}  // namespace mergecore::cuda
