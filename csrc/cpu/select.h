// Runs of deltas and what chooses among them, shared by the kernels of selection (select.cpp,
// magnitudes.cpp, elect.cpp). Not for the kernels' signatures (kernels.h).
#pragma once

#include <vector>

#include "narrow.h"

namespace mergecore::cpu {

constexpr int kRun = 256;  // entries; the deltas of 64 models fit an L2 cache

// One model's deltas over a run, and what the blend makes of them.
struct alignas(64) Deltas {
  double value[kRun];
};

inline int64_t index_of(const Window& w, int64_t entry) {
  return w.first_entry + w.first_row * w.columns + entry;
}

template <class T>
void add_to(T* total, int64_t count) {
  __atomic_fetch_add(total, static_cast<T>(count), __ATOMIC_RELAXED);
}

inline void load_base(const Inputs& in, int64_t entry, int n, double* base) {
  if (in.base.data != nullptr) load_chunk(at(in.base, entry), in.base.dtype, n, base);
}

// Whether the deltas are differences of bf16 numbers, none of them dropped before: those have
// kernels of their own.
inline bool are_plain_bf16(const Inputs& in) {
  bool plain = in.base.data != nullptr && in.base.dtype == Dtype::bf16;
  for (int m = 0; m < in.count; ++m) {
    plain = plain && in.models[m].dtype == Dtype::bf16 &&
            (in.drops == nullptr || !drops_any(in.drops[m]));
  }
  return plain;
}

constexpr int kMaxPlain = 4;  // models whose deltas fit the registers

// Whether elections have loops of their own for it: up to kMaxPlain plain models.
inline bool is_plain(const Election& e) {
  const bool mixes =
      e.elect == Elect::none || e.elect == Elect::weighted || e.elect == Elect::unweighted;
  return mixes && e.consensus == 0 && e.kept.measure == Measure::own &&
         e.kept.inputs.count <= kMaxPlain && are_plain_bf16(e.kept.inputs);
}

// Deltas of model m with what `in.drops` says. `base` holds zeros where there is none.
void load_deltas(const Inputs& in, int m, int64_t entry, int n, const double* base, double* delta);
void load_all_deltas(const Inputs& in, int64_t entry, int n, Deltas* deltas);
// The keys of model m's deltas, of plain bf16 models. False where float32 does not tell them all.
inline bool narrow_keys(const Inputs& in, int m, int64_t entry, int n, uint32_t* keys) {
  return narrow_keys_of(static_cast<const uint16_t*>(at(in.models[m], entry)),
                        static_cast<const uint16_t*>(at(in.base, entry)), n, keys);
}
// What the measures of all models of a run have in common: the standard deviation, or the sum of
// the deltas.
void common_run(const Kept& kept, const Deltas* deltas, int n, double* common);
// The magnitudes that are compared, of model m: as they are, or in `out`.
const double* measured_run(const Kept& kept, int m, const double* delta, const double* common,
                           int64_t entry, int n, double* out);
// factor[i]: what entry i's random number makes of its delta: 0 where it is dropped.
void random_run(const Kept& kept, int m, int64_t entry, int n, double* factor);

// mixed[i]: what is added to the base, out of each model's kept deltas; `factors` for scores only.
void mix_run(const Election& e, const Deltas* values, const Deltas* factors, int n, double* mixed);

// The kept deltas of a run. Where nothing is chosen, they are the deltas themselves.
struct Run {
  std::vector<Deltas> deltas, factors, values;

  explicit Run(const Kept& kept)
      : deltas(static_cast<size_t>(kept.inputs.count)),
        factors(kept.keeps == nullptr ? 0 : deltas.size()),
        values(factors.size()) {}

  const Deltas* load(const Kept& kept, int64_t entry, int n, const double* base);
};

}  // namespace mergecore::cpu
