// What sums down columns and along rows share: visits of the accumulators, lanes of a row, and
// their adding up.
//
// Both are the same loop: pieces of entries are added lane by lane, in order. For columns across
// rows a piece is one row's share of a column block; for columns along rows the pieces are
// consecutive parts of one row, and the lanes are added last. Either way a caller's
//   add(pieces, to, to_stride)
// adds them to the first pieces.n of each run of accumulators; runs lie `to_stride` apart.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace mergecore::cpu {

constexpr int kPieces = 16;  // pieces added per visit of the accumulators
constexpr int kBlock = 64;   // entries of a piece at most
constexpr int kPart = 32;    // entries of each piece that are converted and added at a time
constexpr int kSheet = kPieces * kPart;
constexpr int64_t kMaxSums = 1 + 3 * kMaxModels;

// `count` (at most kPieces) pieces of n (at most kBlock) entries, `stride` entries apart, that
// start at window entry `entry`. Those of the next visit start at `next`.
struct Pieces {
  int64_t entry;
  int64_t next;
  int64_t stride;
  int count;
  int n;
};

// to[p * kPart + i] is entry i of piece p from window entry `entry` on, exactly; zero where the
// matrix is not there. Float holds all dtypes but f64.
template <class Number>
inline __attribute__((always_inline)) void load_part(const Matrix& matrix, int64_t entry,
                                                     int64_t stride, int count, int n, Number* to) {
  if (matrix.data == nullptr) {
    std::fill_n(to, kSheet, Number{0});
    return;
  }
  with_dtype(matrix.dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    if constexpr (sizeof(typename T::Number) <= sizeof(Number)) {
      const auto* bits = static_cast<const typename T::Bits*>(matrix.data) + entry;
      for (int p = 0; p < count; ++p, bits += stride, to += kPart) {
        if (n == kPart) {  // of a length that the compiler knows
          for (int i = 0; i < kPart; ++i) to[i] = T::load(bits[i]);
        } else {
          for (int i = 0; i < n; ++i) to[i] = T::load(bits[i]);
        }
      }
    }
  });
}

template <class Number, class Lanes, int kMatrices, class F>
inline __attribute__((always_inline)) void each_lanes_of(As<Lanes> lanes,
                                                         const Matrix (&matrices)[kMatrices],
                                                         const Pieces& pieces, const F& f) {
  constexpr int kWide = kLanesOf<Lanes>;
  alignas(64) Number numbers[kMatrices * kSheet];
  for (int first = 0; first < pieces.n; first += kPart) {
    const int n = std::min(kPart, pieces.n - first);
    for (int m = 0; m < kMatrices; ++m) {
      const Matrix& matrix = matrices[m];
      load_part(matrix, pieces.entry + first, pieces.stride, pieces.count, n, numbers + m * kSheet);
      if (matrix.data == nullptr) continue;
      const int64_t size = dtype_size(matrix.dtype), stride = pieces.stride * size;
      const auto* ahead = static_cast<const char*>(at(matrix, pieces.next + first));
      for (int64_t i = 0; i < n * size; i += 64) {
        for (int p = 0; p < kPieces; ++p) __builtin_prefetch(ahead + p * stride + i, 0, 2);
      }
    }
    int i = 0;
    if (n == kPart && pieces.count == kPieces) {
      constexpr std::integral_constant<int, kPieces> all;
      for (; i < kPart; i += kWide) f(lanes, all, numbers + i, first + i);
      continue;
    }
    for (; i + kWide <= n; i += kWide) f(lanes, pieces.count, numbers + i, first + i);
    for (; i < n; ++i) f(As<double>{}, pieces.count, numbers + i, first + i);
  }
}

// Calls f(As<Lanes>, count, numbers, i) for entries i, i + 1, ... of all pieces: those of piece p
// of matrix m are numbers[m * kSheet + p * kPart] on. `count` is pieces.count, as a constant where
// it is kPieces. Reading goes on evenly beside the arithmetic: only so many lines can be under way
// at once, and a processor looks only so far ahead.
template <int kMatrices, class F>
void each_lanes(const Matrix (&matrices)[kMatrices], const Pieces& pieces, const F& f) {
  const bool wide = std::any_of(matrices, matrices + kMatrices, [](const Matrix& matrix) {
    return matrix.data != nullptr && matrix.dtype == Dtype::f64;
  });
  with_lanes([&](auto lanes) __attribute__((always_inline)) {
    wide ? each_lanes_of<double>(lanes, matrices, pieces, f)
         : each_lanes_of<float>(lanes, matrices, pieces, f);
  });
}

// A tile's columns into runs of tile.columns sums, in blocks of at most kBlock columns.
template <class Add>
void sum_columns(const Window& w, const Tile& tile, double* sums, const Add& add) {
  const int64_t end = tile.row + tile.rows, end_column = tile.column + tile.columns;
  for (int64_t row = tile.row; row < end;) {
    const int pieces = static_cast<int>(std::min<int64_t>(kPieces, end - row));
    for (int64_t column = tile.column; column < end_column; column += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, end_column - column));
      const int64_t entry = row * w.columns + column;
      // The columns beside, the rows below, or where this one is: another thread has what follows.
      const int64_t next = column + kBlock < end_column ? entry + kBlock
                           : row + pieces < end         ? (row + pieces) * w.columns + tile.column
                                                        : entry;
      add(Pieces{entry, next, w.columns, pieces, n}, sums + column - tile.column, tile.columns);
    }
    row += pieces;
  }
}

// Window rows [begin, end) into sums[count][total_rows] at the tensor's row.
template <class Add>
void sum_rows(const Window& w, int64_t count, double* sums, int64_t total_rows, int64_t begin,
              int64_t end, const Add& add) {
  alignas(64) double lanes[kMaxSums * kLanes];
  for (int64_t row = begin; row < end; ++row) {
    std::fill_n(lanes, count * kLanes, 0.0);
    int64_t entry = row * w.columns;
    for (int64_t left = w.columns; left > 0;) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, left));
      const int pieces = static_cast<int>(std::min<int64_t>(kPieces, left / n));
      const int64_t next = entry + pieces * n;
      add(Pieces{entry, next, kLanes, pieces, n}, lanes, kLanes);
      entry = next;
      left -= pieces * n;
    }
    for (int64_t k = 0; k < count; ++k) {
      double* lane = lanes + k * kLanes;
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
      }
      sums[k * total_rows + w.first_row + row] = lane[0];
    }
  }
}

}  // namespace mergecore::cpu
