#include "chunk.h"

namespace mergecore::cpu {

MERGECORE_CLONES
void load_chunk(const void* source, Dtype dtype, int n, double* out) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    const auto* bits = static_cast<const typename T::Bits*>(source);
    for (int i = 0; i < n; ++i) out[i] = T::load(bits[i]);
  });
}

// The first three halvings in one expression: of one register's worth of lanes at a time.
MERGECORE_CLONES
double sum_lanes(const double* lanes) {
  static_assert(kLanes == 64);
  double sums[8];
  for (int i = 0; i < 8; ++i) {
    const double* lane = lanes + i;
    sums[i] = ((lane[0] + lane[32]) + (lane[16] + lane[48])) +
              ((lane[8] + lane[40]) + (lane[24] + lane[56]));
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

MERGECORE_CLONES
void keep_chunk(const Drop& drop, uint64_t first, int n, double* keep) {
  const double scale = drop.scale;
  if (drop.threshold == 0) {
    for (int i = 0; i < n; ++i) keep[i] = scale;
    return;
  }
  alignas(64) uint32_t numbers[kChunk];
  numbers_chunk(drop.key, first, n, numbers);
  const auto last_dropped = static_cast<uint32_t>(drop.threshold - 1);
  for (int i = 0; i < n; ++i) keep[i] = numbers[i] > last_dropped ? scale : 0.0;
}

MERGECORE_CLONES
void select_chunk(const Drop& drop, const void* model, Dtype dtype, const double* base,
                  int64_t first, int n, double* keep) {
  const Drop limits = drop;
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    const auto* bits = static_cast<const typename T::Bits*>(model);
    for (int i = 0; i < n; ++i) {
      const double magnitude = fabs(T::load(bits[i]) - base[i]);
      keep[i] = selected(limits, magnitude, first + i) ? keep[i] : 0.0;
    }
  });
}

MERGECORE_CLONES
void dropped_delta_chunk(const void* model, Dtype dtype, const double* base, const double* keep,
                         int n, double* delta) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    const auto* bits = static_cast<const typename T::Bits*>(model);
    for (int i = 0; i < n; ++i) delta[i] = keep[i] * (T::load(bits[i]) - base[i]);
  });
}

// base_coefficient * base + sum; a zero sum leaves the base bit for bit, the sign of its zeros
// included.
inline __attribute__((always_inline)) double add_base(double product, double sum) {
  return sum == 0.0 ? product : product + sum;
}

// sum[i] becomes the blend's value, out[i] that value rounded. False if a value is not finite or
// beyond the largest number of `dtype`: then out is not to be used.
MERGECORE_CLONES
bool store_finite_chunk(const double* base, double base_coefficient, double* sum, int n,
                        Dtype dtype, void* out) {
  bool finite = true;
  with_result(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    typename T::Number rounded[kChunk];
    uint64_t largest = 0;
    if (base != nullptr) {
      for (int i = 0; i < n; ++i) sum[i] = add_base(base_coefficient * base[i], sum[i]);
    }
    for (int i = 0; i < n; ++i) {
      double result = round_finite<T>(sum[i]);
      uint64_t magnitude = bit_cast<uint64_t>(result) & 0x7fffffffffffffffull;
      largest = magnitude > largest ? magnitude : largest;
      rounded[i] = static_cast<typename T::Number>(result);
    }
    auto* bits = static_cast<typename T::Bits*>(out);
    for (int i = 0; i < n; ++i) bits[i] = T::store_finite(rounded[i]);
    finite = largest <= bit_cast<uint64_t>(T::largest);
  });
  return finite;
}

// The rare chunk with values that are not finite or overflow: stored one by one and counted.
void store_any_chunk(const double* values, int n, Dtype dtype, void* out, int64_t& nonfinite,
                     int64_t& overflow) {
  with_result(dtype, [&](auto type) {
    using T = decltype(type);
    auto* bits = static_cast<typename T::Bits*>(out);
    for (int i = 0; i < n; ++i) {
      double result = round_to<T>(values[i]);
      bits[i] = T::store(static_cast<typename T::Number>(result));
      if (!(fabs(values[i]) < HUGE_VAL)) {
        ++nonfinite;
      } else if (fabs(result) > T::largest) {
        ++overflow;
      }
    }
  });
}

void store_chunk(const double* base, double base_coefficient, double* sum, int n, Dtype dtype,
                 void* out, int64_t& nonfinite, int64_t& overflow) {
  if (store_finite_chunk(base, base_coefficient, sum, n, dtype, out)) return;
  store_any_chunk(sum, n, dtype, out, nonfinite, overflow);
}

}  // namespace mergecore::cpu
