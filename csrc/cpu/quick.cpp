// Blends of bf16 by float32, where float32 is enough to tell which bf16 number the float64 result
// rounds to: for nearly all entries, at several times the speed. The others wait for the float64
// blend (blend.cpp).
//
// Bounded. v is the value that blend.cpp computes, X the largest of |a| and all |x_n| of an entry,
// b the base's coefficient, and S = |b| + 2 sum_n |c_n|, or sum_n |c_n| without a base, so that
// |b a| + sum_n |c_n d_n| <= S X. With u = 2^-24, rounding d_n, c_n, b and b a, N fused
// multiply-adds and the last sum make float32's value w differ from v by at most (N + 3) u S X, to
// first order; float64 and its rounding to 40 bits add less than 2^-15 u S X. One more u S X covers
// the rounding of w - e and w + e. So with e >= (N + 6) u S X v lies strictly between the two, and
// where both round to one bf16 number, v does. Small X count as such that e is at least 2^-120:
// beside it underflow counts for nothing. Where X is 0, everything is exact.
//
// Exact. Let 2^k c_n and 2^k b be whole numbers. An entry's numbers other than 0 are multiples of
// 2^-7 q, if q is the power of two at or below the least of them, so all terms and sums are
// multiples of 2^(-7-k) q, and none is larger than S X. So float32, which has 24 bits, rounds
// nothing where S X <= 2^(17-k) q, nor does it differences where 2 X <= 2^17 q: w is v, ties
// included, and rounding to 40 bits leaves it as it is.
//
// Two neighbours are computed as the halves of a word, the first being the lower one (every machine
// that this runs on is little-endian): widening and packing takes no shuffles.
#include "quick.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace mergecore::cpu {

namespace {

constexpr double kSmallest = 0x1p-60;  // of coefficients, so that products are normal numbers
constexpr double kLargest = 0x1p60;
constexpr double kLeastError = 0x1p-120;
constexpr double kGreatest = 0x1p120;  // of S X, with room below float32's largest number
constexpr int kFewBinades = 8;         // between an entry's numbers: nearly always they are closer
constexpr int kWords = kQuick / 2;

using Word [[gnu::may_alias, gnu::aligned(2)]] = uint32_t;
using Four [[gnu::may_alias, gnu::aligned(2)]] = uint64_t;  // entries

}  // namespace

// Whole blocks of kQuick entries of one row; pointers are to the first.
struct QuickBlend::Run {
  int count;
  const uint16_t* base;  // nullptr: none
  const uint16_t* models[kMaxModels];
  const float* coefficients;  // [block][models, bound][lower and upper halves][kWords]
  int64_t stride;             // of blocks
  float of_base;
  bool exact;
  uint16_t spread, least, greatest;
  uint16_t* out;
};

namespace {

using Run = QuickBlend::Run;

enum class End { none, bounded, exact };

inline __attribute__((always_inline)) float lower(uint32_t word) {
  return bit_cast<float>(word << 16);
}

inline __attribute__((always_inline)) float upper(uint32_t word) {
  return bit_cast<float>(word & 0xffff0000u);
}

inline __attribute__((always_inline)) uint32_t packed(uint32_t lower, uint32_t upper) {
  return (upper & 0xffff0000u) | lower >> 16;
}

// sum + b a; a zero sum leaves the base bit for bit, the sign of its zeros included.
inline __attribute__((always_inline)) float with_base(float sum, float of_base, float a) {
  const float product = of_base * a;
  return sum == 0.0f ? product : product + sum;
}

// To nearest even in the upper half.
inline __attribute__((always_inline)) uint32_t rounded(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return bits + ((bits & 0x10000u) != 0 ? 0x8000u : 0x7fffu);
}

// Of one block: largest[i] is what bounds the error of entry i; with `exact`, undecided[i] is set
// where its numbers are too far from each other. False where a number is not finite or very large.
inline __attribute__((always_inline)) bool find_sizes(const Run& run, int64_t place,
                                                      uint16_t* largest, uint16_t* undecided) {
  alignas(64) uint16_t smallest[kQuick];  // less one: beside it zeros do not count
  std::fill_n(largest, kQuick, uint16_t{0});
  std::fill_n(smallest, kQuick, uint16_t{0xffff});
  for (int m = run.base == nullptr ? 0 : -1; m < run.count; ++m) {
    const uint16_t* numbers = (m < 0 ? run.base : run.models[m]) + place;
    for (int i = 0; i < kQuick; ++i) {
      const uint16_t size = numbers[i] & 0x7fffu;
      largest[i] = size > largest[i] ? size : largest[i];
    }
    if (!run.exact) continue;
    for (int i = 0; i < kQuick; ++i) {
      const uint16_t less = static_cast<uint16_t>((numbers[i] & 0x7fffu) - 1);
      smallest[i] = less < smallest[i] ? less : smallest[i];
    }
  }
  const uint16_t spread = run.spread, least = run.least, greatest = run.greatest;
  uint16_t found = 0;
  for (int i = 0; i < kQuick; ++i) found |= largest[i] > greatest;
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
  return found == 0;
}

// Adds a block's entries of kModels models to the sums; where they are the last, stores results,
// and with End::bounded what is undecided.
template <int kModels, bool kBase, End kEnd>
inline __attribute__((always_inline)) void add_models(const Run& run, int64_t place, int first,
                                                      const float* coefficients, float* even,
                                                      float* odd, const uint16_t* largest,
                                                      uint16_t* undecided) {
  const Word* model[kModels];
  for (int m = 0; m < kModels; ++m) {
    model[m] = reinterpret_cast<const Word*>(run.models[first + m] + place);
  }
  const auto* base = reinterpret_cast<const Word*>(run.base + (kBase ? place : 0));
  const auto* size = reinterpret_cast<const Word*>(largest);
  auto* out = reinterpret_cast<Word*>(run.out + place);
  auto* differ = reinterpret_cast<Word*>(undecided);
  const float* of_lower = coefficients + first * kQuick;
  const float* of_upper = of_lower + kWords;
  const float of_base = run.of_base;
#pragma GCC ivdep
  for (int i = 0; i < kWords; ++i) {
    const uint32_t a = kBase ? base[i] : 0;
    float w0 = even[i], w1 = odd[i];
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
inline __attribute__((always_inline)) void add_block(const Run& run, int64_t place,
                                                     const float* coefficients,
                                                     const uint16_t* largest,
                                                     uint16_t* undecided) {
  alignas(64) float even[kWords], odd[kWords];
  std::fill_n(even, kWords, -0.0f);  // the neutral element, as in blend.cpp
  std::fill_n(odd, kWords, -0.0f);
  int first = 0;
  auto add = [&](auto models, auto end) __attribute__((always_inline)) {
    add_models<models.value, kBase, end.value>(run, place, first, coefficients, even, odd, largest,
                                               undecided);
  };
  constexpr std::integral_constant<End, kEnd> kLast;
  for (; first + 4 < run.count; first += 4) {
    add(std::integral_constant<int, 4>{}, std::integral_constant<End, End::none>{});
  }
  switch (run.count - first) {
    case 1:
      return add(std::integral_constant<int, 1>{}, kLast);
    case 2:
      return add(std::integral_constant<int, 2>{}, kLast);
    case 3:
      return add(std::integral_constant<int, 3>{}, kLast);
    default:
      return add(std::integral_constant<int, 4>{}, kLast);
  }
}

// Stores the results of n entries; undecided[i] is not 0 where float32 does not tell. False, and
// nothing to be used, where a number is not finite or very large.
MERGECORE_CLONES
bool store_run(const Run& run, int n, uint16_t* undecided) {
  const float* c = run.coefficients;
  for (int place = 0; place < n; place += kQuick, c += run.stride, undecided += kQuick) {
    alignas(64) uint16_t largest[kQuick];
    if (!find_sizes(run, place, largest, undecided)) return false;
    if (run.base == nullptr) {
      run.exact ? add_block<false, End::exact>(run, place, c, largest, undecided)
                : add_block<false, End::bounded>(run, place, c, largest, undecided);
    } else {
      run.exact ? add_block<true, End::exact>(run, place, c, largest, undecided)
                : add_block<true, End::bounded>(run, place, c, largest, undecided);
    }
  }
  return true;
}

// Bit i is set where flags[i] is not 0, i < kQuick.
MERGECORE_CLONES
uint64_t set_bits(const uint16_t* flags) {
  uint64_t any = 0;
  const auto* fours = reinterpret_cast<const Four*>(flags);
  for (int i = 0; i < kQuick / 4; ++i) any |= fours[i];
  if (any == 0) return 0;
  alignas(64) uint16_t ones[kQuick];
  for (int i = 0; i < kQuick; ++i) ones[i] = flags[i] != 0;
  uint64_t bits = 0;
  for (int i = 0; i < kQuick / 4; ++i) {
    const uint64_t four = reinterpret_cast<const Four*>(ones)[i];
    // Each product of a one and a power has a place of its own; bits 48 to 51 are the four ones.
    bits |= (four * (1ull << 48 | 1ull << 33 | 1ull << 18 | 1ull << 3)) >> 48 << 4 * i;
  }
  return bits;
}

// kept[i] = model[i], or the base where it is dropped (where there is none, a zero of its sign).
// Returns the largest magnitude of the model.
MERGECORE_CLONES
uint16_t drop_run(const uint16_t* base, const uint16_t* model, const uint32_t* numbers,
                  uint32_t last_dropped, int n, uint16_t* kept) {
  uint16_t greatest = 0;
  for (int i = 0; i < n; ++i) {
    const uint16_t size = model[i] & 0x7fffu;
    greatest = size > greatest ? size : greatest;
  }
  if (base != nullptr) {
    for (int i = 0; i < n; ++i) kept[i] = numbers[i] > last_dropped ? model[i] : base[i];
  } else {
    for (int i = 0; i < n; ++i) {
      kept[i] = model[i] & (numbers[i] > last_dropped ? 0xffffu : 0x8000u);
    }
  }
  return greatest;
}

bool is_tame(double coefficient) {
  const double size = fabs(coefficient);
  return size == 0.0 || (size >= kSmallest && size <= kLargest);
}

// The least k >= 0 for which 2^k times the number is whole; large for what has more than 16 bits.
int steps(double number) {
  int exponent;
  const double whole = std::ldexp(std::frexp(number, &exponent), 16);
  if (number == 0.0) return 0;
  if (whole != std::floor(whole)) return 1000;
  const int zeros = __builtin_ctz(static_cast<unsigned>(fabs(whole)));
  return std::max(0, 16 - zeros - exponent);
}

// The bits of a positive number cut to bf16.
uint16_t cut(double number) {
  return static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(number)) >> 16);
}

// The scale of kept deltas of a model.
double scale_of(const Inputs& in, int model) {
  return in.drops != nullptr && drops_any(in.drops[model]) ? in.drops[model].scale : 1.0;
}

}  // namespace

QuickBlend::QuickBlend(const Blend& blend) : blend_(blend), of_rows_(blend.axis == Axis::rows) {
  const Inputs& in = blend.inputs;
  const auto is_bf16 = [](const Matrix& matrix) { return matrix.dtype == Dtype::bf16; };
  if (blend.out_dtype != Dtype::bf16 || in.count == 0) return;
  if (in.base.data != nullptr && !is_bf16(in.base)) return;
  if (!std::all_of(in.models, in.models + in.count, is_bf16)) return;
  if (in.drops != nullptr && std::any_of(in.drops, in.drops + in.count, selects)) return;
  applies_ = take_coefficients();
  if (!applies_) return;
  dropped_.resize(in.drops == nullptr ? 0 : static_cast<size_t>(in.count) * kChunk);
  numbers_.resize(static_cast<size_t>(in.count + 1) * kChunk);
  gathered_coefficients_.resize(static_cast<size_t>(in.count) * kChunk);
  places_.resize(kChunk);
}

// False where float32 is not for them.
bool QuickBlend::take_coefficients() {
  const Inputs& in = blend_.inputs;
  const bool based = in.base.data != nullptr;
  const int64_t first = of_rows_ ? in.window.first_row : 0;
  const int64_t number = of_rows_                       ? in.window.rows
                         : blend_.axis == Axis::columns ? in.window.columns
                                                        : 1;
  of_base_ = based ? blend_.base_coefficient : 0.0;
  if (!is_tame(of_base_)) return false;
  std::vector<double> sums(static_cast<size_t>(number), fabs(of_base_));  // S
  int most_steps = steps(of_base_);
  for (int m = 0; m < in.count; ++m) {
    const double* from = blend_.coefficients + m * blend_.stride + first;
    const double scale = scale_of(in, m);
    bool tame = true;
    for (int64_t i = 0; i < number; ++i) {
      const double c = from[i] * scale;
      tame &= is_tame(c);
      sums[static_cast<size_t>(i)] += based ? 2.0 * fabs(c) : fabs(c);
    }
    if (!tame) return false;
    for (int64_t i = 0; i < number && most_steps < 16; ++i) {
      most_steps = std::max(most_steps, steps(from[i]) + steps(scale));
    }
  }
  const auto [low, high] = std::minmax_element(sums.begin(), sums.end());
  const double least_sum = std::max(*low, kSmallest), greatest_sum = std::max(*high, kSmallest);
  const double bound = (in.count + 6) * 0x1.01p-24;  // e / (S X), rounded up
  const int binades = 16 - most_steps - static_cast<int>(std::ceil(std::log2(greatest_sum)));
  exact_ = binades >= kFewBinades;
  spread_ = static_cast<uint16_t>(std::min(binades, 15) << 7);
  least_ = static_cast<uint16_t>(cut(kLeastError / (bound * least_sum)) + 1);
  greatest_ = cut(kGreatest / std::max(greatest_sum, 1.0));


  bounds_ = std::move(sums);
  for (double& sum : bounds_) sum = std::max(sum, kSmallest) * bound;
  const bool of_columns = blend_.axis == Axis::columns;
  const int64_t block = (in.count + 1) * kQuick;
  stride_ = of_columns ? block : 0;
  coefficients_.resize(static_cast<size_t>(of_columns ? number / kQuick * block : block));
  if (!of_columns) {
    fill(0);
    return true;
  }
  for (int m = 0; m <= in.count; ++m) {
    const double* from =
        m == in.count ? bounds_.data() : blend_.coefficients + m * blend_.stride;
    const double scale = m == in.count ? 1.0 : scale_of(in, m);
    for (int64_t first = 0; first + kQuick <= number; first += kQuick) {
      float* to = coefficients_.data() + (first / kQuick * (in.count + 1) + m) * kQuick;
      for (int i = 0; i < kWords; ++i) {
        to[i] = static_cast<float>(from[first + 2 * i] * scale);
        to[kWords + i] = static_cast<float>(from[first + 2 * i + 1] * scale);
      }
    }
  }
  return true;
}

// Makes the coefficients those of a row, or of the tensor.
void QuickBlend::fill(int64_t row) {
  const Inputs& in = blend_.inputs;
  const int64_t place = of_rows_ ? in.window.first_row + row : 0;
  row_ = row;
  float* to = coefficients_.data();
  for (int m = 0; m < in.count; ++m, to += kQuick) {
    const double c = blend_.coefficients[m * blend_.stride + place] * scale_of(in, m);
    std::fill_n(to, kQuick, static_cast<float>(c));
  }
  std::fill_n(to, kQuick, static_cast<float>(bounds_[static_cast<size_t>(row)]));
}

bool QuickBlend::store(int64_t entry, int64_t row, int64_t column, int n) {
  const Inputs& in = blend_.inputs;
  const Window& w = in.window;
  if (of_rows_ && row != row_) fill(row);
  Run run;
  run.count = in.count;
  run.base = in.base.data == nullptr ? nullptr : static_cast<const uint16_t*>(in.base.data) + entry;
  uint16_t greatest = 0;
  for (int m = 0; m < in.count; ++m) {
    run.models[m] = static_cast<const uint16_t*>(in.models[m].data) + entry;
    if (in.drops == nullptr || in.drops[m].threshold == 0) continue;
    alignas(64) uint32_t numbers[kChunk];
    const int64_t index = w.first_entry + w.first_row * w.columns + entry;
    numbers_chunk(in.drops[m].key, static_cast<uint64_t>(index), n, numbers);
    uint16_t* kept = dropped_.data() + m * kChunk;
    const auto last = static_cast<uint32_t>(in.drops[m].threshold - 1);
    greatest = std::max(greatest, drop_run(run.base, run.models[m], numbers, last, n, kept));
    run.models[m] = kept;
  }
  if (greatest > greatest_) return false;
  run.coefficients = coefficients_.data() + column / kQuick * stride_;
  run.stride = stride_;
  run.of_base = static_cast<float>(of_base_);
  run.exact = exact_;
  run.spread = spread_;
  run.least = least_;
  run.greatest = greatest_;
  run.out = static_cast<uint16_t*>(blend_.out) + entry;
  alignas(64) uint16_t undecided[kChunk];
  if (!store_run(run, n, undecided)) return false;
  uint64_t bits[kChunk / kQuick];
  int count = 0;
  for (int i = 0; i < n; i += kQuick) {
    bits[i / kQuick] = set_bits(undecided + i);
    count += __builtin_popcountll(bits[i / kQuick]);
  }
  if (count > n / 2) return false;
  if (waiting_ + count > kChunk) finish();
  for (int i = 0; i < n; i += kQuick) {
    for (uint64_t left = bits[i / kQuick]; left != 0; left &= left - 1) {
      gather(run, entry, row, column, i + __builtin_ctzll(left));
    }
  }
  return true;
}

// Entry i of a run waits for the float64 blend.
void QuickBlend::gather(const Run& run, int64_t entry, int64_t row, int64_t column, int i) {
  const Inputs& in = blend_.inputs;
  uint16_t* number = numbers_.data() + waiting_;
  *number = run.base == nullptr ? 0 : run.base[i];
  for (int m = 0; m < in.count; ++m) *(number += kChunk) = run.models[m][i];
  places_[static_cast<size_t>(waiting_)] = entry + i;
  if (blend_.axis != Axis::tensor) {
    const double* from = blend_.coefficients + (of_rows_ ? in.window.first_row + row : column + i);
    for (int m = 0; m < in.count; ++m) {
      gathered_coefficients_[static_cast<size_t>(m * kChunk + waiting_)] = from[m * blend_.stride];
    }
  }
  ++waiting_;
}

void QuickBlend::finish() {
  if (waiting_ == 0) return;
  const Inputs& in = blend_.inputs;
  Matrix models[kMaxModels];
  Drop scales[kMaxModels];  // what is dropped was taken out already
  for (int m = 0; m < in.count; ++m) {
    models[m] = {numbers_.data() + (m + 1) * kChunk, Dtype::bf16};
    scales[m] = {0, 0, scale_of(in, m)};
  }
  const Matrix base = {in.base.data == nullptr ? nullptr : numbers_.data(), Dtype::bf16};
  const Drop* drops = in.drops == nullptr ? nullptr : scales;
  const bool same = blend_.axis == Axis::tensor;
  uint16_t results[kChunk];
  const Blend gathered = {{{1, waiting_, 0, 0}, base, models, drops, in.count},
                          same ? Axis::tensor : Axis::columns,
                          same ? blend_.coefficients : gathered_coefficients_.data(),
                          same ? blend_.stride : kChunk,
                          blend_.base_coefficient,
                          results,
                          Dtype::bf16};
  int64_t nonfinite = 0, overflow = 0;  // stay so: the numbers are not that large
  blend_chunk(gathered, 0, 0, 0, waiting_, nonfinite, overflow);
  for (int i = 0; i < waiting_; ++i) {
    static_cast<uint16_t*>(blend_.out)[places_[static_cast<size_t>(i)]] = results[i];
  }
  waiting_ = 0;
}

}  // namespace mergecore::cpu
