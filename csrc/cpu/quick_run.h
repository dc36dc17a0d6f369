// The loops of the float32 blend. What they decide, and why that is right, is told in
// quick_bounds.h.
#pragma once

#include "quick_words.h"

namespace mergecore::cpu {

// Up to kChunk entries of one row; pointers are to the first.
struct QuickRun {
  int count;
  const uint16_t* base;  // nullptr: none
  const uint16_t* models[kMaxModels];
  // [block][models, bound][even entries, odd entries]; a bound is e for X = 1.
  const float* coefficients;
  int64_t stride;  // of blocks; 0: the same for all
  float of_base;
  bool exact;
  uint16_t spread;    // exact: bits between an entry's least and largest number, at most
  uint16_t least;     // bounded: X of smaller numbers
  uint16_t greatest;  // of all numbers
  uint16_t* out;
};

enum class Stored { nothing, most, all };

// Stores the results of n entries; undecided[i] is not 0 where float32 does not tell: of all or of
// most it does. Nothing is to be used where a number is not finite or beyond `greatest`.
Stored store_run(const QuickRun& run, int n, uint16_t* undecided);

// Writes the places of the n flags that are not 0, and returns how many they are.
int find_set(const uint16_t* flags, int n, uint16_t* places);

// kept[i] = model[i], or the base where its number is not beyond `last_dropped`. Returns the
// largest magnitude of the model.
uint16_t drop_run(const uint16_t* base, const uint16_t* model, const uint32_t* numbers,
                  uint32_t last_dropped, int n, uint16_t* kept);

}  // namespace mergecore::cpu
