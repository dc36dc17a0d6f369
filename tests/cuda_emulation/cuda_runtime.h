// A stand-in for the CUDA runtime: with this folder first on the include path, a C++ compiler
// builds csrc/cuda/*.cu for the host, and a launch runs every thread of the grid.
//
// Blocks run one after the other in random order, so that none may depend on another. The lanes of
// a warp are fibers that meet in the warp functions: a lane that leaves while its warp waits for it
// is an error, as it would be undefined on a GPU. Only what mergecore's kernels use is here.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <set>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned n) : x(n) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error";
}

namespace emulation {

constexpr int kLanesOfWarp = 32;
constexpr size_t kStack = 1 << 18;

enum class Meeting { none, shuffle, sum };

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  Meeting waits_in = Meeting::none;
  bool done = false;
};

inline dim3 thread_index, block_index;
inline Lane lanes[kLanesOfWarp];
inline uint64_t offered[kLanesOfWarp], exchanged[kLanesOfWarp];
inline int current = 0;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 block_order;
inline std::set<void*> launched;  // kernels

inline void run_lane() {
  body();
  lanes[current].done = true;
}

// Waits until all lanes of the warp are here with their values.
inline int meet(Meeting meeting, uint64_t value) {
  const int lane = current;
  offered[lane] = value;
  lanes[lane].waits_in = meeting;
  swapcontext(&lanes[lane].context, &scheduler);
  return lane;
}

inline void run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler;
    lane.done = false;
    makecontext(&lane.context, run_lane, 0);
  }
  for (;;) {
    int done = 0, together = 0;
    for (current = 0; current < kLanesOfWarp; ++current) {
      lanes[current].waits_in = Meeting::none;
      thread_index.x = first_thread + static_cast<unsigned>(current);
      swapcontext(&scheduler, &lanes[current].context);
      done += lanes[current].done;
      together += lanes[current].waits_in == lanes[0].waits_in;
    }
    if (done == kLanesOfWarp) return;
    if (done != 0 || together != kLanesOfWarp) {
      std::fputs("the lanes of a warp did not meet in the same warp function\n", stderr);
      std::abort();
    }
    std::copy(offered, offered + kLanesOfWarp, exchanged);
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width) {
  static_assert(sizeof(T) == sizeof(uint64_t), "only 8-byte values are shuffled");
  if (mask != 0xffffffffu) std::abort();
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int lane = emulation::meet(emulation::Meeting::shuffle, bits);
  const bool inside = lane % width + static_cast<int>(delta) < width;
  T result;
  std::memcpy(&result, &emulation::exchanged[inside ? lane + static_cast<int>(delta) : lane],
              sizeof bits);
  return result;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width) {
  static_assert(sizeof(T) == sizeof(uint64_t), "only 8-byte values are shuffled");
  if (mask != 0xffffffffu) std::abort();
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int lane = emulation::meet(emulation::Meeting::shuffle, bits);
  T result;
  std::memcpy(&result, &emulation::exchanged[lane / width * width + from], sizeof bits);
  return result;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  if (mask != 0xffffffffu) std::abort();
  emulation::meet(emulation::Meeting::sum, value);
  return static_cast<unsigned>(std::accumulate(
      emulation::exchanged, emulation::exchanged + emulation::kLanesOfWarp, uint64_t{0}));
}

inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return (*to += value) - value;
}

// Two 16-bit numbers in a word.
template <class Half, class F>
unsigned by_halves(unsigned a, unsigned b, const F& f) {
  const auto half = [&](int shift) {
    return static_cast<uint32_t>(static_cast<uint16_t>(
        f(static_cast<Half>(a >> shift & 0xffffu), static_cast<Half>(b >> shift & 0xffffu))));
  };
  return half(16) << 16 | half(0);
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return by_halves<uint16_t>(a, b, [](auto x, auto y) { return std::max(x, y); });
}
inline unsigned __vminu2(unsigned a, unsigned b) {
  return by_halves<uint16_t>(a, b, [](auto x, auto y) { return std::min(x, y); });
}
inline unsigned __vmins2(unsigned a, unsigned b) {
  return by_halves<int16_t>(a, b, [](auto x, auto y) { return std::min(x, y); });
}
inline int __ffs(unsigned word) { return __builtin_ffs(static_cast<int>(word)); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  static_assert((0 + ... + sizeof(Parameters)) <= 32764,
                "kernel parameters are at most 32764 bytes");
  if (config->gridDim.x == 0 || config->blockDim.x % emulation::kLanesOfWarp != 0) {
    return cudaErrorInvalidConfiguration;
  }
  emulation::launched.insert(reinterpret_cast<void*>(kernel));
  emulation::body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  std::vector<unsigned> blocks(config->gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), emulation::block_order);
  for (const unsigned block : blocks) {
    emulation::block_index.x = block;
    for (unsigned thread = 0; thread < config->blockDim.x; thread += emulation::kLanesOfWarp) {
      emulation::run_warp(thread);
    }
  }
  return cudaSuccess;
}
