// The random numbers of runs of entries: four from each Philox counter, as numeric.h defines them.
#include <algorithm>

#include "chunk.h"

// With AVX-512 eight counters are multiplied at once. Compilers do not find that in the plain loop.
#ifdef __AVX512F__
#define MERGECORE_V4
#elif defined(MERGECORE_PICKS)
#define MERGECORE_V4 __attribute__((target("arch=x86-64-v4")))
#define MERGECORE_ANY __attribute__((target("default")))
#else
#define MERGECORE_ANY
#endif
#ifdef MERGECORE_V4
#include <immintrin.h>
#endif

namespace mergecore::cpu {

namespace {

constexpr int kTogether = 8;  // counters

// The numbers of `count` counters from `counter` on; `count` is a multiple of kTogether.
#ifdef MERGECORE_ANY
MERGECORE_ANY
void philox_run(uint64_t key, uint64_t counter, int count, uint32_t* out) {
  for (int i = 0; i < count; ++i, out += 4) {
    uint32_t four[4];
    philox(key, counter + static_cast<uint64_t>(i), four);
    for (int j = 0; j < 4; ++j) out[j] = four[j];
  }
}
#endif

#ifdef MERGECORE_V4
using Eight = uint64_t __attribute__((vector_size(64)));
using Sixteen = uint32_t __attribute__((vector_size(64)));

// The products of the lower halves.
MERGECORE_V4 inline __attribute__((always_inline)) Eight product(Eight one, Eight other) {
  return (Eight)_mm512_maskz_mul_epu32(0xff, (__m512i)one, (__m512i)other);
}

// Words are lower halves; what is in the upper ones does not count. Several times eight counters,
// since each step waits for the one before.
template <int kTimes>
MERGECORE_V4 inline __attribute__((always_inline)) void philox_vectors(uint64_t key,
                                                                       uint64_t counter,
                                                                       uint32_t* out) {
  const Eight zero = {}, by0 = zero + 0xD2511F53u, by2 = zero + 0xCD9E8D57u;
  Eight c0[kTimes], c1[kTimes], c2[kTimes], c3[kTimes];
  for (int t = 0; t < kTimes; ++t) {
    c0[t] = counter + static_cast<uint64_t>(kTogether * t) + Eight{0, 1, 2, 3, 4, 5, 6, 7};
    c1[t] = c0[t] >> 32;
    c2[t] = c3[t] = zero;
  }
  uint64_t k0 = static_cast<uint32_t>(key), k1 = key >> 32;
#pragma GCC unroll 9
  for (int round = 0; round < 9; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int t = 0; t < kTimes; ++t) {
      const Eight p0 = product(c0[t], by0), p1 = product(c2[t], by2);
      c0[t] = p1 >> 32 ^ c1[t] ^ k0;
      c2[t] = p0 >> 32 ^ c3[t] ^ k1;
      c1[t] = p1;
      c3[t] = p0;
    }
  }
  // The last round leaves two words in one place: words 1 and 0 of a counter, and words 3 and 2.
  const Sixteen low = {1, 0, 17, 16, 3, 2, 19, 18, 5, 4, 21, 20, 7, 6, 23, 22};
  for (int t = 0; t < kTimes; ++t) {
    const Eight w01 = product(c2[t], by2) ^ c1[t] << 32 ^ k0 << 32;
    const Eight w23 = product(c0[t], by0) ^ c3[t] << 32 ^ k1 << 32;
    const Sixteen first = __builtin_shuffle((Sixteen)w01, (Sixteen)w23, low);
    const Sixteen second = __builtin_shuffle((Sixteen)w01, (Sixteen)w23, low + 8);
    memcpy(out + 4 * kTogether * t, &first, sizeof(first));
    memcpy(out + 4 * kTogether * t + 2 * kTogether, &second, sizeof(second));
  }
}

MERGECORE_V4
void philox_run(uint64_t key, uint64_t counter, int count, uint32_t* out) {
  int i = 0;
  for (; i + 4 * kTogether <= count; i += 4 * kTogether) {
    philox_vectors<4>(key, counter + static_cast<uint64_t>(i), out + 4 * i);
  }
  for (; i < count; i += kTogether) {
    philox_vectors<1>(key, counter + static_cast<uint64_t>(i), out + 4 * i);
  }
}
#endif

}  // namespace

void numbers_chunk(uint64_t key, uint64_t first, int n, uint32_t* numbers) {
  constexpr int kNumbers = 4 * kTogether;
  const int lead = static_cast<int>(first % 4);
  if (lead == 0 && n % kNumbers == 0) return philox_run(key, first / 4, n / 4, numbers);
  alignas(64) uint32_t more[kChunk + kNumbers];
  const int runs = (lead + n + kNumbers - 1) / kNumbers;
  philox_run(key, first / 4, runs * kTogether, more);
  std::copy_n(more + lead, n, numbers);
}

}  // namespace mergecore::cpu
