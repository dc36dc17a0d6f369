// The deltas of a run and what chooses among them: measures, masks, sums of what is kept. Not for
// the search of top sets (magnitudes.cpp), nor for what becomes of the kept deltas (elect.cpp).
#include "select.h"

#include <algorithm>
#include <vector>

namespace mergecore::cpu {

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

MERGECORE_CLONES
void size_run(const double* delta, double scale, int n, double* out) {
  for (int i = 0; i < n; ++i) out[i] = fabs(delta[i]) * scale;
}

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
      for (int i = 0; i < n;) {
        const int64_t row = (first + i) / columns, end = (row + 1) * columns - first;
        const int last = static_cast<int>(std::min<int64_t>(n, end));
        size_run(delta + i, scales[row], last - i, out + i);
        i = last;
      }
      return out;
    }
    case Measure::competition:
      competition_run(delta, common, in.count, scales, n, out);
      return out;
  }
  return out;
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

void random_run(const Kept& kept, int m, int64_t entry, int n, double* factor) {
  const Drop& drop = kept.keeps[m];
  const Window& w = kept.inputs.window;
  const uint64_t first = static_cast<uint64_t>(index_of(w, entry));
  if (kept.odds == nullptr) return keep_chunk(drop, first, n, factor);
  uint32_t numbers[kRun];
  numbers_chunk(drop.key, first, n, numbers);
  const double* odds = kept.odds + m * w.rows * w.columns + entry;
  odds_run(numbers, odds, kept.divide_by_odds, drop.scale, n, factor);
}

// factor[i]: what the delta of entry i of model m is multiplied with, 0 where it is not kept.
void factor_run(const Kept& kept, int m, const double* delta, const double* common, int64_t entry,
                int n, double* factor) {
  if (kept.keeps == nullptr) {
    std::fill_n(factor, n, 1.0);
    return;
  }
  const Drop& drop = kept.keeps[m];
  random_run(kept, m, entry, n, factor);
  if (!selects(drop)) return;
  alignas(64) double out[kRun];
  const double* measured = measured_run(kept, m, delta, common, entry, n, out);
  select_run(drop, measured, index_of(kept.inputs.window, entry), n, factor);
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
      sums[s * blocks + b] = sum_lanes(lanes.data() + kLanes * s);
    }
  }
}

MERGECORE_CLONES
void multiply_run(const double* factor, const double* delta, int64_t n, double* value) {
  for (int64_t i = 0; i < n; ++i) value[i] = factor[i] * delta[i];
}

const Deltas* Run::load(const Kept& kept, int64_t entry, int n, const double* base) {
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
  return sum_lanes(lanes);
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
