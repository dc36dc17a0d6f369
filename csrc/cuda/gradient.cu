// The gradient of a loss by the coefficients of a scaled sum: per model and column the sum over
// rows of dL/dW times the delta, in one read. A block serves one model; blocks of a window's models
// are neighbours in the grid, so that gradient and base come from the L2 cache for all but one.
#include "sums.cuh"

namespace mergecore::cuda {

namespace {

// Adds kSteps runs of n entries, `stride` entries apart; all are loaded before the first is used.
// G is the storage type of the gradient.
template <class T, class G, bool kVector, int kSteps>
__device__ __forceinline__ void add_steps(const DeviceInputs& in, const Matrix& gradient, int m,
                                          int64_t entry, int64_t stride, int n,
                                          double (&sums)[kEntries]) {
  Entries<G> outer[kSteps];
  Entries<T> model[kSteps], base[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    outer[i] = load<G, kVector>(gradient, entry + i * stride, n);
    model[i] = load<T, kVector>(in.models[m], entry + i * stride, n);
    base[i] = load_base<T, kVector>(in, entry + i * stride, n);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      if (!kVector && j >= n) continue;
      const double d = value(model[i], in.models[m].dtype, j) - value(base[i], in.base.dtype, j);
      sums[j] = fma(value(outer[i], gradient.dtype, j), d, sums[j]);
    }
  }
}

// partial[tile][model][column]; the first tile goes on from `pending`.
template <class T, class G, bool kVector>
__global__ void __launch_bounds__(kColumnThreads)
    sum_tiles(const __grid_constant__ DeviceInputs in, const __grid_constant__ Matrix gradient,
              unsigned groups, const double* pending, double* partial) {
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
  double sums[kEntries] = {};
  if (tile == 0) load_sums(pending + m * w.columns + column, n, sums);
  constexpr int kSteps = kInFlight<T>;
  for (; row + kSteps <= rows.end; row += kSteps) {
    const int64_t entry = row * w.columns + column;
    add_steps<T, G, kVector, kSteps>(in, gradient, m, entry, w.columns, n, sums);
  }
  for (; row < rows.end; ++row) {
    const int64_t entry = row * w.columns + column;
    add_steps<T, G, kVector, 1>(in, gradient, m, entry, w.columns, n, sums);
  }
  store_sums<kVector>(partial + (tile * in.count + m) * w.columns + column, sums, n);
}

template <class T, class G, bool kVector>
__global__ void __launch_bounds__(kRowThreads)
    sum_rows(const __grid_constant__ DeviceInputs in, const __grid_constant__ Matrix gradient,
             int64_t total_rows, double* out) {
  const Window& w = in.window;
  const unsigned models = static_cast<unsigned>(in.count);
  const int m = static_cast<int>(blockIdx.x % models);
  const int64_t row = static_cast<int64_t>(blockIdx.x / models) * (kRowThreads / kThreadsPerRow) +
                      threadIdx.x / kThreadsPerRow;
  const unsigned thread = threadIdx.x % kThreadsPerRow;
  double sums[kEntries] = {};
  if (row < w.rows) {
    constexpr int kSteps = kInFlight<T>;
    const int64_t entry = row * w.columns;
    int64_t column = thread * kEntries;
    for (; column + (kSteps - 1) * kLanes + kEntries <= w.columns; column += kSteps * kLanes) {
      add_steps<T, G, kVector, kSteps>(in, gradient, m, entry + column, kLanes, kEntries, sums);
    }
    for (; column < w.columns; column += kLanes) {
      const int n = run_of<kVector>(w.columns - column);
      add_steps<T, G, kVector, 1>(in, gradient, m, entry + column, kLanes, n, sums);
    }
  }
  // Threads without a row take part, so that the whole warp meets in every shuffle.
  const double sum = halve(sums);
  if (row < w.rows && thread == 0) out[m * total_rows + w.first_row + row] = sum;
}

// Calls f with the storage types of base and models, and of the gradient: float32 is the one that
// is to be fast, any other takes the kernel that looks every dtype up.
template <class F>
int with_gradient(const Inputs& in, const Matrix& gradient, const F& f) {
  if (gradient.dtype != Dtype::f32) return f(Wide{}, Wide{});
  return with_storage(in, [&](auto type) { return f(type, F32{}); });
}

}  // namespace

int64_t column_gradient_scratch(const Inputs& in) {
  if (in.window.rows == 0) return 0;
  return Tiles(in.window).count * in.count * in.window.columns *
         static_cast<int64_t>(sizeof(double));
}

int column_gradient(const Inputs& in, const Matrix& gradient, double* sums, double* pending,
                    void* scratch, Stream stream) {
  const Window& w = in.window;
  if (w.rows == 0 || w.columns == 0) return cudaSuccess;
  const DeviceInputs inputs = by_value(in);
  const Tiles tiles(w);
  const int64_t size = in.count * w.columns;
  const int64_t groups = divide_up(w.columns, kColumnThreads * kEntries);
  const bool vector = vectors(inputs) && aligned(gradient.data) && aligned(scratch);
  double* partial = static_cast<double*>(scratch);
  int error = with_gradient(in, gradient, [&](auto type, auto outer) {
    using T = decltype(type);
    using G = decltype(outer);
    auto* kernel = vector ? &sum_tiles<T, G, true> : &sum_tiles<T, G, false>;
    return launch(kernel, tiles.count * groups * in.count, kColumnThreads, stream, inputs, gradient,
                  static_cast<unsigned>(groups), pending, partial);
  });
  if (error != cudaSuccess) return error;
  return launch(&add_tiles, divide_up(size, kRowThreads), kRowThreads, stream, partial, size,
                tiles.complete, tiles.complete < tiles.count, sums, pending);
}

int row_gradient(const Inputs& in, const Matrix& gradient, double* sums, int64_t total_rows,
                 Stream stream) {
  const Window& w = in.window;
  if (w.rows == 0) return cudaSuccess;
  const DeviceInputs inputs = by_value(in);
  const bool vector = vectors(inputs) && aligned(gradient.data);
  const int64_t blocks = divide_up(w.rows, kRowThreads / kThreadsPerRow) * in.count;
  return with_gradient(in, gradient, [&](auto type, auto outer) {
    using T = decltype(type);
    using G = decltype(outer);
    auto* kernel = vector ? &sum_rows<T, G, true> : &sum_rows<T, G, false>;
    return launch(kernel, blocks, kRowThreads, stream, inputs, gradient, total_rows, sums);
  });
}

}  // namespace mergecore::cuda
