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

// 1 / power, of a positive power of two.
inline __attribute__((always_inline)) float inverse(float power) {
  return bit_cast<float>(0x7f000000u - bit_cast<uint32_t>(power));
}

// `value`, negated where `sign` is below zero.
inline __attribute__((always_inline)) float turned(float value, float sign) {
  return bit_cast<float>(bit_cast<uint32_t>(value) ^ (bit_cast<uint32_t>(sign) & 0x80000000u));
}

// The smallest float32 number that is not below `limit`, and the largest that is not beyond it.
float rounded_up(double limit) {
  const auto near = static_cast<float>(limit);
  return near < limit ? std::nextafter(near, HUGE_VALF) : near;
}

float rounded_down(double limit) {
  const auto near = static_cast<float>(limit);
  return near > limit ? std::nextafter(near, -HUGE_VALF) : near;
}

// Bit i is set where float32 does not decide block i.
template <int kModels>
inline __attribute__((always_inline)) uint32_t undecided_blocks(const QuickElection& e, int n) {
  const uint16_t spread = e.spread, least = e.least_size, greatest = e.greatest;
  uint32_t blocks = 0;
  for (int place = 0; place < n; place += kQuick) {
    alignas(64) uint16_t largest[kQuick], smallest[kQuick];  // less one: beside it zeros do not count
    std::fill_n(largest, kQuick, uint16_t{0});
    std::fill_n(smallest, kQuick, uint16_t{0xffff});
    for (int m = -1; m < kModels; ++m) {
      const uint16_t* numbers = (m < 0 ? e.base : e.models[m]) + place;
      fetch<0>(numbers + kChunk);
      for (int i = 0; i < kQuick; ++i) {
        const uint16_t size = numbers[i] & 0x7fffu;
        largest[i] = size > largest[i] ? size : largest[i];
      }
      for (int i = 0; i < kQuick; ++i) {
        const uint16_t less = static_cast<uint16_t>((numbers[i] & 0x7fffu) - 1);
        smallest[i] = less < smallest[i] ? less : smallest[i];
      }
    }
    fetch<1>(e.out + place + kChunk);
    uint16_t undecided = 0;
    for (int i = 0; i < kQuick; ++i) {
      undecided |= static_cast<uint16_t>(largest[i] - smallest[i]) > spread;
      undecided |= largest[i] > greatest;
      undecided |= smallest[i] < least;
    }
    blocks |= uint32_t{undecided} << place / kQuick;
  }
  return blocks;
}

// The results of n entries, decided or not.
template <int kModels, Mix kMix>
inline __attribute__((always_inline)) void mix_words(const QuickElection& e, int n) {
  const Word* model[kModels];
  float least[kModels], most[kModels], side[kModels], coefficient[kModels], weight[kModels];
  for (int m = 0; m < kModels; ++m) {
    model[m] = reinterpret_cast<const Word*>(e.models[m]);
    least[m] = e.least[m];
    most[m] = e.most[m];
    side[m] = e.side[m];
    coefficient[m] = e.coefficient[m];
    weight[m] = e.weight[m];
  }
  const auto mix = [&](float a, const float* x) __attribute__((always_inline)) {
    float d[kModels];
    float mixed = 0.0f, sum = 0.0f, divisor = 0.0f;
#pragma GCC unroll 4
    for (int m = 0; m < kModels; ++m) {
      const float delta = x[m] - a, size = fabsf(delta);
      d[m] = (size < least[m]) | (size > most[m]) ? 0.0f : delta;
      if constexpr (kMix == Mix::all) {
        mixed += coefficient[m] * d[m];
      } else {
        sum += side[m] * d[m];
      }
    }
    if constexpr (kMix != Mix::all) {
#pragma GCC unroll 4
      for (int m = 0; m < kModels; ++m) {
        const bool agrees = turned(side[m] * d[m], sum) > 0.0f;
        mixed += agrees ? coefficient[m] * d[m] : 0.0f;
        divisor += agrees ? weight[m] : 0.0f;
      }
    }
    float result;
    if constexpr (kMix == Mix::all || kMix == Mix::elected) {
      result = a + mixed;
    } else {
      const float size = divisor == 0.0f ? 1.0f : fabsf(divisor);
      const float whole = size * a + turned(mixed, divisor);
      result = kMix == Mix::halved ? whole * inverse(size) : whole / size;
    }
    return rounded(mixed == 0.0f ? a : result);
  };
  const Word* base = reinterpret_cast<const Word*>(e.base);
  Word* out = reinterpret_cast<Word*>(e.out);
#pragma GCC ivdep
  for (int i = 0; i < n / 2; ++i) {
    float x0[kModels], x1[kModels];
#pragma GCC unroll 4
    for (int m = 0; m < kModels; ++m) {
      x0[m] = lower(model[m][i]);
      x1[m] = upper(model[m][i]);
    }
    out[i] = packed(mix(lower(base[i]), x0), mix(upper(base[i]), x1));
  }
}

template <int kModels>
inline __attribute__((always_inline)) uint32_t elect_models(const QuickElection& e, Mix mix,
                                                            int n) {
  const uint32_t undecided = undecided_blocks<kModels>(e, n);
  switch (mix) {
    case Mix::all:
      mix_words<kModels, Mix::all>(e, n);
      break;
    case Mix::elected:
      mix_words<kModels, Mix::elected>(e, n);
      break;
    case Mix::halved:
      mix_words<kModels, Mix::halved>(e, n);
      break;
    case Mix::divided:
      mix_words<kModels, Mix::divided>(e, n);
      break;
  }
  return undecided;
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

// As drop_run, by the odds of each entry.
MERGECORE_CLONES
uint16_t keep_run(const uint16_t* base, const uint16_t* model, const uint32_t* numbers,
                  const double* odds, int n, uint16_t* kept) {
  uint16_t greatest = 0;
  for (int i = 0; i < n; ++i) {
    const uint16_t size = model[i] & 0x7fffu;
    greatest = size > greatest ? size : greatest;
  }
  for (int i = 0; i < n; ++i) kept[i] = kept_by_odds(numbers[i], odds[i]) ? model[i] : base[i];
  return greatest;
}

}  // namespace

QuickElect::QuickElect(const Election& e) : election_(e) {
  if (!is_plain(e) || e.out_dtype != Dtype::bf16 || e.kept.divide_by_odds) return;
  applies_ = take_coefficients();
  for (int m = 0; m < e.kept.inputs.count; ++m) {
    const Drop drop = e.kept.keeps == nullptr ? Drop{0, 0, 1.0} : e.kept.keeps[m];
    // Ties are kept before the first place, and beyond the second.
    const double more = std::nextafter(drop.least, HUGE_VAL);
    const double less = std::nextafter(drop.most, -HUGE_VAL);
    limits_[m] = {{rounded_up(more), rounded_up(drop.least)},
                  {rounded_down(drop.most), rounded_down(less)}};
  }
}

// False where float32 is not for them.
bool QuickElect::take_coefficients() {
  const Election& e = election_;
  const int count = e.kept.inputs.count;
  const bool divides = e.normalize && e.elect != Elect::none;
  if (!is_tame(e.scale) || (divides && !is_power_of_two(e.scale))) return false;
  int most_steps = 0;
  double votes = 0.0, weights = 0.0, sum = 0.0;
  for (int m = 0; m < count; ++m) {
    const double w = e.weights[m], kept = e.kept.keeps == nullptr ? 1.0 : e.kept.keeps[m].scale;
    if (!is_tame(w) || !is_tame(kept)) return false;
    const double side = (e.elect == Elect::weighted ? w : 1.0) * kept;
    const double coefficient = e.scale * w * kept;
    run_.side[m] = static_cast<float>(side);
    run_.coefficient[m] = static_cast<float>(coefficient);
    run_.weight[m] = static_cast<float>(w);
    most_steps = std::max(most_steps, steps(e.scale) + steps(w) + steps(kept));
    votes += 2.0 * fabs(side);
    sum += 2.0 * fabs(coefficient);
    weights += fabs(w);
  }
  sum = std::max(votes, sum + (divides ? std::max(1.0, weights) : 1.0));
  const int binades = exact_binades(most_steps, sum);
  run_.spread = static_cast<uint16_t>(binades << 7);
  run_.greatest = cut_bits(kGreatestElected / sum);
  run_.least_size = divides ? cut_bits(kLeastDivided) : 0;
  mix_ = e.elect == Elect::none ? Mix::all : divides ? Mix::halved : Mix::elected;
  for (int some = 1; divides && some < 1 << count; ++some) {
    double divisor = 0.0;
    for (int m = 0; m < count; ++m) divisor += (some >> m & 1) != 0 ? e.weights[m] : 0.0;
    if (divisor != 0.0 && !is_power_of_two(divisor)) mix_ = Mix::divided;
  }
  return binades >= kFewBinades;
}

// The limits of a run. False where two numbers do not tell: ties are kept in a part of it only.
bool QuickElect::take_limits(int64_t first, int n) {
  for (int m = 0; m < election_.kept.inputs.count; ++m) {
    bool before_least = false, before_most = false;
    if (election_.kept.keeps != nullptr) {
      const Drop& drop = election_.kept.keeps[m];
      before_least = first < drop.least_before;
      before_most = first < drop.most_before;
      if (before_least != (first + n - 1 < drop.least_before)) return false;
      if (before_most != (first + n - 1 < drop.most_before)) return false;
    }
    run_.least[m] = limits_[m].least[before_least];
    run_.most[m] = limits_[m].most[before_most];
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
  if (kept.odds == nullptr && drop.threshold == 0) return model;
  const Window& w = kept.inputs.window;
  alignas(64) uint32_t numbers[kChunk];
  numbers_chunk(drop.key, static_cast<uint64_t>(index_of(w, entry)), n, numbers);
  prefetch(model + 2 * kChunk, 2 * n);
  uint16_t greatest;
  if (kept.odds == nullptr) {
    const auto last_dropped = static_cast<uint32_t>(drop.threshold - 1);
    greatest = drop_run(run_.base, model, numbers, last_dropped, n, kept_[m]);
  } else {
    const double* odds = kept.odds + m * w.rows * w.columns + entry;
    greatest = keep_run(run_.base, model, numbers, odds, n, kept_[m]);
  }
  return greatest > run_.greatest ? nullptr : kept_[m];
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
