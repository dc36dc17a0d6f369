// Order statistics of magnitudes, and the blend of deltas that were chosen by them: one thread per
// entry, the models one after the other.
#include "window.cuh"

namespace mergecore::cuda {

namespace {

constexpr int kThreads = 256;

struct DeviceKept {
  DeviceInputs in;
  Measure measure;
  const double* scales;
  int64_t stride;
  bool keeping;
  bool divide_by_odds;
  const double* odds;
  Drop keeps[kMaxModels];
};

DeviceKept kept_by_value(const Kept& kept) {
  DeviceKept out = {};
  out.in = by_value(kept.inputs);
  out.measure = kept.measure;
  out.scales = kept.scales;
  out.stride = kept.stride;
  out.keeping = kept.keeps != nullptr;
  out.divide_by_odds = kept.divide_by_odds;
  out.odds = kept.odds;
  for (int m = 0; out.keeping && m < kept.inputs.count; ++m) out.keeps[m] = kept.keeps[m];
  return out;
}

int64_t entries_of(const Kept& kept) {
  return kept.inputs.window.rows * kept.inputs.window.columns;
}

__device__ __forceinline__ double number_at(const Matrix& matrix, int64_t entry) {
  switch (matrix.dtype) {
    case Dtype::f64:
      return F64::load(static_cast<const uint64_t*>(matrix.data)[entry]);
    case Dtype::f32:
      return F32::load(static_cast<const uint32_t*>(matrix.data)[entry]);
    case Dtype::f16:
      return F16::load(static_cast<const uint16_t*>(matrix.data)[entry]);
    default:
      return BF16::load(static_cast<const uint16_t*>(matrix.data)[entry]);
  }
}

__device__ __forceinline__ double base_at(const DeviceInputs& in, int64_t entry) {
  return in.base.data == nullptr ? 0.0 : number_at(in.base, entry);
}

__device__ __forceinline__ int64_t index_of(const DeviceInputs& in, int64_t entry) {
  return in.window.first_entry + in.window.first_row * in.window.columns + entry;
}

__device__ __forceinline__ uint32_t random_number(uint64_t key, int64_t index) {
  uint32_t block[4];
  philox(key, static_cast<uint64_t>(index) >> 2, block);
  const unsigned place = static_cast<unsigned>(index & 3);
  const uint32_t low = (place & 1) != 0 ? block[1] : block[0];
  const uint32_t high = (place & 1) != 0 ? block[3] : block[2];
  return (place & 2) != 0 ? high : low;
}

__device__ __forceinline__ double delta_of(const DeviceInputs& in, int m, double base,
                                           int64_t entry) {
  const Drop& drop = in.drops[m];
  const double d = number_at(in.models[m], entry) - base;
  if (!drops_any(drop)) return d;
  const int64_t index = index_of(in, entry);
  const uint32_t number = drop.threshold > 0 ? random_number(drop.key, index) : 0;
  return keep(drop, number, d, index) * d;
}

__device__ __forceinline__ double spread_at(const DeviceInputs& in, double base, int64_t entry) {
  double mean = 0.0, distances = 0.0, squares = 0.0;
  for (int m = 0; m < in.count; ++m) mean += delta_of(in, m, base, entry);
  mean /= in.count;
  for (int m = 0; m < in.count; ++m) {
    const double d = delta_of(in, m, base, entry), distance = d - mean;
    distances = fma(distance, distance, distances);
    squares = fma(d, d, squares);
  }
  return spread_of(distances, squares, in.count);
}

// What the measures of all models of an entry have in common.
__device__ __forceinline__ double common_at(const DeviceKept& kept, double base, int64_t entry) {
  if (kept.measure == Measure::spread) return spread_at(kept.in, base, entry);
  double total = 0.0;
  if (kept.measure != Measure::competition) return total;
  for (int m = 0; m < kept.in.count; ++m) total += delta_of(kept.in, m, base, entry);
  return total;
}

// The magnitude that is compared, of the delta d of model m.
__device__ __forceinline__ double measured(const DeviceKept& kept, int m, double d, double common,
                                           int64_t entry) {
  const double* scales = kept.scales + m * kept.stride;
  switch (kept.measure) {
    case Measure::spread:
      return common;
    case Measure::rows:
      return fabs(d) * scales[index_of(kept.in, entry) / kept.in.window.columns];
    case Measure::competition:
      return competition(d, common, kept.in.count, scales);
    default:
      return fabs(d);
  }
}

// What the delta d of model m is multiplied with.
__device__ __forceinline__ double factor_of(const DeviceKept& kept, int m, double d, double common,
                                            int64_t entry) {
  if (!kept.keeping) return 1.0;
  const Drop& drop = kept.keeps[m];
  const int64_t index = index_of(kept.in, entry);
  double factor = drop.scale;
  if (kept.odds != nullptr) {
    const double odds = kept.odds[m * kept.in.window.rows * kept.in.window.columns + entry];
    if (kept.divide_by_odds) factor = 1.0 / odds;
    if (!kept_by_odds(random_number(drop.key, index), odds)) factor = 0.0;
  } else if (drop.threshold > 0 && random_number(drop.key, index) < drop.threshold) {
    factor = 0.0;
  }
  if (!selects(drop)) return factor;
  const double magnitude = measured(kept, m, d, common, entry);
  if (!selected(drop, magnitude, index)) return 0.0;
  if (kept.measure != Measure::competition || factor == 0.0) return factor;
  return factor * competing_weight(magnitude, drop.least, drop.most);
}

__device__ __forceinline__ void count_one(int64_t* total) {
  atomicAdd(reinterpret_cast<unsigned long long*>(total), 1ull);
}

// The key of set `which`: a model's, or that of all.
__device__ __forceinline__ int64_t key_of(const DeviceKept& kept, int which, int64_t entry) {
  const double base = base_at(kept.in, entry);
  const double d = delta_of(kept.in, which, base, entry);
  return magnitude_bits(measured(kept, which, d, common_at(kept, base, entry), entry));
}

struct Offsets {
  int64_t of[kMaxModels];
};

__global__ void __launch_bounds__(kThreads)
    count_window(const __grid_constant__ DeviceKept kept, const __grid_constant__ Offsets offsets,
                 int sets, int shift, bool clamp, int64_t bins, int64_t entries,
                 int64_t* histogram) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= entries) return;
  for (int set = 0; set < sets; ++set) {
    const int64_t key = key_of(kept, set, entry), offset = offsets.of[set];
    const int64_t bin = clamp ? clamped_bin(key, shift, offset, bins) : (key >> shift) - offset;
    if (bin >= 0 && bin < bins) count_one(histogram + set * bins + bin);
  }
}

struct Ranges {
  KeyRange of[kMaxRanges];
  int count;
};

__global__ void __launch_bounds__(kThreads)
    collect_window(const __grid_constant__ DeviceKept kept, const __grid_constant__ Ranges ranges,
                   int64_t entries, int64_t* keys, int64_t* indices, int64_t capacity,
                   int64_t* found, int64_t* equal, int64_t block) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= entries) return;
  const int64_t blocks = (entries + block - 1) / block;
  for (int r = 0; r < ranges.count; ++r) {
    const KeyRange& range = ranges.of[r];
    const int64_t key = key_of(kept, range.model, entry);
    if (key == range.low) count_one(equal + r * blocks + entry / block);
    if (key <= range.low || key >= range.high) continue;
    const int64_t place =
        static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(found + r), 1ull));
    if (place >= capacity) continue;
    keys[r * capacity + place] = key;
    indices[r * capacity + place] = index_of(kept.in, entry);
  }
}

constexpr int kWarp = 32;

struct Sums {
  double total = 0.0;
  double magnitude = 0.0;
  double square = 0.0;
};

// One lane of a block's sums.
__device__ __forceinline__ Sums sum_lane(const DeviceKept& kept, int m, int64_t entry,
                                         int64_t last) {
  Sums sums;
  for (; entry < last; entry += kLanes) {
    const double base = base_at(kept.in, entry);
    const double d = delta_of(kept.in, m, base, entry);
    const double v = factor_of(kept, m, d, common_at(kept, base, entry), entry) != 0.0 ? d : 0.0;
    sums.total += fabs(d);
    sums.magnitude += fabs(v);
    sums.square = fma(v, v, sums.square);
  }
  return sums;
}

__device__ __forceinline__ double add_lanes(double low, double high) {
  double sum = low + high;  // lanes i and i + 32
  for (int half = kWarp / 2; half > 0; half /= 2)
    sum += __shfl_down_sync(kAllLanes, sum, half, kWarp);
  return sum;
}

// One warp per block of entries; a thread has two of the 64 lanes.
__global__ void __launch_bounds__(kWarp)
    sum_blocks(const __grid_constant__ DeviceKept kept, int64_t entries, int64_t blocks,
               int64_t block, double* sums) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * block;
  const int64_t last = first + block < entries ? first + block : entries;
  for (int m = 0; m < kept.in.count; ++m) {
    const Sums low = sum_lane(kept, m, first + threadIdx.x, last);
    const Sums high = sum_lane(kept, m, first + threadIdx.x + kWarp, last);
    const double total = add_lanes(low.total, high.total);
    const double magnitude = add_lanes(low.magnitude, high.magnitude);
    const double square = add_lanes(low.square, high.square);
    if (threadIdx.x != 0) continue;
    double* out = sums + 3 * m * blocks + blockIdx.x;
    out[0] = total;
    out[blocks] = magnitude;
    out[2 * blocks] = square;
  }
}

__global__ void __launch_bounds__(kThreads)
    write_magnitudes(const __grid_constant__ DeviceInputs in, int64_t entries, double* out) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= entries) return;
  const double base = base_at(in, entry);
  for (int m = 0; m < in.count; ++m) out[m * entries + entry] = fabs(delta_of(in, m, base, entry));
}

__global__ void __launch_bounds__(kThreads)
    write_kept(const __grid_constant__ DeviceKept kept, int64_t entries, double* out) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= entries) return;
  const double base = base_at(kept.in, entry), common = common_at(kept, base, entry);
  for (int m = 0; m < kept.in.count; ++m) {
    const double d = delta_of(kept.in, m, base, entry);
    const double v = factor_of(kept, m, d, common, entry) * d;
    out[m * entries + entry] = v == 0.0 ? base : base + v;
  }
}

struct Limits {
  double of[kMaxModels];
};

__global__ void __launch_bounds__(kThreads)
    count_beyond(const __grid_constant__ DeviceInputs in, const __grid_constant__ Limits limits,
                 int64_t entries, int64_t* counts) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= entries) return;
  const double base = base_at(in, entry);
  int beyond = 0;
  for (int m = 0; m < in.count; ++m) {
    beyond += goes_beyond(delta_of(in, m, base, entry), limits.of[m]) ? 1 : 0;
  }
  for (int m = 0; m < in.count; ++m) {
    if (!goes_beyond(delta_of(in, m, base, entry), limits.of[m])) continue;
    count_one(counts + 2 * m + (beyond > 1 ? 0 : 1));
  }
}

// The sum of f(entry) along a row of `columns` entries: a thread of the warp has two of the lanes.
template <class F>
__device__ __forceinline__ double sum_row(int64_t columns, const F& f) {
  double low = 0.0, high = 0.0;
  for (int64_t i = threadIdx.x; i < columns; i += kLanes) low += f(i);
  for (int64_t i = threadIdx.x + kWarp; i < columns; i += kLanes) high += f(i);
  return add_lanes(low, high);
}

// The first thread's value.
__device__ __forceinline__ double from_first(double value) {
  return __shfl_sync(kAllLanes, value, 0, kWarp);
}

// One warp per row and model.
__global__ void __launch_bounds__(kWarp)
    diverge_rows(const __grid_constant__ DeviceInputs in, double* out, int64_t stride) {
  const int64_t columns = in.window.columns;
  const int m = static_cast<int>(blockIdx.x % static_cast<unsigned>(in.count));
  const int64_t row = blockIdx.x / static_cast<unsigned>(in.count), first = row * columns;
  const auto delta = [&](int64_t i) { return delta_of(in, m, base_at(in, first + i), first + i); };
  const auto entry = [&](int64_t i) {
    const double base = base_at(in, first + i);
    return base + delta_of(in, m, base, first + i);
  };
  double largest = -HUGE_VAL;
  for (int64_t i = threadIdx.x; i < columns; i += kWarp) {
    const double x = entry(i);
    largest = x > largest ? x : largest;
  }
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const double other = __shfl_down_sync(kAllLanes, largest, half, kWarp);
    largest = other > largest ? other : largest;
  }
  largest = from_first(largest);
  const auto power = [&](int64_t i) { return exp_exact_order(entry(i) - largest); };
  const double total = from_first(sum_row(columns, power));
  const double mean =
      from_first(sum_row(columns, [&](int64_t i) { return power(i) * delta(i); }) / total);
  const double rest =
      sum_row(columns, [&](int64_t i) { return power(i) * exp_minus_line(mean - delta(i)); });
  if (threadIdx.x != 0) return;
  out[m * stride + first_row_of(in.window) + row] = log1p_exact_order(rest / total);
}

struct DeviceElection {
  DeviceKept kept;
  Elect elect;
  bool normalize;
  double scale;
  int consensus;
  void* out;
  Dtype out_dtype;
  double weights[kMaxModels];
  double limits[kMaxModels];
};

// Model m's delta and what it is multiplied with.
struct Choice {
  double delta;
  double factor;
  __device__ __forceinline__ double value() const { return factor * delta; }
};

__device__ __forceinline__ Choice choice_of(const DeviceKept& kept, int m, double base,
                                            double common, int64_t entry) {
  const double d = delta_of(kept.in, m, base, entry);
  return {d, factor_of(kept, m, d, common, entry)};
}

// With an election by sign.
__device__ __forceinline__ double elected_at(const DeviceElection& e, double scale, double base,
                                             double common, int64_t entry) {
  const DeviceKept& kept = e.kept;
  double mixed = -0.0, sum = 0.0, absolute = 0.0, divisor = 0.0, weight = 0.0;
  for (int m = 0; m < kept.in.count; ++m) {
    const double w = e.elect == Elect::weighted ? e.weights[m] : 1.0;
    const double term = w * choice_of(kept, m, base, common, entry).value();
    sum += term;
    absolute += fabs(term);
  }
  const bool negative = elects_negative(sum, absolute);
  for (int m = 0; m < kept.in.count; ++m) {
    const double w = e.weights[m];
    const double v = choice_of(kept, m, base, common, entry).value();
    const double side = e.elect == Elect::weighted ? w * v : v;
    if ((negative ? -side : side) <= 0.0) continue;  // NaN stays in
    mixed = fma(w, v, mixed);
    divisor += w;
    weight += fabs(w);
  }
  return elected(mixed, divisor, weight, e.normalize, scale);
}

__device__ __forceinline__ double combined_at(const DeviceElection& e, double scale, double base,
                                              double common, int64_t entry) {
  const DeviceKept& kept = e.kept;
  if (e.elect == Elect::weighted || e.elect == Elect::unweighted) {
    return elected_at(e, scale, base, common, entry);
  }
  double mixed = -0.0, sum = 0.0, beyond = 0.0, divisor = 0.0;
  for (int m = 0; m < kept.in.count; ++m) {
    const Choice choice = choice_of(kept, m, base, common, entry);
    const double w = e.weights[m], limit = e.limits[m], v = choice.value();
    switch (e.elect) {
      case Elect::none:
        mixed = fma(scale * w, v, mixed);
        break;
      case Elect::limited:
        mixed = fma(scale * w, limited(v, limit), mixed);
        break;
      case Elect::largest:
        if (takes_over(w * v, mixed)) mixed = w * v;
        break;
      case Elect::shared:
        if (!goes_beyond(v, limit)) break;
        mixed = w * v;
        sum += v;
        beyond += 1.0;
        break;
      default:  // competing
        mixed = fma(w, v, mixed);
        divisor += choice.factor;
    }
  }
  switch (e.elect) {
    case Elect::largest:
      return mixed * scale;
    case Elect::shared:
      return scale * (beyond > 1.0 ? sum / beyond : mixed);
    case Elect::competing:
      return scale * (divisor > 0.0 ? mixed / divisor : mixed);
    default:
      return mixed;
  }
}

// What is added to the base.
__device__ __forceinline__ double mixed_at(const DeviceElection& e, double base, int64_t entry) {
  const double common = common_at(e.kept, base, entry);
  const double mixed = combined_at(e, e.consensus > 0 ? 1.0 : e.scale, base, common, entry);
  if (e.consensus == 0) return mixed;
  int held = 0;
  for (int m = 0; m < e.kept.in.count; ++m) {
    held += holds_on(delta_of(e.kept.in, m, base, entry), mixed, e.limits[m]) ? 1 : 0;
  }
  return e.scale * agreed(mixed, held, e.consensus);
}

template <class Out>
__global__ void __launch_bounds__(kThreads)
    elect_window(const __grid_constant__ DeviceElection e, int64_t entries, int64_t* counts) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= entries) return;
  const double base = base_at(e.kept.in, entry);
  const double mixed = mixed_at(e, base, entry);
  const double value = mixed == 0.0 ? base : base + mixed;
  const double result = round_to<Out>(value);
  static_cast<typename Out::Bits*>(e.out)[entry] = Out::store(static_cast<float>(result));
  if (!(fabs(value) < HUGE_VAL)) {
    count_one(counts);
  } else if (fabs(result) > Out::largest) {
    count_one(counts + 1);
  }
}

}  // namespace

int count_magnitudes(const Kept& kept, int shift, const int64_t* offsets, bool clamp, int64_t bins,
                     int64_t* histogram, Stream stream) {
  const int64_t entries = entries_of(kept);
  if (entries == 0) return cudaSuccess;
  const int sets = kept.measure == Measure::spread ? 1 : kept.inputs.count;
  Offsets values = {};
  std::copy_n(offsets, sets, values.of);
  return launch(&count_window, divide_up(entries, kThreads), kThreads, stream, kept_by_value(kept),
                values, sets, shift, clamp, bins, entries, histogram);
}

int collect_magnitudes(const Kept& kept, const KeyRange* ranges, int count, int64_t* keys,
                       int64_t* indices, int64_t capacity, int64_t* found, int64_t* equal,
                       int64_t block, Stream stream) {
  const int64_t entries = entries_of(kept);
  if (entries == 0) return cudaSuccess;
  Ranges values = {};
  std::copy_n(ranges, count, values.of);
  values.count = count;
  return launch(&collect_window, divide_up(entries, kThreads), kThreads, stream,
                kept_by_value(kept), values, entries, keys, indices, capacity, found, equal, block);
}

int kept_sums(const Kept& kept, double* sums, int64_t block, Stream stream) {
  const int64_t entries = entries_of(kept);
  if (entries == 0) return cudaSuccess;
  const int64_t blocks = divide_up(entries, block);
  return launch(&sum_blocks, blocks, kWarp, stream, kept_by_value(kept), entries, blocks, block,
                sums);
}

int magnitudes(const Inputs& in, double* out, Stream stream) {
  const int64_t entries = in.window.rows * in.window.columns;
  if (entries == 0) return cudaSuccess;
  return launch(&write_magnitudes, divide_up(entries, kThreads), kThreads, stream, by_value(in),
                entries, out);
}

int keep_deltas(const Kept& kept, double* out, Stream stream) {
  const int64_t entries = entries_of(kept);
  if (entries == 0) return cudaSuccess;
  return launch(&write_kept, divide_up(entries, kThreads), kThreads, stream, kept_by_value(kept),
                entries, out);
}

int count_shared(const Inputs& in, const double* limits, int64_t* counts, Stream stream) {
  const int64_t entries = in.window.rows * in.window.columns;
  if (entries == 0) return cudaSuccess;
  Limits values = {};
  std::copy_n(limits, in.count, values.of);
  return launch(&count_beyond, divide_up(entries, kThreads), kThreads, stream, by_value(in), values,
                entries, counts);
}

int row_divergences(const Inputs& in, double* out, int64_t stride, Stream stream) {
  if (in.window.rows == 0 || in.window.columns == 0) return cudaSuccess;
  return launch(&diverge_rows, in.window.rows * in.count, kWarp, stream, by_value(in), out, stride);
}

int elect(const Election& election, int64_t* counts, Stream stream) {
  const int64_t entries = entries_of(election.kept);
  if (entries == 0) return cudaSuccess;
  DeviceElection e = {};
  e.kept = kept_by_value(election.kept);
  e.elect = election.elect;
  e.normalize = election.normalize;
  e.scale = election.scale;
  e.out = election.out;
  e.out_dtype = election.out_dtype;
  e.consensus = election.consensus;
  std::copy_n(election.weights, election.kept.inputs.count, e.weights);
  if (election.limits != nullptr) {
    std::copy_n(election.limits, election.kept.inputs.count, e.limits);
  }
  const int64_t blocks = divide_up(entries, kThreads);
  switch (election.out_dtype) {
    case Dtype::f32:
      return launch(&elect_window<F32>, blocks, kThreads, stream, e, entries, counts);
    case Dtype::f16:
      return launch(&elect_window<F16>, blocks, kThreads, stream, e, entries, counts);
    default:
      return launch(&elect_window<BF16>, blocks, kThreads, stream, e, entries, counts);
  }
}

}  // namespace mergecore::cuda
