// Top sets by magnitude: a histogram of the keys, and the keys within a range with their indices.
// Not for what is kept by them (select.cpp, elect.cpp).
#include <algorithm>
#include <limits>
#include <vector>

#include "select.h"

namespace mergecore::cpu {

MERGECORE_CLONES
void wide_keys(const double* values, int n, int64_t* keys) {
  for (int i = 0; i < n; ++i) keys[i] = magnitude_bits(values[i]);
}

// Whether a measure compares each model by itself.
bool is_own(Measure measure) { return measure == Measure::own || measure == Measure::rows; }

int sets_of(const Kept& kept) { return kept.measure == Measure::spread ? 1 : kept.inputs.count; }

// Calls f(which, keys) with the keys of a run, of sets first, first + 1, ... last - 1.
template <class F>
void with_keys(const Kept& kept, int first, int last, int64_t entry, int n, const F& f) {
  const Inputs& in = kept.inputs;
  alignas(64) double out[kRun];
  int64_t keys[kRun];
  const auto call = [&](int m, const double* delta, const double* common) {
    const double* values = measured_run(kept, m, delta, common, entry, n, out);
    wide_keys(values, n, keys);
    f(m, keys);
  };
  if (is_own(kept.measure)) {
    alignas(64) double base[kRun] = {};
    alignas(64) double delta[kRun];
    load_base(in, entry, n, base);
    for (int m = first; m < last; ++m) {
      load_deltas(in, m, entry, n, base, delta);
      call(m, delta, nullptr);
    }
    return;
  }
  Deltas deltas[kMaxModels];
  double common[kRun];
  load_all_deltas(in, entry, n, deltas);
  common_run(kept, deltas, n, common);
  for (int m = first; m < last; ++m) call(m, deltas[m].value, common);
}

// How often each bin occurs. Two counters per bin, for entries side by side: increments of one
// counter wait for each other. All are zero between calls, so that only those in use are gone
// through.
class Counters {
 public:
  explicit Counters(int64_t bins) : bins_(static_cast<uint32_t>(bins)) {
    const size_t needed = 2 * (static_cast<size_t>(bins) + 1);
    if (counts_.size() < needed) counts_.resize(needed);
  }

  // The bins of a run; `bins` itself is for keys that count nowhere.
  void add(const uint32_t* bins, int n) {
    uint32_t* counts = counts_.data();
    for (int i = 0; i + 1 < n; i += 2) {
      ++counts[2 * bins[i]];
      ++counts[2 * bins[i + 1] + 1];
    }
    if (n % 2 != 0) ++counts[2 * bins[n - 1]];
  }

  // Bins above `low` and up to `high` may have been counted, and bin 0.
  void extend(uint32_t low, uint32_t high) {
    low_ = std::min(low_, low);
    high_ = std::max(high_, high);
  }

  // Adds all to `histogram`, and starts again from zero.
  void move_to(int64_t* histogram) {
    move_bin(0, histogram);
    for (uint32_t bin = low_ + 1; bin != 0 && bin <= high_ && bin < bins_; ++bin) {
      move_bin(bin, histogram);
    }
    counts_[2 * bins_] = counts_[2 * bins_ + 1] = 0;
    low_ = kNone;
    high_ = 0;
  }

  static constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

 private:
  void move_bin(uint32_t bin, int64_t* histogram) {
    uint32_t* both = counts_.data() + 2 * static_cast<size_t>(bin);
    const int64_t count = int64_t{both[0]} + both[1];
    if (count != 0) add_to(histogram + bin, count);
    both[0] = both[1] = 0;
  }

  static thread_local std::vector<uint32_t> counts_;
  uint32_t bins_, low_ = kNone, high_ = 0;
};

thread_local std::vector<uint32_t> Counters::counts_;

// What all keys of a histogram are counted by.
struct Bins {
  int shift;
  int64_t offset;
  bool clamp;
  int64_t count;
};

// The range of bins, but for the first: `low` holds the smallest less 1, without a sign.
struct Range {
  uint32_t low = Counters::kNone, high = 0;

  MERGECORE_INLINE void add(uint32_t bin) {
    low = std::min(low, bin - 1u);
    high = std::max(high, bin);
  }
};

// The bins of float32 keys, clamped, in their place, and their range.
MERGECORE_CLONES
Range narrow_bins(const Bins& bins, uint32_t* keys, int n) {
  const int shift = bins.shift - kNarrow, last = static_cast<int>(bins.count) - 2;
  const int offset = static_cast<int>(bins.offset - (kRebias >> bins.shift));
  Range range;
  for (int i = 0; i < n; ++i) {
    const int bin = static_cast<int>(keys[i] >> shift) - offset;
    const int inner = std::min(std::max(bin, 1), last);
    const uint32_t found = static_cast<uint32_t>(inner & -static_cast<int>(keys[i] != 0));
    keys[i] = found;
    range.add(found);
  }
  return range;
}

// The same of float64 keys, clamped or not, in `out`.
MERGECORE_CLONES
Range wide_bins(const Bins& bins, const int64_t* keys, int n, uint32_t* out) {
  const int shift = bins.shift;
  const int64_t offset = bins.offset, count = bins.count;
  Range range;
  if (bins.clamp) {
    for (int i = 0; i < n; ++i) {
      out[i] = static_cast<uint32_t>(clamped_bin(keys[i], shift, offset, count));
    }
  } else {
    for (int i = 0; i < n; ++i) {
      const int64_t bin = (keys[i] >> shift) - offset;
      out[i] = static_cast<uint32_t>((bin < 0) | (bin >= count) ? count : bin);
    }
  }
  for (int i = 0; i < n; ++i) range.add(out[i]);
  return range;
}

// Whether float32 keys tell the bins: they are clamped, no narrower than the steps of such keys,
// and 32 bits hold their numbers.
bool tells_bins(const Bins& bins) {
  constexpr int64_t most = 1 << 28;
  return bins.clamp && bins.shift >= 40 && bins.shift <= 52 && bins.count >= 3 &&
         bins.count < most && bins.offset > -most && bins.offset < most;
}

// Bins that lie about a threshold, and which of their keys are at the lower end: nearly all, where
// deltas lie on a coarse grid.
class BracketedBins {
 public:
  BracketedBins(const Kept& kept, int shift, const int64_t* offsets, int64_t bins)
      : kept_(kept),
        bins_(bins),
        above_end_((int64_t{1} << shift) - 1),
        counts_(static_cast<size_t>(2 * kept.inputs.count * bins)) {
    bool narrow = are_plain_bf16(kept.inputs);
    for (int set = 0; set < kept.inputs.count; ++set) {
      wide_.push_back({shift, offsets[set], true, bins});
      narrow = narrow && tells_bins(wide_.back());
    }
    for (const Bins& each : wide_) {
      if (narrow) narrow_.emplace_back(shift, each.offset, bins);
    }
  }

  // A run of n <= kChunk entries. Sets side by side may be of one model: its keys are made once.
  void add(int64_t entry, int n) {
    const Inputs& in = kept_.inputs;
    for (int first = 0, last; first < in.count; first = last) {
      last = first + 1;
      while (last < in.count && in.models[last].data == in.models[first].data) ++last;
      add(first, last, entry, n);
    }
  }

  // Adds all to histogram[sets][bins], and what is at lower ends to ends[sets][stride]; starts
  // again from zero.
  void move_to(int64_t* histogram, int32_t* ends, int64_t stride) {
    for (int set = 0; set < kept_.inputs.count; ++set) {
      for (int64_t bin = 0; bin < bins_; ++bin) {
        uint32_t* both = counts_of(set) + 2 * bin;
        if ((both[0] | both[1]) == 0) continue;
        add_to(histogram + set * bins_ + bin, int64_t{both[0]} + both[1]);
        const bool is_inner = bin > 1 && bin < bins_ - 2;
        if (is_inner || bin == 0) add_to(ends + set * stride + bin, both[0]);
        both[0] = both[1] = 0;
      }
    }
  }

 private:
  void add(int first, int last, int64_t entry, int n) {
    alignas(64) uint32_t keys[kChunk];
    const int step = narrow_.empty() ? kRun : kPlaces;
    if (!narrow_.empty() && narrow_keys(kept_.inputs, first, entry, n, keys)) {
      for (int set = first; set < last; ++set) {
        narrow_[static_cast<size_t>(set)].add(keys, n, counts_of(set));
      }
    } else if (n > step) {  // of narrow keys one entry may be the reason
      for (int start = 0; start < n; start += step) {
        add(first, last, entry + start, std::min(step, n - start));
      }
    } else {
      for (int set = first; set < last; ++set) {
        with_keys(kept_, set, set + 1, entry, n, [&](int, const int64_t* wide) {
          wide_bins(wide_[static_cast<size_t>(set)], wide, n, keys);
          uint32_t* counts = counts_of(set);
          for (int i = 0; i < n; ++i) ++counts[2 * keys[i] + ((wide[i] & above_end_) != 0)];
        });
      }
    }
  }

  // Two counters for each bin: of keys at its lower end, and of others.
  uint32_t* counts_of(int set) { return counts_.data() + 2 * set * bins_; }

  const Kept& kept_;
  const int64_t bins_;
  const int64_t above_end_;  // bits of a key that are all 0 at the lower end of its bin
  std::vector<Bins> wide_;
  std::vector<NarrowBins> narrow_;  // empty where float32 keys do not tell the bins
  std::vector<uint32_t> counts_;
};

void count_magnitudes(const Kept& kept, int shift, const int64_t* offsets, bool clamp, int64_t bins,
                      int64_t* histogram, int64_t begin, int64_t end) {
  const bool plain = kept.measure == Measure::own && are_plain_bf16(kept.inputs);
  // One set after the other: a thread's counts of one fit its cache.
  Counters counters(bins);
  for (int set = 0; set < sets_of(kept); ++set) {
    const Bins places{shift, offsets[set], clamp, bins};
    const bool narrow = plain && tells_bins(places);
    for (int64_t entry = begin; entry < end; entry += kRun) {
      const int n = static_cast<int>(std::min<int64_t>(kRun, end - entry));
      alignas(64) uint32_t found[kRun];
      Range range;
      if (narrow && narrow_keys(kept.inputs, set, entry, n, found)) {
        range = narrow_bins(places, found, n);
      } else {
        with_keys(kept, set, set + 1, entry, n,
                  [&](int, const int64_t* keys) { range = wide_bins(places, keys, n, found); });
      }
      counters.add(found, n);
      counters.extend(range.low, range.high);
    }
    counters.move_to(histogram + set * bins);
  }
}

void count_bracketed(const Inputs& in, int shift, const int64_t* offsets, int64_t bins,
                     int64_t* histogram, int32_t* ends, int64_t part, int64_t begin, int64_t end) {
  const Kept kept{in, Measure::own, nullptr, 0, nullptr, nullptr, false};
  const int64_t parts = (in.window.rows * in.window.columns + part - 1) / part;
  BracketedBins bracketed(kept, shift, offsets, bins);
  while (begin < end) {
    const int64_t at_part = begin / part, last = std::min(end, (at_part + 1) * part);
    for (; begin < last; begin += kChunk) {
      bracketed.add(begin, static_cast<int>(std::min<int64_t>(kChunk, last - begin)));
    }
    begin = last;
    bracketed.move_to(histogram, ends + at_part * bins, parts * bins);
  }
}

// The entries of one range that are collected, and where.
struct Collection {
  KeyRange range;
  int64_t* keys;
  int64_t* indices;
  int64_t capacity;
  int64_t* found;
  int64_t* equal;  // [blocks]

  // Adds the `within` entries of a run that lie in the range, of index `first` and those after it.
  void append(const int64_t* run, int n, int64_t within, int64_t first) const {
    int64_t place = __atomic_fetch_add(found, within, __ATOMIC_RELAXED);
    for (int i = 0; i < n && place < capacity; ++i) {
      if (run[i] <= range.low || run[i] >= range.high) continue;
      keys[place] = run[i];
      indices[place] = first + i;
      ++place;
    }
  }
};

MERGECORE_CLONES
void find_wide(const int64_t* keys, int n, const KeyRange& range, int64_t& equal, int64_t& within) {
  const int64_t low = range.low, high = range.high;
  int64_t same = 0, inside = 0;
  for (int i = 0; i < n; ++i) {
    same += keys[i] == low;
    inside += (keys[i] > low) & (keys[i] < high);
  }
  equal = same;
  within = inside;
}

void collect_run(const Collection& to, const int64_t* keys, int n, int64_t block, int64_t first) {
  int64_t equal, within;
  find_wide(keys, n, to.range, equal, within);
  to.equal[block] += equal;
  if (within != 0) to.append(keys, n, within, first);
}

void collect_narrow_run(const Collection& to, const uint32_t* keys, int n, int64_t block,
                        int64_t first) {
  const int32_t floor = narrow_floor(to.range.low), last = narrow_floor(to.range.high - 1);
  if (floor == std::numeric_limits<int32_t>::max()) return;
  const bool is_key = floor >= 0 && widened(static_cast<uint32_t>(floor)) == to.range.low;
  const Found found = find_keys(keys, n, is_key ? floor : -1, floor + 1, last);
  to.equal[block] += found.equal;
  if (found.within == 0) return;
  int64_t wide[kRun];
  for (int i = 0; i < n; ++i) wide[i] = widened(keys[i]);
  to.append(wide, n, found.within, first);
}

void collect_magnitudes(const Kept& kept, const KeyRange* ranges, int count, int64_t* keys_out,
                        int64_t* indices, int64_t capacity, int64_t* found, int64_t* equal,
                        int64_t block, int64_t begin, int64_t end) {
  const Window& w = kept.inputs.window;
  const int64_t blocks = (w.rows * w.columns + block - 1) / block;
  std::vector<std::vector<Collection>> of_set(static_cast<size_t>(sets_of(kept)));
  for (int r = 0; r < count; ++r) {
    of_set.at(static_cast<size_t>(ranges[r].model))
        .push_back({ranges[r], keys_out + r * capacity, indices + r * capacity, capacity, found + r,
                    equal + r * blocks});
  }
  const bool plain = kept.measure == Measure::own && are_plain_bf16(kept.inputs);
  for (int64_t entry = begin; entry < end;) {
    const int64_t at_block = entry / block, first = index_of(w, entry);
    const int n =
        static_cast<int>(std::min<int64_t>({kRun, end - entry, (at_block + 1) * block - entry}));
    const auto collect_set = [&](int set, const int64_t* keys) {
      for (const Collection& to : of_set[static_cast<size_t>(set)]) {
        collect_run(to, keys, n, at_block, first);
      }
    };
    if (plain) {
      for (int set = 0; set < sets_of(kept); ++set) {
        const auto& wanted = of_set[static_cast<size_t>(set)];
        alignas(64) uint32_t narrow[kRun];
        if (wanted.empty()) continue;
        if (!narrow_keys(kept.inputs, set, entry, n, narrow)) {
          with_keys(kept, set, set + 1, entry, n, collect_set);
          continue;
        }
        for (const Collection& to : wanted) collect_narrow_run(to, narrow, n, at_block, first);
      }
    } else {
      with_keys(kept, 0, sets_of(kept), entry, n, collect_set);
    }
    entry += n;
  }
}

}  // namespace mergecore::cpu
