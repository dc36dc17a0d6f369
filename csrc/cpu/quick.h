// Blends of bf16 in float32 where that gives the float64 blend's bits. See quick.cpp.
#pragma once

#include <vector>

#include "quick_run.h"

namespace mergecore::cpu {

// One thread's use of it. Entries that float32 does not decide wait until there are enough for the
// float64 blend: finish() comes last.
class QuickBlend {
 public:
  explicit QuickBlend(const Blend& blend);

  // Whether dtypes and coefficients are such that it can be tried at all.
  bool applies() const { return applies_; }

  // Stores the results of n <= kChunk entries of one row, n being a multiple of kQuick and, where
  // coefficients are by column, so is `column`. False where all are left to the float64 blend.
  bool store(int64_t entry, int64_t row, int64_t column, int n);

  void finish();

 private:
  bool take_coefficients();
  void take_fractions(double sum);
  void fill(int64_t row);
  void gather(const QuickRun& run, int64_t entry, int64_t row, int64_t column,
              const uint16_t* places, int count);

  const Blend& blend_;
  const bool of_rows_, based_;
  bool applies_ = false;
  bool exact_ = false;  // float32 makes no error where an entry's numbers are of like size
  int divisor_ = 1;
  uint16_t spread_ = 0, tie_ = 0, least_ = 0, greatest_ = 0;  // as in QuickRun
  std::vector<double> base_coefficients_;                     // b'
  std::vector<double> errors_;                                // e for X = 1, of each place
  std::vector<float> coefficients_, bounds_;                  // as in QuickRun
  int64_t row_ = 0;                                           // that they are of
  std::vector<uint16_t> dropped_;  // [model][kChunk]: the run without what is dropped
  // The entries that wait.
  int waiting_ = 0;
  std::vector<uint16_t> numbers_;              // [base, models][kChunk]
  std::vector<double> gathered_coefficients_;  // [model][kChunk]
  std::vector<int64_t> places_;
};

// The float64 blend of n entries (at most kChunk) of one row, or of any with one coefficient.
void blend_chunk(const Blend& blend, int64_t entry, int64_t row, int64_t column, int n,
                 int64_t& nonfinite, int64_t& overflow);

}  // namespace mergecore::cpu
