// Dot products of all pairs of the base and the deltas in one read. A thread serves eight lanes (or
// columns) of a few pairs that share their first vector; the groups of pairs of one run of entries
// are neighbours in the grid, so that all but one of them find the entries in the L2 cache.
#include "sums.cuh"

namespace mergecore::cuda {

namespace {

constexpr int kPairs = 4;  // of a thread: 32 sums in registers

// The products of vector `i` with the vectors first, first + 1, ... first + count - 1.
struct Group {
  int i, first, count;
  int64_t pair;  // number of (i, first)

  __device__ __forceinline__ Group(int index, int vectors) : i(0), pair(0) {
    int groups = (vectors + kPairs - 1) / kPairs;
    while (index >= groups) {
      index -= groups;
      pair += vectors - i;
      ++i;
      groups = (vectors - i + kPairs - 1) / kPairs;
    }
    first = i + index * kPairs;
    pair += index * kPairs;
    count = vectors - first < kPairs ? vectors - first : kPairs;
  }
};

int64_t groups_of(int vectors) {
  int64_t groups = 0;
  for (int i = 0; i < vectors; ++i) groups += divide_up(vectors - i, kPairs);
  return groups;
}

using Values = double[kEntries];

// Vector v at eight entries: the base (v = 0) or a delta. Entries beyond the n-th are zeros.
template <class T, bool kVector>
__device__ __forceinline__ void vector(const DeviceInputs& in, int v, const Values& base,
                                       int64_t entry, int n, Values& out) {
  if (v == 0) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) out[j] = base[j];
    return;
  }
  const Matrix& matrix = in.models[v - 1];
  const Entries<T> model = load<T, kVector>(matrix, entry, n);
#pragma unroll
  for (int j = 0; j < kEntries; ++j) out[j] = value(model, matrix.dtype, j) - base[j];
  const Window& w = in.window;
  drop_deltas(in.drops[v - 1], w.first_entry + w.first_row * w.columns + entry, out);
}

// Adds the products of eight entries.
template <class T, bool kVector>
__device__ __forceinline__ void add(const DeviceInputs& in, const Group& group, int64_t entry,
                                    int n, Values (&sums)[kPairs]) {
  Values base, one, other;
  const Entries<T> bits = load_base<T, kVector>(in, entry, n);
#pragma unroll
  for (int j = 0; j < kEntries; ++j) base[j] = value(bits, in.base.dtype, j);
  vector<T, kVector>(in, group.i, base, entry, n, one);
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    if (k >= group.count) continue;
    vector<T, kVector>(in, group.first + k, base, entry, n, other);
#pragma unroll
    for (int j = 0; j < kEntries; ++j) sums[k][j] = fma(one[j], other[j], sums[k][j]);
  }
}

// Runs of `length` entries: out[pair * pair_stride + run * run_stride].
template <class T, bool kVector>
__global__ void __launch_bounds__(kRowThreads)
    sum_runs(const __grid_constant__ DeviceInputs in, unsigned groups, int64_t runs, int64_t length,
             int64_t entries, double* out, int64_t pair_stride, int64_t run_stride) {
  const Group group(static_cast<int>(blockIdx.x % groups), in.count + 1);
  const int64_t run = static_cast<int64_t>(blockIdx.x / groups) * (kRowThreads / kThreadsPerRow) +
                      threadIdx.x / kThreadsPerRow;
  const unsigned thread = threadIdx.x % kThreadsPerRow;
  Values sums[kPairs] = {};
  if (run < runs) {
    const int64_t end = (run + 1) * length < entries ? (run + 1) * length : entries;
    for (int64_t entry = run * length + thread * kEntries; entry < end; entry += kLanes) {
      const int n = run_of<kVector>(end - entry);
      add<T, kVector>(in, group, entry, n, sums);
    }
  }
  // Threads without a run take part, so that the whole warp meets in every shuffle.
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const double sum = halve(sums[k]);
    if (run >= runs || thread != 0 || k >= group.count) continue;
    out[(group.pair + k) * pair_stride + run * run_stride] = sum;
  }
}

// sums[pair] += partial[block][pair], block after block.
__global__ void __launch_bounds__(kRowThreads)
    add_blocks(const double* partial, int64_t pairs, int64_t blocks, double* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= pairs) return;
  double sum = sums[i];
#pragma unroll 8
  for (int64_t block = 0; block < blocks; ++block) sum += partial[block * pairs + i];
  sums[i] = sum;
}

// partial[tile][pair][column]; the first tile goes on from `pending`.
template <class T, bool kVector>
__global__ void __launch_bounds__(kColumnThreads)
    sum_tiles(const __grid_constant__ DeviceInputs in, unsigned shares, unsigned groups,
              int64_t pairs, const double* pending, double* partial) {
  const Window& w = in.window;
  const Group group(static_cast<int>(blockIdx.x % groups), in.count + 1);
  const unsigned share = blockIdx.x / groups % shares;
  const int64_t tile = blockIdx.x / groups / shares;
  const int64_t column = (static_cast<int64_t>(share) * kColumnThreads + threadIdx.x) * kEntries;
  if (column >= w.columns) return;
  const int n = run_of<kVector>(w.columns - column);
  const int64_t first = tile * kTileRows - w.first_row % kTileRows;
  const int64_t end = first + kTileRows < w.rows ? first + kTileRows : w.rows;

  Values sums[kPairs] = {};
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    if (tile == 0 && k < group.count) {
      load_sums(pending + (group.pair + k) * w.columns + column, n, sums[k]);
    }
  }
  for (int64_t row = first > 0 ? first : 0; row < end; ++row) {
    add<T, kVector>(in, group, row * w.columns + column, n, sums);
  }
  double* to = partial + (tile * pairs + group.pair) * w.columns + column;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    if (k < group.count) store_sums<kVector>(to + k * w.columns, sums[k], n);
  }
}

// `vector_runs`: every run starts on 16 bytes and has a multiple of kEntries.
int launch_runs(const Inputs& in, int64_t length, bool vector_runs, double* out,
                int64_t pair_stride, int64_t run_stride, Stream stream) {
  const DeviceInputs inputs = by_value(in);
  const int64_t entries = in.window.rows * in.window.columns;
  const int64_t runs = divide_up(entries, length), groups = groups_of(in.count + 1);
  const int64_t blocks = divide_up(runs, kRowThreads / kThreadsPerRow) * groups;
  return with_storage(in, [&](auto type) {
    using T = decltype(type);
    auto* kernel = inputs.aligned && vector_runs ? &sum_runs<T, true> : &sum_runs<T, false>;
    return launch(kernel, blocks, kRowThreads, stream, inputs, static_cast<unsigned>(groups), runs,
                  length, entries, out, pair_stride, run_stride);
  });
}

}  // namespace

int64_t gram_scratch(const Inputs& in) {
  const int64_t blocks = divide_up(in.window.rows * in.window.columns, kGramBlock);
  return blocks * gram_count(in.count) * static_cast<int64_t>(sizeof(double));
}

int gram(const Inputs& in, double* sums, void* scratch, Stream stream) {
  const int64_t entries = in.window.rows * in.window.columns, pairs = gram_count(in.count);
  if (entries == 0) return cudaSuccess;
  double* partial = static_cast<double*>(scratch);
  const int error = launch_runs(in, kGramBlock, entries % kEntries == 0, partial, 1, pairs, stream);
  if (error != cudaSuccess) return error;
  return launch(&add_blocks, divide_up(pairs, kRowThreads), kRowThreads, stream, partial, pairs,
                divide_up(entries, kGramBlock), sums);
}

int row_gram(const Inputs& in, double* sums, int64_t total_rows, Stream stream) {
  const Window& w = in.window;
  if (w.rows == 0 || w.columns == 0) return cudaSuccess;
  return launch_runs(in, w.columns, w.columns % kEntries == 0, sums + w.first_row, total_rows, 1,
                     stream);
}

int64_t column_gram_scratch(const Inputs& in) {
  if (in.window.rows == 0) return 0;
  const int64_t size = gram_count(in.count) * in.window.columns;
  return Tiles(in.window).count * size * static_cast<int64_t>(sizeof(double));
}

int column_gram(const Inputs& in, double* sums, double* pending, void* scratch, Stream stream) {
  const Window& w = in.window;
  if (w.rows == 0 || w.columns == 0) return cudaSuccess;
  const DeviceInputs inputs = by_value(in);
  const Tiles tiles(w);
  const int64_t pairs = gram_count(in.count), size = pairs * w.columns;
  const int64_t shares = divide_up(w.columns, kColumnThreads * kEntries);
  const int64_t groups = groups_of(in.count + 1);
  double* partial = static_cast<double*>(scratch);
  const int error = with_storage(in, [&](auto type) {
    using T = decltype(type);
    auto* kernel = vectors(inputs) && aligned(scratch) ? &sum_tiles<T, true> : &sum_tiles<T, false>;
    return launch(kernel, tiles.count * shares * groups, kColumnThreads, stream, inputs,
                  static_cast<unsigned>(shares), static_cast<unsigned>(groups), pairs, pending,
                  partial);
  });
  if (error != cudaSuccess) return error;
  return launch(&add_tiles, divide_up(size, kRowThreads), kRowThreads, stream, partial, size,
                tiles.complete, tiles.complete < tiles.count, sums, pending);
}

}  // namespace mergecore::cuda
