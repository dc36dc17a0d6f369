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

// numbers[0] is the first of the Philox block that holds entry `first`.
inline __attribute__((always_inline)) int blocks_of_numbers(uint64_t key, uint64_t first, int n,
                                                            uint32_t* numbers) {
  const int lead = static_cast<int>(first & 3);
  const uint64_t counter = first >> 2;
  const int blocks = (lead + n + 3) / 4;
  for (int i = 0; i < blocks; ++i) {
    uint32_t out[4];
    philox(key, counter + static_cast<uint64_t>(i), out);
    numbers[4 * i] = out[0];
    numbers[4 * i + 1] = out[1];
    numbers[4 * i + 2] = out[2];
    numbers[4 * i + 3] = out[3];
  }
  return lead;
}

MERGECORE_CLONES
void numbers_chunk(uint64_t key, uint64_t first, int n, uint32_t* out) {
  uint32_t numbers[kChunk + 8];
  const int lead = blocks_of_numbers(key, first, n, numbers);
  for (int i = 0; i < n; ++i) out[i] = numbers[lead + i];
}

MERGECORE_CLONES
void keep_chunk(const Drop& drop, uint64_t first, int n, double* keep) {
  const double scale = drop.scale;
  const uint64_t threshold = drop.threshold;
  if (threshold == 0) {
    for (int i = 0; i < n; ++i) keep[i] = scale;
    return;
  }
  uint32_t numbers[kChunk + 8];
  const int lead = blocks_of_numbers(drop.key, first, n, numbers);
  for (int i = 0; i < n; ++i) keep[i] = numbers[lead + i] >= threshold ? scale : 0.0;
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

}  // namespace mergecore::cpu
