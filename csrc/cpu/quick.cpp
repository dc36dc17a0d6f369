// Blends of bf16 by float32, where float32 is enough to tell which bf16 number the float64 result
// rounds to: for nearly all entries, at several times the speed. Not for the others (blend.cpp).
//
// v is the value that blend.cpp computes, and M = |b a| + sum_n |c_n d_n| for the base's
// coefficient b. With u = 2^-24, rounding d_n, c_n and b, N fused multiply-adds and the last one
// make float32's value w differ from v by at most (N + 3) u M, to first order; float64 and its
// rounding to 40 bits add less than 2^-15 u M. One more u M covers the rounding of w - e and w + e.
// So with e >= (N + 6) u M v lies strictly between the two, and where both round to one bf16
// number, v does.
#include "quick.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace mergecore::cpu {

namespace {

constexpr float kLeast = 0x1p-120f;    // what e is at least: beside it underflow counts for nothing
constexpr float kGreatest = 0x1p100f;  // of e, with room below float32's largest number
constexpr double kSmallest = 0x1p-60;  // of coefficients, so that products are normal numbers
constexpr double kLargest = 0x1p60;

inline __attribute__((always_inline)) float above(double coefficient, int models) {
  return static_cast<float>(fabs(coefficient) * (models + 6) * 0x1.01p-24);
}

inline bool is_tame(double coefficient) {
  const double size = fabs(coefficient);
  return size == 0.0 || (size >= kSmallest && size <= kLargest);
}

// A block's entries of kModels models are added to `sum` and `error`, or, where they are the last,
// the results stored. False if float32 does not decide all of them.
template <int kModels, bool kColumns, bool kLast>
inline __attribute__((always_inline)) bool add_block(const uint16_t* base,
                                                     const uint16_t* const* models,
                                                     const float* const* coefficients,
                                                     const float* const* errors, float of_base,
                                                     float error_of_base, float* sum, float* error,
                                                     uint16_t* out) {
  const uint16_t* model[kModels];
  const float* coefficient[kModels];
  const float* bound[kModels];
  float one[kModels], one_bound[kModels];
  for (int m = 0; m < kModels; ++m) {
    model[m] = models[m];
    coefficient[m] = coefficients[m];
    bound[m] = errors[m];
    one[m] = *coefficients[m];
    one_bound[m] = *errors[m];
  }
  uint32_t differ = 0, largest = 0;
#pragma GCC ivdep
  for (int i = 0; i < kQuick; ++i) {
    const float a = BF16::load(base[i]);
    float w = sum[i], e = error[i];
#pragma GCC unroll 4
    for (int m = 0; m < kModels; ++m) {
      const float d = BF16::load(model[m][i]) - a;
      w = fmaf(kColumns ? coefficient[m][i] : one[m], d, w);
      e = fmaf(kColumns ? bound[m][i] : one_bound[m], fabsf(d), e);
    }
    if constexpr (kLast) {
      w = fmaf(of_base, a, w);
      e = fmaf(error_of_base, fabsf(a), e);
      const uint32_t low = bit_cast<uint32_t>(w - e) + 0x8000u;
      const uint32_t high = bit_cast<uint32_t>(w + e) + 0x8000u;
      const uint32_t size = bit_cast<uint32_t>(e);
      differ |= low ^ high;
      largest = size > largest ? size : largest;
      out[i] = static_cast<uint16_t>(high >> 16);
    } else {
      sum[i] = w;
      error[i] = e;
    }
  }
  return differ >> 16 == 0 && largest < bit_cast<uint32_t>(kGreatest);
}

// What all blocks of a call share.
struct Terms {
  const uint16_t* base;
  const uint16_t* models[kMaxModels];
  const float* coefficients[kMaxModels];
  const float* errors[kMaxModels];
  float of_base, error_of_base;
};

template <bool kColumns>
inline __attribute__((always_inline)) bool add_models(const Terms& t, int count, uint16_t* out) {
  alignas(64) float sum[kQuick] = {};
  alignas(64) float error[kQuick];
  std::fill_n(error, kQuick, kLeast);
  auto add = [&](auto models, auto last, int first) __attribute__((always_inline)) {
    return add_block<models.value, kColumns, last.value>(
        t.base, t.models + first, t.coefficients + first, t.errors + first, t.of_base,
        t.error_of_base, sum, error, out);
  };
  int first = 0;
  for (; first + 4 < count; first += 4) {
    add(std::integral_constant<int, 4>{}, std::false_type{}, first);
  }
  switch (count - first) {
    case 1:
      return add(std::integral_constant<int, 1>{}, std::true_type{}, first);
    case 2:
      return add(std::integral_constant<int, 2>{}, std::true_type{}, first);
    case 3:
      return add(std::integral_constant<int, 3>{}, std::true_type{}, first);
    default:
      return add(std::integral_constant<int, 4>{}, std::true_type{}, first);
  }
}

MERGECORE_CLONES
bool store_block(const Terms& terms, int count, bool per_entry, uint16_t* out) {
  return per_entry ? add_models<true>(terms, count, out) : add_models<false>(terms, count, out);
}

constexpr uint16_t kZeros[kQuick] = {};

}  // namespace

QuickBlend::QuickBlend(const Blend& blend) : blend_(blend) {
  const Inputs& in = blend.inputs;
  const auto is_bf16 = [](const Matrix& matrix) { return matrix.dtype == Dtype::bf16; };
  if (blend.out_dtype != Dtype::bf16 || in.count == 0) return;
  if (in.base.data != nullptr && !is_bf16(in.base)) return;
  if (!std::all_of(in.models, in.models + in.count, is_bf16)) return;
  if (in.drops != nullptr && std::any_of(in.drops, in.drops + in.count, drops_any)) return;
  const Window& w = in.window;
  const int64_t first = blend.axis == Axis::rows ? w.first_row : 0;
  length_ = blend.axis == Axis::rows ? w.rows : blend.axis == Axis::columns ? w.columns : 1;
  const double base = in.base.data == nullptr ? 0.0 : blend.base_coefficient;
  if (!is_tame(base)) return;
  of_base_ = static_cast<float>(base);
  error_of_base_ = above(base, in.count);
  coefficients_.resize(static_cast<size_t>(in.count * length_));
  errors_.resize(coefficients_.size());
  for (int m = 0; m < in.count; ++m) {
    const double* from = blend.coefficients + m * blend.stride + first;
    if (!std::all_of(from, from + length_, is_tame)) return;
    for (int64_t i = 0; i < length_; ++i) {
      coefficients_[static_cast<size_t>(m * length_ + i)] = static_cast<float>(from[i]);
      errors_[static_cast<size_t>(m * length_ + i)] = above(from[i], in.count);
    }
  }
  applies_ = true;
}

bool QuickBlend::store(int64_t entry, int64_t row, int64_t column) const {
  const Inputs& in = blend_.inputs;
  const bool per_entry = blend_.axis == Axis::columns;
  const int64_t place = per_entry ? column : blend_.axis == Axis::rows ? row : 0;
  Terms terms;
  terms.base =
      in.base.data == nullptr ? kZeros : static_cast<const uint16_t*>(in.base.data) + entry;
  for (int m = 0; m < in.count; ++m) {
    terms.models[m] = static_cast<const uint16_t*>(in.models[m].data) + entry;
    terms.coefficients[m] = coefficients_.data() + m * length_ + place;
    terms.errors[m] = errors_.data() + m * length_ + place;
  }
  terms.of_base = of_base_;
  terms.error_of_base = error_of_base_;
  return store_block(terms, in.count, per_entry, static_cast<uint16_t*>(blend_.out) + entry);
}

}  // namespace mergecore::cpu
