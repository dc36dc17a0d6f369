// The loops of the float32 blend (quick_bounds.h).
#include "quick_run.h"

#include <algorithm>
#include <type_traits>

#include "flags.h"

namespace mergecore::cpu {

namespace {

constexpr int kWords = kQuick / 2;
constexpr int kFew = 6;  // models: with the base and the result, the ways of an L1 cache

enum class End { none, bounded, exact };

// sum + b a; a zero sum leaves the base bit for bit, the sign of its zeros included.
inline __attribute__((always_inline)) float with_base(float sum, float of_base, float a) {
  const float product = of_base * a;
  return sum == 0.0f ? product : product + sum;
}

// Of one block: largest[i] is what bounds the error of entry i; with `exact`, undecided[i] is set
// where its numbers are too far from each other. greatest[i] is the largest of all blocks.
inline __attribute__((always_inline)) void find_sizes(const QuickRun& run, int64_t place,
                                                      uint16_t* largest, uint16_t* greatest,
                                                      uint16_t* undecided) {
  alignas(64) uint16_t smallest[kQuick];  // less one: beside it zeros do not count
  const int begin = run.base == nullptr ? 0 : -1;
  const bool many = run.count > kFew;
  for (int m = begin; m < run.count; ++m) {
    const uint16_t* numbers = (m < 0 ? run.base : run.models[m]) + place;
    many ? fetch_near(numbers + 2 * kFetched) : fetch<0>(numbers + kFetched);
    if (m == begin) {
      for (int i = 0; i < kQuick; ++i) largest[i] = numbers[i] & 0x7fffu;
    } else {
      for (int i = 0; i < kQuick; ++i) {
        const uint16_t size = numbers[i] & 0x7fffu;
        largest[i] = size > largest[i] ? size : largest[i];
      }
    }
    if (!run.exact) continue;
    if (m == begin) {
      for (int i = 0; i < kQuick; ++i) {
        smallest[i] = static_cast<uint16_t>((numbers[i] & 0x7fffu) - 1);
      }
    } else {
      for (int i = 0; i < kQuick; ++i) {
        const uint16_t less = static_cast<uint16_t>((numbers[i] & 0x7fffu) - 1);
        smallest[i] = less < smallest[i] ? less : smallest[i];
      }
    }
  }
  for (int i = 0; i < kQuick; ++i) {
    greatest[i] = largest[i] > greatest[i] ? largest[i] : greatest[i];
  }
  const uint16_t spread = run.spread, least = run.least;
  if (run.exact) {
    for (int i = 0; i < kQuick; ++i) {
      undecided[i] = static_cast<uint16_t>(largest[i] - smallest[i]) > spread;
    }
  } else {
    for (int i = 0; i < kQuick; ++i) {
      const uint16_t size = largest[i] > least ? largest[i] : least;
      largest[i] = largest[i] == 0 ? 0 : size;
    }
  }
}

// Adds a block's entries of kModels models to the sums, which begin with them if they are the
// first; where they are the last, stores results, and with End::bounded what is undecided.
template <int kModels, bool kBase, bool kFirst, End kEnd>
inline __attribute__((always_inline)) void add_models(const QuickRun& run, int64_t place, int first,
                                                      const float* coefficients, float* even,
                                                      float* odd, const uint16_t* largest,
                                                      uint16_t* undecided) {
  const Word* model[kModels];
  for (int m = 0; m < kModels; ++m) {
    model[m] = reinterpret_cast<const Word*>(run.models[first + m] + place);
  }
  // Not auto, which would forget that words may lie anywhere.
  const Word* base = reinterpret_cast<const Word*>(run.base + (kBase ? place : 0));
  const Word* size = reinterpret_cast<const Word*>(largest);
  Word* out = reinterpret_cast<Word*>(run.out + place);
  Word* differ = reinterpret_cast<Word*>(undecided);
  const float* of_lower = coefficients + first * kQuick;
  const float* of_upper = of_lower + kWords;
  const float of_base = run.of_base;
#pragma GCC ivdep
  for (int i = 0; i < kWords; ++i) {
    const uint32_t a = kBase ? base[i] : 0;
    float w0 = kFirst ? -0.0f : even[i];  // the neutral element, as in blend.cpp
    float w1 = kFirst ? -0.0f : odd[i];
#pragma GCC unroll 4
    for (int m = 0; m < kModels; ++m) {
      const uint32_t x = model[m][i];
      const float d0 = kBase ? lower(x) - lower(a) : lower(x);
      const float d1 = kBase ? upper(x) - upper(a) : upper(x);
      w0 = fmaf(of_lower[m * kQuick + i], d0, w0);
      w1 = fmaf(of_upper[m * kQuick + i], d1, w1);
    }
    if constexpr (kEnd == End::none) {
      even[i] = w0;
      odd[i] = w1;
      continue;
    }
    if constexpr (kBase) {
      w0 = with_base(w0, of_base, lower(a));
      w1 = with_base(w1, of_base, upper(a));
    }
    if constexpr (kEnd == End::exact) {
      out[i] = packed(rounded(w0), rounded(w1));
    } else {
      const float bound0 = of_lower[kModels * kQuick + i], bound1 = of_upper[kModels * kQuick + i];
      const float x0 = lower(size[i]), x1 = upper(size[i]);
      const uint32_t low0 = bit_cast<uint32_t>(fmaf(-bound0, x0, w0)) + 0x8000u;
      const uint32_t low1 = bit_cast<uint32_t>(fmaf(-bound1, x1, w1)) + 0x8000u;
      const uint32_t high0 = bit_cast<uint32_t>(fmaf(bound0, x0, w0)) + 0x8000u;
      const uint32_t high1 = bit_cast<uint32_t>(fmaf(bound1, x1, w1)) + 0x8000u;
      differ[i] = packed(low0 ^ high0, low1 ^ high1);
      out[i] = packed(high0, high1);
    }
  }
}

template <bool kBase, End kEnd>
inline __attribute__((always_inline)) void add_block(const QuickRun& run, int64_t place,
                                                     const float* coefficients,
                                                     const uint16_t* largest, uint16_t* undecided) {
  alignas(64) float even[kWords], odd[kWords];
  int begin = 0;
  auto add = [&](auto models, auto first, auto end) __attribute__((always_inline)) {
    add_models<models.value, kBase, first.value, end.value>(run, place, begin, coefficients, even,
                                                            odd, largest, undecided);
    begin += 4;
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
        return add(std::integral_constant<int, 4>{}, first, kLast);
    }
  };
  constexpr std::integral_constant<int, 4> kFour;
  if (run.count <= 4) return add_last(std::true_type{});
  add(kFour, std::true_type{}, kNot);
  while (begin + 4 < run.count) add(kFour, std::false_type{}, kNot);
  add_last(std::false_type{});
}

}  // namespace

MERGECORE_CLONES
Stored store_run(const QuickRun& run, int n, uint16_t* undecided) {
  alignas(64) uint16_t greatest[kQuick];
  std::fill_n(greatest, kQuick, uint16_t{0});
  const float* c = run.coefficients;
  for (int place = 0; place < n; place += kQuick, c += run.stride) {
    alignas(64) uint16_t largest[kQuick];
    uint16_t* open = undecided + place;
    if (run.count <= kFew) fetch<1>(run.out + place + kFetched);
    find_sizes(run, place, largest, greatest, open);
    if (run.base == nullptr) {
      run.exact ? add_block<false, End::exact>(run, place, c, largest, open)
                : add_block<false, End::bounded>(run, place, c, largest, open);
    } else {
      run.exact ? add_block<true, End::exact>(run, place, c, largest, open)
                : add_block<true, End::bounded>(run, place, c, largest, open);
    }
  }
  uint16_t over = 0, any = 0;
  for (int i = 0; i < kQuick; ++i) over |= greatest[i] > run.greatest;
  for (int i = 0; i < n; ++i) any |= undecided[i];
  return over != 0 ? Stored::nothing : any != 0 ? Stored::most : Stored::all;
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
    const uint16_t size = model[i] & 0x7fffu;
    greatest = size > greatest ? size : greatest;
  }
  for (int i = 0; i < n; ++i) {  // by a mask: of 32 and 16 bits AVX2 makes no choice
    const auto keep = static_cast<uint16_t>(-static_cast<int>(numbers[i] > last_dropped));
    kept[i] = base[i] ^ ((model[i] ^ base[i]) & keep);
  }
  return greatest;
}

}  // namespace mergecore::cpu
