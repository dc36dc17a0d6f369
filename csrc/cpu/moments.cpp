// Per-column moments of base and deltas in one read: WIDEN's disentanglement (section 3.3, eq.
// 1-2).
#include "sums.h"

namespace mergecore::cpu {

struct Moments {
  double* dd;
  double* da;
  double* xx;
};

// Adds the base, where kBase says so, and models: sums[m] are those of matrix m, of the base, which
// is the first, only `xx`.
template <bool kBase, int kMatrices>
void add_pieces(const Matrix (&matrices)[kMatrices], const Pieces& pieces, const Moments* sums) {
  auto add = [&](auto as, int n, auto next, auto base, int i) __attribute__((always_inline)) {
    typename decltype(as)::Lanes dd[kMatrices], da[kMatrices], xx[kMatrices], a, x;
    if (kBase) load(sums[0].xx + i, xx[0]);
#pragma GCC unroll 4
    for (int m = 1; m < kMatrices; ++m) {
      load(sums[m].xx + i, xx[m]);
      load(sums[m].dd + i, dd[m]);
      load(sums[m].da + i, da[m]);
    }
    for (int p = 0; p < n; ++p) {
      next(p);
      load(base + p * kPart, a);
      if (kBase) multiply_add(a, a, xx[0]);
#pragma GCC unroll 4
      for (int m = 1; m < kMatrices; ++m) {
        load(base + m * kSheet + p * kPart, x);
        const auto d = x - a;
        multiply_add(d, d, dd[m]);
        multiply_add(d, a, da[m]);
        multiply_add(x, x, xx[m]);
      }
    }
    if (kBase) store(xx[0], sums[0].xx + i);
#pragma GCC unroll 4
    for (int m = 1; m < kMatrices; ++m) {
      store(xx[m], sums[m].xx + i);
      store(dd[m], sums[m].dd + i);
      store(da[m], sums[m].da + i);
    }
  };
  each_lanes(matrices, pieces, add);
}

// One piece whose deltas were already dropped and rescaled.
MERGECORE_CLONES
void add_delta_piece(const double* delta, const double* base, int n, Moments sums) {
  for (int i = 0; i < n; ++i) {
    double d = delta[i], x = base[i] + d;
    sums.dd[i] = fma(d, d, sums.dd[i]);
    sums.da[i] = fma(d, base[i], sums.da[i]);
    sums.xx[i] = fma(x, x, sums.xx[i]);
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
            {sums.dd + place, sums.da + place, sums.xx + place});
      }
    }
  }
}

// What sum_columns and sum_rows call.
auto moment_adder(const Inputs& in) {
  return [&in](const Pieces& pieces, double* to, int64_t to_stride) {
    const auto sums_of = [&](int m) {
      double* first = to + (1 + 3 * m) * to_stride;
      return Moments{first, first + to_stride, first + 2 * to_stride};
    };
    const auto is_dropped = [&](int m) { return in.drops != nullptr && drops_any(in.drops[m]); };
    const Moments of_base{nullptr, nullptr, to};
    bool added = false;  // the base's
    for (int m = 0; m < in.count; ++m) {
      const Matrix &base = in.base, &model = in.models[m];
      if (is_dropped(m)) {
        add_dropped_pieces(in.drops[m], base, model, in.window, pieces, sums_of(m));
      } else if (m + 1 < in.count && !is_dropped(m + 1)) {
        const Matrix two[] = {base, model, in.models[m + 1]};
        const Moments sums[] = {of_base, sums_of(m), sums_of(m + 1)};
        added ? add_pieces<false>(two, pieces, sums) : add_pieces<true>(two, pieces, sums);
        added = true;
        ++m;
      } else {
        const Matrix one[] = {base, model};
        const Moments sums[] = {of_base, sums_of(m)};
        added ? add_pieces<false>(one, pieces, sums) : add_pieces<true>(one, pieces, sums);
        added = true;
      }
    }
    if (!added) add_pieces<true>({in.base}, pieces, &of_base);
  };
}

void column_moments(const Inputs& in, const Tile& tile, double* sums) {
  sum_columns(in.window, tile, sums, moment_adder(in));
}

void row_moments(const Inputs& in, double* sums, int64_t total_rows, int64_t begin, int64_t end) {
  sum_rows(in.window, moment_count(in.count), sums, total_rows, begin, end, moment_adder(in));
}

}  // namespace mergecore::cpu
