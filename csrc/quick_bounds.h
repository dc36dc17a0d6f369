// Blends of bf16 by float32, where float32 is enough to tell which bf16 number the float64 result
// rounds to: for nearly all entries, at several times the speed. Which those are is told here;
// csrc/cpu/quick.cpp and csrc/cuda/quick_blend.cu have the others done.
//
// Without differences. Beside a base, with coefficient b, the float64 blend computes
// b a + sum_n c_n (x_n - a), for differences lose nothing. Float32 computes b' a + sum_n c_n x_n
// with b' = b - sum_n c_n, the same number: that large terms cancel does not matter where errors
// are compared with these. So the base is one of M inputs, and S the sum of their coefficients'
// magnitudes; |b| + 2 sum_n |c_n| is at most 3 S.
//
// Bounded. v is the value that the float64 blend computes, and X the largest magnitude of an
// entry's numbers, so that no sum of terms is larger than S X. With u = 2^-24, rounding
// coefficients and M fused multiply-adds make float32's value w differ from v by at most (M + 1) u
// S X, to first order; float64 and its rounding to 40 bits add less than 2^-15 u S X. One more u S
// X covers the rounding of w - e and w + e. So with e >= (M + 4) u S X v lies strictly between the
// two, and where both round to one bf16 number, v does. Small X count as such that e is at least
// 2^-120: beside it underflow counts for nothing. Where X is 0, everything is exact.
//
// Exact. Let 2^k c_n and 2^k b be whole numbers, and so 2^k b'. An entry's numbers other than 0 are
// multiples of 2^-7 q, if q is the power of two at or below the least of them, so all terms and
// sums are multiples of 2^(-7-k) q, and none is larger than S X. So float32, which has 24 bits,
// rounds nothing where S X <= 2^(17-k) q: w is v, ties included, and rounding to 40 bits leaves it
// as it is. k is at most 16: so the multiples are float32 numbers however small q is (bf16
// subnormals are multiples of 2^-133, float32 ones of 2^-149).
//
// Fractions. Weights as people give them, 0.3 or 2/3, make ties that float32 does not compute
// exactly. Let c_n = p_n / D and b = p / D for a small whole D and whole p_n and p, but for
// roundings by 2^-50 of themselves. Then R = (p - sum_n p_n) a + sum_n p_n x_n is computed exactly
// as above, with k = 0 and the sum of these coefficients in the place of S, and the entry is R / D,
// rounded once. As with elections below, that is on the right side of the middle M of two bf16
// numbers, or is M. So is v, which differs from R / D by E = (3 N + 30) 2^-53 S X at most. Where R
// / D is not M, it is as far from it as 1 / D of 2^-7 q or of 2^(e-8), whichever is less, if M is
// at least 2^e; E and what rounding to 40 bits does are nothing beside it. Where R / D is M,
// rounding to 40 bits makes M of v as long as E < 2^(e-40): where the result is a normal number and
// at least 2^-g X, with 2^g <= 2^11 / ((3 N + 30) S). Others are not decided.
//
// Zeros. The signs of w and v differ only where both are 0 and there is a base, which a v of 0 may
// take its sign from: it is b a where all numbers are 0, and other such entries are not decided.
//
// Elections (csrc/cpu/quick_elect.cpp) are tried only where they are exact. With weights w_n >= 0,
// a scale t and s_n for what kept deltas are multiplied with, let 2^k t w_n s_n and all factors and
// products of these be whole numbers. Votes are w_n s_n d_n or s_n d_n. In the place of
// a + t sum w_n s_n d_n / D, D being the sum of the weights that agree, one computes R / D with
// R = D a + t sum w_n s_n d_n. S is the larger of two bounds: of what votes sum up to, 2 sum |votes
// for d_n = 1|, and of R, max(1, sum w_n) + 2 sum |t w_n s_n|. Votes, their sums and R are exact as
// above. So signs are right: a sum other than 0 is at least 2^-24 of what its terms are at most,
// and none is taken for noise (2^-40). What is compared with limits is exact, too.
// Let h = 2^(-7-k) q, so that R is a multiple of h below 2^24 h, and M the middle of two bf16
// numbers, an odd multiple of 2^(e-8) if 2^e < |M| < 2^(e+1). Float32's R / D, which is rounded
// once, is on the right side of M unless |R - D M| <= D 2^(e-24) and not 0. But that is a multiple
// of h or of 2^(-k+e-8), whichever is less: h > D 2^(e-24) because D 2^e < |R| < 2^24 h, and
// 2^(-k+e-8) > D 2^(e-24) because 2^k D <= 2^k S <= 2^8, by kFewBinades. Where R / D is below the
// normal numbers, M is a multiple of 2^-134 and |R / D - M| at least 2^-142, beside which rounding
// by 2^-150 is nothing. Float64, which divides first, errs by less than 2^-28 h / D and
// 2^(e-39), and not at all where R / D is M, t being a power of two: it rounds to the same side.
// Fractions are elected in the same way, with t = 1 where there are sides: where D w_n s_n and D
// w_n are whole for a small whole D, they take the place of w_n s_n and w_n, and where nothing else
// divides, so does D. Signs are as safe as above. Float64 errs by less than (3 N + 30) 2^-53 S X if
// S is 1 + 2 t sum |w_n s_n| or, for means, 1 + 2 |s_n|: ties are told from others as in blends.
#pragma once

#include "numeric.h"

namespace mergecore {

constexpr double kSmallestQuick = 0x1p-60;  // of coefficients, so that products are normal numbers
constexpr double kLargestQuick = 0x1p60;
constexpr double kLeastError = 0x1p-120;      // e
constexpr double kGreatestQuick = 0x1p120;    // S X, with room below float32's largest number
constexpr double kGreatestElected = 0x1p104;  // S X of an election, with room for division
constexpr int kMostSteps = 16;                // k
constexpr int kGreatestDivisor = 128;         // D
constexpr int kFewBinades = 8;  // between an entry's numbers: nearly always they are closer

MERGECORE_INLINE bool is_tame(double coefficient) {
  const double size = fabs(coefficient);
  return (size == 0.0) | ((size >= kSmallestQuick) & (size <= kLargestQuick));
}

// e / (S X) of a blend of `inputs`, rounded up.
MERGECORE_INLINE double relative_bound(int inputs) { return (inputs + 4) * 0x1.01p-24; }

// Whether a number is whole, but for roundings of what it was computed from.
MERGECORE_INLINE bool is_whole(double number) {
  return fabs(number - rint(number)) <= 0x1p-50 * fabs(number);
}

// g of a blend of `models`, S being `sum`; below 0 if there is none.
MERGECORE_INLINE int tie_binades(int models, double sum) {
  const uint64_t bits = bit_cast<uint64_t>(0x1p11 / ((3 * models + 30) * sum));
  return static_cast<int>(bits >> 52) - 1023;
}

// The least k >= 0 for which 2^k times a tame number is whole.
MERGECORE_INLINE int steps(double number) {
  if (number == 0.0) return 0;
  const uint64_t bits = bit_cast<uint64_t>(number);
  const uint64_t significand = (bits & 0xfffffffffffffull) | 1ull << 52;
  const auto last = static_cast<double>(static_cast<int64_t>(significand & (~significand + 1)));
  const int zeros = static_cast<int>(bit_cast<uint64_t>(last) >> 52) - 1023;
  const int k = 1075 - static_cast<int>(bits >> 52 & 0x7ff) - zeros;
  return k > 0 ? k : 0;
}

// Binades between the largest and the least of an entry's numbers, at most, so that float32 is
// exact: below 1 where it never is.
MERGECORE_INLINE int exact_binades(int most_steps, double sum) {
  if (most_steps > kMostSteps) return 0;
  const uint64_t bits = bit_cast<uint64_t>(sum);
  const int exponent = static_cast<int>(bits >> 52) - 1023;
  const int up = (bits & 0xfffffffffffffull) != 0;  // ceil(log2(sum)), `sum` being a normal number
  const int binades = 16 - most_steps - exponent - up;
  return binades < 0 ? 0 : binades > 15 ? 15 : binades;
}

// The bits of a positive number cut to bf16.
MERGECORE_INLINE uint16_t cut_bits(double number) {
  return static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(number)) >> 16);
}

}  // namespace mergecore
