// Flags as bits: to visit the few that are set.
#pragma once

#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace mergecore::cpu {

constexpr int kPlaces = 64;  // entries side by side

// Bit i is set where flags[i] is not 0, of kPlaces flags that lie at a multiple of 16 bytes. Bytes
// have all bits set, or none.
#ifdef __SSE2__
inline uint64_t bits_of(const uint8_t* flags) {
  uint64_t bits = 0;
  for (int i = 0; i < kPlaces; i += 16) {
    const __m128i some = _mm_load_si128(reinterpret_cast<const __m128i*>(flags + i));
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(some))) << i;
  }
  return bits;
}

inline uint64_t bits_of(const uint16_t* flags) {
  const __m128i zero = _mm_setzero_si128();
  uint64_t clear = 0;
  for (int i = 0; i < kPlaces; i += 16) {
    const auto* some = reinterpret_cast<const __m128i*>(flags + i);
    const __m128i one = _mm_cmpeq_epi16(_mm_load_si128(some), zero);
    const __m128i two = _mm_cmpeq_epi16(_mm_load_si128(some + 1), zero);
    const int both = _mm_movemask_epi8(_mm_packs_epi16(one, two));
    clear |= static_cast<uint64_t>(static_cast<uint32_t>(both)) << i;
  }
  return ~clear;
}
#else
template <class Flag>
uint64_t bits_of(const Flag* flags) {
  uint64_t bits = 0;
  for (int i = 0; i < kPlaces; ++i) bits |= static_cast<uint64_t>(flags[i] != 0) << i;
  return bits;
}
#endif

}  // namespace mergecore::cpu
