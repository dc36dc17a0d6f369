// Keys of the differences of bf16 numbers as float32 bits, half as wide as those of float64. Not
// for what is counted and collected by them (magnitudes.cpp).
#pragma once

#include <algorithm>

#include "chunk.h"
#include "flags.h"

namespace mergecore::cpu {

// A key of float32 bits k > 0 has the float64 bits (k << kNarrow) + kRebias.
constexpr int kNarrow = 29;
constexpr int64_t kRebias = int64_t{1023 - 127} << 52;
constexpr uint32_t kLeastKey = 0x00800000;     // of normal numbers
constexpr uint32_t kInfiniteKey = 0x7f800000;  // and below it all keys are

inline int64_t widened(uint32_t key) {
  return key == 0 ? 0 : (static_cast<int64_t>(key) << kNarrow) + kRebias;
}

// The float32 key of the largest number whose float64 key is not beyond `key`; -1 if there is none.
inline int32_t narrow_floor(int64_t key) {
  if (key < widened(kLeastKey)) return key < 0 ? -1 : 0;
  return static_cast<int32_t>(std::min<int64_t>((key - kRebias) >> kNarrow, 0x7fffffff));
}

// keys[i] = the bits of |x[i] - a[i]| in float32. False if one of them may not be exact, or is not
// that of a normal number or zero.
bool narrow_keys_of(const uint16_t* x, const uint16_t* a, int n, uint32_t* keys);

// Bins side by side as `clamped_bin` numbers them, from `offset` on by float64 keys >> shift: what
// lies beyond is counted in the second and in the last but one, zeros in the first.
class NarrowBins {
 public:
  NarrowBins(int shift, int64_t offset, int64_t bins);

  // Counts n <= kChunk keys in counts[bins][2]: those at the lower end of their bin, and others.
  void add(const uint32_t* keys, int n, uint32_t* counts);

 private:
  // Which counter is that of a key inside.
  int64_t place_of(uint32_t key) const {
    return int64_t{key >> shift_} + ((key - 1) >> shift_) + 1 - 2 * offset_;
  }

  int shift_;  // of float32 keys
  int64_t offset_, bins_;
  uint32_t first_, last_;        // keys inside: first <= key < last
  uint32_t hot_ = kInfiniteKey;  // the lower end of the bin with most, as far as is known: many
                                 // differences may be one number
};

// How many of the keys are `equal`, and how many lie from `first` to `last`.
struct Found {
  int32_t equal, within;
};
Found find_keys(const uint32_t* keys, int n, int32_t equal, int32_t first, int32_t last);

}  // namespace mergecore::cpu
