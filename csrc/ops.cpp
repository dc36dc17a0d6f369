// Schemas, argument checks and device dispatch of the kernels, once, on the LibTorch stable ABI.
//
// Every op writes into tensors that the caller made (and reuses), so no op allocates but for
// scratch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
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

namespace {

void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("mergecore: " + message);
}

Dtype dtype_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      throw std::runtime_error(std::string("mergecore: ") + what +
                               " must be float32, float16 or bfloat16");
  }
}

void check_device(const Tensor& tensor, const Tensor& like, const char* what) {
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
        std::string(what) + " must be on the same device as the others");
}

double* float64(const Tensor& tensor, const Tensor& like, int64_t least, const char* what) {
  check_device(tensor, like, what);
  check(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() &&
            tensor.numel() >= least,
        std::string(what) + " must be contiguous float64 with at least " + std::to_string(least) +
            " numbers");
  return static_cast<double*>(tensor.data_ptr());
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
    const int64_t dropping = static_cast<int64_t>(keys.size());
    check((dropping == 0 || dropping == count) && thresholds.size() == keys.size() &&
              scales.size() == keys.size(),
          "drop keys, thresholds and scales must be empty or one per model");
    check(dropping == 0 || base.has_value(), "dropping deltas needs a base");
    for (int64_t i = 0; i < dropping; ++i) {
      check(thresholds[i] >= 0 && thresholds[i] <= (int64_t{1} << 32),
            "drop thresholds must be 0 to 2^32");
      drops.push_back(
          {static_cast<uint64_t>(keys[i]), static_cast<uint64_t>(thresholds[i]), scales[i]});
    }
    check(first_row >= 0 && first_entry >= 0, "window positions must not be negative");
    inputs = Inputs{{shape.size(0), shape.size(1), first_row, first_entry},
                    base_matrix,
                    models.data(),
                    drops.empty() ? nullptr : drops.data(),
                    static_cast<int>(count)};
  }

  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

 private:
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

double* moments_of(const Tensor& tensor, const Tensors& models, const char* what) {
  check(tensor.dim() == 2 && tensor.size(0) == moment_count(static_cast<int>(models.size())) &&
            tensor.size(1) == models[0].size(1),
        std::string(what) + " must be (1 + 3 * models, columns)");
  return float64(tensor, models[0], 0, what);
}

double* gram_of(const Tensor& tensor, const Tensors& models, int64_t columns, const char* what) {
  check(tensor.dim() == 2 && tensor.size(0) == gram_count(static_cast<int>(models.size())) &&
            tensor.size(1) == columns,
        std::string(what) + " must be ((models + 1) * (models + 2) / 2, columns)");
  return float64(tensor, models[0], 0, what);
}

double* flat_gram_of(const Tensor& sums, const Tensors& models, const Window& w) {
  check(w.first_row * w.columns % kGramBlock == 0,
        "windows of a whole tensor's Gram matrix must start at a multiple of " +
            std::to_string(kGramBlock) + " entries");
  return gram_of(sums, models, 1, "sums");
}

double* row_gram_of(const Tensor& sums, const Tensors& models, const Window& w) {
  check(sums.dim() == 2 && sums.size(1) >= w.first_row + w.rows,
        "sums must have as many columns as the tensor has rows");
  return gram_of(sums, models, sums.size(1), "sums");
}

// Work is split over threads in whole cache lines of the narrowest dtype.
constexpr int64_t kGrainEntries = 1 << 15;
constexpr int64_t kLine = 32;

template <class F>
void parallel_lines(int64_t count, int64_t grain, const F& f) {
  const int64_t lines = (count + kLine - 1) / kLine;
  torch::stable::parallel_for(
      0, lines, std::max<int64_t>(1, grain / kLine),
      [&](int64_t begin, int64_t end) { f(begin * kLine, std::min(end * kLine, count)); });
}

}  // namespace

void column_moments_cpu(std::optional<Tensor> base, Tensors models, Tensor sums, Tensor pending,
                        int64_t first_row, int64_t first_entry, Integers keys, Integers thresholds,
                        Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  double* total = moments_of(sums, models, "sums");
  double* tile = moments_of(pending, models, "pending");
  parallel_lines(
      w.columns, kGrainEntries / std::max<int64_t>(1, w.rows),
      [&](int64_t begin, int64_t end) { cpu::column_moments(a.inputs, total, tile, begin, end); });
}

void row_moments_cpu(std::optional<Tensor> base, Tensors models, Tensor sums, int64_t first_row,
                     int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  check(sums.dim() == 2 && sums.size(0) == moment_count(a.inputs.count) &&
            sums.size(1) >= first_row + w.rows,
        "sums must be (1 + 3 * models, rows of the tensor)");
  double* out = float64(sums, models[0], 0, "sums");
  torch::stable::parallel_for(0, w.rows, kGrainEntries / std::max<int64_t>(1, w.columns) + 1,
                              [&](int64_t begin, int64_t end) {
                                cpu::row_moments(a.inputs, out, sums.size(1), begin, end);
                              });
}

void gram_cpu(Tensor sums, std::optional<Tensor> base, Tensors models, int64_t first_row,
              int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  double* total = flat_gram_of(sums, models, w);
  const int64_t pairs = gram_count(a.inputs.count);
  const int64_t blocks = (w.rows * w.columns + kGramBlock - 1) / kGramBlock;
  std::vector<double> partial(static_cast<size_t>(blocks * pairs));
  torch::stable::parallel_for(
      0, blocks, kGrainEntries / kGramBlock, [&](int64_t begin, int64_t end) {
        cpu::run_grams(a.inputs, kGramBlock, partial.data(), 1, pairs, begin, end);
      });
  for (int64_t i = 0; i < blocks * pairs; ++i) total[i % pairs] += partial[static_cast<size_t>(i)];
}

void row_gram_cpu(Tensor sums, std::optional<Tensor> base, Tensors models, int64_t first_row,
                  int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  double* out = row_gram_of(sums, models, w) + w.first_row;
  torch::stable::parallel_for(0, w.rows, kGrainEntries / std::max<int64_t>(1, w.columns) + 1,
                              [&](int64_t begin, int64_t end) {
                                cpu::run_grams(a.inputs, w.columns, out, sums.size(1), 1, begin,
                                               end);
                              });
}

void column_gram_cpu(Tensor sums, Tensor pending, std::optional<Tensor> base, Tensors models,
                     int64_t first_row, int64_t first_entry, Integers keys, Integers thresholds,
                     Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  double* total = gram_of(sums, models, w.columns, "sums");
  double* tile = gram_of(pending, models, w.columns, "pending");
  parallel_lines(
      w.columns, kGrainEntries / std::max<int64_t>(1, w.rows),
      [&](int64_t begin, int64_t end) { cpu::column_gram(a.inputs, total, tile, begin, end); });
}

void blend_cpu(Tensor out, std::optional<Tensor> base, Tensors models, Tensor coefficients,
               double base_coefficient, int64_t axis, int64_t first_row, int64_t first_entry,
               Integers keys, Integers thresholds, Reals scales, Tensor counts) {
  BlendArguments a(out, base, models, coefficients, base_coefficient, axis, first_row, first_entry,
                   keys, thresholds, scales, counts);
  const Window& w = a.inputs.window;
  std::atomic<int64_t> nonfinite{0}, overflow{0};
  parallel_lines(w.rows * w.columns, kGrainEntries, [&](int64_t begin, int64_t end) {
    int64_t bad = 0, large = 0;
    cpu::blend(a.blend, begin, end, bad, large);
    nonfinite += bad;
    overflow += large;
  });
  auto* totals = static_cast<int64_t*>(counts.data_ptr());
  totals[0] += nonfinite;
  totals[1] += overflow;
}

namespace {

struct Ranking {
  const double* values;
  double* ranks;
  int models;
  int64_t count;

  Ranking(const Tensor& in, const Tensor& out) {
    check(in.dim() == 2 && out.dim() == 2 && in.size(0) == out.size(0) && in.size(1) == out.size(1),
          "values and ranks must be (models, n)");
    check(in.size(1) < (int64_t{1} << 31), "at most 2^31 - 1 values can be ranked");
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

}  // namespace

void rank_cpu(Tensor values, Tensor ranks, bool average) {
  Ranking a(values, ranks);
  torch::stable::parallel_for(0, a.models, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      cpu::rank(a.values + m * a.count, a.ranks + m * a.count, a.count, average);
    }
  });
}

void calibrated_softmax_cpu(Tensor scores, Tensor thresholds, double divisor, double s,
                            Tensor out) {
  Softmax a(scores, thresholds, divisor, out);
  torch::stable::parallel_for(0, a.count, 4096, [&](int64_t begin, int64_t end) {
    cpu::calibrated_softmax(a.scores, a.thresholds, divisor, s, a.out, a.models, a.count, begin,
                            end);
  });
}

#ifdef MERGECORE_CUDA

namespace {

// The GPU that a tensor lies on, made current while this lives, and torch's current stream there.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Stream stream = nullptr;

  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
};

void succeed(int error, const char* what) {
  check(error == 0, std::string(what) + " failed on the GPU: " + cuda::error_string(error));
}

// Scratch comes from torch's caching allocator, in stream order.
Tensor scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace

void column_moments_cuda(std::optional<Tensor> base, Tensors models, Tensor sums, Tensor pending,
                         int64_t first_row, int64_t first_entry, Integers keys, Integers thresholds,
                         Reals scales) {
  const OnDevice on(sums);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  double* total = moments_of(sums, models, "sums");
  double* tile = moments_of(pending, models, "pending");
  Tensor space = scratch(sums, cuda::column_moments_scratch(a.inputs));
  succeed(cuda::column_moments(a.inputs, total, tile, space.data_ptr(), on.stream),
          "column_moments");
}

void row_moments_cuda(std::optional<Tensor> base, Tensors models, Tensor sums, int64_t first_row,
                      int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  const OnDevice on(sums);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  check(sums.dim() == 2 && sums.size(0) == moment_count(a.inputs.count) &&
            sums.size(1) >= first_row + a.inputs.window.rows,
        "sums must be (1 + 3 * models, rows of the tensor)");
  succeed(cuda::row_moments(a.inputs, float64(sums, models[0], 0, "sums"), sums.size(1), on.stream),
          "row_moments");
}

void gram_cuda(Tensor sums, std::optional<Tensor> base, Tensors models, int64_t first_row,
               int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  const OnDevice on(sums);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  double* total = flat_gram_of(sums, models, a.inputs.window);
  Tensor space = scratch(sums, cuda::gram_scratch(a.inputs));
  succeed(cuda::gram(a.inputs, total, space.data_ptr(), on.stream), "gram");
}

void row_gram_cuda(Tensor sums, std::optional<Tensor> base, Tensors models, int64_t first_row,
                   int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  const OnDevice on(sums);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  double* out = row_gram_of(sums, models, a.inputs.window);
  succeed(cuda::row_gram(a.inputs, out, sums.size(1), on.stream), "row_gram");
}

void column_gram_cuda(Tensor sums, Tensor pending, std::optional<Tensor> base, Tensors models,
                      int64_t first_row, int64_t first_entry, Integers keys, Integers thresholds,
                      Reals scales) {
  const OnDevice on(sums);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  double* total = gram_of(sums, models, a.inputs.window.columns, "sums");
  double* tile = gram_of(pending, models, a.inputs.window.columns, "pending");
  Tensor space = scratch(sums, cuda::column_gram_scratch(a.inputs));
  succeed(cuda::column_gram(a.inputs, total, tile, space.data_ptr(), on.stream), "column_gram");
}

void blend_cuda(Tensor out, std::optional<Tensor> base, Tensors models, Tensor coefficients,
                double base_coefficient, int64_t axis, int64_t first_row, int64_t first_entry,
                Integers keys, Integers thresholds, Reals scales, Tensor counts) {
  const OnDevice on(out);
  BlendArguments a(out, base, models, coefficients, base_coefficient, axis, first_row, first_entry,
                   keys, thresholds, scales, counts);
  succeed(cuda::blend(a.blend, static_cast<int64_t*>(counts.data_ptr()), on.stream), "blend");
}

void rank_cuda(Tensor values, Tensor ranks, bool average) {
  const OnDevice on(values);
  Ranking a(values, ranks);
  Tensor space = scratch(values, cuda::rank_scratch(a.models, a.count));
  succeed(cuda::rank(a.values, a.ranks, a.models, a.count, average, space.data_ptr(), on.stream),
          "rank");
}

void calibrated_softmax_cuda(Tensor scores, Tensor thresholds, double divisor, double s,
                             Tensor out) {
  const OnDevice on(scores);
  Softmax a(scores, thresholds, divisor, out);
  succeed(cuda::calibrated_softmax(a.scores, a.thresholds, divisor, s, a.out, a.models, a.count,
                                   on.stream),
          "calibrated_softmax");
}

#endif  // MERGECORE_CUDA

}  // namespace mergecore

STABLE_TORCH_LIBRARY(mergecore, m) {
  m.def(
      "column_moments(Tensor? base, Tensor[] models, Tensor(a!) sums, Tensor(b!) pending, "
      "int first_row, int first_entry, int[] drop_keys, int[] drop_thresholds, "
      "float[] drop_scales) -> ()");
  m.def(
      "row_moments(Tensor? base, Tensor[] models, Tensor(a!) sums, int first_row, "
      "int first_entry, int[] drop_keys, int[] drop_thresholds, float[] drop_scales) -> ()");
  m.def(
      "gram(Tensor(a!) sums, Tensor? base, Tensor[] models, int first_row, int first_entry, "
      "int[] drop_keys, int[] drop_thresholds, float[] drop_scales) -> ()");
  m.def(
      "row_gram(Tensor(a!) sums, Tensor? base, Tensor[] models, int first_row, int first_entry, "
      "int[] drop_keys, int[] drop_thresholds, float[] drop_scales) -> ()");
  m.def(
      "column_gram(Tensor(a!) sums, Tensor(b!) pending, Tensor? base, Tensor[] models, "
      "int first_row, int first_entry, int[] drop_keys, int[] drop_thresholds, "
      "float[] drop_scales) -> ()");
  m.def(
      "blend(Tensor(a!) out, Tensor? base, Tensor[] models, Tensor coefficients, "
      "float base_coefficient, int axis, int first_row, int first_entry, int[] drop_keys, "
      "int[] drop_thresholds, float[] drop_scales, Tensor(b!) counts) -> ()");
  m.def("rank(Tensor values, Tensor(a!) ranks, bool average) -> ()");
  m.def(
      "calibrated_softmax(Tensor scores, Tensor thresholds, float divisor, float s, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mergecore, CPU, m) {
  m.impl("column_moments", TORCH_BOX(&mergecore::column_moments_cpu));
  m.impl("row_moments", TORCH_BOX(&mergecore::row_moments_cpu));
  m.impl("gram", TORCH_BOX(&mergecore::gram_cpu));
  m.impl("row_gram", TORCH_BOX(&mergecore::row_gram_cpu));
  m.impl("column_gram", TORCH_BOX(&mergecore::column_gram_cpu));
  m.impl("blend", TORCH_BOX(&mergecore::blend_cpu));
  m.impl("rank", TORCH_BOX(&mergecore::rank_cpu));
  m.impl("calibrated_softmax", TORCH_BOX(&mergecore::calibrated_softmax_cpu));
}

#ifdef MERGECORE_CUDA
STABLE_TORCH_LIBRARY_IMPL(mergecore, CUDA, m) {
  m.impl("column_moments", TORCH_BOX(&mergecore::column_moments_cuda));
  m.impl("row_moments", TORCH_BOX(&mergecore::row_moments_cuda));
  m.impl("gram", TORCH_BOX(&mergecore::gram_cuda));
  m.impl("row_gram", TORCH_BOX(&mergecore::row_gram_cuda));
  m.impl("column_gram", TORCH_BOX(&mergecore::column_gram_cuda));
  m.impl("blend", TORCH_BOX(&mergecore::blend_cuda));
  m.impl("rank", TORCH_BOX(&mergecore::rank_cuda));
  m.impl("calibrated_softmax", TORCH_BOX(&mergecore::calibrated_softmax_cuda));
}
#endif
