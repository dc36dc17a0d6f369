// Bytes that are all ones or zero, as bits: to visit the few that are set.
#pragma once

#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace mergecore::cpu {

constexpr int kPlaces = 64;  // entries side by side

// Bit i is set where flags[i] is, of kPlaces flags that lie at a multiple of 16 bytes.
#ifdef __SSE2__
inline uint64_t bits_of(const uint8_t* flags) {
  uint64_t bits = 0;
  for (int i = 0; i < kPlaces; i += 16) {
    const __m128i some = _mm_load_si128(reinterpret_cast<const __m128i*>(flags + i));
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(some))) << i;
  }
  return bits;
}
#else
inline uint64_t bits_of(const uint8_t* flags) {
  uint64_t bits = 0;
  for (int i = 0; i < kPlaces; ++i) bits |= static_cast<uint64_t>(flags[i] != 0) << i;
  return bits;
}
#endif

}  // namespace mergecore::cpu
