// The loops of the float32 blend (quick_bounds.h).
#include "quick_run.h"

#include <algorithm>
#include <type_traits>

#include "flags.h"

namespace mergecore::cpu {

namespace {

constexpr int kWords = kQuick / 2;
constexpr int kFew = 7;     // inputs: with the result, the ways of an L1 cache
constexpr int kAdded = 4;   // inputs that are added up in registers
constexpr int kSpan = 256;  // entries that are taken through one step after the other
// Entries between use and what is asked for: the next span, but for the blocks that are under way.
// Into the L2 cache earlier, for there is room.
constexpr int kNext = kSpan + 128, kNextNear = 3 * kSpan;

enum class End { none, bounded, exact, divided };

// What the inputs so far make of a span's entries.
struct Partial {
  alignas(64) uint16_t largest[kSpan];
  alignas(64) uint16_t smallest[kSpan];  // less one: beside it zeros do not count
  alignas(64) float sums[kSpan];         // [block][even, odd]
};

// Counts kInputs inputs in. Of smallest numbers only with kExact.
template <int kInputs, bool kFirst, bool kExact>
inline __attribute__((always_inline)) void add_sizes(const QuickRun& run, int64_t span, int first,
                                                     int n, Partial& partial) {
  for (int place = 0; place < n; place += kQuick) {
    const uint16_t* input[kInputs];
    for (int m = 0; m < kInputs; ++m) input[m] = run.inputs[first + m] + span + place;
    uint16_t* largest = partial.largest + place;
    uint16_t* smallest = partial.smallest + place;
#pragma GCC ivdep
    for (int i = 0; i < kQuick; ++i) {
      uint16_t most = size_of(input[0][i]);
      if constexpr (!kFirst) most = most > largest[i] ? most : largest[i];
#pragma GCC unroll 4
      for (int m = 1; m < kInputs; ++m) {
        const uint16_t size = size_of(input[m][i]);
        most = size > most ? size : most;
      }
      largest[i] = most;
    }
    if constexpr (!kExact) continue;
#pragma GCC ivdep
    for (int i = 0; i < kQuick; ++i) {
      uint16_t least = less_one(input[0][i]);
      if constexpr (!kFirst) least = least < smallest[i] ? least : smallest[i];
#pragma GCC unroll 4
      for (int m = 1; m < kInputs; ++m) {
        const uint16_t less = less_one(input[m][i]);
        least = less < least ? less : least;
      }
      smallest[i] = least;
    }
  }
}

// With kExact, undecided[i] is set where an entry's numbers are too far from each other; else
// partial.largest becomes what bounds errors. Returns the greatest number.
template <bool kExact>
inline __attribute__((always_inline)) uint16_t end_sizes(const QuickRun& run, int n,
                                                         Partial& partial, uint16_t* undecided) {
  const uint16_t spread = run.spread, least = run.least;
  uint16_t* largest = partial.largest;
  uint16_t greatest = 0;
  for (int i = 0; i < n; ++i) {
    greatest = largest[i] > greatest ? largest[i] : greatest;
    if constexpr (kExact) {
      undecided[i] = static_cast<uint16_t>(largest[i] - partial.smallest[i]) > spread;
    } else {
      const uint16_t size = largest[i] > least ? largest[i] : least;
      largest[i] = largest[i] == 0 ? 0 : size;
    }
  }
  return greatest;
}

// Adds kInputs inputs to the sums, which begin with them if they are the first; where they are the
// last, stores results, and with End::bounded what is undecided.
template <int kInputs, bool kFirst, bool kColumns, End kEnd>
inline __attribute__((always_inline)) void add_inputs(const QuickRun& run, int64_t span, int first,
                                                      int n, Partial& partial,
                                                      uint16_t* undecided) {
  const Word* input[kInputs];  // not auto, which would forget that words may lie anywhere
  for (int m = 0; m < kInputs; ++m) {
    input[m] = reinterpret_cast<const Word*>(run.inputs[first + m] + span);
  }
  const Word* sizes = reinterpret_cast<const Word*>(partial.largest);
  Word* out = reinterpret_cast<Word*>(run.out + span);
  Word* differ = reinterpret_cast<Word*>(undecided);
  const float* of_lower =
      run.coefficients + (kColumns ? span * run.count + first * kQuick : int64_t{first});
  float same[kInputs];
  for (int m = 0; m < kInputs; ++m) same[m] = kColumns ? 0.0f : of_lower[m];
  const float divisor = run.divisor;
  const float* bounds = run.bounds + (kColumns ? span / kQuick : 0);
  const int64_t stride = int64_t{run.count} * kQuick;
  const bool many = run.count > kFew;
  for (int place = 0; place < n; place += kQuick, of_lower += stride) {
    for (int m = 0; m < kInputs; ++m) {
      const uint16_t* from = run.inputs[first + m] + span + place;
      many ? fetch_near(from + kNextNear) : fetch<0>(from + kNext);
    }
    if (kEnd != End::none && !many) fetch<1>(run.out + span + place + kNext);
    const float* of_upper = of_lower + kWords;
    float* even = partial.sums + place;
    float* odd = even + kWords;
    const float bound = bounds[kColumns ? place / kQuick : 0];
    const int word = place / 2;
#pragma GCC ivdep
    for (int i = 0; i < kWords; ++i) {
      float w0 = kFirst ? -0.0f : even[i];  // the neutral element, as in blend.cpp
      float w1 = kFirst ? -0.0f : odd[i];
#pragma GCC unroll 4
      for (int m = 0; m < kInputs; ++m) {
        const uint32_t x = input[m][word + i];
        w0 = fmaf(kColumns ? of_lower[m * kQuick + i] : same[m], lower(x), w0);
        w1 = fmaf(kColumns ? of_upper[m * kQuick + i] : same[m], upper(x), w1);
      }
      if constexpr (kEnd == End::none) {
        even[i] = w0;
        odd[i] = w1;
      } else if constexpr (kEnd == End::exact) {
        out[word + i] = packed(rounded(w0), rounded(w1));
      } else if constexpr (kEnd == End::divided) {
        out[word + i] = packed(rounded(w0 / divisor), rounded(w1 / divisor));
      } else {
        const float x0 = lower(sizes[word + i]), x1 = upper(sizes[word + i]);
        const uint32_t low0 = bit_cast<uint32_t>(fmaf(-bound, x0, w0)) + 0x8000u;
        const uint32_t low1 = bit_cast<uint32_t>(fmaf(-bound, x1, w1)) + 0x8000u;
        const uint32_t high0 = bit_cast<uint32_t>(fmaf(bound, x0, w0)) + 0x8000u;
        const uint32_t high1 = bit_cast<uint32_t>(fmaf(bound, x1, w1)) + 0x8000u;
        const uint32_t result = packed(high0, high1);
        differ[word + i] = packed(low0, low1) ^ result;
        out[word + i] = result;
      }
    }
  }
}

// Sets undecided[i] where a quotient may be a tie that is none in float64.
inline __attribute__((always_inline)) void find_ties(const QuickRun& run, int64_t span, int n,
                                                     const Partial& partial, uint16_t* undecided) {
  const uint16_t* out = run.out + span;
  const uint16_t tie = run.tie;
  for (int i = 0; i < n; ++i) {
    undecided[i] |= partial.largest[i] > most_of_ties(size_of(out[i]), tie);
  }
}

// Returns the greatest number.
template <bool kColumns, End kEnd>
inline __attribute__((always_inline)) uint16_t blend_span(const QuickRun& run, int64_t span, int n,
                                                          uint16_t* undecided) {
  constexpr bool kExact = kEnd != End::bounded;
  Partial partial;
  uint16_t greatest = 0;
  int begin = 0;
  auto add = [&](auto inputs, auto first, auto end) __attribute__((always_inline)) {
    add_sizes<inputs.value, first.value, kExact>(run, span, begin, n, partial);
    if (end.value != End::none) greatest = end_sizes<kExact>(run, n, partial, undecided);
    add_inputs<inputs.value, first.value, kColumns, end.value>(run, span, begin, n, partial,
                                                               undecided);
    if (end.value == End::divided) find_ties(run, span, n, partial, undecided);
    begin += inputs.value;
  };
  constexpr std::integral_constant<End, End::none> kNot;
  auto add_last = [&](auto first) __attribute__((always_inline)) {
    constexpr std::integral_constant<End, kEnd> kLast;
    switch (run.count - begin) {
      case 1:
        return add(std::integral_constant<int, 1>{}, first, kLast);
      case 2:
        return add(std::integral_constant<int, 2>{}, first, kLast);
      case 3:
        return add(std::integral_constant<int, 3>{}, first, kLast);
      default:
        return add(std::integral_constant<int, kAdded>{}, first, kLast);
    }
  };
  constexpr std::integral_constant<int, kAdded> kSome;
  if (run.count <= kAdded) {
    add_last(std::true_type{});
    return greatest;
  }
  add(kSome, std::true_type{}, kNot);
  while (begin + kAdded < run.count) add(kSome, std::false_type{}, kNot);
  add_last(std::false_type{});
  return greatest;
}

// The smallest magnitude of n results.
inline __attribute__((always_inline)) uint16_t smallest_of(const uint16_t* results, int n) {
  uint16_t smallest = 0x7fffu;
  for (int i = 0; i < n; ++i) {
    const uint16_t size = size_of(results[i]);
    smallest = size < smallest ? size : smallest;
  }
  return smallest;
}

// Zeros beside a base: b a where all numbers are zeros, and undecided elsewhere.
MERGECORE_CLONES
void settle_zeros(const QuickRun& run, int n, uint16_t* undecided) {
  for (int place = 0; place < n; place += kQuick) {
    uint16_t* out = run.out + place;
    if (smallest_of(out, kQuick) != 0) continue;
    alignas(64) uint16_t any[kQuick] = {};
    for (int m = 0; m < run.count; ++m) {
      const uint16_t* numbers = run.inputs[m] + place;
      for (int i = 0; i < kQuick; ++i) any[i] |= size_of(numbers[i]);
    }
    const uint16_t* base = run.inputs[0] + place;
    uint16_t* open = undecided + place;
    for (int i = 0; i < kQuick; ++i) {
      const bool zero = size_of(out[i]) == 0;
      open[i] = zero ? any[i] : open[i];
      out[i] = zero && any[i] == 0 ? base[i] ^ run.sign : out[i];
    }
  }
}

}  // namespace

template <bool kColumns, End kEnd>
inline __attribute__((always_inline)) uint16_t blend_run(const QuickRun& run, int n,
                                                         uint16_t* undecided) {
  // Coefficients are read in the order in which they lie.
  const int step = kColumns && run.count > kAdded ? kQuick : kSpan;
  uint16_t greatest = 0;
  for (int span = 0; span < n; span += step) {
    const int number = std::min(n - span, step);
    greatest = std::max(greatest, blend_span<kColumns, kEnd>(run, span, number, undecided + span));
  }
  return greatest;
}

MERGECORE_CLONES
Stored store_run(const QuickRun& run, int n, uint16_t* undecided) {
  uint16_t greatest;
  if (run.of_columns) {
    greatest = run.exact ? blend_run<true, End::exact>(run, n, undecided)
                         : blend_run<true, End::bounded>(run, n, undecided);
  } else if (run.exact && run.divisor != 1.0f) {
    greatest = blend_run<false, End::divided>(run, n, undecided);
  } else {
    greatest = run.exact ? blend_run<false, End::exact>(run, n, undecided)
                         : blend_run<false, End::bounded>(run, n, undecided);
  }
  if (greatest > run.greatest) return Stored::nothing;
  if (run.based && smallest_of(run.out, n) == 0) settle_zeros(run, n, undecided);
  uint16_t any = 0;
  for (int i = 0; i < n; ++i) any |= undecided[i];
  return any != 0 ? Stored::most : Stored::all;
}

int find_set(const uint16_t* flags, int n, uint16_t* places) {
  int count = 0;
  for (int first = 0; first < n; first += kPlaces) {
    for (uint64_t bits = bits_of(flags + first); bits != 0; bits &= bits - 1) {
      places[count++] = static_cast<uint16_t>(first + __builtin_ctzll(bits));
    }
  }
  return count;
}

MERGECORE_CLONES
uint16_t drop_run(const uint16_t* base, const uint16_t* model, const uint32_t* numbers,
                  uint32_t last_dropped, int n, uint16_t* kept) {
  uint16_t greatest = 0;
  for (int i = 0; i < n; ++i) {
    const uint16_t size = size_of(model[i]);
    greatest = size > greatest ? size : greatest;
  }
  for (int i = 0; i < n; ++i) {  // by a mask: of 32 and 16 bits AVX2 makes no choice
    const auto keep = static_cast<uint16_t>(-static_cast<int>(numbers[i] > last_dropped));
    kept[i] = base[i] ^ ((model[i] ^ base[i]) & keep);
  }
  return greatest;
}

}  // namespace mergecore::cpu
