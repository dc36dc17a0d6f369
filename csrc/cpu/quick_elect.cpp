// Which elections of bf16 are tried in float32 (see quick_bounds.h), and their loops.
#include "quick_elect.h"

#include <algorithm>
#include <cmath>

#include "../quick_bounds.h"
#include "quick_run.h"

namespace mergecore::cpu {

namespace {

bool is_power_of_two(double number) {
  return (bit_cast<uint64_t>(number) & 0xfffffffffffffull) == 0 && number != 0.0;
}

// The float32 magnitudes from `least` to `most`.
Magnitudes magnitudes_within(double least, double most) {
  const auto low = static_cast<float>(std::max(least, 0.0)), high = static_cast<float>(most);
  const float first = low < least ? std::nextafter(low, HUGE_VALF) : low;
  const float last = high > most ? std::nextafter(high, -HUGE_VALF) : high;
  if (!(first <= last)) return {0x80000000u, 0};  // none
  const auto from = bit_cast<uint32_t>(first);
  return {from, bit_cast<uint32_t>(last) - from};
}

// What kept deltas are multiplied with.
double kept_scale(const Election& e, int model) {
  return e.kept.keeps == nullptr ? 1.0 : e.kept.keeps[model].scale;
}

// Bit i is set where float32 does not decide block i.
template <int kModels>
inline __attribute__((always_inline)) uint32_t undecided_blocks(const QuickElection& e, int n) {
  const uint16_t spread = e.spread, greatest = e.greatest;
  alignas(64) uint16_t undecided[kQuick];  // bit i: of block i
  std::fill_n(undecided, kQuick, uint16_t{0});
  for (int place = 0; place < n; place += kQuick) {
    alignas(64) uint16_t largest[kQuick], smallest[kQuick];
    std::fill_n(largest, kQuick, uint16_t{0});
    std::fill_n(smallest, kQuick, uint16_t{0xffff});
    const auto take = [&](const uint16_t* numbers) __attribute__((always_inline)) {
      fetch<0>(numbers + 2 * kChunk);
      take_largest(numbers, largest);
      take_smallest(numbers, smallest);
    };
    take(e.base + place);
    for (int m = 0; m < kModels; ++m) take(e.models[m] + place);
    fetch<1>(e.out + place + 2 * kChunk);
    const auto bit = static_cast<uint16_t>(1 << place / kQuick);
    for (int i = 0; i < kQuick; ++i) {
      const uint16_t apart = static_cast<uint16_t>(largest[i] - smallest[i]);
      const uint16_t far = (apart > spread) | (largest[i] > greatest);
      undecided[i] |= static_cast<uint16_t>(far * bit);
    }
  }
  uint16_t blocks = 0;
  for (int i = 0; i < kQuick; ++i) blocks |= undecided[i];
  return blocks;
}

// The same where a result is a tie that may be none in float64. rest[i] is 0 of ties.
template <int kModels>
inline __attribute__((always_inline)) uint32_t tie_blocks(const QuickElection& e,
                                                          const uint16_t* rest, int n) {
  const uint16_t tie = e.tie;
  alignas(64) uint16_t undecided[kQuick];  // bit i: of block i
  std::fill_n(undecided, kQuick, uint16_t{0});
  for (int place = 0; place < n; place += kQuick) {
    const uint16_t* out = e.out + place;
    const uint16_t* from_tie = rest + place;
    alignas(64) uint16_t largest[kQuick];
    std::fill_n(largest, kQuick, uint16_t{0});
    take_largest(e.base + place, largest);
    for (int m = 0; m < kModels; ++m) take_largest(e.models[m] + place, largest);
    const auto bit = static_cast<uint16_t>(1 << place / kQuick);
    for (int i = 0; i < kQuick; ++i) {
      const uint16_t size = size_of(out[i]);
      const uint16_t is_tie = (from_tie[i] == 0) | (size < kLeastNormal);
      const uint16_t open = is_tie & (largest[i] > most_of_ties(size, tie));
      undecided[i] |= static_cast<uint16_t>(open * bit);
    }
  }
  uint16_t blocks = 0;
  for (int i = 0; i < kQuick; ++i) blocks |= undecided[i];
  return blocks;
}

// The results of n entries, decided or not; of fractions what lies between them and ties, too.
template <int kModels, Mix kMix, bool kFractions>
inline __attribute__((always_inline)) void mix_words(const QuickElection& e, int n,
                                                     uint16_t* rest) {
  const Word* model[kModels];
  uint32_t least[kModels], extent[kModels];
  float side[kModels], share[kModels], weight[kModels];
  for (int m = 0; m < kModels; ++m) {
    model[m] = reinterpret_cast<const Word*>(e.models[m]);
    least[m] = e.kept[m].least;
    extent[m] = e.kept[m].extent;
    side[m] = e.side[m];
    share[m] = e.share[m];
    weight[m] = e.weight[m];
  }
  const float whole = e.divisor;
  const auto mix = [&](float a, const float* x) __attribute__((always_inline)) {
    float vote[kModels];
    float sum = 0.0f, mixed = 0.0f, divisor = 0.0f;
#pragma GCC unroll 4
    for (int m = 0; m < kModels; ++m) {
      float d = x[m] - a;
      d = (bit_cast<uint32_t>(d) & 0x7fffffffu) - least[m] <= extent[m] ? d : 0.0f;
      vote[m] = side[m] * d;
      sum = m == 0 ? vote[m] : sum + vote[m];
    }
    if constexpr (kMix == Mix::all) {
      mixed = sum;
    } else {
      const uint32_t sign = bit_cast<uint32_t>(sum) & 0x80000000u;
#pragma GCC unroll 4
      for (int m = 0; m < kModels; ++m) {
        const bool agrees = bit_cast<float>(bit_cast<uint32_t>(vote[m]) ^ sign) > 0.0f;
        mixed = agrees ? fmaf(share[m], vote[m], mixed) : mixed;
        divisor = agrees ? divisor + weight[m] : divisor;
      }
    }
    if constexpr (kMix != Mix::divided && kFractions) divisor = whole;
    const float result =
        kMix == Mix::divided || kFractions ? fmaf(divisor, a, mixed) / divisor : a + mixed;
    return mixed == 0.0f ? a : result;
  };
  const Word* base = reinterpret_cast<const Word*>(e.base);
  Word* out = reinterpret_cast<Word*>(e.out);
  Word* off = reinterpret_cast<Word*>(rest);
#pragma GCC ivdep
  for (int i = 0; i < n / 2; ++i) {
    float x0[kModels], x1[kModels];
#pragma GCC unroll 4
    for (int m = 0; m < kModels; ++m) {
      x0[m] = lower(model[m][i]);
      x1[m] = upper(model[m][i]);
    }
    const float low = mix(lower(base[i]), x0), high = mix(upper(base[i]), x1);
    out[i] = packed(rounded(low), rounded(high));
    if constexpr (kFractions) {
      off[i] = ((bit_cast<uint32_t>(low) & 0xffffu) | bit_cast<uint32_t>(high) << 16) ^ 0x80008000u;
    }
  }
}

template <int kModels, bool kFractions>
inline __attribute__((always_inline)) void mix_models(const QuickElection& e, Mix mix, int n,
                                                      uint16_t* rest) {
  switch (mix) {
    case Mix::all:
      return mix_words<kModels, Mix::all, kFractions>(e, n, rest);
    case Mix::elected:
      return mix_words<kModels, Mix::elected, kFractions>(e, n, rest);
    case Mix::divided:
      return mix_words<kModels, Mix::divided, kFractions>(e, n, rest);
  }
}

template <int kModels>
inline __attribute__((always_inline)) uint32_t elect_models(const QuickElection& e, Mix mix,
                                                            int n) {
  const uint32_t undecided = undecided_blocks<kModels>(e, n);
  if (e.divisor == 1.0f) {
    mix_models<kModels, false>(e, mix, n, nullptr);
    return undecided;
  }
  alignas(64) uint16_t rest[kChunk];
  mix_models<kModels, true>(e, mix, n, rest);
  return undecided | tie_blocks<kModels>(e, rest, n);
}

MERGECORE_CLONES
uint32_t elect_quickly(const QuickElection& e, Mix mix, int count, int n) {
  switch (count) {
    case 1:
      return elect_models<1>(e, mix, n);
    case 2:
      return elect_models<2>(e, mix, n);
    case 3:
      return elect_models<3>(e, mix, n);
    default:
      return elect_models<4>(e, mix, n);
  }
}

}  // namespace

QuickElect::QuickElect(const Election& e) : election_(e) {
  if (!is_plain(e) || e.out_dtype != Dtype::bf16 || e.kept.odds != nullptr) return;
  applies_ = take_coefficients();
  for (int m = 0; m < e.kept.inputs.count; ++m) {
    const Drop drop = e.kept.keeps == nullptr ? Drop{0, 0, 1.0} : e.kept.keeps[m];
    const double least[] = {std::nextafter(drop.least, HUGE_VAL), drop.least};
    const double most[] = {drop.most, std::nextafter(drop.most, -HUGE_VAL)};
    for (int i = 0; i < 4; ++i) kept_[m][i] = magnitudes_within(least[i % 2], most[i / 2]);
  }
}

// False where float32 is not for them.
bool QuickElect::take_coefficients() {
  const Election& e = election_;
  const bool elects = e.elect != Elect::none, divides = elects && e.normalize;
  mix_ = !elects ? Mix::all : divides ? Mix::divided : Mix::elected;
  if (!is_tame(e.scale) || (divides && !is_power_of_two(e.scale))) return false;
  int most_steps = 0;
  for (int m = 0; m < e.kept.inputs.count; ++m) {
    const double w = e.weights[m], kept = kept_scale(e, m);
    if (!is_tame(w) || !is_tame(kept) || (divides && w < 0.0)) return false;
    most_steps = std::max(most_steps, steps(e.scale) + steps(w) + steps(kept));
  }
  return multiply(1, most_steps) || take_fractions();
}

// Looks for what all products of weights, scales and factors are fractions of.
bool QuickElect::take_fractions() {
  const Election& e = election_;
  const bool elects = e.elect != Elect::none;
  if (elects && e.scale != 1.0) return false;
  for (int divisor = 3; divisor <= kGreatestDivisor; ++divisor) {
    bool whole = true;
    for (int m = 0; m < e.kept.inputs.count && whole; ++m) {
      const double weight = divisor * e.weights[m] * e.scale, kept = kept_scale(e, m);
      whole = is_whole(weight * kept) && (!elects || is_whole(weight)) &&
              (e.elect != Elect::unweighted || is_whole(kept));
    }
    if (whole) return multiply(divisor, 0);
  }
  return false;
}

// Takes all coefficients times `divisor`, whole numbers if it is not 1. False where float32 would
// seldom be exact.
bool QuickElect::multiply(int divisor, int most_steps) {
  const Election& e = election_;
  const int count = e.kept.inputs.count;
  const auto product = [&](double c) { return divisor == 1 ? c : rint(divisor * c); };
  double votes = 0.0, shares = 0.0, weights = 0.0, most_kept = 0.0;
  for (int m = 0; m < count; ++m) {
    const double w = e.weights[m], kept = kept_scale(e, m);
    double side = product(w * kept), share = e.scale;
    if (e.elect == Elect::none) side = product(e.scale * w * kept), share = 1.0;
    if (e.elect == Elect::unweighted) {
      side = divisor == 1 ? kept : rint(kept);
      share = product(e.scale * w);
    }
    const double weight = product(w);
    run_.side[m] = static_cast<float>(side);
    run_.share[m] = static_cast<float>(share);
    run_.weight[m] = static_cast<float>(weight);
    votes += 2.0 * fabs(side);
    shares += 2.0 * fabs(share * side);
    weights += weight;
    most_kept = std::max(most_kept, fabs(kept));
  }
  const bool divides = mix_ == Mix::divided;
  const double sum = std::max(votes, shares + (divides ? std::max(weights, 1.0) : divisor));
  const int binades = exact_binades(most_steps, sum);
  run_.spread = static_cast<uint16_t>(binades << 7);
  run_.greatest = cut_bits(kGreatestElected / sum);
  run_.divisor = static_cast<float>(divisor);
  const int ties = tie_binades(count, 1.0 + (divides ? 2.0 * most_kept : shares / divisor));
  run_.tie = static_cast<uint16_t>(std::max(ties, 0) << 7);
  return binades >= kFewBinades && (divisor == 1 || ties >= 0);
}

// False where two limits do not tell what is kept of a run: ties are in a part of it only.
bool QuickElect::take_limits(int64_t first, int n) {
  for (int m = 0; m < election_.kept.inputs.count; ++m) {
    int which = 0;
    if (election_.kept.keeps != nullptr) {
      const Drop& drop = election_.kept.keeps[m];
      const int64_t last = first + n - 1;
      if ((first < drop.least_before) != (last < drop.least_before)) return false;
      if ((first < drop.most_before) != (last < drop.most_before)) return false;
      which = (first < drop.least_before) + 2 * (first < drop.most_before);
    }
    run_.kept[m] = kept_[m][which];
  }
  return true;
}

// The run of model m, the base's numbers in the place of those whose deltas are dropped; nullptr
// where a number is not for float32: dropped or not, it has to show in the result.
const uint16_t* QuickElect::kept_at_random(int m, int64_t entry, int n) {
  const Kept& kept = election_.kept;
  const auto* model = static_cast<const uint16_t*>(at(kept.inputs.models[m], entry));
  if (kept.keeps == nullptr) return model;
  const Drop& drop = kept.keeps[m];
  if (drop.threshold == 0) return model;
  alignas(64) uint32_t numbers[kChunk];
  numbers_chunk(drop.key, static_cast<uint64_t>(index_of(kept.inputs.window, entry)), n, numbers);
  prefetch(model + 2 * kChunk, 2 * n);
  const auto last_dropped = static_cast<uint32_t>(drop.threshold - 1);
  const uint16_t greatest = drop_run(run_.base, model, numbers, last_dropped, n, dropped_[m]);
  return greatest > run_.greatest ? nullptr : dropped_[m];
}

uint32_t QuickElect::store(int64_t entry, int n) {
  const Inputs& in = election_.kept.inputs;
  const uint32_t all = (uint32_t{1} << (n + kQuick - 1) / kQuick) - 1;
  const int whole = n / kQuick * kQuick;
  if (rest_ > 0) --rest_;
  if (!applies_ || rest_ > 0 || whole == 0) return all;
  if (!take_limits(index_of(in.window, entry), whole)) return all;
  run_.base = static_cast<const uint16_t*>(at(in.base, entry));
  run_.out = static_cast<uint16_t*>(election_.out) + entry;
  for (int m = 0; m < in.count; ++m) {
    run_.models[m] = kept_at_random(m, entry, whole);
    if (run_.models[m] == nullptr) return all;
  }
  const uint32_t undecided = elect_quickly(run_, mix_, in.count, whole);
  if (2 * __builtin_popcount(undecided) > whole / kQuick) rest_ = kPatience;
  return undecided | (all >> whole / kQuick << whole / kQuick);
}

}  // namespace mergecore::cpu
