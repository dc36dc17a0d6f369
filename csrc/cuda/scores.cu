// Ranking within each model and the calibrated softmax over models: WIDEN's equations 3 to 6.
#include <cub/device/device_radix_sort.cuh>

#include "window.cuh"

namespace mergecore::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    make_keys(const double* values, int64_t count, uint64_t* keys, uint32_t* indices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  keys[i] = sort_key(values[i]);
  indices[i] = static_cast<uint32_t>(i);
}

// The first position in [begin, end) of the sorted keys whose key is not `before` the wanted one.
template <class Before>
__device__ __forceinline__ int64_t search(const uint64_t* keys, int64_t begin, int64_t end,
                                          const Before& before) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (before(keys[middle])) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__global__ void __launch_bounds__(kThreads)
    write_ranks(const uint64_t* keys, const uint32_t* indices, int64_t count, bool average,
                double* ranks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint64_t key = keys[i];
  int64_t first = i, last = i + 1;
  if (average) {
    if (first > 0 && keys[first - 1] == key) {
      first = search(keys, 0, first, [key](uint64_t other) { return other < key; });
    }
    if (last < count && keys[last] == key) {
      last = search(keys, last, count, [key](uint64_t other) { return other <= key; });
    }
  }
  // Ranks first+1 .. last: their mean is half an integer, exact in float64.
  ranks[indices[i]] = 0.5 * static_cast<double>(first + 1 + last);
}

__global__ void __launch_bounds__(kThreads)
    softmax_columns(const double* scores, const double* thresholds, double divisor, double s,
                    double* out, int models, int64_t count) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j < count) softmax_column(scores, thresholds, divisor, s, out, models, count, j);
}

// Models are ranked one after the other in the same scratch.
struct RankScratch {
  uint64_t* keys[2];
  uint32_t* indices[2];
  void* sorting;
  size_t sorting_bytes = 0;
  int64_t bytes = 0;
  cudaError_t error;

  RankScratch(void* memory, int64_t count) {
    cub::DoubleBuffer<uint64_t> no_keys;
    cub::DoubleBuffer<uint32_t> no_indices;
    error = cub::DeviceRadixSort::SortPairs(nullptr, sorting_bytes, no_keys, no_indices,
                                            static_cast<int>(count));
    for (auto& part : keys) part = static_cast<uint64_t*>(take(memory, 8 * count));
    for (auto& part : indices) part = static_cast<uint32_t*>(take(memory, 4 * count));
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

int64_t rank_scratch(int models, int64_t count) {
  return models == 0 || count == 0 ? 0 : RankScratch(nullptr, count).bytes;
}

int rank(const double* values, double* ranks, int models, int64_t count, bool average,
         void* scratch, Stream stream) {
  if (models == 0 || count == 0) return cudaSuccess;
  RankScratch parts(scratch, count);
  int error = parts.error;
  const int64_t blocks = divide_up(count, kThreads);
  for (int m = 0; m < models && error == cudaSuccess; ++m) {
    cub::DoubleBuffer<uint64_t> keys(parts.keys[0], parts.keys[1]);
    cub::DoubleBuffer<uint32_t> indices(parts.indices[0], parts.indices[1]);
    error = launch(&make_keys, blocks, kThreads, stream, values + m * count, count, keys.Current(),
                   indices.Current());
    if (error != cudaSuccess) break;
    error = cub::DeviceRadixSort::SortPairs(parts.sorting, parts.sorting_bytes, keys, indices,
                                            static_cast<int>(count), 0, 64,
                                            static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) break;
    error = launch(&write_ranks, blocks, kThreads, stream, keys.Current(), indices.Current(), count,
                   average, ranks + m * count);
  }
  return error;
}

int calibrated_softmax(const double* scores, const double* thresholds, double divisor, double s,
                       double* out, int models, int64_t count, Stream stream) {
  if (models == 0 || count == 0) return cudaSuccess;
  return launch(&softmax_columns, divide_up(count, kThreads), kThreads, stream, scores, thresholds,
                divisor, s, out, models, count);
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace mergecore::cuda
