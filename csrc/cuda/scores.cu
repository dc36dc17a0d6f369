// Ranking within each model or row, and the calibrated softmax over models: WIDEN's equations 3
// to 6.
#include <cub/device/device_radix_sort.cuh>

#include "window.cuh"

namespace mergecore::cuda {

namespace {

constexpr int kThreads = 256;

struct Odds {
  double lowest[kMaxModels];
  double steps[kMaxModels];
};

__global__ void __launch_bounds__(kThreads)
    make_keys(const double* values, int64_t count, uint64_t* keys, uint32_t* indices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  keys[i] = sort_key(values[i]);
  indices[i] = static_cast<uint32_t>(i);
}

__global__ void __launch_bounds__(kThreads)
    make_rows(const uint32_t* indices, int64_t total, uint32_t count, uint32_t* rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < total) rows[i] = indices[i] / count;
}

// The first position in [begin, end) of the sorted values whose key is not `before` the wanted one.
template <class Before>
__device__ __forceinline__ int64_t search(const double* values, const uint32_t* indices,
                                          int64_t begin, int64_t end, const Before& before) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (before(sort_key(values[indices[middle]]))) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// From the indices of all values, model after model, each model's in rising order.
__global__ void __launch_bounds__(kThreads)
    write_ranks(const double* values, const uint32_t* indices, int64_t total, int64_t count,
                bool average, double* ranks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t begin = i / count * count, end = begin + count;
  const auto key_at = [&](int64_t place) { return sort_key(values[indices[place]]); };
  int64_t first = i, last = i + 1;
  if (average) {
    const uint64_t key = key_at(i);
    if (first > begin && key_at(first - 1) == key) {
      first = search(values, indices, begin, first, [key](uint64_t it) { return it < key; });
    }
    if (last < end && key_at(last) == key) {
      last = search(values, indices, last, end, [key](uint64_t it) { return it <= key; });
    }
  }
  // Ranks from 1 on in place of `first` to `last`: their mean is half an integer, exact in float64.
  ranks[indices[i]] = 0.5 * static_cast<double>(first - begin + 1 + last - begin);
}

__global__ void __launch_bounds__(kThreads)
    odds_of_ranks(const __grid_constant__ Odds odds, int64_t entries, int64_t total,
                  double* values) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t m = i / entries;
  values[i] = odds.lowest[m] + (values[i] - 1.0) * odds.steps[m];
}

// The same steps as on the CPU.
__global__ void __launch_bounds__(kThreads)
    softmax_columns(const double* scores, const double* thresholds, double divisor, double s,
                    double* out, int models, int64_t count) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= count) return;
  double largest = -HUGE_VAL;
  for (int n = 0; n < models; ++n) {
    const double z = scores[n * count + j] / divisor;
    largest = z > largest ? z : largest;
  }
  double sum = 0.0;
  for (int n = 0; n < models; ++n) {
    const double e = exp_exact_order(scores[n * count + j] / divisor - largest);
    out[n * count + j] = e;
    sum += e;
  }
  for (int n = 0; n < models; ++n) {
    const bool essential = scores[n * count + j] > thresholds[n];
    out[n * count + j] = essential ? s : out[n * count + j] / sum;
  }
}

// All models are sorted at once by their values, and then, which keeps that order, by the model.
struct RankScratch {
  uint64_t* keys[2];  // then, as 32 bits, the models
  uint32_t* indices[2];
  void* sorting;
  size_t sorting_bytes = 0;
  int64_t bytes = 0;
  int model_bits = 0;
  cudaError_t error;

  RankScratch(void* memory, int64_t models, int64_t count) {
    const int total = static_cast<int>(models * count);
    while ((int64_t{1} << model_bits) < models) ++model_bits;
    cub::DoubleBuffer<uint64_t> no_keys;
    cub::DoubleBuffer<uint32_t> no_models, no_indices;
    size_t by_model = 0;
    error = cub::DeviceRadixSort::SortPairs(nullptr, sorting_bytes, no_keys, no_indices, total);
    if (error == cudaSuccess) {
      error = cub::DeviceRadixSort::SortPairs(nullptr, by_model, no_models, no_indices, total, 0,
                                              model_bits > 0 ? model_bits : 1);
    }
    sorting_bytes = sorting_bytes > by_model ? sorting_bytes : by_model;
    for (auto& part : keys) part = static_cast<uint64_t*>(take(memory, 8 * int64_t{total}));
    for (auto& part : indices) part = static_cast<uint32_t*>(take(memory, 4 * int64_t{total}));
    sorting = take(memory, static_cast<int64_t>(sorting_bytes));
  }

 private:
  void* take(void* memory, int64_t size) {
    constexpr int64_t kAlignment = 256;
    void* part = memory == nullptr ? nullptr : static_cast<char*>(memory) + bytes;
    bytes += divide_up(size, kAlignment) * kAlignment;
    return part;
  }
};

}  // namespace

int64_t rank_scratch(int64_t models, int64_t count) {
  return models == 0 || count == 0 ? 0 : RankScratch(nullptr, models, count).bytes;
}

int rank(const double* values, double* ranks, int64_t models, int64_t count, bool average,
         void* scratch, Stream stream) {
  if (models == 0 || count == 0) return cudaSuccess;
  RankScratch parts(scratch, models, count);
  int error = parts.error;
  if (error != cudaSuccess) return error;
  const int64_t total = models * count, blocks = divide_up(total, kThreads);
  const auto on = static_cast<cudaStream_t>(stream);
  cub::DoubleBuffer<uint64_t> keys(parts.keys[0], parts.keys[1]);
  cub::DoubleBuffer<uint32_t> indices(parts.indices[0], parts.indices[1]);
  error = launch(&make_keys, blocks, kThreads, stream, values, total, keys.Current(),
                 indices.Current());
  if (error != cudaSuccess) return error;
  error = cub::DeviceRadixSort::SortPairs(parts.sorting, parts.sorting_bytes, keys, indices,
                                          static_cast<int>(total), 0, 64, on);
  if (error != cudaSuccess) return error;
  if (models > 1) {
    cub::DoubleBuffer<uint32_t> rows(reinterpret_cast<uint32_t*>(parts.keys[0]),
                                     reinterpret_cast<uint32_t*>(parts.keys[1]));
    error = launch(&make_rows, blocks, kThreads, stream, indices.Current(), total,
                   static_cast<uint32_t>(count), rows.Current());
    if (error != cudaSuccess) return error;
    error = cub::DeviceRadixSort::SortPairs(parts.sorting, parts.sorting_bytes, rows, indices,
                                            static_cast<int>(total), 0, parts.model_bits, on);
    if (error != cudaSuccess) return error;
  }
  return launch(&write_ranks, blocks, kThreads, stream, values, indices.Current(), total, count,
                average, ranks);
}

// The magnitudes of all rows, and what ranking needs.
int64_t row_odds_scratch(const Inputs& in) {
  const int64_t rows = in.count * in.window.rows;
  return divide_up(8 * rows * in.window.columns, 256) * 256 + rank_scratch(rows, in.window.columns);
}

int row_odds(const Inputs& in, const double* lowest, const double* steps, double* odds,
             void* scratch, Stream stream) {
  const int64_t entries = in.window.rows * in.window.columns, rows = in.count * in.window.rows;
  if (in.count == 0 || entries == 0) return cudaSuccess;
  auto* values = static_cast<double*>(scratch);
  int error = magnitudes(in, values, stream);
  if (error != cudaSuccess) return error;
  void* rest = static_cast<char*>(scratch) + divide_up(8 * in.count * entries, 256) * 256;
  error = rank(values, odds, rows, in.window.columns, true, rest, stream);
  if (error != cudaSuccess) return error;
  Odds each{};
  for (int m = 0; m < in.count; ++m) {
    each.lowest[m] = lowest[m];
    each.steps[m] = steps[m];
  }
  const int64_t total = in.count * entries;
  return launch(&odds_of_ranks, divide_up(total, kThreads), kThreads, stream, each, entries, total,
                odds);
}

int calibrated_softmax(const double* scores, const double* thresholds, double divisor, double s,
                       double* out, int models, int64_t count, Stream stream) {
  if (models == 0 || count == 0) return cudaSuccess;
  return launch(&softmax_columns, divide_up(count, kThreads), kThreads, stream, scores, thresholds,
                divisor, s, out, models, count);
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace mergecore::cuda
