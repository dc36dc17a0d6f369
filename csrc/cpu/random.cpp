// The random numbers of runs of entries: four from each Philox counter, as numeric.h defines them.
#include <algorithm>

#include "chunk.h"

// Vectors multiply several counters at once. Compilers do not find that in the plain loop.
#ifdef MERGECORE_PICKS
#define MERGECORE_V4 __attribute__((target("arch=x86-64-v4")))
#define MERGECORE_V3 __attribute__((target("arch=x86-64-v3")))
#define MERGECORE_ANY __attribute__((target("default")))
#elif defined(__AVX512F__)
#define MERGECORE_V4
#elif defined(__AVX2__)
#define MERGECORE_V3
#else
#define MERGECORE_ANY
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

#if defined(MERGECORE_V4) || defined(MERGECORE_V3)
// One number of each of several counters: the lower half of a word of its own.
template <int kCounters>
struct Vectors {
  typedef uint64_t Words __attribute__((vector_size(8 * kCounters)));
  typedef uint32_t Halves __attribute__((vector_size(8 * kCounters)));
};

// The products of the lower halves. Not the compilers' function: it would have to be inlined into
// what is written for any instruction set.
template <class Words>
inline __attribute__((always_inline)) void multiply(const Words& one, const Words& other,
                                                    Words& product) {
  asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(one), "v"(other));
}

// What is in upper halves does not count. Several times kCounters, since each step waits for the
// one before.
template <int kCounters, int kTimes>
inline __attribute__((always_inline)) void philox_vectors(uint64_t key, uint64_t counter,
                                                          uint32_t* out) {
  using Words = typename Vectors<kCounters>::Words;
  using Halves = typename Vectors<kCounters>::Halves;
  const Words zero = {}, by0 = zero + 0xD2511F53u, by2 = zero + 0xCD9E8D57u;
  Words c0[kTimes], c1[kTimes], c2[kTimes], c3[kTimes], next;
  for (int i = 0; i < kCounters; ++i) next[i] = counter + static_cast<uint64_t>(i);
  for (int t = 0; t < kTimes; ++t, next += static_cast<uint64_t>(kCounters)) {
    c0[t] = next;
    c1[t] = c0[t] >> 32;
    c2[t] = c3[t] = zero;
  }
  uint64_t k0 = static_cast<uint32_t>(key), k1 = key >> 32;
#pragma GCC unroll 9
  for (int round = 0; round < 9; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int t = 0; t < kTimes; ++t) {
      Words p0, p1;
      multiply(c0[t], by0, p0);
      multiply(c2[t], by2, p1);
      c0[t] = p1 >> 32 ^ c1[t] ^ k0;
      c2[t] = p0 >> 32 ^ c3[t] ^ k1;
      c1[t] = p1;
      c3[t] = p0;
    }
  }
  // The last round leaves two numbers in one word: 1 and 0 of a counter, and 3 and 2.
  Halves order;
  for (int i = 0; i < 2 * kCounters; ++i) {
    order[i] = static_cast<uint32_t>(i / 4 * 2 + 1 - i % 2 + i % 4 / 2 * 2 * kCounters);
  }
  for (int t = 0; t < kTimes; ++t) {
    Words w01, w23;
    multiply(c2[t], by2, w01);
    multiply(c0[t], by0, w23);
    w01 ^= c1[t] << 32 ^ k0 << 32;
    w23 ^= c3[t] << 32 ^ k1 << 32;
    const Halves first = __builtin_shuffle((Halves)w01, (Halves)w23, order);
    const Halves second =
        __builtin_shuffle((Halves)w01, (Halves)w23, order + static_cast<uint32_t>(kCounters));
    memcpy(out + 4 * kCounters * t, &first, sizeof(first));
    memcpy(out + 4 * kCounters * t + 2 * kCounters, &second, sizeof(second));
  }
}

template <int kCounters, int kTimes>
inline __attribute__((always_inline)) void philox_runs(uint64_t key, uint64_t counter, int count,
                                                       uint32_t* out) {
  int i = 0;
  for (; i + kTimes * kCounters <= count; i += kTimes * kCounters) {
    philox_vectors<kCounters, kTimes>(key, counter + static_cast<uint64_t>(i), out + 4 * i);
  }
  for (; i < count; i += kCounters) {
    philox_vectors<kCounters, 1>(key, counter + static_cast<uint64_t>(i), out + 4 * i);
  }
}
#endif

#ifdef MERGECORE_V4
MERGECORE_V4
void philox_run(uint64_t key, uint64_t counter, int count, uint32_t* out) {
  philox_runs<8, 4>(key, counter, count, out);
}
#endif

#ifdef MERGECORE_V3
MERGECORE_V3
void philox_run(uint64_t key, uint64_t counter, int count, uint32_t* out) {
  philox_runs<4, 2>(key, counter, count, out);
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
