// The loops of the float32 blend. What they decide, and why that is right, is told in
// quick_bounds.h.
#pragma once

#include "quick_words.h"

namespace mergecore::cpu {

// Up to kChunk entries of one row; pointers are to the first.
struct QuickRun {
  int count;   // of inputs: the base, if there is one, and the models
  bool based;  // the first input is the base
  const uint16_t* inputs[kMaxModels + 1];
  bool of_columns;            // or the same for all entries:
  const float* coefficients;  // [inputs], or [block][inputs][even entries, odd entries]
  const float* bounds;        // [1], or [block]: of e, for X = 1
  uint16_t sign;              // of b, as a bf16 zero
  bool exact;
  float divisor;      // exact: of sums, unless 1
  uint16_t tie;       // with a divisor: bits between X and a result, at most
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
