#include "narrow.h"

namespace mergecore::cpu {

namespace {

// Numbers of 8 significant bits have an exact difference of 24 where their exponents differ by 15
// at most. From 2^-100 on they are multiples of 2^-107, and so is it: no subnormal number. Beside 0
// anything is exact. Below 2^127 no difference is infinite.
constexpr uint16_t kMostApart = 15 << 7;
constexpr uint16_t kLeastSize = (127 - 100) << 7;
constexpr uint16_t kTooLarge = (127 + 127) << 7;

// Of `kPlaces` places, each by itself: the greatest gap, the least size less 1, the greatest size.
struct alignas(64) Extremes {
  uint16_t apart[kPlaces], least[kPlaces], most[kPlaces];

  MERGECORE_INLINE Extremes() {
    std::fill_n(apart, kPlaces, uint16_t{0});
    std::fill_n(least, kPlaces, uint16_t{0xffff});
    std::fill_n(most, kPlaces, uint16_t{0});
  }

  MERGECORE_INLINE void add(const uint16_t* x, const uint16_t* a, int n) {
    for (int i = 0; i < n; ++i) {
      const uint16_t size = x[i] & 0x7fffu, other = a[i] & 0x7fffu;
      const uint16_t large = size > other ? size : other, small = size > other ? other : size;
      const uint16_t nonzero = small == 0 ? large : small;
      const uint16_t gap = static_cast<uint16_t>(large - nonzero);
      const uint16_t less = static_cast<uint16_t>(nonzero - 1);  // of two zeros: the greatest
      apart[i] = gap > apart[i] ? gap : apart[i];
      least[i] = less < least[i] ? less : least[i];
      most[i] = large > most[i] ? large : most[i];
    }
  }
};

inline __attribute__((always_inline)) void subtract(const uint16_t* x, const uint16_t* a, int n,
                                                    uint32_t* keys) {
  for (int i = 0; i < n; ++i) {
    keys[i] = bit_cast<uint32_t>(BF16::load(x[i]) - BF16::load(a[i])) & 0x7fffffffu;
  }
}

struct Split {
  int32_t hot, inside, above, zeros;
};

// Keys from `first` to below `last` other than the hot one have all bits of inside[i] set, others
// none.
MERGECORE_CLONES
Split split_keys(const uint32_t* keys, int n, uint32_t first, uint32_t last, uint32_t hot,
                 uint8_t* inside) {
  const uint32_t width = last - first;
  Split found = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) {
    const bool is_hot = keys[i] == hot;
    const bool is_inside = (keys[i] - first < width) & !is_hot;
    inside[i] = static_cast<uint8_t>(-static_cast<int>(is_inside));
    found.hot += is_hot;
    found.inside += is_inside;
    found.above += keys[i] >= last;
    found.zeros += keys[i] == 0;
  }
  return found;
}

}  // namespace

MERGECORE_CLONES
bool narrow_keys_of(const uint16_t* x, const uint16_t* a, int n, uint32_t* keys) {
  Extremes found;
  int place = 0;
  for (; place + kPlaces <= n; place += kPlaces) {
    // Few lines at a time, among arithmetic.
    prefetch(x + place + kChunk, 2 * kPlaces);
    prefetch(a + place + kChunk, 2 * kPlaces);
    found.add(x + place, a + place, kPlaces);
    subtract(x + place, a + place, kPlaces, keys + place);
  }
  found.add(x + place, a + place, n - place);
  subtract(x + place, a + place, n - place, keys + place);
  uint16_t wrong = 0;
  for (int i = 0; i < kPlaces; ++i) {
    wrong |= found.apart[i] > kMostApart;
    wrong |= found.least[i] < kLeastSize;
    wrong |= found.most[i] >= kTooLarge;
  }
  return wrong == 0;
}

NarrowBins::NarrowBins(int wide_shift, int64_t offset, int64_t bins)
    : shift_(wide_shift - kNarrow), offset_(offset - (kRebias >> wide_shift)), bins_(bins) {
  // Both limits are multiples of a bin's width, so that bins lie inside or outside as a whole.
  const auto key_of = [&](int64_t bin) {
    const int64_t key = (offset_ + bin) * (int64_t{1} << shift_);
    return static_cast<uint32_t>(std::clamp<int64_t>(key, kLeastKey, kInfiniteKey));
  };
  first_ = key_of(2);
  last_ = key_of(bins - 2);
}

void NarrowBins::add(const uint32_t* keys, int n, uint32_t* counts) {
  alignas(64) uint8_t inside[kChunk];
  const Split found = split_keys(keys, n, first_, last_, hot_, inside);
  const int beyond = n - found.zeros - found.inside - found.hot;
  counts[0] += static_cast<uint32_t>(found.zeros);
  counts[2] += static_cast<uint32_t>(beyond - found.above);
  counts[2 * (bins_ - 2)] += static_cast<uint32_t>(found.above);
  if (found.hot != 0) counts[place_of(hot_)] += static_cast<uint32_t>(found.hot);
  if (found.inside == 0) return;
  std::fill(inside + n, inside + (n + kPlaces - 1) / kPlaces * kPlaces, uint8_t{0});
  uint32_t key = kInfiniteKey;
  for (int start = 0; start < n; start += kPlaces) {
    for (uint64_t bits = bits_of(inside + start); bits != 0; bits &= bits - 1) {
      key = keys[start + __builtin_ctzll(bits)];
      ++counts[place_of(key)];
    }
  }
  const int64_t place = place_of(key);
  const bool is_end = place % 2 == 0;
  if (is_end && (hot_ == kInfiniteKey || counts[place] > counts[place_of(hot_)])) hot_ = key;
}

MERGECORE_CLONES
Found find_keys(const uint32_t* keys, int n, int32_t equal, int32_t first, int32_t last) {
  Found found = {0, 0};
  for (int i = 0; i < n; ++i) {
    const auto key = static_cast<int32_t>(keys[i]);
    found.equal += key == equal;
    found.within += (key >= first) & (key <= last);
  }
  return found;
}

}  // namespace mergecore::cpu
