// Order statistics of magnitudes, and the blend of deltas that were chosen by them: top sets,
// random masks, sign election.
#include <algorithm>
#include <vector>

#include "chunk.h"

namespace mergecore::cpu {

constexpr int kRun = 256;  // entries; the deltas of 64 models fit an L2 cache

// One model's deltas over a run, and what the blend makes of them.
struct alignas(64) Deltas {
  double value[kRun];
};

int64_t index_of(const Window& w, int64_t entry) {
  return w.first_entry + w.first_row * w.columns + entry;
}

void load_base(const Inputs& in, int64_t entry, int n, double* base) {
  if (in.base.data != nullptr) load_chunk(at(in.base, entry), in.base.dtype, n, base);
}

// Deltas of model m with what `in.drops` says. `base` holds zeros where there is none.
void load_deltas(const Inputs& in, int m, int64_t entry, int n, const double* base, double* delta) {
  static constexpr Drop everything{0, 0, 1.0};
  alignas(64) double keep[kRun];
  const bool dropping = in.drops != nullptr && drops_any(in.drops[m]);
  const Drop& drop = dropping ? in.drops[m] : everything;
  kept_delta_chunk(drop, at(in.models[m], entry), in.models[m].dtype, base,
                   index_of(in.window, entry), n, keep, delta);
}

void load_all_deltas(const Inputs& in, int64_t entry, int n, Deltas* deltas) {
  alignas(64) double base[kRun] = {};
  load_base(in, entry, n, base);
  for (int m = 0; m < in.count; ++m) load_deltas(in, m, entry, n, base, deltas[m].value);
}

MERGECORE_CLONES
void spread_chunk(const Deltas* deltas, int count, int n, double* spread) {
  double mean[kRun] = {}, distances[kRun] = {}, squares[kRun] = {};
  for (int m = 0; m < count; ++m) {
    for (int i = 0; i < n; ++i) mean[i] += deltas[m].value[i];
  }
  for (int i = 0; i < n; ++i) mean[i] /= count;
  for (int m = 0; m < count; ++m) {
    for (int i = 0; i < n; ++i) {
      const double d = deltas[m].value[i], distance = d - mean[i];
      distances[i] = fma(distance, distance, distances[i]);
      squares[i] = fma(d, d, squares[i]);
    }
  }
  for (int i = 0; i < n; ++i) spread[i] = spread_of(distances[i], squares[i], count);
}

// What the measures of all models of a run have in common: the standard deviation, or the sum of
// the deltas.
void common_run(const Kept& kept, const Deltas* deltas, int n, double* common) {
  const int count = kept.inputs.count;
  if (kept.measure == Measure::spread) spread_chunk(deltas, count, n, common);
  if (kept.measure != Measure::competition) return;
  std::fill_n(common, n, 0.0);
  for (int m = 0; m < count; ++m) {
    for (int i = 0; i < n; ++i) common[i] += deltas[m].value[i];
  }
}

MERGECORE_CLONES
void competition_run(const double* delta, const double* total, int count, const double* of_model,
                     int n, double* out) {
  const double scales[2] = {of_model[0], of_model[1]};
  for (int i = 0; i < n; ++i) out[i] = competition(delta[i], total[i], count, scales);
}

// The magnitudes that are compared, of model m: as they are, or in `out`.
const double* measured_run(const Kept& kept, int m, const double* delta, const double* common,
                           int64_t entry, int n, double* out) {
  const Inputs& in = kept.inputs;
  const double* scales = kept.scales + m * kept.stride;
  switch (kept.measure) {
    case Measure::own:
      return delta;
    case Measure::spread:
      return common;
    case Measure::rows: {
      const int64_t columns = in.window.columns, first = index_of(in.window, entry);
      for (int i = 0; i < n; ++i) out[i] = fabs(delta[i]) * scales[(first + i) / columns];
      return out;
    }
    case Measure::competition:
      competition_run(delta, common, in.count, scales, n, out);
      return out;
  }
  return out;
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
    for (int i = 0; i < n; ++i) keys[i] = magnitude_bits(values[i]);
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

void add_to(int64_t* total, int64_t count) { __atomic_fetch_add(total, count, __ATOMIC_RELAXED); }

void count_magnitudes(const Kept& kept, int shift, const int64_t* offsets, bool clamp, int64_t bins,
                      int64_t* histogram, int64_t begin, int64_t end) {
  // One set after the other: a thread's counts of one fit its cache.
  std::vector<uint32_t> counts(static_cast<size_t>(bins));
  for (int set = 0; set < sets_of(kept); ++set) {
    const int64_t offset = offsets[set];
    for (int64_t entry = begin; entry < end; entry += kRun) {
      const int n = static_cast<int>(std::min<int64_t>(kRun, end - entry));
      with_keys(kept, set, set + 1, entry, n, [&](int, const int64_t* keys) {
        for (int i = 0; i < n; ++i) {
          const int64_t bin =
              clamp ? clamped_bin(keys[i], shift, offset, bins) : (keys[i] >> shift) - offset;
          if (bin >= 0 && bin < bins) ++counts[static_cast<size_t>(bin)];
        }
      });
    }
    for (int64_t i = 0; i < bins; ++i) {
      uint32_t& count = counts[static_cast<size_t>(i)];
      if (count != 0) add_to(histogram + set * bins + i, count);
      count = 0;
    }
  }
}

void collect_magnitudes(const Kept& kept, const KeyRange* ranges, int count, int64_t* keys_out,
                        int64_t* indices, int64_t capacity, int64_t* found, int64_t* equal,
                        int64_t block, int64_t begin, int64_t end) {
  const Window& w = kept.inputs.window;
  const int64_t blocks = (w.rows * w.columns + block - 1) / block;
  for (int64_t entry = begin; entry < end;) {
    const int64_t in_block = block - entry % block;
    const int n = static_cast<int>(std::min<int64_t>({kRun, end - entry, in_block}));
    with_keys(kept, 0, sets_of(kept), entry, n, [&](int which, const int64_t* keys) {
      for (int r = 0; r < count; ++r) {
        if (ranges[r].model != which) continue;
        const int64_t low = ranges[r].low, high = ranges[r].high;
        int64_t same = 0, within = 0;
        for (int i = 0; i < n; ++i) {
          same += keys[i] == low;
          within += keys[i] > low && keys[i] < high;
        }
        equal[r * blocks + entry / block] += same;
        if (within == 0) continue;
        int64_t place = __atomic_fetch_add(found + r, within, __ATOMIC_RELAXED);
        for (int i = 0; i < n && place < capacity; ++i) {
          if (keys[i] <= low || keys[i] >= high) continue;
          keys_out[r * capacity + place] = keys[i];
          indices[r * capacity + place] = index_of(w, entry + i);
          ++place;
        }
      }
    });
    entry += n;
  }
}

MERGECORE_CLONES
void select_run(const Drop& drop, const double* measured, int64_t first, int n, double* factor) {
  const Drop limits = drop;
  for (int i = 0; i < n; ++i) {
    factor[i] = selected(limits, fabs(measured[i]), first + i) ? factor[i] : 0.0;
  }
}

MERGECORE_CLONES
void odds_run(const uint32_t* numbers, const double* odds, bool divide, double scale, int n,
              double* factor) {
  for (int i = 0; i < n; ++i) {
    const double kept = divide ? 1.0 / odds[i] : scale;
    factor[i] = kept_by_odds(numbers[i], odds[i]) ? kept : 0.0;
  }
}

// factor[i]: what the delta of entry i of model m is multiplied with, 0 where it is not kept.
void factor_run(const Kept& kept, int m, const double* delta, const double* common, int64_t entry,
                int n, double* factor) {
  if (kept.keeps == nullptr) {
    std::fill_n(factor, n, 1.0);
    return;
  }
  const Drop& drop = kept.keeps[m];
  const Window& w = kept.inputs.window;
  const int64_t first = index_of(w, entry);
  if (kept.odds != nullptr) {
    uint32_t numbers[kRun];
    numbers_chunk(drop.key, static_cast<uint64_t>(first), n, numbers);
    const double* odds = kept.odds + m * w.rows * w.columns + entry;
    odds_run(numbers, odds, kept.divide_by_odds, drop.scale, n, factor);
  } else {
    keep_chunk(drop, static_cast<uint64_t>(first), n, factor);
  }
  if (!selects(drop)) return;
  alignas(64) double out[kRun];
  const double* measured = measured_run(kept, m, delta, common, entry, n, out);
  select_run(drop, measured, first, n, factor);
  if (kept.measure != Measure::competition) return;
  for (int i = 0; i < n; ++i) {
    if (factor[i] != 0.0) factor[i] *= competing_weight(measured[i], drop.least, drop.most);
  }
}

// factors[m][i] of all models.
void factor_runs(const Kept& kept, const Deltas* deltas, int64_t entry, int n, Deltas* factors) {
  double common[kRun];
  common_run(kept, deltas, n, common);
  for (int m = 0; m < kept.inputs.count; ++m) {
    factor_run(kept, m, deltas[m].value, common, entry, n, factors[m].value);
  }
}

void kept_sums(const Kept& kept, double* sums, int64_t block, int64_t begin, int64_t end) {
  const Inputs& in = kept.inputs;
  const int64_t entries = in.window.rows * in.window.columns;
  const int64_t blocks = (entries + block - 1) / block;
  std::vector<Deltas> deltas(static_cast<size_t>(in.count)), factors(static_cast<size_t>(in.count));
  std::vector<double> lanes(static_cast<size_t>(in.count) * 3 * kLanes);
  for (int64_t b = begin; b < end; ++b) {
    std::fill(lanes.begin(), lanes.end(), 0.0);
    const int64_t first = b * block, last = std::min(entries, first + block);
    for (int64_t entry = first; entry < last; entry += kRun) {  // kRun is a multiple of kLanes
      const int n = static_cast<int>(std::min<int64_t>(kRun, last - entry));
      load_all_deltas(in, entry, n, deltas.data());
      factor_runs(kept, deltas.data(), entry, n, factors.data());
      for (int m = 0; m < in.count; ++m) {
        double* lane = lanes.data() + 3 * kLanes * m;
        for (int i = 0; i < n; ++i) {
          const double d = deltas[static_cast<size_t>(m)].value[i];
          const double v = factors[static_cast<size_t>(m)].value[i] != 0.0 ? d : 0.0;
          lane[i % kLanes] += fabs(d);
          lane[kLanes + i % kLanes] += fabs(v);
          lane[2 * kLanes + i % kLanes] = fma(v, v, lane[2 * kLanes + i % kLanes]);
        }
      }
    }
    for (int s = 0; s < 3 * in.count; ++s) {
      double* lane = lanes.data() + kLanes * s;
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
      }
      sums[s * blocks + b] = lane[0];
    }
  }
}

void magnitudes(const Inputs& in, double* out, int64_t begin, int64_t end) {
  const int64_t entries = in.window.rows * in.window.columns;
  alignas(64) double base[kRun] = {};
  for (int64_t entry = begin; entry < end; entry += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, end - entry));
    load_base(in, entry, n, base);
    for (int m = 0; m < in.count; ++m) {
      double* values = out + m * entries + entry;
      load_deltas(in, m, entry, n, base, values);
      for (int i = 0; i < n; ++i) values[i] = fabs(values[i]);
    }
  }
}

// mixed[i]: what is added to the base, out of each model's kept deltas.
MERGECORE_CLONES
void sum_run(const Election& e, const Deltas* values, int n, double* mixed) {
  for (int m = 0; m < e.kept.inputs.count; ++m) {
    const double c = e.scale * e.weights[m];
    if (e.elect == Elect::limited) {
      const double limit = e.limits[m];
      for (int i = 0; i < n; ++i) mixed[i] = fma(c, limited(values[m].value[i], limit), mixed[i]);
    } else {
      for (int i = 0; i < n; ++i) mixed[i] = fma(c, values[m].value[i], mixed[i]);
    }
  }
}

MERGECORE_CLONES
void elect_run(const Election& e, const Deltas* values, int n, double* mixed) {
  const int count = e.kept.inputs.count;
  double sum[kRun] = {}, absolute[kRun] = {}, divisor[kRun] = {}, weight[kRun] = {};
  for (int m = 0; m < count; ++m) {
    const double w = e.elect == Elect::weighted ? e.weights[m] : 1.0;
    for (int i = 0; i < n; ++i) {
      const double term = w * values[m].value[i];
      sum[i] += term;
      absolute[i] += fabs(term);
    }
  }
  for (int m = 0; m < count; ++m) {
    const double w = e.weights[m];
    const double side = e.elect == Elect::weighted ? w : 1.0;
    for (int i = 0; i < n; ++i) {
      const double v = values[m].value[i];
      const double sided = elects_negative(sum[i], absolute[i]) ? -(side * v) : side * v;
      const bool agrees = !(sided <= 0.0);  // NaN stays in
      mixed[i] = agrees ? fma(w, v, mixed[i]) : mixed[i];
      divisor[i] += agrees ? w : 0.0;
      weight[i] += agrees ? fabs(w) : 0.0;
    }
  }
  for (int i = 0; i < n; ++i) {
    mixed[i] = elected(mixed[i], divisor[i], weight[i], e.normalize, e.scale);
  }
}

MERGECORE_CLONES
void largest_run(const Election& e, const Deltas* values, int n, double* mixed) {
  for (int m = 0; m < e.kept.inputs.count; ++m) {
    const double w = e.weights[m];
    for (int i = 0; i < n; ++i) {
      const double term = w * values[m].value[i];
      mixed[i] = takes_over(term, mixed[i]) ? term : mixed[i];
    }
  }
  for (int i = 0; i < n; ++i) mixed[i] *= e.scale;
}

MERGECORE_CLONES
void shared_run(const Election& e, const Deltas* values, int n, double* mixed) {
  double sum[kRun] = {}, beyond[kRun] = {};
  for (int m = 0; m < e.kept.inputs.count; ++m) {
    const double w = e.weights[m], limit = e.limits[m];
    for (int i = 0; i < n; ++i) {
      const double v = values[m].value[i];
      const bool contributes = goes_beyond(v, limit);
      mixed[i] = contributes ? w * v : mixed[i];
      sum[i] += contributes ? v : 0.0;
      beyond[i] += contributes ? 1.0 : 0.0;
    }
  }
  for (int i = 0; i < n; ++i) {
    mixed[i] = e.scale * (beyond[i] > 1.0 ? sum[i] / beyond[i] : mixed[i]);
  }
}

MERGECORE_CLONES
void competing_run(const Election& e, const Deltas* values, const Deltas* factors, int n,
                   double* mixed) {
  double divisor[kRun] = {};
  for (int m = 0; m < e.kept.inputs.count; ++m) {
    const double w = e.weights[m];
    for (int i = 0; i < n; ++i) {
      mixed[i] = fma(w, values[m].value[i], mixed[i]);
      divisor[i] += factors[m].value[i];
    }
  }
  for (int i = 0; i < n; ++i) {
    mixed[i] = e.scale * (divisor[i] > 0.0 ? mixed[i] / divisor[i] : mixed[i]);
  }
}

// What too few models hold on to is 0.
MERGECORE_CLONES
void consensus_run(const Election& e, const Deltas* deltas, int n, double* mixed) {
  int held[kRun] = {};
  for (int m = 0; m < e.kept.inputs.count; ++m) {
    const double limit = e.limits[m];
    for (int i = 0; i < n; ++i) {
      held[i] += holds_on(deltas[m].value[i], mixed[i], limit) ? 1 : 0;
    }
  }
  const double scale = e.scale;
  for (int i = 0; i < n; ++i) mixed[i] = scale * agreed(mixed[i], held[i], e.consensus);
}

MERGECORE_CLONES
void multiply_run(const double* factor, const double* delta, int64_t n, double* value) {
  for (int64_t i = 0; i < n; ++i) value[i] = factor[i] * delta[i];
}

void mix_run(const Election& e, const Deltas* values, const Deltas* factors, int n, double* mixed) {
  std::fill_n(mixed, n, -0.0);
  switch (e.elect) {
    case Elect::none:
    case Elect::limited:
      return sum_run(e, values, n, mixed);
    case Elect::weighted:
    case Elect::unweighted:
      return elect_run(e, values, n, mixed);
    case Elect::largest:
      return largest_run(e, values, n, mixed);
    case Elect::shared:
      return shared_run(e, values, n, mixed);
    case Elect::competing:
      return competing_run(e, values, factors, n, mixed);
  }
}

// The kept deltas of a run. Where nothing is chosen, they are the deltas themselves.
struct Run {
  std::vector<Deltas> deltas, factors, values;

  explicit Run(const Kept& kept)
      : deltas(static_cast<size_t>(kept.inputs.count)),
        factors(kept.keeps == nullptr ? 0 : deltas.size()),
        values(factors.size()) {}

  const Deltas* load(const Kept& kept, int64_t entry, int n, const double* base) {
    for (int m = 0; m < kept.inputs.count; ++m) {
      load_deltas(kept.inputs, m, entry, n, base, deltas[static_cast<size_t>(m)].value);
    }
    if (kept.keeps == nullptr) return deltas.data();
    factor_runs(kept, deltas.data(), entry, n, factors.data());
    for (size_t m = 0; m < deltas.size(); ++m) {
      multiply_run(factors[m].value, deltas[m].value, n, values[m].value);
    }
    return values.data();
  }
};

void elect(const Election& e, int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow) {
  const Inputs& in = e.kept.inputs;
  // The masks of a consensus compare what is not scaled yet.
  Election unscaled = e;
  if (e.consensus > 0) unscaled.scale = 1.0;
  Run run(e.kept);
  alignas(64) double base[kRun] = {};
  alignas(64) double mixed[kRun];
  for (int64_t entry = begin; entry < end; entry += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, end - entry));
    load_base(in, entry, n, base);
    const Deltas* values = run.load(e.kept, entry, n, base);
    mix_run(unscaled, values, run.factors.data(), n, mixed);
    if (e.consensus > 0) consensus_run(e, run.deltas.data(), n, mixed);
    void* out = static_cast<char*>(e.out) + entry * dtype_size(e.out_dtype);
    store_chunk(base, 1.0, mixed, n, e.out_dtype, out, nonfinite, overflow);
  }
}

void keep_deltas(const Kept& kept, double* out, int64_t begin, int64_t end) {
  const int64_t entries = kept.inputs.window.rows * kept.inputs.window.columns;
  Run run(kept);
  alignas(64) double base[kRun] = {};
  for (int64_t entry = begin; entry < end; entry += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, end - entry));
    load_base(kept.inputs, entry, n, base);
    const Deltas* values = run.load(kept, entry, n, base);
    for (int m = 0; m < kept.inputs.count; ++m) {
      double* to = out + m * entries + entry;
      for (int i = 0; i < n; ++i) {
        const double v = values[m].value[i];
        to[i] = v == 0.0 ? base[i] : base[i] + v;
      }
    }
  }
}

void count_shared(const Inputs& in, const double* limits, int64_t* counts, int64_t begin,
                  int64_t end) {
  std::vector<Deltas> deltas(static_cast<size_t>(in.count));
  std::vector<int64_t> found(2 * deltas.size());
  for (int64_t entry = begin; entry < end; entry += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, end - entry));
    load_all_deltas(in, entry, n, deltas.data());
    int beyond[kRun] = {};
    for (int m = 0; m < in.count; ++m) {
      const double* delta = deltas[static_cast<size_t>(m)].value;
      for (int i = 0; i < n; ++i) beyond[i] += goes_beyond(delta[i], limits[m]) ? 1 : 0;
    }
    for (int m = 0; m < in.count; ++m) {
      const double* delta = deltas[static_cast<size_t>(m)].value;
      int64_t shared = 0, alone = 0;
      for (int i = 0; i < n; ++i) {
        const bool contributes = goes_beyond(delta[i], limits[m]);
        shared += contributes && beyond[i] > 1;
        alone += contributes && beyond[i] == 1;
      }
      found[static_cast<size_t>(2 * m)] += shared;
      found[static_cast<size_t>(2 * m + 1)] += alone;
    }
  }
  for (size_t i = 0; i < found.size(); ++i) add_to(counts + i, found[i]);
}

// The sum along a row, in 64 lanes, which are halved.
MERGECORE_CLONES
double sum_row(const double* values, int64_t columns) {
  double lanes[kLanes] = {};
  for (int64_t first = 0; first < columns; first += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, columns - first));
    for (int i = 0; i < n; ++i) lanes[i] += values[first + i];
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// power[i] = e^(base[i] + delta[i] - largest), where that is the largest exponent of the row.
MERGECORE_CLONES
void power_row(const double* base, const double* delta, int64_t columns, double* power) {
  double largest = -HUGE_VAL;
  for (int64_t i = 0; i < columns; ++i) {
    power[i] = base[i] + delta[i];
    largest = power[i] > largest ? power[i] : largest;
  }
  for (int64_t i = 0; i < columns; ++i) power[i] = exp_exact_order(power[i] - largest);
}

MERGECORE_CLONES
void rest_row(const double* power, const double* delta, double mean, int64_t columns, double* out) {
  for (int64_t i = 0; i < columns; ++i) out[i] = power[i] * exp_minus_line(mean - delta[i]);
}

// With p = softmax(x) and d = x - a, KL = log(sum p e^(m - d)) for m = sum p d. The terms of first
// order vanish, so that what is left, log(1 + sum p (e^(m - d) - 1 - (m - d))), cancels nowhere.
void row_divergences(const Inputs& in, double* out, int64_t stride, int64_t begin, int64_t end) {
  const int64_t columns = in.window.columns;
  std::vector<double> base(static_cast<size_t>(columns)), delta(base.size()), power(base.size()),
      term(base.size());
  for (int64_t row = begin; row < end; ++row) {
    for (int m = 0; m < in.count; ++m) {
      for (int64_t i = 0; i < columns; i += kRun) {
        const int n = static_cast<int>(std::min<int64_t>(kRun, columns - i));
        load_base(in, row * columns + i, n, base.data() + i);
        load_deltas(in, m, row * columns + i, n, base.data() + i, delta.data() + i);
      }
      power_row(base.data(), delta.data(), columns, power.data());
      const double total = sum_row(power.data(), columns);
      multiply_run(power.data(), delta.data(), columns, term.data());
      const double mean = sum_row(term.data(), columns) / total;
      rest_row(power.data(), delta.data(), mean, columns, term.data());
      const double rest = sum_row(term.data(), columns);
      out[m * stride + first_row_of(in.window) + row] = log1p_exact_order(rest / total);
    }
  }
}

}  // namespace mergecore::cpu
