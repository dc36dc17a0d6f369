// Which blends of bf16 are tried in float32, with which bounds (see quick_bounds.h), and the
// float64 blend of the entries that are not decided.
#include "quick.h"

#include <algorithm>
#include <cmath>

#include "../quick_bounds.h"

namespace mergecore::cpu {

namespace {

// With c = scale * from[i]: sums[i] += |c|, rest[i] -= c. Whether all these are tame.
MERGECORE_CLONES
bool take_away(const double* from, double scale, int64_t n, double* sums, double* rest) {
  int64_t wild = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double c = from[i] * scale;
    sums[i] += fabs(c);
    rest[i] -= c;
    wild |= is_tame(c) ? 0 : 1;
  }
  return wild == 0;
}

// Whole blocks of scale * from as they lie in QuickRun.
MERGECORE_CLONES
void put_coefficients(const double* from, double scale, int64_t n, int64_t stride, float* to) {
  for (; n >= kQuick; n -= kQuick, from += kQuick, to += stride) {
    for (int i = 0; i < kQuick / 2; ++i) {
      to[i] = static_cast<float>(from[2 * i] * scale);
      to[kQuick / 2 + i] = static_cast<float>(from[2 * i + 1] * scale);
    }
  }
}

MERGECORE_CLONES
void find_range(const double* values, int64_t n, double* least, double* greatest) {
  double low = HUGE_VAL, high = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  *least = low;
  *greatest = high;
}

// The scale of kept deltas of a model.
double scale_of(const Inputs& in, int model) {
  return in.drops != nullptr && drops_any(in.drops[model]) ? in.drops[model].scale : 1.0;
}

}  // namespace

QuickBlend::QuickBlend(const Blend& blend)
    : blend_(blend), of_rows_(blend.axis == Axis::rows), based_(blend.inputs.base.data != nullptr) {
  const Inputs& in = blend.inputs;
  const auto is_bf16 = [](const Matrix& matrix) { return matrix.dtype == Dtype::bf16; };
  if (blend.out_dtype != Dtype::bf16 || in.count == 0) return;
  if (in.base.data != nullptr && !is_bf16(in.base)) return;
  if (!std::all_of(in.models, in.models + in.count, is_bf16)) return;
  if (in.drops != nullptr && std::any_of(in.drops, in.drops + in.count, selects)) return;
  applies_ = take_coefficients();
  if (!applies_) return;
  dropped_.resize(in.drops == nullptr ? 0 : static_cast<size_t>(in.count) * kChunk);
  numbers_.resize(static_cast<size_t>(in.count + 1) * kChunk);
  gathered_coefficients_.resize(static_cast<size_t>(in.count) * kChunk);
  places_.resize(kChunk);
}

// False where float32 is not for them.
bool QuickBlend::take_coefficients() {
  const Inputs& in = blend_.inputs;
  const int64_t first = of_rows_ ? in.window.first_row : 0;
  const int64_t number = of_rows_                       ? in.window.rows
                         : blend_.axis == Axis::columns ? in.window.columns
                                                        : 1;
  const double of_base = based_ ? blend_.base_coefficient : 0.0;
  if (!is_tame(of_base)) return false;
  std::vector<double> sums(static_cast<size_t>(number));  // S
  base_coefficients_.assign(static_cast<size_t>(number), of_base);
  int most_steps = steps(of_base);
  for (int m = 0; m < in.count; ++m) {
    const double* from = blend_.coefficients + m * blend_.stride + first;
    const double scale = scale_of(in, m);
    if (!take_away(from, scale, number, sums.data(), base_coefficients_.data())) return false;
    for (int64_t i = 0; i < number && most_steps <= kMostSteps; ++i) {
      most_steps = std::max(most_steps, steps(from[i]) + steps(scale));
    }
  }
  if (based_) {
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += fabs(base_coefficients_[i]);
  }
  double least_sum, greatest_sum;
  find_range(sums.data(), number, &least_sum, &greatest_sum);
  least_sum = std::max(least_sum, kSmallestQuick);
  greatest_sum = std::max(greatest_sum, kSmallestQuick);
  const double bound = relative_bound(based_ + in.count);
  const int binades = exact_binades(most_steps, greatest_sum);
  exact_ = binades >= kFewBinades;
  spread_ = static_cast<uint16_t>(binades << 7);
  least_ = static_cast<uint16_t>(cut_bits(kLeastError / (bound * least_sum)) + 1);
  greatest_ = cut_bits(kGreatestQuick / std::max(greatest_sum, 1.0));

  errors_ = std::move(sums);
  for (double& sum : errors_) sum = std::max(sum, kSmallestQuick) * bound;
  if (!exact_ && blend_.axis == Axis::tensor) take_fractions(greatest_sum);
  const int64_t inputs = based_ + in.count;
  if (blend_.axis != Axis::columns) {
    coefficients_.resize(static_cast<size_t>(inputs));
    bounds_.resize(1);
    fill(0);
    return true;
  }
  const int64_t blocks = number / kQuick, stride = inputs * kQuick;
  coefficients_.resize(static_cast<size_t>(blocks * stride));
  float* to = coefficients_.data();
  if (based_) {
    put_coefficients(base_coefficients_.data(), 1.0, number, stride, to);
    to += kQuick;
  }
  for (int m = 0; m < in.count; ++m, to += kQuick) {
    const double* from = blend_.coefficients + m * blend_.stride;
    put_coefficients(from, scale_of(in, m), number, stride, to);
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const auto first = errors_.begin() + i * kQuick;
    bounds_.push_back(static_cast<float>(*std::max_element(first, first + kQuick)));
  }
  return true;
}

// Looks for what all coefficients are fractions of.
void QuickBlend::take_fractions(double sum) {
  const Inputs& in = blend_.inputs;
  const double of_base = based_ ? blend_.base_coefficient : 0.0;
  const int ties = tie_binades(in.count, sum);
  for (int divisor = 3; ties >= 0 && divisor <= kGreatestDivisor; ++divisor) {
    if (!is_whole(divisor * of_base)) continue;
    double wholes = based_ ? fabs(rint(divisor * base_coefficients_[0])) : 0.0;
    bool whole = true;
    for (int m = 0; m < in.count && whole; ++m) {
      const double c = divisor * blend_.coefficients[m * blend_.stride] * scale_of(in, m);
      whole = is_whole(c);
      wholes += fabs(rint(c));
    }
    if (!whole) continue;
    const int binades = exact_binades(0, wholes);
    if (binades < kFewBinades) return;
    exact_ = true;
    divisor_ = divisor;
    tie_ = static_cast<uint16_t>(ties << 7);
    spread_ = static_cast<uint16_t>(binades << 7);
    greatest_ = cut_bits(kGreatestQuick / wholes);
    return;
  }
}

// Makes the coefficients those of a row, or of the tensor.
void QuickBlend::fill(int64_t row) {
  const Inputs& in = blend_.inputs;
  const int64_t place = of_rows_ ? in.window.first_row + row : 0;
  row_ = row;
  const auto coefficient = [&](double c) {
    return static_cast<float>(divisor_ == 1 ? c : rint(divisor_ * c));
  };
  float* to = coefficients_.data();
  if (based_) *to++ = coefficient(base_coefficients_[static_cast<size_t>(row)]);
  for (int m = 0; m < in.count; ++m) {
    *to++ = coefficient(blend_.coefficients[m * blend_.stride + place] * scale_of(in, m));
  }
  bounds_[0] = static_cast<float>(errors_[static_cast<size_t>(row)]);
}

bool QuickBlend::store(int64_t entry, int64_t row, int64_t column, int n) {
  const Inputs& in = blend_.inputs;
  const Window& w = in.window;
  if (of_rows_ && row != row_) fill(row);
  QuickRun run;
  run.count = based_ + in.count;
  run.based = based_;
  const auto* base = static_cast<const uint16_t*>(in.base.data) + (based_ ? entry : 0);
  const uint16_t** models = run.inputs + based_;
  if (based_) run.inputs[0] = base;
  uint16_t greatest = 0;
  for (int m = 0; m < in.count; ++m) {
    models[m] = static_cast<const uint16_t*>(in.models[m].data) + entry;
    if (in.drops == nullptr || in.drops[m].threshold == 0) continue;
    alignas(64) uint32_t numbers[kChunk];
    const int64_t index = w.first_entry + w.first_row * w.columns + entry;
    numbers_chunk(in.drops[m].key, static_cast<uint64_t>(index), n, numbers);
    prefetch(models[m] + 2 * kChunk, 2 * n);
    uint16_t* kept = dropped_.data() + m * kChunk;
    const auto last = static_cast<uint32_t>(in.drops[m].threshold - 1);
    greatest = std::max(greatest, drop_run(base, models[m], numbers, last, n, kept));
    models[m] = kept;
  }
  if (greatest > greatest_) return false;
  run.of_columns = blend_.axis == Axis::columns;
  const int64_t block = run.of_columns ? column / kQuick : 0;
  run.coefficients = coefficients_.data() + block * run.count * kQuick;
  run.bounds = bounds_.data() + block;
  run.sign = based_ && std::signbit(blend_.base_coefficient) ? 0x8000u : 0;
  run.exact = exact_;
  run.divisor = static_cast<float>(divisor_);
  run.tie = tie_;
  run.spread = spread_;
  run.least = least_;
  run.greatest = greatest_;
  run.out = static_cast<uint16_t*>(blend_.out) + entry;
  alignas(64) uint16_t undecided[kChunk];
  const Stored stored = store_run(run, n, undecided);
  if (stored != Stored::most) return stored == Stored::all;
  uint16_t places[kChunk];
  const int count = find_set(undecided, n, places);
  if (count > n / 2) return false;
  gather(run, entry, row, column, places, count);
  return true;
}

// Entries of a run that wait for the float64 blend.
void QuickBlend::gather(const QuickRun& run, int64_t entry, int64_t row, int64_t column,
                        const uint16_t* places, int count) {
  const Inputs& in = blend_.inputs;
  if (waiting_ + count > kChunk) finish();
  for (int m = -1; m < in.count; ++m) {
    const uint16_t* from = m + based_ < 0 ? nullptr : run.inputs[m + based_];
    uint16_t* to = numbers_.data() + (m + 1) * kChunk + waiting_;
    for (int i = 0; i < count && from != nullptr; ++i) to[i] = from[places[i]];
  }
  for (int m = 0; m < in.count && blend_.axis != Axis::tensor; ++m) {
    const double* from = blend_.coefficients + m * blend_.stride;
    double* to = gathered_coefficients_.data() + m * kChunk + waiting_;
    for (int i = 0; i < count; ++i) {
      to[i] = from[of_rows_ ? in.window.first_row + row : column + places[i]];
    }
  }
  int64_t* to = places_.data() + waiting_;
  for (int i = 0; i < count; ++i) to[i] = entry + places[i];
  waiting_ += count;
}

void QuickBlend::finish() {
  if (waiting_ == 0) return;
  const Inputs& in = blend_.inputs;
  Matrix models[kMaxModels];
  Drop scales[kMaxModels];  // what is dropped was taken out already
  for (int m = 0; m < in.count; ++m) {
    models[m] = {numbers_.data() + (m + 1) * kChunk, Dtype::bf16};
    // A limit that no delta reaches: what drops nothing at all would not be scaled.
    scales[m] = {0, 0, scale_of(in, m)};
    scales[m].most = F64::largest;
  }
  const Matrix base = {in.base.data == nullptr ? nullptr : numbers_.data(), Dtype::bf16};
  const Drop* drops = in.drops == nullptr ? nullptr : scales;
  const bool same = blend_.axis == Axis::tensor;
  uint16_t results[kChunk];
  const Blend gathered = {{{1, waiting_, 0, 0}, base, models, drops, in.count},
                          same ? Axis::tensor : Axis::columns,
                          same ? blend_.coefficients : gathered_coefficients_.data(),
                          same ? blend_.stride : kChunk,
                          blend_.base_coefficient,
                          results,
                          Dtype::bf16};
  int64_t nonfinite = 0, overflow = 0;  // stay so: the numbers are not that large
  blend_chunk(gathered, 0, 0, 0, waiting_, nonfinite, overflow);
  for (int i = 0; i < waiting_; ++i) {
    static_cast<uint16_t*>(blend_.out)[places_[static_cast<size_t>(i)]] = results[i];
  }
  waiting_ = 0;
}

}  // namespace mergecore::cpu
