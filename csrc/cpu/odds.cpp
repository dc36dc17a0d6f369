// Keep-probabilities by rank of magnitude within a row (DELLA).
#include <algorithm>

#include "ranks.h"

namespace mergecore::cpu {

namespace {

// Deltas of bf16 numbers lie on coarse grids: nearly all magnitudes of a row have few bits behind
// the leading one. An even digit is such a magnitude, an odd one stands for all that lie between it
// and the next. Only entries that share an odd digit have to be sorted.
constexpr int kDigitShift = 16;  // 7 bits are left
constexpr uint32_t kDigits = 1u << (32 - kDigitShift);

MERGECORE_INLINE uint32_t digit_of(uint32_t key) {
  constexpr uint32_t below = (1u << kDigitShift) - 1;
  return key >> kDigitShift << 1 | ((key & below) != 0 ? 1u : 0u);
}

// The digits of a row, and the least and largest but for 0, which is the digit of zeros.
MERGECORE_CLONES
void digits_of_row(const uint32_t* keys, int64_t n, uint16_t* digits, uint32_t& least,
                   uint32_t& largest) {
  uint32_t low = kDigits, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t digit = digit_of(keys[i]);
    digits[i] = static_cast<uint16_t>(digit);
    low = std::min(low, digit - 1u);  // of 0: the largest number
    high = std::max(high, digit);
  }
  least = low + 1;
  largest = high;
}

MERGECORE_CLONES
void flag_nonzero(const uint32_t* counts, uint32_t n, uint8_t* flags) {
  for (uint32_t i = 0; i < n; ++i) flags[i] = counts[i] != 0 ? 0xff : 0;
}

// out[i] = table[digits[i]]; flags[i] has all bits where that is negative, else none.
MERGECORE_CLONES
void look_up(const int32_t* table, const uint16_t* digits, int64_t n, int32_t* out,
             uint8_t* flags) {
  constexpr int kLooks = 8;  // loads that no store, which might be to the table, holds up
  int64_t done = 0;
  for (; done + kLooks <= n; done += kLooks) {
    int32_t found[kLooks];
    for (int i = 0; i < kLooks; ++i) found[i] = table[digits[done + i]];
    memcpy(out + done, found, sizeof(found));
  }
  for (; done < n; ++done) out[done] = table[digits[done]];
  for (int64_t i = 0; i < n; ++i) flags[i] = out[i] < 0 ? 0xff : 0;
}

MERGECORE_CLONES
void odds_of_counts(const Line& line, const int32_t* twice, int64_t n, double* out) {
  const Line l = line;
  for (int64_t i = 0; i < n; ++i) out[i] = odds_of(l, twice[i]);
}

MERGECORE_CLONES
void odds_of_ranks(const Line& line, int64_t n, double* values) {
  const Line l = line;
  for (int64_t i = 0; i < n; ++i) values[i] = l.lowest + (values[i] - 1.0) * l.step;
}

// f(i) for all of n flags that are set; flags lie at a multiple of 16 bytes and reach to a multiple
// of kPlaces.
template <class F>
void each_set(const uint8_t* flags, int64_t n, F&& f) {
  for (int64_t start = 0; start < n; start += kPlaces) {
    for (uint64_t bits = bits_of(flags + start); bits != 0; bits &= bits - 1) {
      f(start + __builtin_ctzll(bits));
    }
  }
}

// Rows of one length follow each other: what is not asked for again keeps its place.
template <class T>
void grow(std::vector<T>& numbers, size_t size) {
  if (numbers.size() < size) numbers.resize(size);
}

int64_t whole_places(int64_t n) { return (n + kPlaces - 1) / kPlaces * kPlaces; }

// The numbers by digit that one thread works with.
struct Tables {
  std::vector<uint32_t> counts = std::vector<uint32_t>(kDigits);  // 0 but while a row is counted
  std::vector<int32_t> twice = std::vector<int32_t>(kDigits);  // or minus a place, of shared ones
  std::unique_ptr<uint8_t[]> used{new uint8_t[kDigits]};
};

}  // namespace

bool RowRanks::count(const Inputs& in, int m, int64_t row, int32_t* twice) {
  thread_local Tables tables;
  const int64_t columns = in.window.columns, first = row * columns;
  keys_.resize(static_cast<size_t>(columns));
  digits_.resize(keys_.size());
  for (int64_t i = 0; i < columns; i += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, columns - i));
    if (!narrow_keys(in, m, first + i, n, keys_.data() + i)) return false;
  }
  uint32_t least, largest;
  digits_of_row(keys_.data(), columns, digits_.data(), least, largest);
  grow(groups_, keys_.size() / 2 + 1);  // what can fail comes before counts that are not 0
  grow(sorted_, keys_.size());
  uint32_t* counts = tables.counts.data();
  for (const uint16_t digit : digits_) ++counts[digit];
  // Without branches, which would be taken as it happens.
  Group* group = groups_.data();
  uint32_t below = 0, shared = 0;
  const auto take = [&](uint32_t digit) {
    const uint32_t here = counts[digit];
    counts[digit] = 0;
    const bool is_shared = ((digit & 1u) != 0) & (here > 1);
    *group = {below, here};
    group += is_shared;
    shared += is_shared ? here : 0;
    tables.twice[digit] =
        is_shared ? -static_cast<int32_t>(shared) : static_cast<int32_t>(2 * below + 1 + here);
    below += here;
  };
  if (counts[0] != 0) take(0);
  if (least <= largest) {
    const uint32_t start = least / kPlaces * kPlaces;
    const auto span = static_cast<uint32_t>(whole_places(largest + 1 - start));
    flag_nonzero(counts + start, span, tables.used.get() + start);
    each_set(tables.used.get() + start, span,
             [&](int64_t i) { take(start + static_cast<uint32_t>(i)); });
  }
  shared_groups_ = group - groups_.data();
  flags_.resize(static_cast<size_t>(whole_places(columns)));
  look_up(tables.twice.data(), digits_.data(), columns, twice, flags_.data());
  std::fill(flags_.begin() + columns, flags_.end(), uint8_t{0});
  // A group's entries are written from its last place down.
  each_set(flags_.data(), shared == 0 ? 0 : columns, [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    sorted_[static_cast<size_t>(-1 - tables.twice[digits_[at]]++)] =
        uint64_t{keys_[at]} << 32 | static_cast<uint64_t>(i);
  });
  sort_shared(twice);
  return true;
}

void RowRanks::sort_shared(int32_t* twice) {
  uint64_t* begin = sorted_.data();
  for (int64_t i = 0; i < shared_groups_; ++i) {
    const auto [below, here] = groups_[static_cast<size_t>(i)];
    uint64_t* end = begin + here;
    std::sort(begin, end);
    for (uint64_t *first = begin, *last = begin; first < end; first = last) {
      while (last < end && *last >> 32 == *first >> 32) ++last;
      const auto lower = below + static_cast<uint32_t>(first - begin);
      const auto rank = static_cast<int32_t>(2 * lower + 1 + static_cast<uint32_t>(last - first));
      for (const uint64_t* entry = first; entry < last; ++entry) {
        twice[*entry & 0xffffffffu] = rank;
      }
    }
    begin = end;
  }
}

void RowRanks::write(const Inputs& in, int m, int64_t row, const Line& line, double* out) {
  const int64_t columns = in.window.columns, first = row * columns;
  twice_.resize(static_cast<size_t>(columns));
  if (are_plain_bf16(in) && count(in, m, row, twice_.data())) {
    odds_of_counts(line, twice_.data(), columns, out);
    return;
  }
  alignas(64) double base[kRun] = {};
  values_.resize(twice_.size());
  for (int64_t i = 0; i < columns; i += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, columns - i));
    load_base(in, first + i, n, base);
    load_deltas(in, m, first + i, n, base, values_.data() + i);
  }
  for (double& value : values_) value = fabs(value);
  rank(values_.data(), out, columns, true);
  odds_of_ranks(line, columns, out);
}

void row_odds(const Inputs& in, const double* lowest, const double* steps, double* odds,
              int64_t begin, int64_t end) {
  const int64_t rows = in.window.rows, columns = in.window.columns;
  if (columns == 0) return;
  RowRanks ranks;
  for (int64_t row = begin; row < end; ++row) {
    for (int m = 0; m < in.count; ++m) {
      ranks.write(in, m, row, {lowest[m], steps[m]}, odds + (m * rows + row) * columns);
    }
  }
}

}  // namespace mergecore::cpu
