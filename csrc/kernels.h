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

// DARE for one model. Entry e (index in the whole tensor) is kept iff its Philox number >=
// threshold.
struct Drop {
  uint64_t key;
  uint64_t threshold;  // round(drop_rate * 2^32): 0 keeps everything
  double scale;        // of kept entries, 1 / (1 - drop_rate) when rescaling
};

struct Window {
  int64_t rows;
  int64_t columns;
  int64_t first_row;    // of this window in its matrix
  int64_t first_entry;  // index in the whole tensor of the matrix's first entry (expert by expert)
};

constexpr int kTileRows = 64;  // rows are summed tile by tile (design, section 5)
constexpr int kLanes = 64;     // a row is summed in this many lanes
constexpr int kMaxModels = 64;

// Moments per column: rows 0 of `sums` is a.a, rows 1+3n.. are d.d, d.(x+a), x.x of model n.
inline int64_t moment_count(int models) { return 1 + 3 * static_cast<int64_t>(models); }

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

// Decision (lead): values that cancel to float64 noise (1e-17 of their terms) are stored as they
// are; nothing cleans them. Tests compare such entries with a tolerance of 2^-44 of the terms'
// magnitudes.

// Order-preserving bits of a float64 for radix sorting: -0 counts as 0, NaN is larger than all.
MERGECORE_INLINE uint64_t sort_key(double value) {
  value = value != value ? bit_cast<double>(0x7ff8000000000000ull) : value + 0.0;
  uint64_t bits = bit_cast<uint64_t>(value);
  return (bits >> 63) != 0 ? ~bits : bits | 0x8000000000000000ull;
}

// Column j of WIDEN's equations 4 to 6: out[n] = s where scores[n] > thresholds[n], else the
// softmax over models of scores / divisor. All arrays are [models][count].
MERGECORE_INLINE void softmax_column(const double* scores, const double* thresholds, double divisor,
                                     double s, double* out, int models, int64_t count, int64_t j) {
  double largest = -HUGE_VAL;
  for (int n = 0; n < models; ++n) {
    double z = scores[n * count + j] / divisor;
    largest = z > largest ? z : largest;
  }
  double sum = 0.0;
  for (int n = 0; n < models; ++n) {
    double e = exp_exact_order(scores[n * count + j] / divisor - largest);
    out[n * count + j] = e;
    sum += e;
  }
  for (int n = 0; n < models; ++n) {
    bool essential = scores[n * count + j] > thresholds[n];
    out[n * count + j] = essential ? s : out[n * count + j] / sum;
  }
}

namespace cpu {

// Columns [begin, end) of sums[moments][columns] (finished tiles) and pending[moments][columns].
void column_moments(const Inputs& in, double* sums, double* pending, int64_t begin, int64_t end);
// Window rows [begin, end) into sums[moments][total_rows] at the tensor's row.
void row_moments(const Inputs& in, double* sums, int64_t total_rows, int64_t begin, int64_t end);
// Runs [begin, end) of `length` consecutive entries of the window (the last may be shorter): the
// products of a run in out[pair * pair_stride + run * run_stride].
void run_grams(const Inputs& in, int64_t length, double* out, int64_t pair_stride,
               int64_t run_stride, int64_t begin, int64_t end);
// Columns [begin, end) of sums[pairs][columns] (finished tiles) and pending[pairs][columns].
void column_gram(const Inputs& in, double* sums, double* pending, int64_t begin, int64_t end);
// Entries [begin, end) of the window, counted row by row; adds to non-finite results, overflowed
// results.
void blend(const Blend& blend, int64_t begin, int64_t end, int64_t& nonfinite, int64_t& overflow);
// Rank of every entry among its model's `count` values, ascending from 1, ties by index or
// averaged.
void rank(const double* values, double* ranks, int64_t count, bool average);
// Columns [begin, end) of WIDEN's equations 4 to 6 on scores[models][count] / divisor.
void calibrated_softmax(const double* scores, const double* thresholds, double divisor, double s,
                        double* out, int models, int64_t count, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

using Stream = void*;  // cudaStream_t

// Bytes of device memory that some kernels need beside their arguments.
int64_t column_moments_scratch(const Inputs& in);
int64_t gram_scratch(const Inputs& in);
int64_t column_gram_scratch(const Inputs& in);
int64_t rank_scratch(int models, int64_t count);

// `in.models` and `in.drops` are host pointers everywhere; all other pointers are device pointers.
// Each returns a cudaError_t (0 is success).
int column_moments(const Inputs& in, double* sums, double* pending, void* scratch, Stream stream);
int row_moments(const Inputs& in, double* sums, int64_t total_rows, Stream stream);
// sums[pairs] += the products of the whole window, blocks of kGramBlock entries in order.
int gram(const Inputs& in, double* sums, void* scratch, Stream stream);
int row_gram(const Inputs& in, double* sums, int64_t total_rows, Stream stream);
int column_gram(const Inputs& in, double* sums, double* pending, void* scratch, Stream stream);
int blend(const Blend& blend, int64_t* counts, Stream stream);  // counts[2] += non-finite, overflow
int rank(const double* values, double* ranks, int models, int64_t count, bool average,
         void* scratch, Stream stream);
int calibrated_softmax(const double* scores, const double* thresholds, double divisor, double s,
                       double* out, int models, int64_t count, Stream stream);
const char* error_string(int error);

}  // namespace cuda

}  // namespace mergecore
