// Short runs of entries held in L1 as float64: the pieces that every CPU kernel is made of.
//
// Each function is one plain loop that the compiler vectorises; MERGECORE_CLONES builds it for
// AVX-512, AVX2 and the baseline and picks one at load time. All of them do the same arithmetic.
#pragma once

#include "../kernels.h"

#ifdef MERGECORE_CLONES  // a test defines it as nothing, to build for one instruction set
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MERGECORE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define MERGECORE_PICKS  // also among functions that are written once for each instruction set
#else
#define MERGECORE_CLONES
#endif

namespace mergecore::cpu {

constexpr int kChunk = 512;  // entries; a few float64 chunks fit a 32 KiB L1 cache

inline const void* at(const Matrix& matrix, int64_t entry) {
  return static_cast<const char*>(matrix.data) + entry * dtype_size(matrix.dtype);
}

// Asks for `bytes` from `from` on: the hardware prefetcher alone does not keep up with runs this
// short. Inlined always: a call that only asks looks like one without effect, and GCC drops it.
inline __attribute__((always_inline)) void prefetch(const void* from, int64_t bytes) {
  const char* line = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
}

// Calls f with the storage type of a window's `dtype`.
template <class F>
inline __attribute__((always_inline)) void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(F32{});
    case Dtype::f16:
      return f(F16{});
    case Dtype::bf16:
      return f(BF16{});
    case Dtype::f64:
      return f(F64{});
  }
}

// Calls f with the storage type of a result's `dtype`.
template <class F>
inline __attribute__((always_inline)) void with_result(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f16:
      return f(F16{});
    case Dtype::bf16:
      return f(BF16{});
    case Dtype::f64:
      return f(F64{});
    default:
      return f(F32{});
  }
}

// out[i] = source[i], exactly.
void load_chunk(const void* source, Dtype dtype, int n, double* out);
// keep[i] = scale or 0 for entries first, first + 1, ... of a tensor.
void keep_chunk(const Drop& drop, uint64_t first, int n, double* keep);
// The random numbers of entries first, first + 1, ... of a tensor.
void numbers_chunk(uint64_t key, uint64_t first, int n, uint32_t* numbers);
// keep[i] = 0 where |model[i] - base[i]| of entry first + i is not selected by its magnitude.
void select_chunk(const Drop& drop, const void* model, Dtype dtype, const double* base,
                  int64_t first, int n, double* keep);
// delta[i] = keep[i] * (model[i] - base[i]).
void dropped_delta_chunk(const void* model, Dtype dtype, const double* base, const double* keep,
                         int n, double* delta);

// The sum of kLanes lanes, which are halved: the second half is added to the first, and so on.
double sum_lanes(const double* lanes);

// out[i] = base_coefficient * base[i] + sum[i], rounded; sum[i] becomes the value that is rounded.
// Adds to non-finite results, overflowed results.
void store_chunk(const double* base, double base_coefficient, double* sum, int n, Dtype dtype,
                 void* out, int64_t& nonfinite, int64_t& overflow);

// delta[i] = keep * (model[i] - base[i]) of entries first, first + 1, ... with all that `drop`
// says.
inline void kept_delta_chunk(const Drop& drop, const void* model, Dtype dtype, const double* base,
                             int64_t first, int n, double* keep, double* delta) {
  keep_chunk(drop, static_cast<uint64_t>(first), n, keep);
  if (selects(drop)) select_chunk(drop, model, dtype, base, first, n, keep);
  dropped_delta_chunk(model, dtype, base, keep, n, delta);
}

}  // namespace mergecore::cpu
