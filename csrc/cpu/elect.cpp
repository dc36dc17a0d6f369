// What the kept deltas of an entry become: their sum, elections, the largest, consensus. Not for
// which deltas are kept (select.cpp).
#include <algorithm>
#include <cmath>

#include "quick_elect.h"
#include "select.h"

namespace mergecore::cpu {

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

// One model of a run whose deltas are those of bf16 numbers, kept by their own magnitude or at
// random.
struct Plain {
  const uint16_t* bits;
  const double* factors;  // by random number, or nullptr: `scale` for all
  double scale;
  double least, most;  // magnitudes below or beyond are not kept
  double weight;
};

// The same arithmetic as sum_run and elect_run, of all models of an entry at once.
template <int kModels, bool kRandom, bool kElects>
inline __attribute__((always_inline)) void mix_plain(const Election& e, const Plain* plain,
                                                     const uint16_t* base, int n, double* mixed) {
  Plain p[kModels];
  double side[kModels];
  for (int m = 0; m < kModels; ++m) {
    p[m] = plain[m];
    side[m] = e.elect == Elect::weighted ? p[m].weight : 1.0;
  }
  const double scale = e.scale;
  const bool normalize = e.normalize;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const double a = BF16::load(base[i]);
    double v[kModels];
    double sum = 0.0, absolute = 0.0, result = -0.0;
#pragma GCC unroll 4
    for (int m = 0; m < kModels; ++m) {
      const double d = BF16::load(p[m].bits[i]) - a, magnitude = fabs(d);
      const double factor = kRandom ? p[m].factors[i] : p[m].scale;
      v[m] = ((magnitude < p[m].least) | (magnitude > p[m].most) ? 0.0 : factor) * d;
      if constexpr (kElects) {
        const double term = side[m] * v[m];
        sum += term;
        absolute += fabs(term);
      } else {
        result = fma(scale * p[m].weight, v[m], result);
      }
    }
    if constexpr (kElects) {
      const bool negative = elects_negative(sum, absolute);
      double divisor = 0.0, weight = 0.0;
#pragma GCC unroll 4
      for (int m = 0; m < kModels; ++m) {
        const double term = side[m] * v[m], sided = negative ? -term : term;
        const bool agrees = !(sided <= 0.0);  // NaN stays in
        result = agrees ? fma(p[m].weight, v[m], result) : result;
        divisor += agrees ? p[m].weight : 0.0;
        weight += agrees ? fabs(p[m].weight) : 0.0;
      }
      result = elected(result, divisor, weight, normalize, scale);
    }
    mixed[i] = result;
  }
}

template <int kModels>
inline __attribute__((always_inline)) void mix_plain(const Election& e, const Plain* plain,
                                                     bool random, const uint16_t* base, int n,
                                                     double* mixed) {
  const bool elects = e.elect != Elect::none;
  if (random) {
    elects ? mix_plain<kModels, true, true>(e, plain, base, n, mixed)
           : mix_plain<kModels, true, false>(e, plain, base, n, mixed);
  } else {
    elects ? mix_plain<kModels, false, true>(e, plain, base, n, mixed)
           : mix_plain<kModels, false, false>(e, plain, base, n, mixed);
  }
}

MERGECORE_CLONES
void mix_plain_run(const Election& e, const Plain* plain, bool random, const uint16_t* base, int n,
                   double* mixed) {
  switch (e.kept.inputs.count) {
    case 1:
      return mix_plain<1>(e, plain, random, base, n, mixed);
    case 2:
      return mix_plain<2>(e, plain, random, base, n, mixed);
    case 3:
      return mix_plain<3>(e, plain, random, base, n, mixed);
    case 4:
      return mix_plain<4>(e, plain, random, base, n, mixed);
  }
}

// The limits of a run. False where two numbers do not tell: ties are kept in a part of it only.
bool plain_limits(const Drop& drop, int64_t first, int n, Plain& plain) {
  const auto within = [&](int64_t before) { return before > first && before < first + n; };
  if (within(drop.least_before) || within(drop.most_before)) return false;
  if (drop.least == HUGE_VAL) return false;  // there is no next number
  // Where its ties are dropped, a limit is the next number that is kept.
  plain.least = first < drop.least_before ? drop.least : std::nextafter(drop.least, HUGE_VAL);
  plain.most = first < drop.most_before ? std::nextafter(drop.most, -HUGE_VAL) : drop.most;
  return true;
}

// mixed[i] of a run, if the models are plain and no limit changes within the run.
bool mix_plain_models(const Election& e, int64_t entry, int n, Deltas* factors, double* mixed) {
  const Inputs& in = e.kept.inputs;
  Plain plain[kMaxPlain];
  bool random = false;
  for (int m = 0; m < in.count; ++m) {
    const auto* bits = static_cast<const uint16_t*>(at(in.models[m], entry));
    plain[m] = {bits, nullptr, 1.0, -1.0, HUGE_VAL, e.weights[m]};
    if (e.kept.keeps == nullptr) continue;
    const Drop& drop = e.kept.keeps[m];
    plain[m].scale = drop.scale;
    if (selects(drop) && !plain_limits(drop, index_of(in.window, entry), n, plain[m])) return false;
    random = random || e.kept.odds != nullptr || drop.threshold > 0;
  }
  for (int m = 0; random && m < in.count; ++m) {
    random_run(e.kept, m, entry, n, factors[m].value);
    plain[m].factors = factors[m].value;
  }
  mix_plain_run(e, plain, random, static_cast<const uint16_t*>(at(in.base, entry)), n, mixed);
  return true;
}

void elect(const Election& e, int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow) {
  const Inputs& in = e.kept.inputs;
  // The masks of a consensus compare what is not scaled yet.
  Election unscaled = e;
  if (e.consensus > 0) unscaled.scale = 1.0;
  Run run(e.kept);
  const bool plain = is_plain(e);
  alignas(64) double base[kRun] = {};
  alignas(64) double mixed[kRun];
  const auto store = [&](int64_t entry, int n) {
    load_base(in, entry, n, base);
    if (!plain || !mix_plain_models(e, entry, n, run.factors.data(), mixed)) {
      const Deltas* values = run.load(e.kept, entry, n, base);
      mix_run(unscaled, values, run.factors.data(), n, mixed);
      if (e.consensus > 0) consensus_run(e, run.deltas.data(), n, mixed);
    }
    void* out = static_cast<char*>(e.out) + entry * dtype_size(e.out_dtype);
    store_chunk(base, 1.0, mixed, n, e.out_dtype, out, nonfinite, overflow);
  };
  QuickElect quick(e);
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t chunk_end = std::min(end, chunk + kChunk);
    uint32_t left = quick.store(chunk, static_cast<int>(chunk_end - chunk));
    for (int64_t entry = chunk; left != 0;) {
      const int decided = __builtin_ctz(left), blocks = __builtin_ctz(~(left >> decided));
      left = left >> decided >> blocks;
      entry += decided * kQuick;
      const int64_t stop = std::min(chunk_end, entry + blocks * kQuick);
      for (; entry < stop; entry += kRun) {
        store(entry, static_cast<int>(std::min<int64_t>(kRun, stop - entry)));
      }
      entry = stop;
    }
  }
}

}  // namespace mergecore::cpu
