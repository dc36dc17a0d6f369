// Keep-probabilities by rank of magnitude within a row (DELLA).
#include <algorithm>
#include <vector>

#include "select.h"

namespace mergecore::cpu {

// Ranks by counting. Deltas of bf16 numbers lie on coarse grids: nearly all magnitudes of a row
// have few bits behind the leading one. An even digit is such a magnitude, an odd one stands for
// all that lie between it and the next. Only entries that share an odd digit have to be sorted.
constexpr int kDigitShift = 16;  // 7 bits are left
constexpr uint32_t kDigits = 1u << (32 - kDigitShift);

MERGECORE_INLINE uint32_t digit_of(uint32_t key) {
  constexpr uint32_t below = (1u << kDigitShift) - 1;
  return key >> kDigitShift << 1 | ((key & below) != 0 ? 1u : 0u);
}

// Keep-probabilities that rise with the rank.
struct Line {
  double lowest, step;
};

// `twice` the mean rank, which is a whole number.
MERGECORE_INLINE double odds_of(const Line& line, int32_t twice) {
  return line.lowest + (0.5 * twice - 1.0) * line.step;
}

// The digits of a row, and the least and largest but for 0, which is the digit of zeros.
MERGECORE_CLONES
void digits_of_row(const uint32_t* keys, int64_t n, uint32_t* digits, uint32_t& least,
                   uint32_t& largest) {
  uint32_t low = kDigits, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t digit = digit_of(keys[i]);
    digits[i] = digit;
    low = std::min(low, digit - 1u);  // of 0: the largest number
    high = std::max(high, digit);
  }
  least = low + 1;
  largest = high;
}

MERGECORE_CLONES
void look_up(const Line& line, const int32_t* twice, const uint32_t* digits, int64_t n,
             double* out) {
  const Line l = line;
  for (int64_t i = 0; i < n; ++i) out[i] = odds_of(l, twice[static_cast<int32_t>(digits[i])]);
}

MERGECORE_CLONES
void odds_of_ranks(const Line& line, int64_t n, double* values) {
  const Line l = line;
  for (int64_t i = 0; i < n; ++i) values[i] = l.lowest + (values[i] - 1.0) * l.step;
}

// One thread's work on rows of one length.
class RowRanks {
 public:
  explicit RowRanks(int64_t columns)
      : columns_(columns),
        keys_(static_cast<size_t>(columns)),
        digits_(keys_.size()),
        shared_(keys_.size()),
        sorted_(keys_.size()),
        ends_(kDigits),
        twice_(kDigits) {}

  void write(const Inputs& in, int m, int64_t row, const Line& line, double* out) {
    const int64_t first = row * columns_;
    bool narrow = are_plain_bf16(in);
    for (int64_t i = 0; narrow && i < columns_; i += kRun) {
      narrow = narrow_keys(in, m, first + i, run(i), keys_.data() + i);
    }
    if (narrow) {
      count(line, out);
      return;
    }
    alignas(64) double base[kRun] = {};
    values_.resize(keys_.size());
    for (int64_t i = 0; i < columns_; i += kRun) {
      load_base(in, first + i, run(i), base);
      load_deltas(in, m, first + i, run(i), base, values_.data() + i);
    }
    for (double& value : values_) value = fabs(value);
    rank(values_.data(), out, columns_, true);
    odds_of_ranks(line, columns_, out);
  }

 private:
  int run(int64_t from) const { return static_cast<int>(std::min<int64_t>(kRun, columns_ - from)); }

  void count(const Line& line, double* out) {
    uint32_t least, largest;
    digits_of_row(keys_.data(), columns_, digits_.data(), least, largest);
    for (const uint32_t digit : digits_) ++ends_[digit];
    uint32_t below = 0;
    const auto place = [&](uint32_t digit) {
      const uint32_t here = ends_[digit];
      twice_[digit] = static_cast<int32_t>(2 * below + 1 + here);
      ends_[digit] = below;
      below += here;
    };
    place(0);
    for (uint32_t digit = least; digit <= largest; ++digit) place(digit);
    look_up(line, twice_.data(), digits_.data(), columns_, out);
    sort_odd(line, out);
    ends_[0] = 0;
    if (least <= largest) std::fill(ends_.begin() + least, ends_.begin() + largest + 1, 0);
  }

  // Entries of odd digits, key and index: brought together by digit, then sorted there.
  void sort_odd(const Line& line, double* out) {
    size_t odd = 0;
    for (size_t i = 0; i < keys_.size(); ++i) {
      shared_[odd] = uint64_t{keys_[i]} << 32 | i;
      odd += digits_[i] & 1u;
    }
    for (size_t i = 0; i < odd; ++i) sorted_[ends_[digit_at(shared_[i])]++] = shared_[i];
    for (size_t i = 0; i < odd; ++i) {
      const uint32_t digit = digit_at(shared_[i]);
      if (twice_[digit] == kDone) continue;
      const uint32_t end = ends_[digit], begin = static_cast<uint32_t>(twice_[digit]) - 1 - end;
      if (end - begin > 1) write_sorted(line, begin, end, out);
      twice_[digit] = kDone;
    }
  }

  void write_sorted(const Line& line, uint32_t begin, uint32_t end, double* out) {
    if (end - begin == 2) {  // the most frequent case
      const uint64_t one = sorted_[begin], other = sorted_[begin + 1];
      const int32_t more = (one >> 32 > other >> 32) - (one >> 32 < other >> 32);
      const int32_t middle = static_cast<int32_t>(begin + end + 1);
      out[one & 0xffffffffu] = odds_of(line, middle + more);
      out[other & 0xffffffffu] = odds_of(line, middle - more);
      return;
    }
    std::sort(sorted_.begin() + begin, sorted_.begin() + end);
    for (uint32_t first = begin, last = begin; first < end; first = last) {
      while (last < end && sorted_[last] >> 32 == sorted_[first] >> 32) ++last;
      const double odds = odds_of(line, static_cast<int32_t>(first + last + 1));
      for (uint32_t i = first; i < last; ++i) out[sorted_[i] & 0xffffffffu] = odds;
    }
  }

  static uint32_t digit_at(uint64_t entry) { return digit_of(static_cast<uint32_t>(entry >> 32)); }

  static constexpr int32_t kDone = 0;

  int64_t columns_;
  std::vector<uint32_t> keys_, digits_;
  std::vector<uint64_t> shared_, sorted_;
  std::vector<uint32_t> ends_;  // by digit: its entries, or their end among all; 0 between rows
  std::vector<int32_t> twice_;  // by digit: twice the mean rank of its entries
  std::vector<double> values_;
};

void row_odds(const Inputs& in, const double* lowest, const double* steps, double* odds,
              int64_t begin, int64_t end) {
  const int64_t rows = in.window.rows, columns = in.window.columns;
  if (columns == 0) return;
  RowRanks ranks(columns);
  for (int64_t row = begin; row < end; ++row) {
    for (int m = 0; m < in.count; ++m) {
      ranks.write(in, m, row, {lowest[m], steps[m]}, odds + (m * rows + row) * columns);
    }
  }
}

}  // namespace mergecore::cpu
