// What the kernels over windows share: launches, the inputs as a kernel parameter, and a thread's
// eight adjacent entries, which travel 16 bytes at a time where the window's layout allows it.
//
// Values, and the order in which they are combined, are those of csrc/cpu: see there for the
// reasons.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>

#include "../kernels.h"

namespace mergecore::cuda {

constexpr int kEntries = 8;  // adjacent entries of a thread
constexpr unsigned kAllLanes = 0xffffffffu;

// Launches without a check of earlier errors; returns the launch's own.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
           const Arguments&... arguments) {
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Inputs as they travel in a kernel's parameters.
struct DeviceInputs {
  Window window;
  Matrix base;
  int count;
  bool aligned;  // every window starts on 16 bytes
  Matrix models[kMaxModels];
  Drop drops[kMaxModels];  // threshold 0 where nothing is dropped
};

inline DeviceInputs by_value(const Inputs& in) {
  DeviceInputs out = {};
  out.window = in.window;
  out.base = in.base;
  out.count = in.count;
  out.aligned = aligned(in.base.data);
  for (int m = 0; m < in.count; ++m) {
    out.models[m] = in.models[m];
    if (in.drops != nullptr) out.drops[m] = in.drops[m];
    out.aligned = out.aligned && aligned(in.models[m].data);
  }
  return out;
}

// The storage types of kernels whose matrices differ in dtype, which is looked up at each use:
// without float64, and with it.
struct Mixed {};
struct Wide {};

// Calls f with the storage type of base and models.
template <class F>
int with_storage(const Inputs& in, const F& f) {
  const Dtype dtype = in.models[0].dtype;
  const Dtype base = in.base.data == nullptr ? dtype : in.base.dtype;
  bool same = base == dtype, wide = base == Dtype::f64;
  for (int m = 0; m < in.count; ++m) {
    same = same && in.models[m].dtype == dtype;
    wide = wide || in.models[m].dtype == Dtype::f64;
  }
  if (wide) return f(Wide{});
  if (!same) return f(Mixed{});
  switch (dtype) {
    case Dtype::f32:
      return f(F32{});
    case Dtype::f16:
      return f(F16{});
    default:
      return f(BF16{});
  }
}

// The bits of a thread's entries as they were loaded.
template <class T>
struct Entries {
  static constexpr int size = sizeof(typename T::Bits);
  uint32_t words[kEntries * size / 4];
};

template <>
struct Entries<Mixed> {
  static constexpr int size = 4;
  uint32_t words[kEntries];
};

template <>
struct Entries<Wide> {
  static constexpr int size = 8;
  uint32_t words[2 * kEntries];
};

// Rows or models whose loads are in flight together: 64 bytes of each matrix.
template <class T>
constexpr int kInFlight = 8 / Entries<T>::size;

// Entries of a thread of which `left` are left. Windows that are read 16 bytes at a time have no
// other number of them: code that never runs would crowd out of the instruction cache what does.
template <bool kVector>
__device__ __forceinline__ int run_of(int64_t left) {
  return kVector || left > kEntries ? kEntries : static_cast<int>(left);
}

template <class Bits, bool kVector>
__device__ __forceinline__ void load_bits(const void* data, int64_t entry, int n, uint32_t* words) {
  const Bits* from = static_cast<const Bits*>(data) + entry;
  constexpr int kSize = sizeof(Bits);
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEntries * kSize / 4; ++i) words[i] = 0;
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      if (j >= n) continue;
      const Bits bits = from[j];
      if constexpr (kSize == 2) {
        words[j / 2] |= static_cast<uint32_t>(bits) << (16 * (j % 2));
      } else {
        words[j * kSize / 4] = static_cast<uint32_t>(bits);
        if constexpr (kSize == 8) words[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
      }
    }
  }
}

// The first n entries from `entry` on, all of them with kVector; the others are zeros.
template <class T, bool kVector>
__device__ __forceinline__ Entries<T> load(const Matrix& matrix, int64_t entry, int n) {
  Entries<T> out;
  if constexpr (Entries<T>::size == 2) {
    load_bits<uint16_t, kVector>(matrix.data, entry, n, out.words);
  } else {
    if constexpr (Entries<T>::size == 8) {
      if (matrix.dtype == Dtype::f64) {
        load_bits<uint64_t, kVector>(matrix.data, entry, n, out.words);
        return out;
      }
    }
    if (std::is_same_v<T, F32> || matrix.dtype == Dtype::f32) {
      load_bits<uint32_t, kVector>(matrix.data, entry, n, out.words);
    } else {
      load_bits<uint16_t, kVector>(matrix.data, entry, n, out.words);
    }
  }
  return out;
}

// The same of the base; zeros where there is none.
template <class T, bool kVector>
__device__ __forceinline__ Entries<T> load_base(const DeviceInputs& in, int64_t entry, int n) {
  if (in.base.data != nullptr) return load<T, kVector>(in.base, entry, n);
  Entries<T> zeros;
#pragma unroll
  for (uint32_t& word : zeros.words) word = 0;
  return zeros;
}

// Entry j, exactly.
template <class T>
__device__ __forceinline__ double value(const Entries<T>& entries, Dtype dtype, int j) {
  const uint32_t half = (entries.words[j / 2] >> (16 * (j % 2))) & 0xffffu;
  if constexpr (std::is_same_v<T, Mixed> || std::is_same_v<T, Wide>) {
    switch (dtype) {
      case Dtype::f64:
        if constexpr (std::is_same_v<T, Wide>) {
          const uint64_t high = entries.words[2 * j + 1];
          return F64::load(high << 32 | entries.words[2 * j]);
        }
        return 0.0;
      case Dtype::f32:
        return F32::load(entries.words[j]);
      case Dtype::f16:
        return F16::load(static_cast<uint16_t>(half));
      default:
        return BF16::load(static_cast<uint16_t>(half));
    }
  } else if constexpr (std::is_same_v<T, F32>) {
    return F32::load(entries.words[j]);
  } else {
    return T::load(static_cast<uint16_t>(half));
  }
}

// The random numbers of a tensor's entries first ... first + 7. Adjacent entries share a Philox
// block.
__device__ __forceinline__ void random_numbers(const Drop& drop, uint64_t first,
                                               uint32_t (&numbers)[kEntries]) {
  const unsigned lead = static_cast<unsigned>(first & 3);
  uint32_t row[12] = {};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    uint32_t block[4];
    if (i == 2 && lead == 0) continue;
    philox(drop.key, (first >> 2) + static_cast<uint64_t>(i), block);
#pragma unroll
    for (int j = 0; j < 4; ++j) row[4 * i + j] = block[j];
  }
  // Shifted down by `lead` in two steps, so that every index is a constant and stays in registers.
  if ((lead & 1) != 0) {
#pragma unroll
    for (int i = 0; i < 11; ++i) row[i] = row[i + 1];
  }
  if ((lead & 2) != 0) {
#pragma unroll
    for (int i = 0; i < 10; ++i) row[i] = row[i + 2];
  }
#pragma unroll
  for (int j = 0; j < kEntries; ++j) numbers[j] = row[j];
}

// What the delta d of entry `index` is multiplied with.
__device__ __forceinline__ double keep(const Drop& drop, uint32_t number, double d, int64_t index) {
  return number >= drop.threshold && selected(drop, fabs(d), index) ? drop.scale : 0.0;
}

// Multiplies the deltas of entries `index`, `index` + 1, ... of the tensor with what `drop` says.
__device__ __forceinline__ void drop_deltas(const Drop& drop, int64_t index,
                                            double (&delta)[kEntries]) {
  if (!drops_any(drop)) return;
  uint32_t numbers[kEntries] = {};
  if (drop.threshold > 0) random_numbers(drop, static_cast<uint64_t>(index), numbers);
  if (!selects(drop)) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      delta[j] = (numbers[j] >= drop.threshold ? drop.scale : 0.0) * delta[j];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    delta[j] = keep(drop, numbers[j], delta[j], index + j) * delta[j];
  }
}

inline bool drops_any(const DeviceInputs& in) {
  return std::any_of(in.drops, in.drops + in.count,
                     [](const Drop& drop) { return mergecore::drops_any(drop); });
}

}  // namespace mergecore::cuda
