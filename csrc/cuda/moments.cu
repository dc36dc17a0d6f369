// Per-column and per-row moments of base and deltas in one read. A block serves one model and adds
// the base's own moment when that model is the first; blocks of a window's models are neighbours in
// the grid, so that the base comes from the L2 cache for all but one of them.
#include "sums.cuh"

namespace mergecore::cuda {

namespace {

// A thread's share of the sums: one lane or column per entry.
struct Lanes {
  double aa[kEntries] = {};
  double dd[kEntries] = {};
  double da[kEntries] = {};
};

// Adds the first n entries of one row; `index` is the tensor's index of the first.
template <class T, bool kDrops>
__device__ __forceinline__ void add(const Entries<T>& model, const Entries<T>& base,
                                    const DeviceInputs& in, int m, int64_t index, int n,
                                    Lanes& sums) {
  double a[kEntries], d[kEntries];
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    a[j] = value(base, in.base.dtype, j);
    d[j] = value(model, in.models[m].dtype, j) - a[j];
  }
  if (kDrops && drops_any(in.drops[m])) drop_deltas(in.drops[m], index, d);
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    if (j >= n) continue;
    // In this order ptxas keeps all of it in registers.
    sums.da[j] = fma(d[j], a[j], sums.da[j]);
    if (m == 0) sums.aa[j] = fma(a[j], a[j], sums.aa[j]);
    sums.dd[j] = fma(d[j], d[j], sums.dd[j]);
  }
}

// Adds kSteps runs of n entries, `stride` entries apart; all are loaded before the first is used.
template <class T, bool kVector, bool kDrops, int kSteps>
__device__ __forceinline__ void add_steps(const DeviceInputs& in, int m, int64_t entry,
                                          int64_t stride, int n, Lanes& sums) {
  const Window& w = in.window;
  const int64_t index = w.first_entry + w.first_row * w.columns + entry;
  Entries<T> model[kSteps], base[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    model[i] = load<T, kVector>(in.models[m], entry + i * stride, n);
    base[i] = load_base<T, kVector>(in, entry + i * stride, n);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    add<T, kDrops>(model[i], base[i], in, m, index + i * stride, kVector ? kEntries : n, sums);
  }
}

// partial[tile][moment][column]; the first tile goes on from `pending`.
template <class T, bool kVector, bool kDrops>
__global__ void __launch_bounds__(kColumnThreads)
    sum_tiles(const __grid_constant__ DeviceInputs in, unsigned groups, int64_t moments,
              const double* pending, double* partial) {
  const Window& w = in.window;
  const unsigned models = static_cast<unsigned>(in.count);
  const int m = static_cast<int>(blockIdx.x % models);
  const unsigned group = blockIdx.x / models % groups;
  const int64_t tile = blockIdx.x / models / groups;
  const int64_t column = (static_cast<int64_t>(group) * kColumnThreads + threadIdx.x) * kEntries;
  if (column >= w.columns) return;
  const int n = run_of<kVector>(w.columns - column);
  const TileRows rows(w, tile);
  int64_t row = rows.begin;

  Lanes sums;
  const int64_t of_dd = 1 + static_cast<int64_t>(m), of_da = of_dd + in.count;
  if (tile == 0) {
    if (m == 0) load_sums(pending + column, n, sums.aa);
    load_sums(pending + of_dd * w.columns + column, n, sums.dd);
    load_sums(pending + of_da * w.columns + column, n, sums.da);
  }
  constexpr int kSteps = kInFlight<T>;
  for (; row + kSteps <= rows.end; row += kSteps) {
    add_steps<T, kVector, kDrops, kSteps>(in, m, row * w.columns + column, w.columns, n, sums);
  }
  for (; row < rows.end; ++row) {
    add_steps<T, kVector, kDrops, 1>(in, m, row * w.columns + column, w.columns, n, sums);
  }
  double* to = partial + tile * moments * w.columns + column;
  if (m == 0) store_sums<kVector>(to, sums.aa, n);
  store_sums<kVector>(to + of_dd * w.columns, sums.dd, n);
  store_sums<kVector>(to + of_da * w.columns, sums.da, n);
}

template <class T, bool kVector, bool kDrops>
__global__ void __launch_bounds__(kRowThreads)
    sum_rows(const __grid_constant__ DeviceInputs in, int64_t total_rows, double* out) {
  const Window& w = in.window;
  const unsigned models = static_cast<unsigned>(in.count);
  const int m = static_cast<int>(blockIdx.x % models);
  const int64_t row = static_cast<int64_t>(blockIdx.x / models) * (kRowThreads / kThreadsPerRow) +
                      threadIdx.x / kThreadsPerRow;
  const unsigned thread = threadIdx.x % kThreadsPerRow;
  Lanes sums;
  if (row < w.rows) {
    constexpr int kSteps = kInFlight<T>;
    const int64_t entry = row * w.columns;
    int64_t column = thread * kEntries;
    for (; column + (kSteps - 1) * kLanes + kEntries <= w.columns; column += kSteps * kLanes) {
      add_steps<T, kVector, kDrops, kSteps>(in, m, entry + column, kLanes, kEntries, sums);
    }
    for (; column < w.columns; column += kLanes) {
      const int n = run_of<kVector>(w.columns - column);
      add_steps<T, kVector, kDrops, 1>(in, m, entry + column, kLanes, n, sums);
    }
  }
  // Threads without a row take part, so that the whole warp meets in every shuffle.
  const double aa = halve(sums.aa), dd = halve(sums.dd), da = halve(sums.da);
  if (row >= w.rows || thread != 0) return;
  double* to = out + w.first_row + row;
  const int64_t of_dd = 1 + static_cast<int64_t>(m);
  if (m == 0) to[0] = aa;
  to[of_dd * total_rows] = dd;
  to[(of_dd + in.count) * total_rows] = da;
}

}  // namespace

int64_t column_moments_scratch(const Inputs& in) {
  if (in.window.rows == 0) return 0;
  const int64_t size = moment_count(in.count) * in.window.columns;
  return Tiles(in.window).count * size * static_cast<int64_t>(sizeof(double));
}

int column_moments(const Inputs& in, double* sums, double* pending, void* scratch, Stream stream) {
  const Window& w = in.window;
  if (w.rows == 0 || w.columns == 0) return cudaSuccess;
  const DeviceInputs inputs = by_value(in);
  const Tiles tiles(w);
  const int64_t moments = moment_count(in.count), size = moments * w.columns;
  const int64_t groups = divide_up(w.columns, kColumnThreads * kEntries);
  double* partial = static_cast<double*>(scratch);
  int error = with_storage(in, [&](auto type) {
    using T = decltype(type);
    const bool wide = vectors(inputs) && aligned(scratch);
    auto* plain = wide ? &sum_tiles<T, true, false> : &sum_tiles<T, false, false>;
    auto* drops = wide ? &sum_tiles<T, true, true> : &sum_tiles<T, false, true>;
    return launch(drops_any(inputs) ? drops : plain, tiles.count * groups * in.count,
                  kColumnThreads, stream, inputs, static_cast<unsigned>(groups), moments, pending,
                  partial);
  });
  if (error != cudaSuccess) return error;
  return launch(&add_tiles, divide_up(size, kRowThreads), kRowThreads, stream, partial, size,
                tiles.complete, tiles.complete < tiles.count, sums, pending);
}

int row_moments(const Inputs& in, double* sums, int64_t total_rows, Stream stream) {
  const Window& w = in.window;
  if (w.rows == 0) return cudaSuccess;
  const DeviceInputs inputs = by_value(in);
  const int64_t blocks = divide_up(w.rows, kRowThreads / kThreadsPerRow) * in.count;
  return with_storage(in, [&](auto type) {
    using T = decltype(type);
    const bool wide = vectors(inputs);
    auto* plain = wide ? &sum_rows<T, true, false> : &sum_rows<T, false, false>;
    auto* drops = wide ? &sum_rows<T, true, true> : &sum_rows<T, false, true>;
    return launch(drops_any(inputs) ? drops : plain, blocks, kRowThreads, stream, inputs,
                  total_rows, sums);
  });
}

}  // namespace mergecore::cuda
