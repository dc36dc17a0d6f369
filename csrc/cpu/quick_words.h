// What the loops of the float32 blend and election share.
//
// Two neighbouring bf16 numbers as the halves of a word, the first being the lower one (every
// machine that this runs on is little-endian): widening to float32 and packing takes no shuffles.
// Not for other dtypes.
#pragma once

#include "chunk.h"

namespace mergecore::cpu {

constexpr int kQuick = 64;     // entries of a block; runs are whole blocks
constexpr int kPatience = 15;  // runs that are not tried after one that failed

using Word [[gnu::may_alias, gnu::aligned(2)]] = uint32_t;

inline __attribute__((always_inline)) float lower(uint32_t word) {
  return bit_cast<float>(word << 16);
}

inline __attribute__((always_inline)) float upper(uint32_t word) {
  return bit_cast<float>(word & 0xffff0000u);
}

inline __attribute__((always_inline)) uint32_t packed(uint32_t lower, uint32_t upper) {
  return (upper & 0xffff0000u) | lower >> 16;
}

// To nearest even in the upper half.
inline __attribute__((always_inline)) uint32_t rounded(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return bits + ((bits & 0x10000u) != 0 ? 0x8000u : 0x7fffu);
}

constexpr uint16_t kLeastNormal = 0x80;

inline __attribute__((always_inline)) uint16_t size_of(uint16_t number) { return number & 0x7fffu; }

// Beside it zeros do not count: less than nothing is the greatest number.
inline __attribute__((always_inline)) uint16_t less_one(uint16_t number) {
  return static_cast<uint16_t>(size_of(number) - 1);
}

inline __attribute__((always_inline)) void take_largest(const uint16_t* block, uint16_t* largest) {
  for (int i = 0; i < kQuick; ++i) {
    const uint16_t size = size_of(block[i]);
    largest[i] = size > largest[i] ? size : largest[i];
  }
}

inline __attribute__((always_inline)) void take_smallest(const uint16_t* block,
                                                         uint16_t* smallest) {
  for (int i = 0; i < kQuick; ++i) {
    const uint16_t less = less_one(block[i]);
    smallest[i] = less < smallest[i] ? less : smallest[i];
  }
}

// The largest number with which a quotient of that size may be a tie also in float64.
inline __attribute__((always_inline)) uint16_t most_of_ties(uint16_t size, uint16_t tie) {
  return static_cast<uint16_t>(size < kLeastNormal ? 0 : size + tie);
}

// Asks for the block at `from`, to read it (0) or to write it (1). Few lines at a time, among
// arithmetic: many at once wait for each other, and everything else for them.
template <int kWrite>
inline __attribute__((always_inline)) void fetch(const uint16_t* from) {
  for (int i = 0; i < kQuick; i += 32) __builtin_prefetch(from + i, kWrite, 3);
}

// Asks for it no nearer than the L2 cache. For more streams than an L1 cache has ways: tensors like
// to lie at the same place of their pages, where they share a set.
inline __attribute__((always_inline)) void fetch_near(const uint16_t* from) {
  for (int i = 0; i < kQuick; i += 32) __builtin_prefetch(from + i, 0, 2);
}

}  // namespace mergecore::cpu
