// Ranks of magnitudes within a row by counting digits, and probabilities that rise with them
// (DELLA). Not for what is done with these (ranked.cpp).
#pragma once

#include <memory>
#include <vector>

#include "select.h"

namespace mergecore::cpu {

// Keep-probabilities that rise with the rank.
struct Line {
  double lowest, step;
};

// `twice` the mean rank, which is a whole number.
MERGECORE_INLINE double odds_of(const Line& line, int32_t twice) {
  return line.lowest + (0.5 * twice - 1.0) * line.step;
}

// For one thread.
class RowRanks {
 public:
  // Twice the mean rank, ascending from 1, of each delta's magnitude among model m's in a row.
  // False where float32 does not tell them.
  bool count(const Inputs& in, int m, int64_t row, int32_t* twice);
  // The probabilities themselves, whatever the deltas are.
  void write(const Inputs& in, int m, int64_t row, const Line& line, double* out);

 private:
  struct Group {  // entries that share a digit, and how many have lower ones
    uint32_t below, here;
  };

  void sort_shared(int32_t* twice);

  std::vector<uint32_t> keys_;
  std::vector<uint16_t> digits_;
  std::vector<uint8_t> flags_;
  std::vector<Group> groups_;
  int64_t shared_groups_ = 0;     // of a row
  std::vector<uint64_t> sorted_;  // of all groups, key and index
  std::vector<int32_t> twice_;
  std::vector<double> values_;
};

}  // namespace mergecore::cpu
