// The checked arguments of the kernels, on the LibTorch stable ABI: shared by ops.cpp (CPU) and
// cuda_ops.cpp.
//
// Every op writes into tensors that the caller made (and reuses), so no op allocates but for
// scratch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace mergecore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Reals = std::vector<double>;

inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("mergecore: " + message);
}

inline Dtype dtype_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      throw std::runtime_error(std::string("mergecore: ") + what +
                               " must be float32, float16, bfloat16 or float64");
  }
}

inline Dtype result_dtype_of(const Tensor& out) {
  const Dtype dtype = dtype_of(out, "out");
  check(dtype != Dtype::f64, "out must be float32, float16 or bfloat16");
  return dtype;
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* what) {
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
        std::string(what) + " must be on the same device as the others");
}

inline double* float64(const Tensor& tensor, const Tensor& like, int64_t least, const char* what) {
  check_device(tensor, like, what);
  check(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() &&
            tensor.numel() >= least,
        std::string(what) + " must be contiguous float64 with at least " + std::to_string(least) +
            " numbers");
  return static_cast<double*>(tensor.data_ptr());
}

// Per model: a key; one threshold, or (threshold, least_before, most_before); one scale, or (scale,
// least, most). The limits choose by magnitude and may be left out.
inline std::vector<Drop> drops_of(const Integers& keys, const Integers& thresholds,
                                  const Reals& scales, int64_t count) {
  const int64_t dropping = static_cast<int64_t>(keys.size());
  const int64_t integers = static_cast<int64_t>(thresholds.size());
  const int64_t each = integers == 3 * dropping ? 3 : 1;
  check((dropping == 0 || dropping == count) && integers == each * dropping &&
            scales.size() == thresholds.size(),
        "drop keys, thresholds and scales must be empty or one per model");
  std::vector<Drop> drops;
  for (int64_t i = 0; i < dropping; ++i) {
    const int64_t* whole = thresholds.data() + each * i;
    const double* real = scales.data() + each * i;
    check(whole[0] >= 0 && whole[0] <= (int64_t{1} << 32), "drop thresholds must be 0 to 2^32");
    Drop drop{static_cast<uint64_t>(keys[i]), static_cast<uint64_t>(whole[0]), real[0]};
    if (each == 3) {
      drop.least = real[1];
      drop.least_before = whole[1];
      drop.most = real[2];
      drop.most_before = whole[2];
    }
    drops.push_back(drop);
  }
  return drops;
}

// The checked arguments that every streaming kernel shares.
struct Arguments {
  std::vector<Matrix> models;
  std::vector<Drop> drops;
  Inputs inputs;

  Arguments(const std::optional<Tensor>& base, const Tensors& tensors, int64_t first_row,
            int64_t first_entry, const Integers& keys, const Integers& thresholds,
            const Reals& scales) {
    const int64_t count = static_cast<int64_t>(tensors.size());
    check(count >= 1 && count <= kMaxModels,
          "the number of models must be 1 to " + std::to_string(kMaxModels));
    const Tensor& shape = tensors[0];
    check(shape.dim() == 2, "windows must have two dimensions");
    for (const Tensor& model : tensors) models.push_back(matrix(model, shape, "a model's window"));
    Matrix base_matrix{nullptr, Dtype::f32};
    if (base.has_value()) base_matrix = matrix(*base, shape, "the base's window");
    drops = drops_of(keys, thresholds, scales, count);
    check(drops.empty() || base.has_value(), "dropping deltas needs a base");
    check(first_row >= 0 && first_entry >= 0, "window positions must not be negative");
    inputs = Inputs{{shape.size(0), shape.size(1), first_row, first_entry},
                    base_matrix,
                    models.data(),
                    drops.empty() ? nullptr : drops.data(),
                    static_cast<int>(count)};
  }

  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

 protected:
  static Matrix matrix(const Tensor& tensor, const Tensor& shape, const char* what) {
    check(tensor.dim() == 2 && tensor.size(0) == shape.size(0) && tensor.size(1) == shape.size(1) &&
              tensor.is_contiguous(),
          std::string(what) + " must be contiguous and of the same shape as the others");
    check_device(tensor, shape, what);
    return {tensor.data_ptr(), dtype_of(tensor, what)};
  }
};

struct BlendArguments : Arguments {
  Blend blend;

  BlendArguments(const Tensor& out, const std::optional<Tensor>& base, const Tensors& models,
                 const Tensor& coefficients, double base_coefficient, int64_t axis,
                 int64_t first_row, int64_t first_entry, const Integers& keys,
                 const Integers& thresholds, const Reals& scales, const Tensor& counts)
      : Arguments(base, models, first_row, first_entry, keys, thresholds, scales) {
    const Window& w = inputs.window;
    check_device(out, models[0], "out");
    check_device(counts, models[0], "counts");
    check(
        out.dim() == 2 && out.size(0) == w.rows && out.size(1) == w.columns && out.is_contiguous(),
        "out must be contiguous and of the windows' shape");
    check(axis >= 0 && axis <= 2, "axis must be 0 (tensor), 1 (columns) or 2 (rows)");
    check(coefficients.dim() == 2 && coefficients.size(0) == inputs.count,
          "coefficients must be (models, n)");
    const int64_t least = axis == 0 ? 1 : axis == 1 ? w.columns : first_row + w.rows;
    check(coefficients.size(1) >= least, "there are fewer coefficients than columns or rows");
    check(counts.scalar_type() == ScalarType::Long && counts.numel() == 2 && counts.is_contiguous(),
          "counts must be two int64");
    blend = Blend{inputs,
                  static_cast<Axis>(axis),
                  float64(coefficients, models[0], 0, "coefficients"),
                  coefficients.size(1),
                  base_coefficient,
                  out.data_ptr(),
                  dtype_of(out, "out")};
  }
};

struct GradientArguments : Arguments {
  Matrix gradient;

  GradientArguments(const Tensor& outer, const std::optional<Tensor>& base, const Tensors& models,
                    int64_t first_row)
      : Arguments(base, models, first_row, 0, {}, {}, {}),
        gradient(matrix(outer, models[0], "the gradient")) {}
};

inline int64_t* int64(const Tensor& tensor, const Tensor& like, int64_t count, const char* what) {
  check_device(tensor, like, what);
  check(
      tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous() && tensor.numel() == count,
      std::string(what) + " must be " + std::to_string(count) + " contiguous int64");
  return static_cast<int64_t*>(tensor.data_ptr());
}

struct KeptArguments : Arguments {
  std::vector<Drop> keeps;
  Kept kept;

  KeptArguments(const std::optional<Tensor>& base, const Tensors& models, int64_t first_row,
                int64_t first_entry, const Integers& keys, const Integers& thresholds,
                const Reals& scales, int64_t measure, const std::optional<Tensor>& measure_scales)
      : Arguments(base, models, first_row, first_entry, keys, thresholds, scales) {
    check(measure >= 0 && measure <= 3,
          "measure must be 0 (own), 1 (spread), 2 (rows) or 3 (competition)");
    kept = Kept{inputs, static_cast<Measure>(measure), nullptr, 0, nullptr, nullptr, false};
    const bool scaled = measure >= 2;
    check(measure_scales.has_value() == scaled, "measures of rows and competition need scales");
    if (!scaled) return;
    const Window& w = inputs.window;
    const int64_t least = kept.measure == Measure::rows ? first_row_of(w) + w.rows : 2;
    check(measure_scales->dim() == 2 && measure_scales->size(0) == inputs.count &&
              measure_scales->size(1) >= least,
          "scales must be (models, rows of the tensor), or (models, 2)");
    kept.scales = float64(*measure_scales, models[0], 0, "scales");
    kept.stride = measure_scales->size(1);
  }

  void choose(const Integers& keys, const Integers& thresholds, const Reals& scales,
              const std::optional<Tensor>& odds, bool divide_by_odds) {
    keeps = drops_of(keys, thresholds, scales, inputs.count);
    kept.keeps = keeps.empty() ? nullptr : keeps.data();
    if (!odds.has_value()) return;
    check(kept.keeps != nullptr, "odds need keeps, whose keys they use");
    check(odds->numel() == inputs.count * entries(), "odds must be (models, entries)");
    kept.odds = float64(*odds, *odds, 0, "odds");
    kept.divide_by_odds = divide_by_odds;
  }

  int64_t entries() const { return inputs.window.rows * inputs.window.columns; }
  int64_t sets() const { return kept.measure == Measure::spread ? 1 : inputs.count; }
};

inline double* moments_of(const Tensor& tensor, const Tensors& models, const char* what) {
  check(tensor.dim() == 2 && tensor.size(0) == moment_count(static_cast<int>(models.size())) &&
            tensor.size(1) == models[0].size(1),
        std::string(what) + " must be (1 + 3 * models, columns)");
  return float64(tensor, models[0], 0, what);
}

inline double* gradients_of(const Tensor& tensor, const Tensors& models, const char* what) {
  check(tensor.dim() == 2 && tensor.size(0) == static_cast<int64_t>(models.size()) &&
            tensor.size(1) == models[0].size(1),
        std::string(what) + " must be (models, columns)");
  return float64(tensor, models[0], 0, what);
}

inline double* row_gradients_of(const Tensor& sums, const Tensors& models, const Window& w) {
  check(sums.dim() == 2 && sums.size(0) == static_cast<int64_t>(models.size()) &&
            sums.size(1) >= w.first_row + w.rows,
        "sums must be (models, rows of the tensor)");
  return float64(sums, models[0], 0, "sums");
}

inline double* gram_of(const Tensor& tensor, const Tensors& models, int64_t columns,
                       const char* what) {
  check(tensor.dim() == 2 && tensor.size(0) == gram_count(static_cast<int>(models.size())) &&
            tensor.size(1) == columns,
        std::string(what) + " must be ((models + 1) * (models + 2) / 2, columns)");
  return float64(tensor, models[0], 0, what);
}

inline double* flat_gram_of(const Tensor& sums, const Tensors& models, const Window& w) {
  check(w.first_row * w.columns % kGramBlock == 0,
        "windows of a whole tensor's Gram matrix must start at a multiple of " +
            std::to_string(kGramBlock) + " entries");
  return gram_of(sums, models, 1, "sums");
}

inline double* row_gram_of(const Tensor& sums, const Tensors& models, const Window& w) {
  check(sums.dim() == 2 && sums.size(1) >= w.first_row + w.rows,
        "sums must have as many columns as the tensor has rows");
  return gram_of(sums, models, sums.size(1), "sums");
}

struct Ranking {
  const double* values;
  double* ranks;
  int models;
  int64_t count;

  Ranking(const Tensor& in, const Tensor& out) {
    check(in.dim() == 2 && out.dim() == 2 && in.size(0) == out.size(0) && in.size(1) == out.size(1),
          "values and ranks must be (models, n)");
    check(in.numel() < (int64_t{1} << 31), "at most 2^31 - 1 values can be ranked");
    values = float64(in, in, 0, "values");
    ranks = float64(out, in, 0, "ranks");
    models = static_cast<int>(in.size(0));
    count = in.size(1);
  }
};

struct Softmax {
  const double* scores;
  const double* thresholds;
  double* out;
  int models;
  int64_t count;

  Softmax(const Tensor& in, const Tensor& limits, double divisor, const Tensor& result) {
    check(in.dim() == 2 && result.dim() == 2 && in.size(0) == result.size(0) &&
              in.size(1) == result.size(1),
          "scores and out must be (models, n)");
    check(divisor > 0, "the divisor must be positive");
    scores = float64(in, in, 0, "scores");
    thresholds = float64(limits, in, in.size(0), "thresholds");
    out = float64(result, in, 0, "out");
    models = static_cast<int>(in.size(0));
    count = in.size(1);
  }
};

struct CountArguments : KeptArguments {
  int64_t* histogram;
  int64_t bins;

  CountArguments(const std::optional<Tensor>& base, const Tensors& models, const Tensor& counts,
                 int64_t shift, const Integers& offsets, bool clamp, int64_t measure,
                 const std::optional<Tensor>& measure_scales, int64_t first_row,
                 int64_t first_entry, const Integers& keys, const Integers& thresholds,
                 const Reals& scales)
      : KeptArguments(base, models, first_row, first_entry, keys, thresholds, scales, measure,
                      measure_scales) {
    check(shift >= 0 && shift < 63, "shift must be 0 to 62");
    check(static_cast<int64_t>(offsets.size()) == sets(), "there must be one offset per histogram");
    check(counts.dim() == 2 && counts.size(0) == sets() && counts.size(1) > (clamp ? 3 : 0),
          "histogram must be (models, bins), or (1, bins) of the spread; at least 4 bins to clamp");
    bins = counts.size(1);
    histogram = int64(counts, models[0], sets() * bins, "histogram");
  }
};

struct BracketArguments : Arguments {
  int64_t* histogram;
  int32_t* ends;
  int64_t bins;

  BracketArguments(const std::optional<Tensor>& base, const Tensors& models, const Tensor& counts,
                   const Tensor& at_ends, int64_t shift, const Integers& offsets, int64_t part,
                   int64_t first_row, int64_t first_entry, const Integers& keys,
                   const Integers& thresholds, const Reals& scales)
      : Arguments(base, models, first_row, first_entry, keys, thresholds, scales) {
    check(shift >= 0 && shift < 63, "shift must be 0 to 62");
    check(static_cast<int64_t>(offsets.size()) == inputs.count,
          "there must be one offset per model");
    check(counts.dim() == 2 && counts.size(0) == inputs.count && counts.size(1) >= 5,
          "histogram must be (models, bins), of at least 5 bins");
    check(part >= 1 && part < (int64_t{1} << 31), "part must be 1 to 2^31 - 1");
    bins = counts.size(1);
    histogram = int64(counts, models[0], inputs.count * bins, "histogram");
    const int64_t parts = (entries() + part - 1) / part;
    check_device(at_ends, models[0], "ends");
    check(at_ends.scalar_type() == ScalarType::Int && at_ends.is_contiguous() &&
              at_ends.numel() == inputs.count * parts * bins,
          "ends must be contiguous int32 (models, parts, bins)");
    ends = static_cast<int32_t*>(at_ends.data_ptr());
  }

  int64_t entries() const { return inputs.window.rows * inputs.window.columns; }
};

struct CollectArguments : KeptArguments {
  std::vector<KeyRange> ranges;
  int64_t* keys;
  int64_t* indices;
  int64_t capacity;
  int64_t* found;
  int64_t* equal;

  CollectArguments(const std::optional<Tensor>& base, const Tensors& models, const Integers& which,
                   const Integers& lows, const Integers& highs, const Tensor& keys_out,
                   const Tensor& indices_out, const Tensor& found_out, const Tensor& equal_out,
                   int64_t block, int64_t measure, const std::optional<Tensor>& measure_scales,
                   int64_t first_row, int64_t first_entry, const Integers& drop_keys,
                   const Integers& thresholds, const Reals& scales)
      : KeptArguments(base, models, first_row, first_entry, drop_keys, thresholds, scales, measure,
                      measure_scales) {
    const int64_t count = static_cast<int64_t>(which.size());
    check(count >= 1 && count <= kMaxRanges && lows.size() == which.size() &&
              highs.size() == which.size(),
          "there must be one low and one high per range");
    for (int64_t r = 0; r < count; ++r) {
      check(which[r] >= 0 && which[r] < sets(), "a range names no model");
      ranges.push_back({static_cast<int32_t>(which[r]), lows[r], highs[r]});
    }
    check(block >= 1, "block must be positive");
    check(keys_out.dim() == 2 && keys_out.size(0) == count, "keys must be (ranges, capacity)");
    capacity = keys_out.size(1);
    keys = int64(keys_out, models[0], count * capacity, "keys");
    indices = int64(indices_out, models[0], count * capacity, "indices");
    found = int64(found_out, models[0], count, "found");
    equal = int64(equal_out, models[0], count * ((entries() + block - 1) / block), "equal");
  }
};

inline double* block_sums(const KeptArguments& a, const Tensor& sums, int64_t block) {
  check(block >= 1, "block must be positive");
  const int64_t blocks = (a.entries() + block - 1) / block;
  check(sums.numel() == 3 * a.inputs.count * blocks, "sums must be (models, 3, blocks)");
  return float64(sums, sums, 0, "sums");
}

inline int64_t* shared_counts(const Arguments& a, const Tensors& models, const Reals& limits,
                              const Tensor& counts) {
  check(static_cast<int>(limits.size()) == a.inputs.count, "there must be one limit per model");
  return int64(counts, models[0], 2 * a.inputs.count, "counts");
}

inline double* row_scales(const Arguments& a, const Tensors& models, const Tensor& out) {
  const Window& w = a.inputs.window;
  check(a.inputs.base.data != nullptr, "divergences need a base");
  check(w.columns == 0 || w.first_entry % w.columns == 0, "windows must start with a row");
  check(out.dim() == 2 && out.size(0) == a.inputs.count && out.size(1) >= first_row_of(w) + w.rows,
        "out must be (models, rows of the tensor)");
  return float64(out, models[0], 0, "out");
}

inline double* magnitudes_of(const Tensor& out, const Tensors& models) {
  check(out.numel() == models[0].numel() * static_cast<int64_t>(models.size()),
        "out must be (models, entries)");
  return float64(out, models[0], 0, "out");
}

inline void check_ranking(const Arguments& a, const Reals& lowest, const Reals& steps) {
  const int64_t count = a.inputs.count;
  check(static_cast<int64_t>(lowest.size()) == count && lowest.size() == steps.size(),
        "there must be one lowest probability and one step per model");
  // Twice a rank has 32 bits.
  check(a.inputs.window.columns < (int64_t{1} << 30), "rows must have less than 2^30 entries");
}

// Where all rows of a window are ranked at once: indices have 32 bits.
inline void check_ranked_together(const Arguments& a) {
  const Window& w = a.inputs.window;
  check(a.inputs.count * w.rows * w.columns < (int64_t{1} << 31),
        "at most 2^31 - 1 values can be ranked");
}

struct ElectArguments : KeptArguments {
  Election election;

  ElectArguments(const Tensor& out, const std::optional<Tensor>& base, const Tensors& models,
                 const Reals& weights, const Reals& limits, double scale, int64_t elect,
                 int64_t consensus, bool normalize, int64_t measure,
                 const std::optional<Tensor>& measure_scales, int64_t first_row,
                 int64_t first_entry, const Integers& keys, const Integers& thresholds,
                 const Reals& scales, const Integers& keep_keys, const Integers& keep_thresholds,
                 const Reals& keep_scales, const Reals& lowest, const Reals& steps,
                 bool divide_by_odds, const Tensor& counts)
      : KeptArguments(base, models, first_row, first_entry, keys, thresholds, scales, measure,
                      measure_scales) {
    choose(keep_keys, keep_thresholds, keep_scales, std::nullopt, false);
    kept.divide_by_odds = divide_by_odds;
    if (!lowest.empty()) {
      check_ranking(*this, lowest, steps);
      check(kept.keeps != nullptr, "odds need keeps, whose keys they use");
    }
    check(base.has_value(), "choosing among deltas needs a base");
    check_device(out, models[0], "out");
    check(out.dim() == 2 && out.numel() == entries() && out.size(0) == inputs.window.rows &&
              out.is_contiguous(),
          "out must be contiguous and of the windows' shape");
    check(elect >= 0 && elect <= 6, "elect must be 0 to 6");
    check(static_cast<int64_t>(weights.size()) == inputs.count,
          "there must be one weight per model");
    const auto how = static_cast<Elect>(elect);
    const bool limited = how == Elect::shared || how == Elect::limited || consensus > 0;
    check(static_cast<int64_t>(limits.size()) == (limited ? inputs.count : 0),
          "there must be one limit per model, if limits are used");
    int64(counts, models[0], 2, "counts");
    election = Election{kept,
                        how,
                        normalize,
                        scale,
                        weights.data(),
                        limits.empty() ? nullptr : limits.data(),
                        static_cast<int>(consensus),
                        out.data_ptr(),
                        result_dtype_of(out)};
  }
};

}  // namespace mergecore
