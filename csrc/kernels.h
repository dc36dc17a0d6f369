// The kernels' raw-pointer signatures, free of torch. CPU and CUDA implement the same
// families.
//
// Terms. A *window* is a run of whole rows of one tensor seen as a matrix (rows x columns,
// row-major, contiguous). The base and the N models bring one window each, with dtypes of their
// own. For model n with entries x and base entries a, the delta is  d = keep * (x - a)  and the
// effective entry is a + d; keep is 1 without dropping, and with DARE (Yu et al. 2024, eq. 3) it is
// 0 or `scale` per entry.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace mergecore {

struct Matrix {
  const void* data;
  Dtype dtype;
};

// Which deltas of one model are kept. At random (DARE): entry e (index in the whole tensor) is kept
// iff its Philox number >= threshold. And by magnitude: entries are ordered by falling |d|, equal
// ones by rising index; kept is what stands before the place of `least` and not before the place of
// `most`.
struct Drop {
  uint64_t key;
  uint64_t threshold;   // round(drop_rate * 2^32): 0 keeps everything
  double scale;         // of kept entries, 1 / (1 - drop_rate) when rescaling
  double least = -1.0;  // |d| == least is kept iff e < least_before
  int64_t least_before = 0;
  double most = HUGE_VAL;  // |d| == most is dropped iff e < most_before
  int64_t most_before = 0;
};

MERGECORE_INLINE bool selects(const Drop& drop) {
  return drop.least >= 0.0 || drop.most < HUGE_VAL;
}

MERGECORE_INLINE bool drops_any(const Drop& drop) { return drop.threshold > 0 || selects(drop); }

// NaN is kept: it has to show in the result. Without branches, which compilers would not vectorise.
MERGECORE_INLINE bool selected(const Drop& drop, double magnitude, int64_t index) {
  const bool small =
      (magnitude < drop.least) | ((magnitude == drop.least) & (index >= drop.least_before));
  const bool large =
      (magnitude > drop.most) | ((magnitude == drop.most) & (index < drop.most_before));
  return !(small | large);
}

struct Window {
  int64_t rows;
  int64_t columns;
  int64_t first_row;    // of this window in its matrix
  int64_t first_entry;  // index in the whole tensor of the matrix's first entry (expert by expert)
};

// The tensor's row that a window starts with.
MERGECORE_INLINE int64_t first_row_of(const Window& w) {
  return w.columns == 0 ? 0 : w.first_row + w.first_entry / w.columns;
}

// Part of a window: rows of one tile, or of its end, and neighbouring columns.
struct Tile {
  int64_t row;  // of the window
  int64_t rows;
  int64_t column;
  int64_t columns;
};

constexpr int kTileRows = 256;  // rows are summed tile by tile (design, section 5)
constexpr int kLanes = 64;      // a row is summed in this many lanes
constexpr int kMaxModels = 64;

// Moments per column: row 0 of `sums` is a.a, then d.d of each of N models, then d.a of each.
inline int64_t moment_count(int models) { return 1 + 2 * static_cast<int64_t>(models); }

// Dot products of all pairs of v_0 = a and v_n = d_n: (0,0), (0,1), ... (0,N), (1,1), ...
constexpr int kGramBlock = 4096;  // entries of a whole tensor that are summed by themselves
inline int64_t gram_count(int models) {
  return (static_cast<int64_t>(models) + 1) * (static_cast<int64_t>(models) + 2) / 2;
}

struct Inputs {
  Window window;
  Matrix base;           // data == nullptr: no base, deltas are the entries themselves
  const Matrix* models;  // [count]
  const Drop* drops;     // [count] or nullptr
  int count;
};

// How the blend's coefficients are laid out: one per model, per model and column, or per model and
// row.
enum class Axis : int32_t { tensor = 0, columns = 1, rows = 2 };

struct Blend {
  Inputs inputs;
  Axis axis;
  const double* coefficients;  // [count] or [count][stride]; `rows`: indexed by the tensor's row
  int64_t stride;
  double base_coefficient;
  void* out;
  Dtype out_dtype;
};

// What order statistics and masks compare: each model's |d| (own); one number per entry for all
// models, the standard deviation of their deltas (spread, SCE); |d| times a number of its row
// (rows); or the competition score of each model (competition, PCB).
enum class Measure : int32_t { own = 0, spread = 1, rows = 2, competition = 3 };

// The deltas after a second choice: `inputs.drops` made them, `keeps` choose among them. Kept ones
// are multiplied by the scale of their keep, and with Measure::competition by where their score
// lies between `least` (0) and `most` (1).
struct Kept {
  Inputs inputs;
  Measure measure;
  // rows: [count][stride], indexed by the tensor's row; competition: [count][2], least |d| and
  // largest |d| less the least; else nullptr.
  const double* scales;
  int64_t stride;
  const Drop* keeps;  // [count] or nullptr: everything is kept
  const double*
      odds;  // [count][entries of the window] keep-probabilities instead of thresholds, or nullptr
  bool divide_by_odds;  // kept entries are divided by their probability
};

// How the kept deltas v_n of an entry become one number: their sum (none); the sum of those of the
// elected sign, divided by their weights with `normalize`; the largest w_n v_n; where several go
// beyond their limit their mean, where one does that one's w_n v_n (shared, RAM); the sum of w_n
// times v_n held within +-limit (limited); sum of w_n v_n, the v_n being weighted by their scores
// already, divided by the sum of those (competing, PCB).
enum class Elect : int32_t {
  none = 0,
  weighted = 1,
  unweighted = 2,
  largest = 3,
  shared = 4,
  limited = 5,
  competing = 6
};

// out = cast( base + scale * mixed ). With `consensus`, mixed is 0 where fewer than so many models
// hold on to it: |d_n| > limit_n |mixed - d_n| for the deltas d_n before `keeps`.
struct Election {
  Kept kept;
  Elect elect;
  bool normalize;
  double scale;
  const double* weights;  // [count], host memory
  const double* limits;   // [count], host memory, or nullptr
  int consensus;
  void* out;
  Dtype out_dtype;
};

// Keys of one order statistic: magnitudes whose bits lie in [low, high) are searched.
struct KeyRange {
  int32_t model;  // 0 for Measure::spread
  int64_t low;
  int64_t high;
};
constexpr int kMaxRanges = 2 * kMaxModels;

// Magnitudes order like their bits.
MERGECORE_INLINE int64_t magnitude_bits(double magnitude) {
  return static_cast<int64_t>(bit_cast<uint64_t>(magnitude) & 0x7fffffffffffffffull);
}

// The bin of a key among `bins` from `offset` on, of 2^shift keys each. Keys beyond go to the outer
// ones: zeros and what is not finite have the first and the last for themselves.
MERGECORE_INLINE int64_t clamped_bin(int64_t key, int shift, int64_t offset, int64_t bins) {
  const int64_t bin = (key >> shift) - offset, most = bins - 2;
  const int64_t inner = bin < 1 ? 1 : bin > most ? most : bin;
  return key == 0 ? 0 : key >= 0x7ff0000000000000 ? bins - 1 : inner;
}

// 40 significant bits: float64 noise must not tell apart what is equal in exact arithmetic.
MERGECORE_INLINE double snapped(double value) {
  constexpr double snap = 1.5 * static_cast<double>(1ull << (53 - kSnapBits));
  const double binade = bit_cast<double>(bit_cast<uint64_t>(value) & 0x7ff0000000000000ull);
  return value < 0x1p900 ? (value + binade * snap) - binade * snap : value;
}

// The standard deviation over `count` deltas from their mean, the sum of squared distances from it,
// and the sum of squares. What is rounding noise counts as 0.
MERGECORE_INLINE double spread_of(double distances, double squares, int count) {
  return distances <= 0x1p-80 * squares ? 0.0 : snapped(sqrt(distances / count));
}

// The sign that the sum elects: negative only where it is so beyond the noise of its terms.
MERGECORE_INLINE bool elects_negative(double sum, double absolute) {
  return sum < 0.0 && sum <= -0x1p-40 * absolute;
}

// Whether a model keeps what became of its delta d (TALL mask). Noise does not; NaN does.
MERGECORE_INLINE bool holds_on(double d, double mixed, double limit) {
  return !(fabs(d) <= limit * fabs(mixed - d) * (1.0 + 0x1p-40));
}

// NaN does, too: it has to show in the result.
MERGECORE_INLINE bool goes_beyond(double d, double limit) { return !(fabs(d) <= limit); }

// What a consensus leaves of `mixed`, which `held` models hold on to. NaN and Inf stay.
MERGECORE_INLINE double agreed(double mixed, int held, int consensus) {
  return held >= consensus || !(fabs(mixed) < HUGE_VAL) ? mixed : 0.0;
}

// `value` within +-limit; NaN stays.
MERGECORE_INLINE double limited(double value, double limit) {
  return value > limit ? limit : value < -limit ? -limit : value;
}

// Whether `term` takes the place of what is the largest so far.
MERGECORE_INLINE bool takes_over(double term, double largest) {
  return !(fabs(term) <= fabs(largest)) && largest == largest;
}

// PCB's balance of a delta within its model and against the sum of all models' deltas, from 0 up.
MERGECORE_INLINE double competition(double d, double total, int count, const double* scales) {
  const double share = scales[1] > 0.0 ? (fabs(d) - scales[0]) / scales[1] : 0.0;
  const double score = exp_exact_order(count * (share * share)) * tanh_exact_order(d * total);
  return score <= 0.0 ? 0.0 : snapped(score);
}

// The weight of a kept score: 0 for `least`, 1 for `most`.
MERGECORE_INLINE double competing_weight(double score, double least, double most) {
  return most > least ? (score - least) / (most - least) : 1.0;
}

// `number` is one of 2^32, each as likely.
MERGECORE_INLINE bool kept_by_odds(uint32_t number, double odds) {
  return static_cast<double>(number) >= (1.0 - odds) * 0x1p32;
}

// What is added to the base, from the weighted sum of the agreeing deltas, the sum of their weights
// and of the weights' absolute values. Weights that cancel to rounding noise divide by nothing.
MERGECORE_INLINE double elected(double sum, double divisor, double absolute, bool normalize,
                                double scale) {
  const bool divides = normalize && fabs(divisor) > 0x1p-40 * absolute;
  return scale * (divides ? sum / divisor : sum);
}

// Order-preserving bits of a float64 for radix sorting: -0 counts as 0, NaN is larger than all.
MERGECORE_INLINE uint64_t sort_key(double value) {
  value = value != value ? bit_cast<double>(0x7ff8000000000000ull) : value + 0.0;
  uint64_t bits = bit_cast<uint64_t>(value);
  return (bits >> 63) != 0 ? ~bits : bits | 0x8000000000000000ull;
}

namespace cpu {

// Adds the moments of a tile's columns to sums[moments][tile.columns].
void column_moments(const Inputs& in, const Tile& tile, double* sums);
// Window rows [begin, end) into sums[moments][total_rows] at the tensor's row.
void row_moments(const Inputs& in, double* sums, int64_t total_rows, int64_t begin, int64_t end);
// The gradient of a loss by the coefficients of  W = a + sum_n d_n diag(c_n),  from its gradient by
// W (a window like the models'): g.d_n of a tile's columns in sums[models][tile.columns].
// `in.drops` is not used.
void column_gradient(const Inputs& in, const Matrix& gradient, const Tile& tile, double* sums);
// The same along the rows: window rows [begin, end) into sums[models][total_rows].
void row_gradient(const Inputs& in, const Matrix& gradient, double* sums, int64_t total_rows,
                  int64_t begin, int64_t end);
// Runs [begin, end) of `length` consecutive entries of the window (the last may be shorter): the
// products of a run in out[pair * pair_stride + run * run_stride].
void run_grams(const Inputs& in, int64_t length, double* out, int64_t pair_stride,
               int64_t run_stride, int64_t begin, int64_t end);
// Adds the products of a tile's columns to sums[pairs][tile.columns].
void column_gram(const Inputs& in, const Tile& tile, double* sums);
// Entries [begin, end) of the window, counted row by row; adds to non-finite results, overflowed
// results.
void blend(const Blend& blend, int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow);
// Rank of every entry among its model's `count` values, ascending from 1, ties by index or
// averaged.
void rank(const double* values, double* ranks, int64_t count, bool average);
// Columns [begin, end) of WIDEN's equations 4 to 6 on scores[models][count] / divisor.
void calibrated_softmax(const double* scores, const double* thresholds, double divisor, double s,
                        double* out, int models, int64_t count, int64_t begin, int64_t end);

// Counts the magnitudes of window entries [begin, end) in histogram[models or 1][bins]: bin b of
// model n has the keys whose bits >> shift is offsets[n] + b. Keys beyond go to the outer bins with
// `clamp` (see clamped_bin), else nowhere. May run at the same time on parts of one window.
void count_magnitudes(const Kept& kept, int shift, const int64_t* offsets, bool clamp, int64_t bins,
                      int64_t* histogram, int64_t begin, int64_t end);
// The same of |d| with `clamp`, 5 bins at least, and which of these keys are the lower end of their
// bin (offsets[n] + b) << shift, zeros among them, outer bins not: ends[models][parts][bins], in
// parts of `part` < 2^31 entries of the window. May run at the same time on parts of one window.
void count_bracketed(const Inputs& in, int shift, const int64_t* offsets, int64_t bins,
                     int64_t* histogram, int32_t* ends, int64_t part, int64_t begin, int64_t end);
// Appends key and index (in the tensor) of entries whose key lies within (low, high) of a range, in
// any order and while there is room; found[range] counts all of them. equal[range][entry / block]
// counts the entries of the window whose key is `low`. May run at the same time on whole blocks.
void collect_magnitudes(const Kept& kept, const KeyRange* ranges, int count, int64_t* keys,
                        int64_t* indices, int64_t capacity, int64_t* found, int64_t* equal,
                        int64_t block, int64_t begin, int64_t end);
// Blocks [begin, end) of sums[models][3][blocks]: sum of |d|, of |v| and of v * v over a block's
// entries, where v is d if it is kept and 0 if not, before any rescaling.
void kept_sums(const Kept& kept, double* sums, int64_t block, int64_t begin, int64_t end);
// Window rows [begin, end) of odds[models][entries of the window]: lowest[m] + (rank - 1) steps[m],
// by the mean rank, ascending from 1, of an entry's |d| within its row.
void row_odds(const Inputs& in, const double* lowest, const double* steps, double* odds,
              int64_t begin, int64_t end);
// out[models][entries of the window]: |d| of window entries [begin, end).
void magnitudes(const Inputs& in, double* out, int64_t begin, int64_t end);
// out[models][entries of the window]: base + kept and rescaled d of window entries [begin, end).
void keep_deltas(const Kept& kept, double* out, int64_t begin, int64_t end);
// Per model the entries beyond its limit that other models share, and those that none does: adds to
// counts[models][2]. May run at the same time on parts of one window.
void count_shared(const Inputs& in, const double* limits, int64_t* counts, int64_t begin,
                  int64_t end);
// Window rows [begin, end) of out[models][stride] at the tensor's row: the divergence of the
// model's row from the base's, KL(softmax(x) || softmax(a)).
void row_divergences(const Inputs& in, double* out, int64_t stride, int64_t begin, int64_t end);
// Window entries [begin, end); adds to non-finite results, overflowed results.
void elect(const Election& election, int64_t begin, int64_t end, int64_t& nonfinite,
           int64_t& overflow);
// The same of window rows [begin, end), with the odds of row_odds.
void elect_by_rank(const Election& election, const double* lowest, const double* steps,
                   int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow);

}  // namespace cpu

namespace cuda {

using Stream = void*;  // cudaStream_t

// Bytes of device memory that some kernels need beside their arguments.
int64_t column_moments_scratch(const Inputs& in);
int64_t column_gradient_scratch(const Inputs& in);
int64_t gram_scratch(const Inputs& in);
int64_t column_gram_scratch(const Inputs& in);
int64_t blend_scratch(const Blend& blend);
int64_t rank_scratch(int64_t models, int64_t count);
int64_t row_odds_scratch(const Inputs& in);

// `in.models` and `in.drops` are host pointers everywhere; all other pointers are device pointers.
// Each returns a cudaError_t (0 is success).
int column_moments(const Inputs& in, double* sums, double* pending, void* scratch, Stream stream);
int row_moments(const Inputs& in, double* sums, int64_t total_rows, Stream stream);
int column_gradient(const Inputs& in, const Matrix& gradient, double* sums, double* pending,
                    void* scratch, Stream stream);
int row_gradient(const Inputs& in, const Matrix& gradient, double* sums, int64_t total_rows,
                 Stream stream);
// sums[pairs] += the products of the whole window, blocks of kGramBlock entries in order.
int gram(const Inputs& in, double* sums, void* scratch, Stream stream);
int row_gram(const Inputs& in, double* sums, int64_t total_rows, Stream stream);
int column_gram(const Inputs& in, double* sums, double* pending, void* scratch, Stream stream);
// counts[2] += non-finite, overflow
int blend(const Blend& blend, int64_t* counts, void* scratch, Stream stream);
int rank(const double* values, double* ranks, int64_t models, int64_t count, bool average,
         void* scratch, Stream stream);
int calibrated_softmax(const double* scores, const double* thresholds, double divisor, double s,
                       double* out, int models, int64_t count, Stream stream);
const char* error_string(int error);
// As in cpu, on whole windows. Arrays of offsets, ranges, keeps and weights are host pointers.
int count_magnitudes(const Kept& kept, int shift, const int64_t* offsets, bool clamp, int64_t bins,
                     int64_t* histogram, Stream stream);
int collect_magnitudes(const Kept& kept, const KeyRange* ranges, int count, int64_t* keys,
                       int64_t* indices, int64_t capacity, int64_t* found, int64_t* equal,
                       int64_t block, Stream stream);
int kept_sums(const Kept& kept, double* sums, int64_t block, Stream stream);
int row_odds(const Inputs& in, const double* lowest, const double* steps, double* odds,
             void* scratch, Stream stream);
int magnitudes(const Inputs& in, double* out, Stream stream);
int keep_deltas(const Kept& kept, double* out, Stream stream);
int count_shared(const Inputs& in, const double* limits, int64_t* counts, Stream stream);
int row_divergences(const Inputs& in, double* out, int64_t stride, Stream stream);
int elect(const Election& election, int64_t* counts, Stream stream);

}  // namespace cuda

}  // namespace mergecore
