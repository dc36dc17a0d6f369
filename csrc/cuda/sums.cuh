// What sums down columns and along rows share: tiles of rows, lanes of a row, and their adding up.
#pragma once

#include "window.cuh"

namespace mergecore::cuda {

namespace {

constexpr int kColumnThreads = 64;  // 512 columns, one tile
constexpr int kRowThreads = 128;    // 16 rows
constexpr int kThreadsPerRow = kLanes / kEntries;

template <bool kVector>
__device__ __forceinline__ void store_sums(double* to, const double (&from)[kEntries], int n) {
  if (kVector) {
#pragma unroll
    for (int j = 0; j < kEntries; j += 2) {
      reinterpret_cast<double2*>(to)[j / 2] = make_double2(from[j], from[j + 1]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      if (j < n) to[j] = from[j];
    }
  }
}

__device__ __forceinline__ void load_sums(const double* from, int n, double (&to)[kEntries]) {
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    if (j < n) to[j] = from[j];
  }
}

// Tiles are counted from the one that the window's first row lies in.
struct Tiles {
  int64_t count, complete;  // of them; all but perhaps the last are complete
  explicit Tiles(const Window& w) {
    const int64_t before = w.first_row / kTileRows;
    count = divide_up(w.first_row + w.rows, kTileRows) - before;
    complete = (w.first_row + w.rows) / kTileRows - before;
  }
};

// The window's rows in one tile.
struct TileRows {
  int64_t begin, end;
  __device__ __forceinline__ TileRows(const Window& w, int64_t tile) {
    const int64_t first = tile * kTileRows - w.first_row % kTileRows;
    begin = first > 0 ? first : 0;
    end = first + kTileRows < w.rows ? first + kTileRows : w.rows;
  }
};

// Adds the complete tiles to `sums` in order and leaves the rest of the window in `pending`: a
// launch of its own, because sum_tiles still reads `pending` while its last tile is done.
__global__ void __launch_bounds__(kRowThreads)
    add_tiles(const double* partial, int64_t size, int64_t complete, bool open, double* sums,
              double* pending) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= size) return;
  double sum = sums[i];
#pragma unroll 8
  for (int64_t tile = 0; tile < complete; ++tile) sum += partial[tile * size + i];
  sums[i] = sum;
  pending[i] = open ? partial[complete * size + i] : 0.0;
}

// lane[i] += lane[i + half] for half = 32, 16, 8 (threads 4, 2, 1 apart) and 4, 2, 1 (in the
// thread).
__device__ __forceinline__ double halve(double (&lane)[kEntries]) {
#pragma unroll
  for (int apart = kThreadsPerRow / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      lane[j] += __shfl_down_sync(kAllLanes, lane[j], apart, kThreadsPerRow);
    }
  }
#pragma unroll
  for (int half = kEntries / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  }
  return lane[0];
}

inline bool vectors(const DeviceInputs& in) {
  return in.aligned && in.window.columns % kEntries == 0;
}

}  // namespace

}  // namespace mergecore::cuda
