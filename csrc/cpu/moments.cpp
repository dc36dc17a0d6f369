// Per-column moments of base and deltas in one read: WIDEN's disentanglement (section 3.3, eq.
// 1-2).
#include "sums.h"

namespace mergecore::cpu {

struct Moments {
  double* dd;
  double* da;
};

// Adds models to dd and da from the first of them on, each `stride` after the one before; matrix 0
// is the base, which is added to aa where kBase says so.
template <bool kBase, int kMatrices>
void add_pieces(const Matrix (&matrices)[kMatrices], const Pieces& pieces, double* aa,
                const Moments& sums, int64_t stride) {
  auto add = [&](auto as, int n, auto next, auto sheet, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes dd[kMatrices], da[kMatrices], square, a, x;
    if (kBase) load(aa + i, square);
#pragma GCC unroll 4
    for (int m = 1; m < kMatrices; ++m) {
      load(sums.dd + (m - 1) * stride + i, dd[m]);
      load(sums.da + (m - 1) * stride + i, da[m]);
    }
    for (int p = 0; p < n; ++p) {
      next(p);
      load(sheet(0, p), a);
      if (kBase) multiply_add(a, a, square);
#pragma GCC unroll 4
      for (int m = 1; m < kMatrices; ++m) {
        load(sheet(m, p), x);
        const auto d = x - a;
        multiply_add(d, d, dd[m]);
        multiply_add(d, a, da[m]);
      }
    }
    if (kBase) store(square, aa + i);
#pragma GCC unroll 4
    for (int m = 1; m < kMatrices; ++m) {
      store(dd[m], sums.dd + (m - 1) * stride + i);
      store(da[m], sums.da + (m - 1) * stride + i);
    }
  };
  each_lanes(matrices, pieces, add);
}

// One piece whose deltas were already dropped and rescaled.
MERGECORE_CLONES
void add_delta_piece(const double* delta, const double* base, int n, Moments sums) {
  for (int i = 0; i < n; ++i) {
    sums.dd[i] = fma(delta[i], delta[i], sums.dd[i]);
    sums.da[i] = fma(delta[i], base[i], sums.da[i]);
  }
}

void add_dropped_pieces(const Drop& drop, const Matrix& base, const Matrix& model, const Window& w,
                        const Pieces& pieces, const Moments& sums) {
  alignas(64) double start[kChunk] = {};
  alignas(64) double keep[kChunk];
  alignas(64) double delta[kChunk];
  const auto add = [&](int64_t entry, int64_t next, int n, const Moments& to) {
    const int64_t index = w.first_entry + w.first_row * w.columns + entry;
    prefetch(at(model, next), n * dtype_size(model.dtype));
    if (base.data != nullptr) load_chunk(at(base, entry), base.dtype, n, start);
    kept_delta_chunk(drop, at(model, entry), model.dtype, start, index, n, keep, delta);
    add_delta_piece(delta, start, n, to);
  };
  for (int run = 0; run < pieces.runs; ++run) {
    for (int p = 0; p < pieces.count; ++p) {
      const int64_t piece = run * pieces.run_stride + p * pieces.stride;
      for (int done = 0; done < pieces.n; done += kChunk) {
        const int64_t place = run * pieces.n + done, here = piece + done;
        add(pieces.entry + here, pieces.next + here, std::min(kChunk, pieces.n - done),
            {sums.dd + place, sums.da + place});
      }
    }
  }
}

// What sum_columns and sum_rows call.
auto moment_adder(const Inputs& in) {
  return [&in](const Pieces& pieces, double* to, int64_t stride) {
    const auto is_added = [&](int m) {  // by itself or with its neighbours, as it is
      return m < in.count && (in.drops == nullptr || !drops_any(in.drops[m]));
    };
    double* base_sums = to;  // until the base is in them
    const auto add = [&](const Moments& sums, const auto&... models) {
      const Matrix matrices[] = {in.base, models...};
      base_sums != nullptr ? add_pieces<true>(matrices, pieces, base_sums, sums, stride)
                           : add_pieces<false>(matrices, pieces, nullptr, sums, stride);
      base_sums = nullptr;
    };
    for (int m = 0; m < in.count;) {
      const Matrix* model = in.models + m;
      const Moments sums{to + (1 + m) * stride, to + (1 + in.count + m) * stride};
      if (!is_added(m)) {
        add_dropped_pieces(in.drops[m], in.base, *model, in.window, pieces, sums);
        m += 1;
      } else if (is_added(m + 1) && is_added(m + 2) && is_added(m + 3)) {
        add(sums, model[0], model[1], model[2], model[3]);
        m += 4;
      } else if (is_added(m + 1) && is_added(m + 2)) {
        add(sums, model[0], model[1], model[2]);
        m += 3;
      } else if (is_added(m + 1)) {
        add(sums, model[0], model[1]);
        m += 2;
      } else {
        add(sums, model[0]);
        m += 1;
      }
    }
    if (base_sums != nullptr) add({});
  };
}

void column_moments(const Inputs& in, const Tile& tile, double* sums) {
  sum_columns(in.window, tile, sums, moment_adder(in));
}

void row_moments(const Inputs& in, double* sums, int64_t total_rows, int64_t begin, int64_t end) {
  sum_rows(in.window, moment_count(in.count), sums, total_rows, begin, end, moment_adder(in));
}

}  // namespace mergecore::cpu
