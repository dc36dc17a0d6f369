// Which blends of bf16 are tried in float32, with which bounds (see quick_bounds.h), and the
// float64 blend of the entries that are not decided.
#include "quick.h"

#include <algorithm>
#include <cmath>

#include "../quick_bounds.h"

namespace mergecore::cpu {

namespace {

// sums[i] += times * |scale * from[i]|. Whether all these are tame.
MERGECORE_CLONES
bool add_sizes(const double* from, double scale, double times, int64_t n, double* sums) {
  int64_t wild = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double c = from[i] * scale;
    sums[i] += times * fabs(c);
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

QuickBlend::QuickBlend(const Blend& blend) : blend_(blend), of_rows_(blend.axis == Axis::rows) {
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
  const bool based = in.base.data != nullptr;
  const int64_t first = of_rows_ ? in.window.first_row : 0;
  const int64_t number = of_rows_                       ? in.window.rows
                         : blend_.axis == Axis::columns ? in.window.columns
                                                        : 1;
  of_base_ = based ? blend_.base_coefficient : 0.0;
  if (!is_tame(of_base_)) return false;
  std::vector<double> sums(static_cast<size_t>(number), fabs(of_base_));  // S
  int most_steps = steps(of_base_);
  for (int m = 0; m < in.count; ++m) {
    const double* from = blend_.coefficients + m * blend_.stride + first;
    const double scale = scale_of(in, m);
    if (!add_sizes(from, scale, based ? 2.0 : 1.0, number, sums.data())) return false;
    for (int64_t i = 0; i < number && most_steps <= kMostSteps; ++i) {
      most_steps = std::max(most_steps, steps(from[i]) + steps(scale));
    }
  }
  double least_sum, greatest_sum;
  find_range(sums.data(), number, &least_sum, &greatest_sum);
  least_sum = std::max(least_sum, kSmallestQuick);
  greatest_sum = std::max(greatest_sum, kSmallestQuick);
  const double bound = relative_bound(in.count);
  const int binades = exact_binades(most_steps, greatest_sum);
  exact_ = binades >= kFewBinades;
  spread_ = static_cast<uint16_t>(binades << 7);
  least_ = static_cast<uint16_t>(cut_bits(kLeastError / (bound * least_sum)) + 1);
  greatest_ = cut_bits(kGreatestQuick / std::max(greatest_sum, 1.0));

  bounds_ = std::move(sums);
  for (double& sum : bounds_) sum = std::max(sum, kSmallestQuick) * bound;
  const bool of_columns = blend_.axis == Axis::columns;
  const int64_t block = (in.count + 1) * kQuick;
  stride_ = of_columns ? block : 0;
  coefficients_.resize(static_cast<size_t>(of_columns ? number / kQuick * block : block));
  if (!of_columns) {
    fill(0);
    return true;
  }
  float* to = coefficients_.data();
  for (int m = 0; m < in.count; ++m, to += kQuick) {
    const double* from = blend_.coefficients + m * blend_.stride;
    put_coefficients(from, scale_of(in, m), number, block, to);
  }
  put_coefficients(bounds_.data(), 1.0, number, block, to);
  return true;
}

// Makes the coefficients those of a row, or of the tensor.
void QuickBlend::fill(int64_t row) {
  const Inputs& in = blend_.inputs;
  const int64_t place = of_rows_ ? in.window.first_row + row : 0;
  row_ = row;
  float* to = coefficients_.data();
  for (int m = 0; m < in.count; ++m, to += kQuick) {
    const double c = blend_.coefficients[m * blend_.stride + place] * scale_of(in, m);
    std::fill_n(to, kQuick, static_cast<float>(c));
  }
  std::fill_n(to, kQuick, static_cast<float>(bounds_[static_cast<size_t>(row)]));
}

bool QuickBlend::store(int64_t entry, int64_t row, int64_t column, int n) {
  const Inputs& in = blend_.inputs;
  const Window& w = in.window;
  if (of_rows_ && row != row_) fill(row);
  QuickRun run;
  run.count = in.count;
  run.base = in.base.data == nullptr ? nullptr : static_cast<const uint16_t*>(in.base.data) + entry;
  uint16_t greatest = 0;
  for (int m = 0; m < in.count; ++m) {
    run.models[m] = static_cast<const uint16_t*>(in.models[m].data) + entry;
    if (in.drops == nullptr || in.drops[m].threshold == 0) continue;
    alignas(64) uint32_t numbers[kChunk];
    const int64_t index = w.first_entry + w.first_row * w.columns + entry;
    numbers_chunk(in.drops[m].key, static_cast<uint64_t>(index), n, numbers);
    prefetch(run.models[m] + 2 * kChunk, 2 * n);
    uint16_t* kept = dropped_.data() + m * kChunk;
    const auto last = static_cast<uint32_t>(in.drops[m].threshold - 1);
    greatest = std::max(greatest, drop_run(run.base, run.models[m], numbers, last, n, kept));
    run.models[m] = kept;
  }
  if (greatest > greatest_) return false;
  run.coefficients = coefficients_.data() + column / kQuick * stride_;
  run.stride = stride_;
  run.of_base = static_cast<float>(of_base_);
  run.exact = exact_;
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
    const uint16_t* from = m < 0 ? run.base : run.models[m];
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
