// out = cast( base_coefficient * base + sum_n c_n * d_n ), one pass, float64, one rounding.
#include "blend.cuh"
#include "rounding.cuh"

namespace mergecore::cuda {

namespace {

// sum[j] += c * delta of model m's entries, whose first lies at `column` of `row`.
template <class T, bool kVector, bool kDrops>
__device__ __forceinline__ void add_model(const DeviceBlend& b, int m, const Entries<T>& model,
                                          const double (&base)[kEntries], int64_t row,
                                          int64_t column, int n, double (&sum)[kEntries]) {
  const Window& w = b.in.window;
  const Dtype dtype = b.in.models[m].dtype;
  double delta[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) delta[j] = value(model, dtype, j) - base[j];
  if constexpr (kDrops) {
    drop_deltas(b.in.drops[m], index_of(b, row, column), delta);
  }
  const double* coefficients = b.coefficients + m * b.stride;
  if (b.axis != Axis::columns) {
    const double c = coefficients[b.axis == Axis::rows ? w.first_row + row : 0];
#pragma unroll
    for (int j = 0; j < kEntries; ++j) sum[j] = fma(c, delta[j], sum[j]);
    return;
  }
  coefficients += column;
#pragma unroll
  for (int j = 0; j < kEntries; j += 2) {
    double2 c = make_double2(0.0, 0.0);
    if (kVector) {
      c = reinterpret_cast<const double2*>(coefficients)[j / 2];
    } else {
      if (j < n) c.x = coefficients[j];
      if (j + 1 < n) c.y = coefficients[j + 1];
    }
    sum[j] = fma(c.x, delta[j], sum[j]);
    sum[j + 1] = fma(c.y, delta[j + 1], sum[j + 1]);
  }
}

// Rounds the first n values to Out and stores them. What is rare is done apart, for all of them.
template <class Out, bool kVector>
__device__ __forceinline__ void store(const double (&values)[kEntries], int n, void* out,
                                      int64_t entry, unsigned& nonfinite, unsigned& overflow) {
  using Bits = typename Out::Bits;
  constexpr int kSize = sizeof(Bits);
  Bits bits[kEntries];
  bool quick = true;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) quick = quick_bits<Out>(values[j], bits[j]) && quick;
  if (!quick) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      const double result = round_to<Out>(values[j]);
      bits[j] = Out::store(static_cast<typename Out::Number>(result));
      if (j >= n) continue;
      if (!(fabs(values[j]) < HUGE_VAL)) {
        ++nonfinite;
      } else if (fabs(result) > Out::largest) {
        ++overflow;
      }
    }
  }
  Bits* to = static_cast<Bits*>(out) + entry;
  if constexpr (kVector) {
    uint32_t words[kEntries * kSize / 4] = {};
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      if constexpr (kSize == 8) {
        words[2 * j] = static_cast<uint32_t>(bits[j]);
        words[2 * j + 1] = static_cast<uint32_t>(bits[j] >> 32);
      } else {
        words[j * kSize / 4] |=
            kSize == 4 ? bits[j] : static_cast<uint32_t>(bits[j]) << (16 * (j % 2));
      }
    }
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      reinterpret_cast<uint4*>(to)[i] =
          make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      if (j < n) to[j] = bits[j];
    }
  }
}

template <class T, class Out, bool kVector, bool kDrops>
__device__ __forceinline__ void blend_entries(const DeviceBlend& b, int64_t row, int64_t column,
                                              int n, unsigned& nonfinite, unsigned& overflow) {
  const DeviceInputs& in = b.in;
  const int64_t entry = row * b.columns + column;
  const Entries<T> base_bits = load_base<T, kVector>(in, entry, n);
  constexpr int kCount = kTogether<T, kDrops>;
  Entries<T> models[kCount];
  load_models<T, kVector>(in, 0, entry, n, models);
  double base[kEntries], sum[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    base[j] = value(base_bits, in.base.dtype, j);
    sum[j] = -0.0;  // the neutral element: adding -0.0 keeps +0.0 and -0.0
  }
  for (int first = 0;;) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i >= in.count) continue;
      add_model<T, kVector, kDrops>(b, first + i, models[i], base, row, column, n, sum);
    }
    first += kCount;
    if (first >= in.count) break;
    load_models<T, kVector>(in, first, entry, n, models);
  }
  if (in.base.data != nullptr) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) sum[j] = with_base(b.base_coefficient, base[j], sum[j]);
  }
  store<Out, kVector>(sum, n, b.out, entry, nonfinite, overflow);
}

// Blocks that share a multiprocessor: as many as leave every value a register. The more there are,
// the more loads are in flight.
template <class T, bool kVector>
constexpr int kBlocks = kVector && Entries<T>::size == 2 ? 5 : 4;

template <class T, class Out, bool kVector, bool kDrops>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, kVector>))
    blend_window(const __grid_constant__ DeviceBlend b, int64_t* counts) {
  unsigned nonfinite = 0, overflow = 0;
  for_runs<kVector>(b, [&](int64_t row, int64_t column, int n) {
    blend_entries<T, Out, kVector, kDrops>(b, row, column, n, nonfinite, overflow);
  });
  add_count(nonfinite, counts);
  add_count(overflow, counts + 1);
}

template <class T, class Out>
int launch_blend(const DeviceBlend& b, int64_t* counts, Stream stream) {
  auto* plain =
      b.vectors ? &blend_window<T, Out, true, false> : &blend_window<T, Out, false, false>;
  auto* drops = b.vectors ? &blend_window<T, Out, true, true> : &blend_window<T, Out, false, true>;
  return launch(drops_any(b.in) ? drops : plain, b.blocks, kThreads, stream, b, counts);
}

}  // namespace

int64_t blend_scratch(const Blend& blend) {
  const Window& w = blend.inputs.window;
  return w.rows == 0 || w.columns == 0 ? 0 : quick_scratch(DeviceBlend(blend));
}

int blend(const Blend& blend, int64_t* counts, void* scratch, Stream stream) {
  const Window& w = blend.inputs.window;
  if (w.rows == 0 || w.columns == 0) return cudaSuccess;
  const DeviceBlend b(blend);
  if (quick_scratch(b) > 0) return quick_blend(b, scratch, counts, stream);
  return with_storage(blend.inputs, [&](auto type) {
    using T = decltype(type);
    switch (blend.out_dtype) {
      case Dtype::f32:
        return launch_blend<T, F32>(b, counts, stream);
      case Dtype::f16:
        return launch_blend<T, F16>(b, counts, stream);
      case Dtype::f64:
        return launch_blend<T, F64>(b, counts, stream);
      default:
        return launch_blend<T, BF16>(b, counts, stream);
    }
  });
}

}  // namespace mergecore::cuda
