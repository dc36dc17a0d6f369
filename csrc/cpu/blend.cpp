// out = cast( base_coefficient * base + sum_n c_n * d_n ), one pass, float64, one rounding.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "chunk.h"

namespace mergecore::cpu {

// sum[i] += c * (model[i] - base[i]), c per entry or the same for all.
MERGECORE_CLONES
void add_delta_chunk(const void* model, Dtype dtype, const double* base, const double* coefficient,
                     bool per_entry, int n, double* sum) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    const auto* bits = static_cast<const typename T::Bits*>(model);
    if (per_entry) {
      for (int i = 0; i < n; ++i) sum[i] = fma(coefficient[i], T::load(bits[i]) - base[i], sum[i]);
    } else {
      const double c = *coefficient;
      for (int i = 0; i < n; ++i) sum[i] = fma(c, T::load(bits[i]) - base[i], sum[i]);
    }
  });
}

MERGECORE_CLONES
void add_scaled_chunk(const double* delta, const double* coefficient, bool per_entry, int n,
                      double* sum) {
  if (per_entry) {
    for (int i = 0; i < n; ++i) sum[i] = fma(coefficient[i], delta[i], sum[i]);
  } else {
    const double c = *coefficient;
    for (int i = 0; i < n; ++i) sum[i] = fma(c, delta[i], sum[i]);
  }
}

// The largest |entry|.
MERGECORE_CLONES
double largest_of_chunk(const void* source, Dtype dtype, int n) {
  double largest = 0.0;
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    using Bits =
        std::make_signed_t<typename T::Bits>;  // without their sign, bits order as values do
    constexpr Bits magnitude = std::numeric_limits<Bits>::max();
    const auto* bits = static_cast<const Bits*>(source);
    Bits most = 0;
    for (int i = 0; i < n; ++i) {
      const Bits here = bits[i] & magnitude;
      most = here > most ? here : most;
    }
    largest = T::load(static_cast<typename T::Bits>(most));
  });
  return largest;
}

// size[i] += |c * delta[i]|.
MERGECORE_CLONES
void add_sizes_chunk(const double* delta, const double* coefficient, bool per_entry, int n,
                     double* size) {
  const double c = *coefficient;
  for (int i = 0; i < n; ++i) size[i] += fabs((per_entry ? coefficient[i] : c) * delta[i]);
}

// sum[i] becomes the blend's value, out[i] that value rounded. False if a value is not finite,
// beyond the largest number of `dtype`, or less than `suspect` but not 0: then out is not to be
// used.
MERGECORE_CLONES
bool store_plain_chunk(const double* base, double base_coefficient, double* sum, double suspect,
                       int n, Dtype dtype, void* out) {
  bool plain = true;
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    float rounded[kChunk];
    uint64_t largest = 0;
    uint64_t noise = 0;
    if (base != nullptr) {
      for (int i = 0; i < n; ++i) sum[i] = add_base(base_coefficient * base[i], sum[i]);
    }
    for (int i = 0; i < n; ++i) {
      double result = round_finite<T>(sum[i]);
      uint64_t magnitude = bit_cast<uint64_t>(result) & 0x7fffffffffffffffull;
      largest = magnitude > largest ? magnitude : largest;
      noise |= fabs(sum[i]) < suspect ? bit_cast<uint64_t>(sum[i]) << 1 : 0;  // no sign: zeros pass
      rounded[i] = static_cast<float>(result);
    }
    auto* bits = static_cast<typename T::Bits*>(out);
    for (int i = 0; i < n; ++i) bits[i] = T::store_finite(rounded[i]);
    plain = largest <= bit_cast<uint64_t>(T::largest) && noise == 0;
  });
  return plain;
}

// Values that are not finite or overflow: stored one by one and counted.
void store_any_chunk(const double* values, int n, Dtype dtype, void* out, int64_t& nonfinite,
                     int64_t& overflow) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    auto* bits = static_cast<typename T::Bits*>(out);
    for (int i = 0; i < n; ++i) {
      double result = round_to<T>(values[i]);
      bits[i] = T::store(static_cast<float>(result));
      if (!(fabs(values[i]) < HUGE_VAL)) {
        ++nonfinite;
      } else if (fabs(result) > T::largest) {
        ++overflow;
      }
    }
  });
}

// The largest |c_n * d_n| of model m in a window is reach * (|x| + |a|).
double reach(const Blend& b, int m) {
  const Window& w = b.inputs.window;
  const double* c = b.coefficients + m * b.stride;
  if (b.axis == Axis::rows) c += w.first_row;
  const int64_t count = b.axis == Axis::tensor ? 1 : b.axis == Axis::columns ? w.columns : w.rows;
  double largest = 0.0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, fabs(c[i]));
  return b.inputs.drops == nullptr ? largest : largest * std::max(1.0, b.inputs.drops[m].scale);
}

constexpr int64_t kAhead = 2 * kChunk;  // entries between use and prefetch

void blend(const Blend& b, int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow) {
  const Inputs& in = b.inputs;
  const Window& w = in.window;
  const bool has_base = in.base.data != nullptr;
  const bool per_entry = b.axis == Axis::columns;
  alignas(64) double base[kChunk] = {};
  alignas(64) double sum[kChunk];
  alignas(64) double keep[kChunk];
  alignas(64) double delta[kChunk];
  double reaches[kMaxModels];
  for (int m = 0; m < in.count; ++m) reaches[m] = reach(b, m);
  for (int64_t entry = begin; entry < end;) {
    const int64_t row = entry / w.columns, column = entry % w.columns;
    int64_t run = std::min<int64_t>(end - entry, kChunk);
    if (b.axis != Axis::tensor) run = std::min(run, w.columns - column);
    const int n = static_cast<int>(run);
    const int64_t place[] = {0, column, w.first_row + row};  // by Axis
    auto coefficients = [&](int m) {
      return b.coefficients + m * b.stride + place[static_cast<int>(b.axis)];
    };
    auto dropping = [&](int m) { return in.drops != nullptr && in.drops[m].threshold > 0; };
    auto load_delta = [&](int m) {
      const int64_t index = w.first_entry + w.first_row * w.columns + entry;
      std::fill_n(keep, n, 1.0);
      if (dropping(m)) keep_chunk(in.drops[m], static_cast<uint64_t>(index), n, keep);
      dropped_delta_chunk(at(in.models[m], entry), in.models[m].dtype, base, keep, n, delta);
    };

    double largest = 0.0, size = 0.0;  // of the base; of all that is added up, at most
    if (has_base) {
      prefetch(at(in.base, entry + kAhead), n * dtype_size(in.base.dtype));
      load_chunk(at(in.base, entry), in.base.dtype, n, base);
      largest = largest_of_chunk(at(in.base, entry), in.base.dtype, n);
      size = fabs(b.base_coefficient) * largest;
    }
    std::fill_n(sum, n, -0.0);  // the neutral element: adding -0.0 keeps +0.0 and -0.0
    for (int m = 0; m < in.count; ++m) {
      const void* model = at(in.models[m], entry);
      const Dtype dtype = in.models[m].dtype;
      prefetch(at(in.models[m], entry + kAhead), n * dtype_size(dtype));
      size += reaches[m] * (largest_of_chunk(model, dtype, n) + largest);
      if (dropping(m)) {
        load_delta(m);
        add_scaled_chunk(delta, coefficients(m), per_entry, n, sum);
      } else {
        add_delta_chunk(model, dtype, base, coefficients(m), per_entry, n, sum);
      }
    }
    void* out = static_cast<char*>(b.out) + entry * dtype_size(b.out_dtype);
    if (!store_plain_chunk(has_base ? base : nullptr, b.base_coefficient, sum,
                           2.0 * kCancelled * size, n, b.out_dtype, out)) {
      double sizes[kChunk] = {};
      for (int m = 0; m < in.count; ++m) {
        load_delta(m);
        add_sizes_chunk(delta, coefficients(m), per_entry, n, sizes);
      }
      for (int i = 0; i < n; ++i) {
        const double product = b.base_coefficient * base[i];  // 0 without a base
        sum[i] = without_noise(sum[i], sizes[i] + fabs(product), product);
      }
      store_any_chunk(sum, n, b.out_dtype, out, nonfinite, overflow);
    }
    entry += n;
  }
}

}  // namespace mergecore::cpu
