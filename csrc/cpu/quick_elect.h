// Elections among bf16 deltas in float32 where that gives the float64 election's bits. Not for the
// entries that it does not decide, nor for other measures, consensus or dtypes (elect.cpp).
#pragma once

#include "quick_words.h"
#include "select.h"

namespace mergecore::cpu {

// What is added to the base: the sum of all deltas, or of those of the elected sign; as it is, or
// divided by the sum of their weights.
enum class Mix { all, elected, divided };

// Those whose float32 bits are `least` to `least` + `extent`.
struct Magnitudes {
  uint32_t least, extent;
};

// Entries of a run; pointers are to the first.
struct QuickElection {
  const uint16_t* base;
  const uint16_t* models[kMaxPlain];
  Magnitudes kept[kMaxPlain];  // deltas of others are dropped
  float side[kMaxPlain];       // a delta times this is its vote
  float share[kMaxPlain];      // a vote times this is added to the base
  float weight[kMaxPlain];
  float divisor;      // of results that are fractions; else 1
  uint16_t tie;       // with a divisor: bits between a result and the largest number, at most
  uint16_t spread;    // bits between an entry's least and largest number, at most
  uint16_t greatest;  // of all numbers
  uint16_t* out;
};

// One thread's use of it.
class QuickElect {
 public:
  explicit QuickElect(const Election& election);

  // Stores the results of n <= kChunk entries. Bit i is set where those of block i, of kQuick
  // entries, are left to float64.
  uint32_t store(int64_t entry, int n);

 private:
  bool take_coefficients();
  bool take_fractions();
  bool multiply(int divisor, int most_steps);
  bool take_limits(int64_t first, int n);
  const uint16_t* kept_at_random(int m, int64_t entry, int n);

  const Election& election_;
  bool applies_ = false;
  Mix mix_ = Mix::all;
  QuickElection run_;
  // Without and with ties of the least magnitude; the same without those of the largest.
  Magnitudes kept_[kMaxPlain][4];
  int rest_ = 0;                                     // runs until the next try
  alignas(64) uint16_t dropped_[kMaxPlain][kChunk];  // a run without what is dropped at random
};

}  // namespace mergecore::cpu
