// Numbers shared by host and device: dtypes, exact loads, the one rounding, exp and its kin,
// Philox.
//
// Everything here is plain IEEE arithmetic in a fixed order, so that the CPU (any instruction set)
// and CUDA return equal bits. It must be compiled without contraction of a*b+c
// (-ffp-contract=off, --fmad=false); a fused multiply-add is written as fma().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MERGECORE_INLINE __host__ __device__ __forceinline__
#else
#define MERGECORE_INLINE inline __attribute__((always_inline))
#endif

namespace mergecore {

// Windows hold any of them; results of a merge are f32, f16 or bf16.
enum class Dtype : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

MERGECORE_INLINE int dtype_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

template <class To, class From>
MERGECORE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Storage types: the bits of one element as they lie in a file.
struct F32 {
  using Bits = uint32_t;
  using Number = float;
  static constexpr Dtype dtype = Dtype::f32;
  static constexpr double largest = 0x1.fffffep127;
  static constexpr int significant = 24;     // significant bits
  static constexpr int min_exponent = -126;  // of the smallest normal number
  static MERGECORE_INLINE float load(Bits bits) { return bit_cast<float>(bits); }
  // `value` is representable (see round_to), or beyond the largest finite number.
  // A NaN gets one bit pattern, here and below: its sign and payload differ between machines.
  static MERGECORE_INLINE Bits store(float value) {
    return value == value ? bit_cast<Bits>(value) : 0x7fc00000u;
  }
  static MERGECORE_INLINE Bits store_finite(float value) { return bit_cast<Bits>(value); }
};

struct BF16 {
  using Bits = uint16_t;
  using Number = float;
  static constexpr Dtype dtype = Dtype::bf16;
  static constexpr double largest = 0x1.fep127;
  static constexpr int significant = 8;
  static constexpr int min_exponent = -126;
  static MERGECORE_INLINE float load(Bits bits) {
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  static MERGECORE_INLINE Bits store(float value) {
    // Representable values have a zero lower half.
    return static_cast<Bits>(value == value ? bit_cast<uint32_t>(value) >> 16 : 0x7fc0u);
  }
  static MERGECORE_INLINE Bits store_finite(float value) {
    return static_cast<Bits>(bit_cast<uint32_t>(value) >> 16);
  }
};

struct F16 {
  using Bits = uint16_t;
  using Number = float;
  static constexpr Dtype dtype = Dtype::f16;
  static constexpr double largest = 65504.0;
  static constexpr int significant = 11;
  static constexpr int min_exponent = -14;
  static MERGECORE_INLINE float load(Bits bits) {
    // Moving exponent and mantissa into place and scaling by 2^112 is exact, subnormals included.
    uint32_t half = bits;
    float magnitude = bit_cast<float>((half & 0x7fffu) << 13) * 0x1p112f;
    uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | special | ((half & 0x8000u) << 16));
  }
  static MERGECORE_INLINE Bits store(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    uint32_t absolute = bits & 0x7fffffffu;
    float magnitude = bit_cast<float>(absolute < 0x47800000u ? absolute : 0x47800000u);  // 65536
    uint32_t half = bit_cast<uint32_t>(magnitude * 0x1p-112f) >> 13;
    return static_cast<Bits>(absolute > 0x7f800000u ? 0x7e00u : half | ((bits >> 16) & 0x8000u));
  }
  static MERGECORE_INLINE Bits store_finite(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    uint32_t half = bit_cast<uint32_t>(bit_cast<float>(bits & 0x7fffffffu) * 0x1p-112f) >> 13;
    return static_cast<Bits>(half | ((bits >> 16) & 0x8000u));
  }
};

// What is computed from files, not stored in them.
struct F64 {
  using Bits = uint64_t;
  using Number = double;
  static constexpr Dtype dtype = Dtype::f64;
  static constexpr double largest = 0x1.fffffffffffffp1023;
  static MERGECORE_INLINE double load(Bits bits) { return bit_cast<double>(bits); }
  static MERGECORE_INLINE Bits store(double value) {
    return value == value ? bit_cast<Bits>(value) : 0x7ff8000000000000ull;
  }
  static MERGECORE_INLINE Bits store_finite(double value) { return bit_cast<Bits>(value); }
};

// 2^exponent for normal exponents.
MERGECORE_INLINE double power_of_two(int exponent) {
  return bit_cast<double>(static_cast<uint64_t>(1023 + exponent) << 52);
}

constexpr int kSnapBits = 40;

// A finite result of a merge as a number of storage type T, still held in float64: first rounded to
// 40 significant bits, so that float64 noise cannot decide what is a tie in exact arithmetic, then
// to T's precision (and to its subnormal grid), to nearest even both times. Adding and subtracting
// 1.5 * 2^52 quanta leaves each rounding to the hardware. Zeros keep their sign. Results beyond
// T::largest are numbers that T::store turns into infinity; Inf and NaN become NaN.
template <class T>
MERGECORE_INLINE double round_finite(double value) {
  constexpr double snap = 1.5 * static_cast<double>(1ull << (53 - kSnapBits));
  constexpr double round = 1.5 * static_cast<double>(1ull << (53 - T::significant));
  double binade = bit_cast<double>(bit_cast<uint64_t>(value) & 0x7ff0000000000000ull);
  double least = power_of_two(T::min_exponent);
  binade = binade > least ? binade : least;
  double snapped = (value + binade * snap) - binade * snap;
  // Where snapping reached the next binade it is a power of two, which any finer grid holds.
  double rounded = (snapped + binade * round) - binade * round;
  uint64_t sign = bit_cast<uint64_t>(value) & 0x8000000000000000ull;
  return bit_cast<double>((bit_cast<uint64_t>(rounded) & 0x7fffffffffffffffull) | sign);
}

// A result in float64 is not rounded at all.
template <>
MERGECORE_INLINE double round_finite<F64>(double value) {
  return value;
}

// The same for any value. Inf and NaN pass unchanged, and so does what is far beyond every
// T::largest: there round_finite itself would overflow.
template <class T>
MERGECORE_INLINE double round_to(double value) {
  return fabs(value) < 0x1p200 ? round_finite<T>(value) : value;
}

// (e^r - 1 - r) / r^2 for |r| <= 0.35, by Taylor to r^13: below 2^-58.
MERGECORE_INLINE double exp_tail(double r) {
  double sum = 1.0 / 6227020800.0;
  sum = fma(sum, r, 1.0 / 479001600.0);
  sum = fma(sum, r, 1.0 / 39916800.0);
  sum = fma(sum, r, 1.0 / 3628800.0);
  sum = fma(sum, r, 1.0 / 362880.0);
  sum = fma(sum, r, 1.0 / 40320.0);
  sum = fma(sum, r, 1.0 / 5040.0);
  sum = fma(sum, r, 1.0 / 720.0);
  sum = fma(sum, r, 1.0 / 120.0);
  sum = fma(sum, r, 1.0 / 24.0);
  sum = fma(sum, r, 1.0 / 6.0);
  return fma(sum, r, 0.5);
}

// exp(x) for x <= 0 or moderate x, within 2 ulp, the same bits everywhere. Below -700 it is 0,
// beyond 700 infinite. Without branches, so that loops over it are vectorised.
MERGECORE_INLINE double exp_exact_order(double x) {
  const double inside = x > -700.0 ? x < 700.0 ? x : 700.0 : -700.0;
  const double k = floor(inside * 1.4426950408889634 + 0.5);
  double r = fma(k, -6.93147180369123816490e-01, inside);  // ln 2, upper 33 bits: exact
  r = fma(k, -1.90821492927058770002e-10, r);
  const double power = fma(fma(exp_tail(r), r, 1.0), r, 1.0) * power_of_two(static_cast<int>(k));
  const double outside = x > 700.0 ? HUGE_VAL : x != x ? x : 0.0;
  return (x > -700.0) & (x <= 700.0) ? power : outside;
}

// e^x - 1 - x, which is never negative, without cancellation.
MERGECORE_INLINE double exp_minus_line(double x) {
  return fabs(x) <= 0.35 ? x * x * exp_tail(x) : exp_exact_order(x) - 1.0 - x;
}

// log(1 + x) for x >= 0, within a few ulp, the same bits everywhere.
MERGECORE_INLINE double log1p_exact_order(double x) {
  if (!(x < HUGE_VAL)) return x;
  double exponent = 0.0, over = x;  // 1 + x = 2^exponent (1 + over)
  if (x > 0.4) {
    const double sum = 1.0 + x;
    const uint64_t bits = bit_cast<uint64_t>(sum);
    const int64_t half = (bits & 0xfffffffffffffull) > 0x6a09e667f3bccull;  // beyond sqrt(2)
    exponent = static_cast<double>(static_cast<int64_t>(bits >> 52) - 1023 + half);
    over =
        bit_cast<double>((bits & 0xfffffffffffffull) | (static_cast<uint64_t>(1023 - half) << 52)) -
        1.0;
  }
  // 2 artanh(s) by its series: |s| <= 0.18, the first term left out is below 2^-60.
  const double s = over / (2.0 + over), square = s * s;
  double sum = 1.0 / 23.0;
  sum = fma(sum, square, 1.0 / 21.0);
  sum = fma(sum, square, 1.0 / 19.0);
  sum = fma(sum, square, 1.0 / 17.0);
  sum = fma(sum, square, 1.0 / 15.0);
  sum = fma(sum, square, 1.0 / 13.0);
  sum = fma(sum, square, 1.0 / 11.0);
  sum = fma(sum, square, 1.0 / 9.0);
  sum = fma(sum, square, 1.0 / 7.0);
  sum = fma(sum, square, 1.0 / 5.0);
  sum = fma(sum, square, 1.0 / 3.0);
  const double log_over = 2.0 * fma(sum * square, s, s);
  return fma(exponent, 6.93147180559945286227e-01, log_over);
}

// tanh(x), within a few ulp, the same bits everywhere.
MERGECORE_INLINE double tanh_exact_order(double x) {
  const double twice = 2.0 * fabs(x);
  const double grown = exp_minus_line(twice) + twice;  // e^2x - 1
  const double size = twice > 80.0 ? 1.0 : grown / (grown + 2.0);
  return x < 0.0 ? -size : size;
}

// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; SC 2011).
MERGECORE_INLINE void philox(uint64_t key, uint64_t counter, uint32_t (&out)[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

}  // namespace mergecore
