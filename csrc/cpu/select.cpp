// Order statistics of magnitudes, and the blend of deltas that were chosen by them: top sets,
// random masks, sign election.
#include <algorithm>
#include <vector>

#include "chunk.h"

namespace mergecore::cpu {

constexpr int kRun = 128;  // entries; the deltas of 64 models fit an L2 cache

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

// Calls f(which, keys) with the keys of a run, of each model or of all together.
template <class F>
void with_keys(const Kept& kept, int64_t entry, int n, const F& f) {
  const Inputs& in = kept.inputs;
  int64_t keys[kRun];
  const auto call = [&](int which, const double* values) {
    for (int i = 0; i < n; ++i) keys[i] = magnitude_bits(values[i]);
    f(which, keys);
  };
  if (kept.measure == Measure::spread) {
    Deltas deltas[kMaxModels];
    double spread[kRun];
    load_all_deltas(in, entry, n, deltas);
    spread_chunk(deltas, in.count, n, spread);
    return call(0, spread);
  }
  alignas(64) double base[kRun] = {};
  alignas(64) double delta[kRun];
  load_base(in, entry, n, base);
  for (int m = 0; m < in.count; ++m) {
    load_deltas(in, m, entry, n, base, delta);
    call(m, delta);
  }
}

void add_to(int64_t* total, int64_t count) { __atomic_fetch_add(total, count, __ATOMIC_RELAXED); }

// The same for model m alone.
Kept only(const Kept& kept, int m) {
  Kept one = kept;
  one.inputs.models += m;
  if (one.inputs.drops != nullptr) one.inputs.drops += m;
  one.inputs.count = 1;
  return one;
}

void count_magnitudes(const Kept& kept, int shift, const int64_t* offsets, bool clamp, int64_t bins,
                      int64_t* histogram, int64_t begin, int64_t end) {
  const bool own = kept.measure == Measure::own;
  // One model after the other: a thread's counts of one model fit its cache.
  std::vector<uint32_t> counts(static_cast<size_t>(bins));
  for (int set = 0; set < (own ? kept.inputs.count : 1); ++set) {
    const Kept part = own ? only(kept, set) : kept;
    const int64_t offset = offsets[set];
    for (int64_t entry = begin; entry < end; entry += kRun) {
      const int n = static_cast<int>(std::min<int64_t>(kRun, end - entry));
      with_keys(part, entry, n, [&](int, const int64_t* keys) {
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
    with_keys(kept, entry, n, [&](int which, const int64_t* keys) {
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

// factors[m][i]: what the kept delta of entry i is multiplied with, or 0.
void keep_run(const Kept& kept, const Deltas* deltas, int64_t entry, int n, Deltas* factors) {
  const Inputs& in = kept.inputs;
  const Window& w = in.window;
  const int64_t first = index_of(w, entry);
  double spread[kRun];
  if (kept.measure == Measure::spread) spread_chunk(deltas, in.count, n, spread);
  for (int m = 0; m < in.count; ++m) {
    double* factor = factors[m].value;
    if (kept.keeps == nullptr) {
      std::fill_n(factor, n, 1.0);
      continue;
    }
    const Drop& drop = kept.keeps[m];
    if (kept.odds != nullptr) {
      const double* odds = kept.odds + m * w.rows * w.columns + entry;
      uint32_t numbers[kRun];
      numbers_chunk(drop.key, static_cast<uint64_t>(first), n, numbers);
      for (int i = 0; i < n; ++i) {
        const double scale = kept.divide_by_odds ? 1.0 / odds[i] : drop.scale;
        factor[i] = kept_by_odds(numbers[i], odds[i]) ? scale : 0.0;
      }
    } else {
      keep_chunk(drop, static_cast<uint64_t>(first), n, factor);
    }
    if (!selects(drop)) continue;
    for (int i = 0; i < n; ++i) {
      const double magnitude =
          kept.measure == Measure::spread ? spread[i] : fabs(deltas[m].value[i]);
      factor[i] = selected(drop, magnitude, first + i) ? factor[i] : 0.0;
    }
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
      keep_run(kept, deltas.data(), entry, n, factors.data());
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

// values[m] become factor * delta; mixed[i] what is added to the base.
MERGECORE_CLONES
void mix_chunk(const Election& e, Deltas* values, const Deltas* factors, int n, double* mixed) {
  const int count = e.kept.inputs.count;
  for (int m = 0; m < count; ++m) {
    for (int i = 0; i < n; ++i) values[m].value[i] *= factors[m].value[i];
  }
  std::fill_n(mixed, n, -0.0);
  if (e.elect == Elect::none) {
    for (int m = 0; m < count; ++m) {
      const double c = e.scale * e.weights[m];
      for (int i = 0; i < n; ++i) mixed[i] = fma(c, values[m].value[i], mixed[i]);
    }
    return;
  }
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

void store_run(const double* base, const double* mixed, int n, Dtype dtype, void* out,
               int64_t& nonfinite, int64_t& overflow) {
  with_result(dtype, [&](auto type) {
    using T = decltype(type);
    auto* bits = static_cast<typename T::Bits*>(out);
    for (int i = 0; i < n; ++i) {
      const double value = mixed[i] == 0.0 ? base[i] : base[i] + mixed[i];
      const double result = round_to<T>(value);
      bits[i] = T::store(static_cast<float>(result));
      if (!(fabs(value) < HUGE_VAL)) {
        ++nonfinite;
      } else if (fabs(result) > T::largest) {
        ++overflow;
      }
    }
  });
}

void elect(const Election& e, int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow) {
  const Inputs& in = e.kept.inputs;
  std::vector<Deltas> deltas(static_cast<size_t>(in.count)), factors(static_cast<size_t>(in.count));
  alignas(64) double base[kRun] = {};
  alignas(64) double mixed[kRun];
  for (int64_t entry = begin; entry < end; entry += kRun) {
    const int n = static_cast<int>(std::min<int64_t>(kRun, end - entry));
    load_base(in, entry, n, base);
    for (int m = 0; m < in.count; ++m)
      load_deltas(in, m, entry, n, base, deltas[static_cast<size_t>(m)].value);
    keep_run(e.kept, deltas.data(), entry, n, factors.data());
    mix_chunk(e, deltas.data(), factors.data(), n, mixed);
    void* out = static_cast<char*>(e.out) + entry * dtype_size(e.out_dtype);
    store_run(base, mixed, n, e.out_dtype, out, nonfinite, overflow);
  }
}

}  // namespace mergecore::cpu
