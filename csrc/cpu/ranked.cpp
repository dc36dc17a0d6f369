// Elections among deltas that are kept by their rank within a row (DELLA), mostly in float32.
//
// Float32 tells the kept deltas and their sum, each with a bound of its error. Where the bounds
// leave two bf16 numbers possible, or leave open what is kept, float64 decides.
//
// Bounds. u = 2^-24. p is an entry's probability, 2^-8 at least; float32 has it to 4 u of it, from
// the rank and two numbers. An entry is kept iff its random number is at least (1 - p) 2^32, that
// is iff its complement, 2^32 - 1 - number, is below 2^32 p: decided where the two are farther
// apart than 2^12, more than 8 u 2^32. With up to four models, 1 / p, products, sums, the sum of
// the weights and a division differ from exact ones by less than 32 u of the sum of their terms'
// sizes; what underflows is within 2^-120, which is added where anything is kept. A sum of votes
// beyond its error has its sign, and is not taken for noise (2^-40). r = a + m is rounded by u |r|,
// r - e and r + e are too: 2^-22 |r| is added. Where both round to one number, any value between
// does.
#include <algorithm>
#include <cmath>

#include "../quick_bounds.h"
#include "quick_run.h"
#include "ranks.h"

namespace mergecore::cpu {

namespace {

constexpr float kRounding = 0x1p-19f;    // of float32, relative to each term
constexpr float kUnderflow = 0x1p-120f;  // of all terms
constexpr float kOfResult = 0x1p-22f;    // of the last sum
constexpr float kGreatestResult = 0x1p120f;
constexpr double kLeastOdds = 0x1p-8;
constexpr float kApart = 0x1p-20f;  // a random number and a probability, at least

// One model of a run.
struct RankedModel {
  const uint16_t* bits;
  const uint32_t* numbers;  // random
  const int32_t* twice;     // the mean rank
  float before, step;       // probability = before + twice * step
  float side;               // a delta times this is its vote
  float share;              // a vote times this is added to the base
  float weight;
};

struct RankedRun {
  const uint16_t* base;
  RankedModel models[kMaxPlain];
  uint16_t* out;
};

template <int kModels, bool kElects, bool kNormalizes, bool kDivides>
inline __attribute__((always_inline)) void mix_ranked(const RankedRun& run, int n,
                                                      uint16_t* undecided) {
  RankedModel model[kModels];
  for (int m = 0; m < kModels; ++m) model[m] = run.models[m];
  const uint16_t* base = run.base;
  uint16_t* out = run.out;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const float a = BF16::load(base[i]);
    float vote[kModels];
    float sum = 0.0f, size = 0.0f;
    uint32_t open = 0;
#pragma GCC unroll 4
    for (int m = 0; m < kModels; ++m) {
      const float d = BF16::load(model[m].bits[i]) - a;
      const float odds =
          fmaf(static_cast<float>(model[m].twice[i]), model[m].step, model[m].before);
      const auto half = static_cast<int32_t>(~model[m].numbers[i] >> 1);
      const float room = fmaf(static_cast<float>(half), -0x1p-31f, odds);
      open |= fabsf(room) < kApart ? 1u : 0u;
      const float kept = kDivides ? model[m].side * d / odds : model[m].side * d;
      vote[m] = room > 0.0f ? kept : 0.0f;
      sum += vote[m];
      size += fabsf(vote[m]);
    }
    float mixed = sum;
    if constexpr (kElects) {
      open |= fabsf(sum) < fmaf(size, kRounding, kUnderflow) && size > 0.0f ? 1u : 0u;
      const uint32_t sign = bit_cast<uint32_t>(sum) & 0x80000000u;
      float divisor = 0.0f;
      mixed = size = 0.0f;
#pragma GCC unroll 4
      for (int m = 0; m < kModels; ++m) {
        const bool agrees = bit_cast<float>(bit_cast<uint32_t>(vote[m]) ^ sign) > 0.0f;
        const float term = agrees ? model[m].share * vote[m] : 0.0f;
        mixed += term;
        size += fabsf(term);
        divisor += agrees ? model[m].weight : 0.0f;
      }
      if constexpr (kNormalizes) {
        const float over = divisor > 0.0f ? 1.0f / divisor : 1.0f;
        mixed *= over;
        size *= over;
      }
    }
    const float result = size > 0.0f ? a + mixed : a;
    float bound = size > 0.0f ? fmaf(size, kRounding, kUnderflow) : 0.0f;
    bound = fmaf(fabsf(result), kOfResult, bound);
    const uint32_t low = rounded(result - bound), high = rounded(result + bound);
    open |= (low ^ high) > 0xffffu ? 1u : 0u;
    open |= fabsf(result) < kGreatestResult ? 0u : 1u;
    out[i] = static_cast<uint16_t>(high >> 16);
    undecided[i] = static_cast<uint16_t>(open);
  }
}

template <int kModels>
inline __attribute__((always_inline)) void mix_models(const RankedRun& run, bool elects,
                                                      bool normalizes, bool divides, int n,
                                                      uint16_t* undecided) {
  if (!elects) {
    divides ? mix_ranked<kModels, false, false, true>(run, n, undecided)
            : mix_ranked<kModels, false, false, false>(run, n, undecided);
  } else if (!normalizes) {
    divides ? mix_ranked<kModels, true, false, true>(run, n, undecided)
            : mix_ranked<kModels, true, false, false>(run, n, undecided);
  } else {
    divides ? mix_ranked<kModels, true, true, true>(run, n, undecided)
            : mix_ranked<kModels, true, true, false>(run, n, undecided);
  }
}

MERGECORE_CLONES
void mix_ranked_run(const RankedRun& run, int count, bool elects, bool normalizes, bool divides,
                    int n, uint16_t* undecided) {
  switch (count) {
    case 1:
      return mix_models<1>(run, elects, normalizes, divides, n, undecided);
    case 2:
      return mix_models<2>(run, elects, normalizes, divides, n, undecided);
    case 3:
      return mix_models<3>(run, elects, normalizes, divides, n, undecided);
    default:
      return mix_models<4>(run, elects, normalizes, divides, n, undecided);
  }
}

// One thread's use of it.
class RankedElection {
 public:
  RankedElection(const Election& election, const Line* lines)
      : election_(election), lines_(lines), applies_(take_coefficients()) {}

  void store_row(int64_t row, int64_t& nonfinite, int64_t& overflow) {
    if (!applies_ || !store_quickly(row, nonfinite, overflow)) {
      store_exactly(row, nonfinite, overflow);
    }
  }

 private:
  bool take_coefficients();
  bool store_quickly(int64_t row, int64_t& nonfinite, int64_t& overflow);
  void settle(const uint16_t* places, int n, int64_t& nonfinite, int64_t& overflow);
  void store_exactly(int64_t row, int64_t& nonfinite, int64_t& overflow);

  const Election& election_;
  const Line* lines_;
  bool applies_;
  RankedRun run_;
  RowRanks ranks_;
  std::vector<int32_t> twice_[kMaxPlain];
  std::vector<double> odds_;
};

// False where float32 is not for them.
bool RankedElection::take_coefficients() {
  const Election& e = election_;
  const Kept& kept = e.kept;
  if (!is_plain(e) || e.out_dtype != Dtype::bf16) return false;
  const auto is_moderate = [](double number) {
    return number == 0.0 || (fabs(number) >= 0x1p-20 && fabs(number) <= 0x1p20);
  };
  const bool elects = e.elect != Elect::none;
  for (int m = 0; m < kept.inputs.count; ++m) {
    const double w = e.weights[m], scale = kept.divide_by_odds ? 1.0 : kept.keeps[m].scale;
    if (!is_moderate(w) || !is_moderate(scale) || !is_moderate(e.scale)) return false;
    if (selects(kept.keeps[m]) || (elects && e.normalize && w < 0.0)) return false;
    const double votes_by = !elects ? e.scale * w : e.elect == Elect::weighted ? w : 1.0;
    RankedModel& model = run_.models[m];
    model.side = static_cast<float>(votes_by * scale);
    model.share = static_cast<float>(e.elect == Elect::weighted ? e.scale : e.scale * w);
    model.weight = static_cast<float>(w);
    const Line& line = lines_[m];
    const double most = odds_of(line, 2 * static_cast<int32_t>(kept.inputs.window.columns));
    if (!(line.step >= 0.0 && line.lowest >= kLeastOdds && most <= 1.0)) return false;
    model.before = static_cast<float>(line.lowest - line.step);
    model.step = static_cast<float>(0.5 * line.step);
  }
  return true;
}

// False where float32 does not tell the ranks of a row.
bool RankedElection::store_quickly(int64_t row, int64_t& nonfinite, int64_t& overflow) {
  const Election& e = election_;
  const Inputs& in = e.kept.inputs;
  const int64_t columns = in.window.columns, first = row * columns;
  for (int m = 0; m < in.count; ++m) {
    twice_[m].resize(static_cast<size_t>(columns));
    if (!ranks_.count(in, m, row, twice_[m].data())) return false;
  }
  alignas(64) uint32_t numbers[kMaxPlain][kChunk];
  alignas(64) uint16_t flags[kChunk];
  uint16_t places[kChunk];
  for (int64_t done = 0; done < columns; done += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, columns - done));
    const int64_t entry = first + done;
    run_.base = static_cast<const uint16_t*>(at(in.base, entry));
    run_.out = static_cast<uint16_t*>(e.out) + entry;
    for (int m = 0; m < in.count; ++m) {
      RankedModel& model = run_.models[m];
      model.bits = static_cast<const uint16_t*>(at(in.models[m], entry));
      model.twice = twice_[m].data() + done;
      model.numbers = numbers[m];
      numbers_chunk(e.kept.keeps[m].key, static_cast<uint64_t>(index_of(in.window, entry)), n,
                    numbers[m]);
    }
    // The next row, while there is much to compute.
    prefetch(run_.base + columns, 2 * n);
    for (int m = 0; m < in.count; ++m) prefetch(run_.models[m].bits + columns, 2 * n);
    std::fill(flags, flags + kChunk, uint16_t{0});
    mix_ranked_run(run_, in.count, e.elect != Elect::none, e.normalize, e.kept.divide_by_odds, n,
                   flags);
    settle(places, find_set(flags, kChunk, places), nonfinite, overflow);
  }
  return true;
}

// What is left open of a run, in float64.
void RankedElection::settle(const uint16_t* places, int n, int64_t& nonfinite, int64_t& overflow) {
  const Election& e = election_;
  const int count = e.kept.inputs.count;
  Deltas values[kMaxPlain];
  alignas(64) double base[kRun], mixed[kRun];
  uint16_t results[kRun];
  for (int done = 0; done < n; done += kRun) {
    const int some = std::min(kRun, n - done);
    for (int i = 0; i < some; ++i) {
      const int place = places[done + i];
      base[i] = BF16::load(run_.base[place]);
      for (int m = 0; m < count; ++m) {
        const RankedModel& model = run_.models[m];
        const double odds = odds_of(lines_[m], model.twice[place]);
        const double kept = e.kept.divide_by_odds ? 1.0 / odds : e.kept.keeps[m].scale;
        const double factor = kept_by_odds(model.numbers[place], odds) ? kept : 0.0;
        values[m].value[i] = factor * (BF16::load(model.bits[place]) - base[i]);
      }
    }
    mix_run(e, values, nullptr, some, mixed);
    store_chunk(base, 1.0, mixed, some, e.out_dtype, results, nonfinite, overflow);
    for (int i = 0; i < some; ++i) run_.out[places[done + i]] = results[i];
  }
}

// The row by itself, with the exact probability of each entry.
void RankedElection::store_exactly(int64_t row, int64_t& nonfinite, int64_t& overflow) {
  const Inputs& in = election_.kept.inputs;
  const int64_t columns = in.window.columns, first = row * columns;
  odds_.resize(static_cast<size_t>(in.count * columns));
  Matrix models[kMaxModels];
  for (int m = 0; m < in.count; ++m) {
    ranks_.write(in, m, row, lines_[m], odds_.data() + m * columns);
    models[m] = {at(in.models[m], first), in.models[m].dtype};
  }
  Election one = election_;
  Inputs& its = one.kept.inputs;
  its.window = {1, columns, in.window.first_row + row, in.window.first_entry};
  its.base.data = at(in.base, first);
  its.models = models;
  one.kept.odds = odds_.data();
  one.out = static_cast<char*>(one.out) + first * dtype_size(one.out_dtype);
  elect(one, 0, columns, nonfinite, overflow);
}

}  // namespace

void elect_by_rank(const Election& election, const double* lowest, const double* steps,
                   int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow) {
  Line lines[kMaxModels];
  for (int m = 0; m < election.kept.inputs.count; ++m) lines[m] = {lowest[m], steps[m]};
  RankedElection ranked(election, lines);
  for (int64_t row = begin; row < end; ++row) ranked.store_row(row, nonfinite, overflow);
}

}  // namespace mergecore::cpu
