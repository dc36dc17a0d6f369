// The kernels' CUDA implementations as torch ops.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace mergecore {

namespace {

// The GPU that a tensor lies on, made current while this lives, and torch's current stream there.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Stream stream = nullptr;

  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    // The header's macro for this check has another name in every torch.
    check(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
          "torch has no current stream on the GPU");
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

void column_gradient_cuda(Tensor gradient, std::optional<Tensor> base, Tensors models, Tensor sums,
                          Tensor pending, int64_t first_row) {
  const OnDevice on(sums);
  GradientArguments a(gradient, base, models, first_row);
  double* total = gradients_of(sums, models, "sums");
  double* tile = gradients_of(pending, models, "pending");
  Tensor space = scratch(sums, cuda::column_gradient_scratch(a.inputs));
  succeed(cuda::column_gradient(a.inputs, a.gradient, total, tile, space.data_ptr(), on.stream),
          "column_gradient");
}

void row_gradient_cuda(Tensor gradient, std::optional<Tensor> base, Tensors models, Tensor sums,
                       int64_t first_row) {
  const OnDevice on(sums);
  GradientArguments a(gradient, base, models, first_row);
  double* out = row_gradients_of(sums, models, a.inputs.window);
  succeed(cuda::row_gradient(a.inputs, a.gradient, out, sums.size(1), on.stream), "row_gradient");
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
  Tensor space = scratch(out, cuda::blend_scratch(a.blend));
  succeed(
      cuda::blend(a.blend, static_cast<int64_t*>(counts.data_ptr()), space.data_ptr(), on.stream),
      "blend");
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

void count_magnitudes_cuda(std::optional<Tensor> base, Tensors models, Tensor histogram,
                           int64_t shift, Integers offsets, bool clamp, int64_t measure,
                           std::optional<Tensor> measure_scales, int64_t first_row,
                           int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  const OnDevice on(histogram);
  CountArguments a(base, models, histogram, shift, offsets, clamp, measure, measure_scales,
                   first_row, first_entry, keys, thresholds, scales);
  succeed(cuda::count_magnitudes(a.kept, static_cast<int>(shift), offsets.data(), clamp, a.bins,
                                 a.histogram, on.stream),
          "count_magnitudes");
}

void collect_magnitudes_cuda(std::optional<Tensor> base, Tensors models, Integers which,
                             Integers lows, Integers highs, Tensor keys_out, Tensor indices,
                             Tensor found, Tensor equal, int64_t block, int64_t measure,
                             std::optional<Tensor> measure_scales, int64_t first_row,
                             int64_t first_entry, Integers keys, Integers thresholds,
                             Reals scales) {
  const OnDevice on(found);
  CollectArguments a(base, models, which, lows, highs, keys_out, indices, found, equal, block,
                     measure, measure_scales, first_row, first_entry, keys, thresholds, scales);
  succeed(
      cuda::collect_magnitudes(a.kept, a.ranges.data(), static_cast<int>(a.ranges.size()), a.keys,
                               a.indices, a.capacity, a.found, a.equal, block, on.stream),
      "collect_magnitudes");
}

void kept_sums_cuda(std::optional<Tensor> base, Tensors models, Tensor sums, int64_t block,
                    int64_t measure, std::optional<Tensor> measure_scales, int64_t first_row,
                    int64_t first_entry, Integers keys, Integers thresholds, Reals scales,
                    Integers keep_keys, Integers keep_thresholds, Reals keep_scales,
                    std::optional<Tensor> odds) {
  const OnDevice on(sums);
  KeptArguments a(base, models, first_row, first_entry, keys, thresholds, scales, measure,
                  measure_scales);
  a.choose(keep_keys, keep_thresholds, keep_scales, odds, false);
  succeed(cuda::kept_sums(a.kept, block_sums(a, sums, block), block, on.stream), "kept_sums");
}

void row_odds_cuda(std::optional<Tensor> base, Tensors models, Reals lowest, Reals steps,
                   Tensor odds, int64_t first_row, int64_t first_entry, Integers keys,
                   Integers thresholds, Reals scales) {
  const OnDevice on(odds);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  check_ranking(a, lowest, steps);
  check_ranked_together(a);
  double* out = magnitudes_of(odds, models);
  Tensor space = scratch(odds, cuda::row_odds_scratch(a.inputs));
  succeed(cuda::row_odds(a.inputs, lowest.data(), steps.data(), out, space.data_ptr(), on.stream),
          "row_odds");
}

void magnitudes_cuda(std::optional<Tensor> base, Tensors models, Tensor out, int64_t first_row,
                     int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  const OnDevice on(out);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  succeed(cuda::magnitudes(a.inputs, magnitudes_of(out, models), on.stream), "magnitudes");
}

void keep_deltas_cuda(std::optional<Tensor> base, Tensors models, Tensor out, int64_t measure,
                      std::optional<Tensor> measure_scales, int64_t first_row, int64_t first_entry,
                      Integers keys, Integers thresholds, Reals scales, Integers keep_keys,
                      Integers keep_thresholds, Reals keep_scales, std::optional<Tensor> odds,
                      bool divide_by_odds) {
  const OnDevice on(out);
  KeptArguments a(base, models, first_row, first_entry, keys, thresholds, scales, measure,
                  measure_scales);
  a.choose(keep_keys, keep_thresholds, keep_scales, odds, divide_by_odds);
  succeed(cuda::keep_deltas(a.kept, magnitudes_of(out, models), on.stream), "keep_deltas");
}

void count_shared_cuda(std::optional<Tensor> base, Tensors models, Reals limits, Tensor counts,
                       int64_t first_row, int64_t first_entry, Integers keys, Integers thresholds,
                       Reals scales) {
  const OnDevice on(counts);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  succeed(cuda::count_shared(a.inputs, limits.data(), shared_counts(a, models, limits, counts),
                             on.stream),
          "count_shared");
}

void row_divergences_cuda(std::optional<Tensor> base, Tensors models, Tensor out, int64_t first_row,
                          int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  const OnDevice on(out);
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  succeed(cuda::row_divergences(a.inputs, row_scales(a, models, out), out.size(1), on.stream),
          "row_divergences");
}

void elect_cuda(Tensor out, std::optional<Tensor> base, Tensors models, Reals weights, Reals limits,
                double scale, int64_t elect, int64_t consensus, bool normalize, int64_t measure,
                std::optional<Tensor> measure_scales, int64_t first_row, int64_t first_entry,
                Integers keys, Integers thresholds, Reals scales, Integers keep_keys,
                Integers keep_thresholds, Reals keep_scales, Reals lowest, Reals steps,
                bool divide_by_odds, Tensor counts) {
  const OnDevice on(out);
  ElectArguments a(out, base, models, weights, limits, scale, elect, consensus, normalize, measure,
                   measure_scales, first_row, first_entry, keys, thresholds, scales, keep_keys,
                   keep_thresholds, keep_scales, lowest, steps, divide_by_odds, counts);
  std::optional<Tensor> odds;
  if (!lowest.empty()) {
    check_ranked_together(a);
    odds = scratch(out, 8 * a.inputs.count * a.entries());
    auto* values = static_cast<double*>(odds->data_ptr());
    Tensor space = scratch(out, cuda::row_odds_scratch(a.inputs));
    succeed(
        cuda::row_odds(a.inputs, lowest.data(), steps.data(), values, space.data_ptr(), on.stream),
        "row_odds");
    a.election.kept.odds = values;
  }
  succeed(cuda::elect(a.election, static_cast<int64_t*>(counts.data_ptr()), on.stream), "elect");
}

}  // namespace mergecore

STABLE_TORCH_LIBRARY_IMPL(mergecore, CUDA, m) {
  m.impl("column_moments", TORCH_BOX(&mergecore::column_moments_cuda));
  m.impl("row_moments", TORCH_BOX(&mergecore::row_moments_cuda));
  m.impl("column_gradient", TORCH_BOX(&mergecore::column_gradient_cuda));
  m.impl("row_gradient", TORCH_BOX(&mergecore::row_gradient_cuda));
  m.impl("gram", TORCH_BOX(&mergecore::gram_cuda));
  m.impl("row_gram", TORCH_BOX(&mergecore::row_gram_cuda));
  m.impl("column_gram", TORCH_BOX(&mergecore::column_gram_cuda));
  m.impl("blend", TORCH_BOX(&mergecore::blend_cuda));
  m.impl("rank", TORCH_BOX(&mergecore::rank_cuda));
  m.impl("calibrated_softmax", TORCH_BOX(&mergecore::calibrated_softmax_cuda));
  m.impl("count_magnitudes", TORCH_BOX(&mergecore::count_magnitudes_cuda));
  m.impl("collect_magnitudes", TORCH_BOX(&mergecore::collect_magnitudes_cuda));
  m.impl("kept_sums", TORCH_BOX(&mergecore::kept_sums_cuda));
  m.impl("row_odds", TORCH_BOX(&mergecore::row_odds_cuda));
  m.impl("magnitudes", TORCH_BOX(&mergecore::magnitudes_cuda));
  m.impl("keep_deltas", TORCH_BOX(&mergecore::keep_deltas_cuda));
  m.impl("count_shared", TORCH_BOX(&mergecore::count_shared_cuda));
  m.impl("row_divergences", TORCH_BOX(&mergecore::row_divergences_cuda));
  m.impl("elect", TORCH_BOX(&mergecore::elect_cuda));
}
