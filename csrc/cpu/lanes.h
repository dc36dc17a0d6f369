// Adjacent float64 numbers as one value, for sums that stay in registers while entries pass by. Not
// for loops that compilers vectorise well by themselves: through narrow types they take wider
// steps, and pay for them in shuffles.
#pragma once

#include <cmath>
#include <cstring>

#include "chunk.h"

namespace mergecore::cpu {

// As many as a register of AVX-512 holds, and of AVX2: of more than one register GCC makes single
// numbers.
constexpr int kEight = 8;
constexpr int kFour = 4;
using Eight = double __attribute__((vector_size(kEight * sizeof(double))));
using Four = double __attribute__((vector_size(kFour * sizeof(double))));

// Of entries 0, 2, ... and 1, 3, ... of bf16: 32 bits hold two, each of which is a float32 after
// one operation. One by one they take two.
struct Sixteen {
  Eight even, odd;
};

template <class Lanes>
constexpr int kLanesOf = sizeof(Lanes) / sizeof(double);

// Which lanes a function is to take: Eight, Four, or double.
template <class Type>
struct As {
  using Lanes = Type;
};

// What takes entries of bf16: pairs where registers are many.
inline As<Sixteen> in_pairs(As<Eight>) { return {}; }
inline As<Four> in_pairs(As<Four>) { return {}; }

// Calls f(As<Lanes>), which must be inlined always, with what fits the registers of this processor.
#ifdef MERGECORE_PICKS
template <class F>
__attribute__((target("arch=x86-64-v4"))) void with_eight(const F& f) {
  f(As<Eight>{});
}

template <class F>
__attribute__((target("arch=x86-64-v3"))) void with_four(const F& f) {
  f(As<Four>{});
}

template <class F>
void with_lanes(const F& f) {
  if (__builtin_cpu_supports("x86-64-v4")) return with_eight(f);
  if (__builtin_cpu_supports("x86-64-v3")) return with_four(f);
  f(As<Four>{});
}
#elif defined(__AVX512F__)
template <class F>
void with_lanes(const F& f) {
  f(As<Eight>{});
}
#else
template <class F>
void with_lanes(const F& f) {
  f(As<Four>{});
}
#endif

// The same names for one number, for what is left of a run. All go by reference: the registers
// that vectors are passed in differ between instruction sets.
template <class Number>
inline __attribute__((always_inline)) void load(const Number* from, double& to) {
  to = from[0];
}

template <class Number>
inline __attribute__((always_inline)) void load(const Number* from, Four& to) {
  to = Four{from[0], from[1], from[2], from[3]};
}

template <class Number>
inline __attribute__((always_inline)) void load(const Number* from, Eight& to) {
  to = Eight{from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
}

// Entries of bf16.
inline __attribute__((always_inline)) void load(const uint16_t* from, double& to) {
  to = BF16::load(from[0]);
}

inline __attribute__((always_inline)) void load(const uint16_t* from, Four& to) {
  to = Four{BF16::load(from[0]), BF16::load(from[1]), BF16::load(from[2]), BF16::load(from[3])};
}

using Pairs = uint32_t __attribute__((vector_size(kEight * sizeof(uint32_t))));

inline __attribute__((always_inline)) void widen(const Pairs& from, Eight& to) {
  float numbers[kEight];
  memcpy(numbers, &from, sizeof(numbers));
  load(numbers, to);
}

inline __attribute__((always_inline)) void load(const uint16_t* from, Sixteen& to) {
  Pairs pairs;
  memcpy(&pairs, from, sizeof(pairs));
  widen(pairs << 16, to.even);
  widen(pairs & 0xffff0000u, to.odd);
}

inline __attribute__((always_inline)) void load(const double* from, Sixteen& to) {
  Eight first, second;
  load(from, first);
  load(from + kEight, second);
  to.even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14);
  to.odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15);
}

inline __attribute__((always_inline)) void store(const Sixteen& from, double* to) {
  const Eight first = __builtin_shufflevector(from.even, from.odd, 0, 8, 1, 9, 2, 10, 3, 11);
  const Eight second = __builtin_shufflevector(from.even, from.odd, 4, 12, 5, 13, 6, 14, 7, 15);
  memcpy(to, &first, sizeof(first));
  memcpy(to + kEight, &second, sizeof(second));
}

template <class Lanes>
inline __attribute__((always_inline)) void store(const Lanes& from, double* to) {
  memcpy(to, &from, sizeof(Lanes));
}

// sum += a * b, rounded once.
inline __attribute__((always_inline)) void multiply_add(const double& a, const double& b,
                                                        double& sum) {
  sum = fma(a, b, sum);
}

inline __attribute__((always_inline)) void multiply_add(const Four& a, const Four& b, Four& sum) {
  sum = Four{fma(a[0], b[0], sum[0]), fma(a[1], b[1], sum[1]), fma(a[2], b[2], sum[2]),
             fma(a[3], b[3], sum[3])};
}

inline __attribute__((always_inline)) void multiply_add(const Eight& a, const Eight& b,
                                                        Eight& sum) {
  sum = Eight{fma(a[0], b[0], sum[0]), fma(a[1], b[1], sum[1]), fma(a[2], b[2], sum[2]),
              fma(a[3], b[3], sum[3]), fma(a[4], b[4], sum[4]), fma(a[5], b[5], sum[5]),
              fma(a[6], b[6], sum[6]), fma(a[7], b[7], sum[7])};
}

inline __attribute__((always_inline)) void multiply_add(const Sixteen& a, const Sixteen& b,
                                                        Sixteen& sum) {
  multiply_add(a.even, b.even, sum.even);
  multiply_add(a.odd, b.odd, sum.odd);
}

inline __attribute__((always_inline)) Sixteen operator-(const Sixteen& a, const Sixteen& b) {
  return {a.even - b.even, a.odd - b.odd};
}

}  // namespace mergecore::cpu
