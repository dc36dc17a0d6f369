// Schemas of the kernels, once, and their CPU implementations.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "arguments.h"
#include "tiles.h"

namespace mergecore {

namespace {

// Work is split over threads in whole cache lines of the narrowest dtype.
constexpr int64_t kGrainEntries = 1 << 15;
constexpr int64_t kLine = 32;

// Parts for each thread: others, which read and write files, take turns on the same cores, and a
// thread that was held up does fewer.
constexpr int64_t kParts = 4;

// Calls f(begin, end) for parts of [0, count), of `grain` at least but for the last.
template <class F>
void parallel_parts(int64_t count, int64_t grain, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t least = threads == 1 ? count : (count - 1) / (threads * kParts) + 1;
  const int64_t part = std::max<int64_t>({1, grain, least});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(
      0, std::min(threads, (count + part - 1) / part), 1, [&](int64_t, int64_t) {
        for (int64_t begin = next.fetch_add(part); begin < count; begin = next.fetch_add(part)) {
          f(begin, std::min(begin + part, count));
        }
      });
}

template <class F>
void parallel_lines(int64_t count, int64_t grain, const F& f) {
  const int64_t lines = (count + kLine - 1) / kLine;
  parallel_parts(lines, grain / kLine, [&](int64_t begin, int64_t end) {
    f(begin * kLine, std::min(end * kLine, count));
  });
}

// Adds a window to column sums; add(tile, to) adds a tile to to[count][tile.columns].
template <class Add>
void add_tiles(const Window& w, int64_t count, double* sums, double* pending, const Add& add) {
  const int64_t threads = torch::stable::get_num_threads();
  TileSums tiles(w, count, sums, pending, threads);
  torch::stable::parallel_for(0, std::min<int64_t>(threads, tiles.parts()), 1,
                              [&](int64_t, int64_t) { tiles.run(add); });
}

}  // namespace

void column_moments_cpu(std::optional<Tensor> base, Tensors models, Tensor sums, Tensor pending,
                        int64_t first_row, int64_t first_entry, Integers keys, Integers thresholds,
                        Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  double* total = moments_of(sums, models, "sums");
  double* rest = moments_of(pending, models, "pending");
  add_tiles(a.inputs.window, moment_count(a.inputs.count), total, rest,
            [&](const Tile& tile, double* to) { cpu::column_moments(a.inputs, tile, to); });
}

void row_moments_cpu(std::optional<Tensor> base, Tensors models, Tensor sums, int64_t first_row,
                     int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  check(sums.dim() == 2 && sums.size(0) == moment_count(a.inputs.count) &&
            sums.size(1) >= first_row + w.rows,
        "sums must be (1 + 3 * models, rows of the tensor)");
  double* out = float64(sums, models[0], 0, "sums");
  parallel_parts(w.rows, kGrainEntries / std::max<int64_t>(1, w.columns) + 1,
                 [&](int64_t begin, int64_t end) {
                   cpu::row_moments(a.inputs, out, sums.size(1), begin, end);
                 });
}

void column_gradient_cpu(Tensor gradient, std::optional<Tensor> base, Tensors models, Tensor sums,
                         Tensor pending, int64_t first_row) {
  GradientArguments a(gradient, base, models, first_row);
  double* total = gradients_of(sums, models, "sums");
  double* rest = gradients_of(pending, models, "pending");
  const auto add = [&](const Tile& tile, double* to) {
    cpu::column_gradient(a.inputs, a.gradient, tile, to);
  };
  add_tiles(a.inputs.window, a.inputs.count, total, rest, add);
}

void row_gradient_cpu(Tensor gradient, std::optional<Tensor> base, Tensors models, Tensor sums,
                      int64_t first_row) {
  GradientArguments a(gradient, base, models, first_row);
  const Window& w = a.inputs.window;
  double* out = row_gradients_of(sums, models, w);
  parallel_parts(w.rows, kGrainEntries / std::max<int64_t>(1, w.columns) + 1,
                 [&](int64_t begin, int64_t end) {
                   cpu::row_gradient(a.inputs, a.gradient, out, sums.size(1), begin, end);
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
  parallel_parts(blocks, kGrainEntries / kGramBlock, [&](int64_t begin, int64_t end) {
    cpu::run_grams(a.inputs, kGramBlock, partial.data(), 1, pairs, begin, end);
  });
  for (int64_t i = 0; i < blocks * pairs; ++i) total[i % pairs] += partial[static_cast<size_t>(i)];
}

void row_gram_cpu(Tensor sums, std::optional<Tensor> base, Tensors models, int64_t first_row,
                  int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  double* out = row_gram_of(sums, models, w) + w.first_row;
  parallel_parts(w.rows, kGrainEntries / std::max<int64_t>(1, w.columns) + 1,
                 [&](int64_t begin, int64_t end) {
                   cpu::run_grams(a.inputs, w.columns, out, sums.size(1), 1, begin, end);
                 });
}

void column_gram_cpu(Tensor sums, Tensor pending, std::optional<Tensor> base, Tensors models,
                     int64_t first_row, int64_t first_entry, Integers keys, Integers thresholds,
                     Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  double* total = gram_of(sums, models, w.columns, "sums");
  double* rest = gram_of(pending, models, w.columns, "pending");
  add_tiles(w, gram_count(a.inputs.count), total, rest,
            [&](const Tile& tile, double* to) { cpu::column_gram(a.inputs, tile, to); });
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

void rank_cpu(Tensor values, Tensor ranks, bool average) {
  Ranking a(values, ranks);
  parallel_parts(a.models, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      cpu::rank(a.values + m * a.count, a.ranks + m * a.count, a.count, average);
    }
  });
}

void calibrated_softmax_cpu(Tensor scores, Tensor thresholds, double divisor, double s,
                            Tensor out) {
  Softmax a(scores, thresholds, divisor, out);
  parallel_parts(a.count, 4096, [&](int64_t begin, int64_t end) {
    cpu::calibrated_softmax(a.scores, a.thresholds, divisor, s, a.out, a.models, a.count, begin,
                            end);
  });
}

void count_magnitudes_cpu(std::optional<Tensor> base, Tensors models, Tensor histogram,
                          int64_t shift, Integers offsets, bool clamp, int64_t measure,
                          std::optional<Tensor> measure_scales, int64_t first_row,
                          int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  CountArguments a(base, models, histogram, shift, offsets, clamp, measure, measure_scales,
                   first_row, first_entry, keys, thresholds, scales);
  // Large parts of many bins: each goes through all of them once.
  parallel_lines(a.entries(), std::max(kGrainEntries, 4 * a.bins), [&](int64_t begin, int64_t end) {
    cpu::count_magnitudes(a.kept, static_cast<int>(shift), offsets.data(), clamp, a.bins,
                          a.histogram, begin, end);
  });
}

void count_bracketed_cpu(std::optional<Tensor> base, Tensors models, Tensor histogram, Tensor ends,
                         int64_t shift, Integers offsets, int64_t part, int64_t first_row,
                         int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  BracketArguments a(base, models, histogram, ends, shift, offsets, part, first_row, first_entry,
                     keys, thresholds, scales);
  parallel_lines(a.entries(), std::max(kGrainEntries, 4 * a.bins), [&](int64_t begin, int64_t end) {
    cpu::count_bracketed(a.inputs, static_cast<int>(shift), offsets.data(), a.bins, a.histogram,
                         a.ends, part, begin, end);
  });
}

void collect_magnitudes_cpu(std::optional<Tensor> base, Tensors models, Integers which,
                            Integers lows, Integers highs, Tensor keys_out, Tensor indices,
                            Tensor found, Tensor equal, int64_t block, int64_t measure,
                            std::optional<Tensor> measure_scales, int64_t first_row,
                            int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  CollectArguments a(base, models, which, lows, highs, keys_out, indices, found, equal, block,
                     measure, measure_scales, first_row, first_entry, keys, thresholds, scales);
  const int64_t blocks = (a.entries() + block - 1) / block;
  parallel_parts(blocks, kGrainEntries / block + 1, [&](int64_t begin, int64_t end) {
    cpu::collect_magnitudes(a.kept, a.ranges.data(), static_cast<int>(a.ranges.size()), a.keys,
                            a.indices, a.capacity, a.found, a.equal, block, begin * block,
                            std::min(end * block, a.entries()));
  });
}

void kept_sums_cpu(std::optional<Tensor> base, Tensors models, Tensor sums, int64_t block,
                   int64_t measure, std::optional<Tensor> measure_scales, int64_t first_row,
                   int64_t first_entry, Integers keys, Integers thresholds, Reals scales,
                   Integers keep_keys, Integers keep_thresholds, Reals keep_scales,
                   std::optional<Tensor> odds) {
  KeptArguments a(base, models, first_row, first_entry, keys, thresholds, scales, measure,
                  measure_scales);
  a.choose(keep_keys, keep_thresholds, keep_scales, odds, false);
  double* out = block_sums(a, sums, block);
  const int64_t blocks = (a.entries() + block - 1) / block;
  parallel_parts(blocks, kGrainEntries / block + 1, [&](int64_t begin, int64_t end) {
    cpu::kept_sums(a.kept, out, block, begin, end);
  });
}

void row_odds_cpu(std::optional<Tensor> base, Tensors models, Reals lowest, Reals steps,
                  Tensor odds, int64_t first_row, int64_t first_entry, Integers keys,
                  Integers thresholds, Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  const Window& w = a.inputs.window;
  check_ranking(a, lowest, steps);
  double* out = magnitudes_of(odds, models);
  parallel_parts(w.rows, kGrainEntries / std::max<int64_t>(1, w.columns) + 1,
                 [&](int64_t begin, int64_t end) {
                   cpu::row_odds(a.inputs, lowest.data(), steps.data(), out, begin, end);
                 });
}

void magnitudes_cpu(std::optional<Tensor> base, Tensors models, Tensor out, int64_t first_row,
                    int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  double* values = magnitudes_of(out, models);
  parallel_lines(models[0].numel(), kGrainEntries, [&](int64_t begin, int64_t end) {
    cpu::magnitudes(a.inputs, values, begin, end);
  });
}

void keep_deltas_cpu(std::optional<Tensor> base, Tensors models, Tensor out, int64_t measure,
                     std::optional<Tensor> measure_scales, int64_t first_row, int64_t first_entry,
                     Integers keys, Integers thresholds, Reals scales, Integers keep_keys,
                     Integers keep_thresholds, Reals keep_scales, std::optional<Tensor> odds,
                     bool divide_by_odds) {
  KeptArguments a(base, models, first_row, first_entry, keys, thresholds, scales, measure,
                  measure_scales);
  a.choose(keep_keys, keep_thresholds, keep_scales, odds, divide_by_odds);
  double* values = magnitudes_of(out, models);
  parallel_lines(a.entries(), kGrainEntries,
                 [&](int64_t begin, int64_t end) { cpu::keep_deltas(a.kept, values, begin, end); });
}

void count_shared_cpu(std::optional<Tensor> base, Tensors models, Reals limits, Tensor counts,
                      int64_t first_row, int64_t first_entry, Integers keys, Integers thresholds,
                      Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  int64_t* totals = shared_counts(a, models, limits, counts);
  parallel_lines(models[0].numel(), kGrainEntries, [&](int64_t begin, int64_t end) {
    cpu::count_shared(a.inputs, limits.data(), totals, begin, end);
  });
}

void row_divergences_cpu(std::optional<Tensor> base, Tensors models, Tensor out, int64_t first_row,
                         int64_t first_entry, Integers keys, Integers thresholds, Reals scales) {
  Arguments a(base, models, first_row, first_entry, keys, thresholds, scales);
  double* values = row_scales(a, models, out);
  parallel_parts(a.inputs.window.rows, 4096 / std::max<int64_t>(1, a.inputs.window.columns) + 1,
                 [&](int64_t begin, int64_t end) {
                   cpu::row_divergences(a.inputs, values, out.size(1), begin, end);
                 });
}

void elect_cpu(Tensor out, std::optional<Tensor> base, Tensors models, Reals weights, Reals limits,
               double scale, int64_t elect, int64_t consensus, bool normalize, int64_t measure,
               std::optional<Tensor> measure_scales, int64_t first_row, int64_t first_entry,
               Integers keys, Integers thresholds, Reals scales, Integers keep_keys,
               Integers keep_thresholds, Reals keep_scales, Reals lowest, Reals steps,
               bool divide_by_odds, Tensor counts) {
  ElectArguments a(out, base, models, weights, limits, scale, elect, consensus, normalize, measure,
                   measure_scales, first_row, first_entry, keys, thresholds, scales, keep_keys,
                   keep_thresholds, keep_scales, lowest, steps, divide_by_odds, counts);
  const Window& w = a.inputs.window;
  std::atomic<int64_t> nonfinite{0}, overflow{0};
  const auto elect_part = [&](int64_t begin, int64_t end) {
    int64_t bad = 0, large = 0;
    if (lowest.empty()) {
      cpu::elect(a.election, begin, end, bad, large);
    } else {
      cpu::elect_by_rank(a.election, lowest.data(), steps.data(), begin, end, bad, large);
    }
    nonfinite += bad;
    overflow += large;
  };
  if (lowest.empty()) {
    parallel_lines(a.entries(), kGrainEntries, elect_part);
  } else {
    parallel_parts(w.rows, kGrainEntries / std::max<int64_t>(1, w.columns) + 1, elect_part);
  }
  auto* totals = static_cast<int64_t*>(counts.data_ptr());
  totals[0] += nonfinite;
  totals[1] += overflow;
}

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
      "column_gradient(Tensor gradient, Tensor? base, Tensor[] models, Tensor(a!) sums, "
      "Tensor(b!) pending, int first_row) -> ()");
  m.def(
      "row_gradient(Tensor gradient, Tensor? base, Tensor[] models, Tensor(a!) sums, "
      "int first_row) -> ()");
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
  m.def(
      "count_magnitudes(Tensor? base, Tensor[] models, Tensor(a!) histogram, int shift, "
      "int[] offsets, bool clamp, int measure, Tensor? measure_scales, int first_row, int "
      "first_entry, int[] drop_keys, "
      "int[] drop_thresholds, float[] drop_scales) -> ()");
  m.def(
      "count_bracketed(Tensor? base, Tensor[] models, Tensor(a!) histogram, Tensor(b!) ends, "
      "int shift, int[] offsets, int part, int first_row, int first_entry, int[] drop_keys, "
      "int[] drop_thresholds, float[] drop_scales) -> ()");
  m.def(
      "collect_magnitudes(Tensor? base, Tensor[] models, int[] which, int[] lows, int[] highs, "
      "Tensor(a!) keys, Tensor(b!) indices, Tensor(c!) found, Tensor(d!) equal, int block, "
      "int measure, Tensor? measure_scales, int first_row, int first_entry, int[] drop_keys, int[] "
      "drop_thresholds, "
      "float[] drop_scales) -> ()");
  m.def(
      "kept_sums(Tensor? base, Tensor[] models, Tensor(a!) sums, int block, int measure, Tensor? "
      "measure_scales, "
      "int first_row, int first_entry, int[] drop_keys, int[] drop_thresholds, "
      "float[] drop_scales, int[] keep_keys, int[] keep_thresholds, float[] keep_scales, "
      "Tensor? odds) -> ()");
  m.def(
      "row_odds(Tensor? base, Tensor[] models, float[] lowest, float[] steps, Tensor(a!) odds, "
      "int first_row, int first_entry, int[] drop_keys, int[] drop_thresholds, "
      "float[] drop_scales) -> ()");
  m.def(
      "magnitudes(Tensor? base, Tensor[] models, Tensor(a!) out, int first_row, int first_entry, "
      "int[] drop_keys, int[] drop_thresholds, float[] drop_scales) -> ()");
  m.def(
      "keep_deltas(Tensor? base, Tensor[] models, Tensor(a!) out, int measure, "
      "Tensor? measure_scales, int first_row, int first_entry, int[] drop_keys, "
      "int[] drop_thresholds, float[] drop_scales, int[] keep_keys, int[] keep_thresholds, "
      "float[] keep_scales, Tensor? odds, bool divide_by_odds) -> ()");
  m.def(
      "count_shared(Tensor? base, Tensor[] models, float[] limits, Tensor(a!) counts, "
      "int first_row, int first_entry, int[] drop_keys, int[] drop_thresholds, "
      "float[] drop_scales) -> ()");
  m.def(
      "row_divergences(Tensor? base, Tensor[] models, Tensor(a!) out, int first_row, "
      "int first_entry, int[] drop_keys, int[] drop_thresholds, float[] drop_scales) -> ()");
  m.def(
      "elect(Tensor(a!) out, Tensor? base, Tensor[] models, float[] weights, float[] limits, "
      "float scale, int elect, int consensus, bool normalize, int measure, Tensor? measure_scales, "
      "int first_row, int first_entry, int[] drop_keys, "
      "int[] drop_thresholds, float[] drop_scales, int[] keep_keys, int[] keep_thresholds, "
      "float[] keep_scales, float[] lowest, float[] steps, bool divide_by_odds, Tensor(b!) counts) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mergecore, CPU, m) {
  m.impl("column_moments", TORCH_BOX(&mergecore::column_moments_cpu));
  m.impl("row_moments", TORCH_BOX(&mergecore::row_moments_cpu));
  m.impl("column_gradient", TORCH_BOX(&mergecore::column_gradient_cpu));
  m.impl("row_gradient", TORCH_BOX(&mergecore::row_gradient_cpu));
  m.impl("gram", TORCH_BOX(&mergecore::gram_cpu));
  m.impl("row_gram", TORCH_BOX(&mergecore::row_gram_cpu));
  m.impl("column_gram", TORCH_BOX(&mergecore::column_gram_cpu));
  m.impl("blend", TORCH_BOX(&mergecore::blend_cpu));
  m.impl("rank", TORCH_BOX(&mergecore::rank_cpu));
  m.impl("calibrated_softmax", TORCH_BOX(&mergecore::calibrated_softmax_cpu));
  m.impl("count_magnitudes", TORCH_BOX(&mergecore::count_magnitudes_cpu));
  m.impl("count_bracketed", TORCH_BOX(&mergecore::count_bracketed_cpu));
  m.impl("collect_magnitudes", TORCH_BOX(&mergecore::collect_magnitudes_cpu));
  m.impl("kept_sums", TORCH_BOX(&mergecore::kept_sums_cpu));
  m.impl("row_odds", TORCH_BOX(&mergecore::row_odds_cpu));
  m.impl("magnitudes", TORCH_BOX(&mergecore::magnitudes_cpu));
  m.impl("keep_deltas", TORCH_BOX(&mergecore::keep_deltas_cpu));
  m.impl("count_shared", TORCH_BOX(&mergecore::count_shared_cpu));
  m.impl("row_divergences", TORCH_BOX(&mergecore::row_divergences_cpu));
  m.impl("elect", TORCH_BOX(&mergecore::elect_cpu));
}
