// A result's bits by integer arithmetic, for the results that nearly all are; not for the others,
// which numeric.h rounds. Half the instructions of round_to(), and the same bits.
#pragma once

#include <type_traits>

#include "../numeric.h"

namespace mergecore::cuda {

// The upper half of a float64: where T's normal numbers begin, and its largest one.
template <class T>
constexpr uint32_t kLeastHigh = 0x38100000;  // 2^-126
template <>
constexpr uint32_t kLeastHigh<F16> = 0x3f100000;  // 2^-14
template <class T>
constexpr uint32_t kLargestHigh = 0x47efe000;
template <>
constexpr uint32_t kLargestHigh<F16> = 0x40effc00;

// Rounds to nearest even at bit `bit` of `value`, a sign and a magnitude; lower bits are left as
// they come.
template <int bit>
MERGECORE_INLINE uint64_t round_at(uint64_t value) {
  return value + ((1ull << (bit - 1)) - 1) + ((value >> bit) & 1);
}

// Stores the bits of `value` rounded as round_to<T> rounds it. False, and no bits, where `value` is
// zero, not a normal number of T, or as large as the largest one.
template <class T>
MERGECORE_INLINE bool quick_bits(double value, typename T::Bits& out) {
  if constexpr (std::is_same_v<T, F64>) return false;
  const uint64_t bits = bit_cast<uint64_t>(value);
  const uint32_t magnitude = static_cast<uint32_t>(bits >> 32) & 0x7fffffffu;
  if (magnitude - kLeastHigh<T> >= kLargestHigh<T> - kLeastHigh<T>) return false;
  constexpr int kSnapped = 53 - kSnapBits;
  const uint64_t snapped = round_at<kSnapped>(bits) >> kSnapped << kSnapped;
  if constexpr (std::is_same_v<T, F32>) {
    out = bit_cast<uint32_t>(static_cast<float>(bit_cast<double>(snapped)));
  } else if constexpr (!std::is_same_v<T, F64>) {
    constexpr int kDropped = 53 - T::significant;
    const uint32_t high = static_cast<uint32_t>(round_at<kDropped>(snapped) >> 32);
    // The exponent's bias is 127 or 15 instead of 1023.
    constexpr uint32_t kBias = kLeastHigh<T> - (1u << 20);
    const uint32_t number = ((high & 0x7fffffffu) - kBias) >> (kDropped - 32);
    out = static_cast<uint16_t>((high >> 16 & 0x8000u) | number);
  }
  return true;
}

}  // namespace mergecore::cuda
