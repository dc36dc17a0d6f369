// What sums down columns and along rows share: tiles of rows, lanes of a row, and their adding up.
//
// Both are the same loop: pieces of entries are added lane by lane, in order. For columns across
// rows a piece is one row's share of a column block; for columns along rows the pieces are
// consecutive parts of one row, and the lanes are added last. Either way a caller's
//   add(entry, stride, pieces, n, to, to_stride)
// adds `pieces` pieces of n entries, which start at window entry `entry` and lie `stride` apart, to
// the first n of each run of accumulators; runs lie `to_stride` apart.
#pragma once

#include <algorithm>

#include "chunk.h"

namespace mergecore::cpu {

constexpr int kPieces = 16;       // pieces added per visit of the accumulators
constexpr int64_t kStrip = 2048;  // columns whose accumulators stay in the L2 cache; a page of bf16
constexpr int64_t kMaxSums = 1 + 3 * kMaxModels;

// Columns [begin, end) of sums[count][columns] (finished tiles) and pending[count][columns], in
// blocks of at most `block` columns.
template <class Add>
void sum_columns(const Window& w, int64_t count, int64_t block, double* sums, double* pending,
                 int64_t begin, int64_t end, const Add& add) {
  for (int64_t strip = begin; strip < end; strip += kStrip) {
    const int64_t strip_end = std::min(end, strip + kStrip);
    for (int64_t row = 0; row < w.rows;) {
      const int64_t in_tile = (w.first_row + row) % kTileRows;
      const int64_t left = std::min(w.rows - row, kTileRows - in_tile);
      const int pieces = static_cast<int>(std::min<int64_t>(kPieces, left));
      for (int64_t column = strip; column < strip_end; column += block) {
        const int n = static_cast<int>(std::min(block, strip_end - column));
        const int64_t entry = row * w.columns + column;
        add(entry, w.columns, pieces, n, pending + column, w.columns);
      }
      row += pieces;
      if ((w.first_row + row) % kTileRows != 0) continue;
      for (int64_t k = 0; k < count; ++k) {  // a tile is complete
        for (int64_t i = k * w.columns + strip; i < k * w.columns + strip_end; ++i) {
          sums[i] += pending[i];
          pending[i] = 0.0;
        }
      }
    }
  }
}

// Window rows [begin, end) into sums[count][total_rows] at the tensor's row.
template <class Add>
void sum_rows(const Window& w, int64_t count, double* sums, int64_t total_rows, int64_t begin,
              int64_t end, const Add& add) {
  alignas(64) double lanes[kMaxSums * kLanes];
  for (int64_t row = begin; row < end; ++row) {
    std::fill_n(lanes, count * kLanes, 0.0);
    const int64_t first = row * w.columns;
    int64_t column = 0;
    while (w.columns - column >= kLanes) {
      const int64_t whole = (w.columns - column) / kLanes;
      const int pieces = static_cast<int>(std::min<int64_t>(kPieces, whole));
      add(first + column, kLanes, pieces, kLanes, lanes, kLanes);
      column += pieces * kLanes;
    }
    if (column < w.columns) {
      add(first + column, kLanes, 1, static_cast<int>(w.columns - column), lanes, kLanes);
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
