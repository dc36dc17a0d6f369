// The blend of bf16 in float32 where that gives the float64 blend's bits, which it does for nearly
// all entries; the thread that meets another one computes it in float64. The proof, and the names,
// are in quick_bounds.h.
//
// An entry's error is at most e = bound * X, and 0 where its numbers are few binades from each
// other and its coefficients have few bits. What w - e and w + e round to alike is the result.
#include "../quick_bounds.h"
#include "blend.cuh"

namespace mergecore::cuda {

namespace {

constexpr int kWords = kEntries / 2;
constexpr uint32_t kSigns = 0x80008000u;
constexpr float kGreatestError = 0x1p98f;  // then S X is below kGreatestQuick

// Numbers of a tensor, or of its rows or columns.
struct Quick {
  float* coefficients;  // [count + 2][stride]: the base's, the models', then bounds
  uint16_t* spreads;    // between an entry's least and largest number, at most, to be exact
  int64_t stride;
};

int64_t quick_count(const DeviceBlend& b) {
  return b.axis == Axis::columns ? b.columns : b.axis == Axis::rows ? b.in.window.rows : 1;
}

// As prepare() leaves them; all begin on 16 bytes.
Quick quick_of(const DeviceBlend& b, void* scratch) {
  Quick q;
  q.stride = divide_up(quick_count(b), kEntries) * kEntries;
  q.coefficients = static_cast<float*>(scratch);
  q.spreads = reinterpret_cast<uint16_t*>(q.coefficients + (b.in.count + 2) * q.stride);
  return q;
}

__device__ __forceinline__ double scale_of(const Drop& drop) {
  return mergecore::drops_any(drop) ? drop.scale : 1.0;
}

__global__ void __launch_bounds__(kThreads)
    prepare(const __grid_constant__ DeviceBlend b, const Quick q, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const bool based = b.in.base.data != nullptr;
  const double of_base = based ? b.base_coefficient : 0.0;
  const int64_t place = b.axis == Axis::rows ? b.in.window.first_row + i : i;
  double sum = 0.0, rest = of_base;  // S and b'
  bool tame = is_tame(of_base);
  int most_steps = steps(of_base);
  for (int m = 0; m < b.in.count; ++m) {
    const double scale = scale_of(b.in.drops[m]), from = b.coefficients[m * b.stride + place];
    const double c = from * scale;
    tame = tame && is_tame(c);
    sum += fabs(c);
    rest -= c;
    const int k = steps(from) + steps(scale);
    most_steps = k > most_steps ? k : most_steps;
    q.coefficients[(m + 1) * q.stride + i] = static_cast<float>(c);
  }
  q.coefficients[i] = static_cast<float>(based ? rest : 0.0);
  if (based) sum += fabs(rest);
  sum = sum > kSmallestQuick ? sum : kSmallestQuick;
  // Where the bound is infinite, nothing is decided.
  q.coefficients[(b.in.count + 1) * q.stride + i] =
      tame ? static_cast<float>(relative_bound(b.in.count + 1) * sum)
           : static_cast<float>(HUGE_VAL);
  q.spreads[i] = static_cast<uint16_t>(tame ? exact_binades(most_steps, sum) << 7 : 0);
}

__device__ __forceinline__ float number(const uint32_t (&words)[kWords], int j) {
  const uint32_t word = words[j / 2];
  return bit_cast<float>(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

// What is at a run's entries: of a column each, or the same for all.
template <bool kColumns>
__device__ __forceinline__ void load_floats(const float* from, int64_t place,
                                            float (&to)[kEntries]) {
  if constexpr (kColumns) {
#pragma unroll
    for (int i = 0; i < kEntries / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(from + place)[i];
      to[4 * i] = four.x;
      to[4 * i + 1] = four.y;
      to[4 * i + 2] = four.z;
      to[4 * i + 3] = four.w;
    }
  } else {
    const float same = from[place];
#pragma unroll
    for (int j = 0; j < kEntries; ++j) to[j] = same;
  }
}

// Of two neighbours in a word each: the largest magnitude, and the least one less 1, beside which
// zeros do not count (0x7fff).
struct Sizes {
  uint32_t largest[kWords] = {};
  uint32_t least[kWords];  // with the sign bit, as a signed number

  __device__ __forceinline__ Sizes() {
#pragma unroll
    for (uint32_t& word : least) word = ~kSigns;
  }
  __device__ __forceinline__ void add(const uint32_t (&words)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      largest[i] = __vmaxu2(largest[i], words[i] & ~kSigns);
      least[i] = __vmins2(least[i], (words[i] | kSigns) - 0x00010001u);
    }
  }
  // Not 0 in the half of an entry whose numbers are farther from each other than `spread`.
  __device__ __forceinline__ uint32_t beyond(uint32_t spread, int i) const {
    const uint32_t limit = __vminu2(least[i] ^ kSigns, ~kSigns) + spread;
    return __vmaxu2(largest[i], limit) ^ limit;
  }
};

__device__ __forceinline__ uint32_t upper_halves(uint32_t first, uint32_t second) {
  return (second & 0xffff0000u) | first >> 16;
}

__device__ __forceinline__ double entry_of(const Matrix& matrix, int64_t entry) {
  return BF16::load(static_cast<const uint16_t*>(matrix.data)[entry]);
}

// One entry in float64, as blend.cu has it.
template <bool kDrops>
__device__ __forceinline__ uint16_t blend_entry(const DeviceBlend& b, int64_t row, int64_t column,
                                                unsigned& nonfinite, unsigned& overflow) {
  const DeviceInputs& in = b.in;
  const int64_t entry = row * b.columns + column, index = index_of(b, row, column);
  const int64_t place = b.axis == Axis::columns ? column
                        : b.axis == Axis::rows  ? in.window.first_row + row
                                                : 0;
  const bool based = in.base.data != nullptr;
  const double base = based ? entry_of(in.base, entry) : 0.0;
  double sum = -0.0;
#pragma unroll 1
  for (int m = 0; m < in.count; ++m) {
    double delta = entry_of(in.models[m], entry) - base;
    if (kDrops && mergecore::drops_any(in.drops[m])) {
      uint32_t numbers[4];
      philox(in.drops[m].key, static_cast<uint64_t>(index) >> 2, numbers);
      const auto lane = static_cast<unsigned>(index & 3);
      const uint32_t even = lane == 0 ? numbers[0] : numbers[2];
      const uint32_t odd = lane == 1 ? numbers[1] : numbers[3];
      delta = keep(in.drops[m], lane % 2 == 0 ? even : odd, delta, index) * delta;
    }
    sum = fma(b.coefficients[m * b.stride + place], delta, sum);
  }
  if (based) sum = with_base(b.base_coefficient, base, sum);
  const double result = round_to<BF16>(sum);
  if (!(fabs(sum) < HUGE_VAL)) {
    ++nonfinite;
  } else if (fabs(result) > BF16::largest) {
    ++overflow;
  }
  return BF16::store(static_cast<float>(result));
}

// sum[j] += c[j] * a model's entry, or the base's where that is dropped.
template <bool kDrops>
__device__ __forceinline__ void add_model(const Drop& drop, int64_t index,
                                          const uint32_t (&model)[kWords],
                                          const uint32_t (&base)[kWords],
                                          const float (&c)[kEntries], float (&sum)[kEntries]) {
  uint32_t numbers[kEntries] = {};
  const bool drops = kDrops && mergecore::drops_any(drop);
  if (drops) random_numbers(drop, static_cast<uint64_t>(index), numbers);
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const bool kept = !drops || numbers[j] >= drop.threshold;
    sum[j] = fma(c[j], kept ? number(model, j) : number(base, j), sum[j]);
  }
}

// Eight entries of a row from `column` on.
template <bool kColumns, bool kDrops>
__device__ __forceinline__ void blend_entries(const DeviceBlend& b, const Quick& q, int64_t row,
                                              int64_t column, unsigned& nonfinite,
                                              unsigned& overflow) {
  const DeviceInputs& in = b.in;
  const int64_t entry = row * b.columns + column;
  const int64_t place = kColumns ? column : b.axis == Axis::rows ? row : 0;
  const bool based = in.base.data != nullptr;
  const Entries<BF16> base = load_base<BF16, true>(in, entry, kEntries);
  constexpr int kCount = kTogether<BF16, kDrops>;
  Entries<BF16> models[kCount];
  load_models<BF16, true>(in, 0, entry, kEntries, models);
  Sizes sizes;
  sizes.add(base.words);
  float sum[kEntries], c[kEntries];
#pragma unroll
  for (float& each : sum) each = -0.0f;  // the neutral element, as in blend.cu
  if (based) {
    load_floats<kColumns>(q.coefficients, place, c);
#pragma unroll
    for (int j = 0; j < kEntries; ++j) sum[j] = c[j] * number(base.words, j);
  }
  for (int first = 0;;) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int m = first + i;
      if (m >= in.count) continue;
      load_floats<kColumns>(q.coefficients + (m + 1) * q.stride, place, c);
      sizes.add(models[i].words);
      add_model<kDrops>(in.drops[m], index_of(b, row, column), models[i].words, base.words, c, sum);
    }
    first += kCount;
    if (first >= in.count) break;
    load_models<BF16, true>(in, first, entry, kEntries, models);
  }
  const float* bounds = q.coefficients + (in.count + 1) * q.stride + place;
  uint32_t spreads[kWords];
  if constexpr (kColumns) {
    load_bits<uint16_t, true>(q.spreads, place, kEntries, spreads);
  } else {
#pragma unroll
    for (uint32_t& word : spreads) word = q.spreads[place] * 0x00010001u;
  }
  const float sign = copysign(1.0, b.base_coefficient) < 0.0 ? -1.0f : 1.0f;
  bool in_range = true;
  uint32_t results[kWords], differ[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t beyond = sizes.beyond(spreads[i], i);
    uint32_t low[2], high[2];
    const float2 bound =
        kColumns ? reinterpret_cast<const float2*>(bounds)[i] : make_float2(bounds[0], bounds[0]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = 2 * i + half;
      const float largest = number(sizes.largest, j),
                  most = (half == 0 ? bound.x : bound.y) * largest;
      in_range = in_range && most <= kGreatestError;  // not where something is NaN
      const bool zeros = largest == 0.0f;
      if (based && zeros) sum[j] = sign * number(base.words, j);  // b a
      const bool near = (half == 0 ? beyond & 0xffffu : beyond >> 16) == 0;
      const bool exact = zeros || (near && sum[j] != 0.0f);
      const float error = exact ? 0.0f : fmaxf(most, static_cast<float>(kLeastError));
      // To nearest even in the upper half, as it is right where both are equal; where they are not,
      // either way of rounding ties will do.
      const uint32_t tie = 0x7fffu + (bit_cast<uint32_t>(sum[j]) >> 16 & 1);
      low[half] = bit_cast<uint32_t>(sum[j] - error) + tie;
      high[half] = bit_cast<uint32_t>(sum[j] + error) + tie;
    }
    results[i] = upper_halves(high[0], high[1]);
    differ[i] = upper_halves(low[0], low[1]) ^ results[i];
  }
  auto* out = static_cast<uint16_t*>(b.out) + entry;
  *reinterpret_cast<uint4*>(out) = make_uint4(results[0], results[1], results[2], results[3]);
  if (in_range && (differ[0] | differ[1] | differ[2] | differ[3]) == 0) return;
  unsigned undecided = in_range ? 0u : 0xffu;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    undecided |= ((differ[i] & 0xffffu) != 0 ? 1u : 0u) << (2 * i);
    undecided |= (differ[i] >> 16 != 0 ? 2u : 0u) << (2 * i);
  }
#pragma unroll 1
  for (; undecided != 0; undecided &= undecided - 1) {
    const int j = __ffs(static_cast<int>(undecided)) - 1;
    out[j] = blend_entry<kDrops>(b, row, column + j, nonfinite, overflow);
  }
}

template <bool kColumns, bool kDrops>
__global__ void __launch_bounds__(kThreads, kDrops ? 6 : 8)
    quick_window(const __grid_constant__ DeviceBlend b, const Quick q, int64_t* counts) {
  unsigned nonfinite = 0, overflow = 0;
  for_runs<true>(b, [&](int64_t row, int64_t column, int) {
    blend_entries<kColumns, kDrops>(b, q, row, column, nonfinite, overflow);
  });
  add_count(nonfinite, counts);
  add_count(overflow, counts + 1);
}

}  // namespace

int64_t quick_scratch(const DeviceBlend& b) {
  const DeviceInputs& in = b.in;
  if (!b.vectors || b.out_dtype != Dtype::bf16) return 0;
  if (in.base.data != nullptr && in.base.dtype != Dtype::bf16) return 0;
  for (int m = 0; m < in.count; ++m) {
    if (in.models[m].dtype != Dtype::bf16 || selects(in.drops[m])) return 0;
  }
  return quick_of(b, nullptr).stride * (in.count * 4 + 8 + static_cast<int64_t>(sizeof(uint16_t)));
}

int quick_blend(const DeviceBlend& b, void* scratch, int64_t* counts, Stream stream) {
  const Quick q = quick_of(b, scratch);
  const int64_t count = quick_count(b);
  const int error = launch(&prepare, divide_up(count, kThreads), kThreads, stream, b, q, count);
  if (error != cudaSuccess) return error;
  const bool columns = b.axis == Axis::columns;
  auto* plain = columns ? &quick_window<true, false> : &quick_window<false, false>;
  auto* drops = columns ? &quick_window<true, true> : &quick_window<false, true>;
  return launch(drops_any(b.in) ? drops : plain, b.blocks, kThreads, stream, b, q, counts);
}

}  // namespace mergecore::cuda
