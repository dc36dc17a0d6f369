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
#include <vector>

#include "lanes.h"

namespace mergecore::cpu {

constexpr int kPieces = 16;  // pieces added per visit of the accumulators
constexpr int kPart = 32;    // entries of each piece that are converted and added at a time
constexpr int kSheet = kPieces * kPart;
constexpr int kVisits = 64;              // in one go, about
constexpr int kBlock = kVisits * kPart;  // entries of a piece at most
constexpr int kAheadOf = 3;              // visits between asking for a line and converting it
constexpr int kMostMatrices = 5;

// `runs` times `count` pieces of n (at most kBlock) entries: the first from window entry `entry`
// on, others `stride` entries apart, those of other runs `run_stride`. The accumulators of a run
// are n after those of the one before. What comes after all starts at `next`.
struct Pieces {
  int64_t entry;
  int64_t next;
  int64_t stride;
  int64_t run_stride;
  int runs;
  int count;
  int n;
};

// What is added in one visit: n entries of `count` pieces to accumulators from `place` on. Visits
// of some pieces come in this order: all parts of the first kPieces, and so on, run after run.
class Visit {
 public:
  explicit Visit(const Pieces& pieces) : pieces_(&pieces), from_(pieces.entry) { take(); }

  int64_t entry;
  int place, count, n;

  // Whether there was one more; else this is the first of the pieces that come next.
  bool advance() {
    if ((first_ += kPart) >= pieces_->n) {
      first_ = 0;
      if ((piece_ += kPieces) >= pieces_->count) {
        piece_ = 0;
        ++run_;
      }
    }
    const bool goes_on = run_ < pieces_->runs;
    if (!goes_on) {
      run_ = 0;
      from_ = pieces_->next;
    }
    take();
    return goes_on;
  }

 private:
  void take() {
    entry = from_ + run_ * pieces_->run_stride + piece_ * pieces_->stride + first_;
    place = run_ * pieces_->n + first_;
    count = std::min(kPieces, pieces_->count - piece_);
    n = std::min(kPart, pieces_->n - first_);
  }

  const Pieces* pieces_;
  int64_t from_;
  int run_ = 0, piece_ = 0, first_ = 0;
};

// The numbers of a visit: to[p * kPart + i] is entry i of piece p, exactly; zero where the matrix
// is not there. Float holds all dtypes but f64. `ahead`: the first entry of what is asked for.
template <class Number>
inline __attribute__((always_inline)) void load_sheet(const Matrix& matrix, const Visit& visit,
                                                      int64_t ahead, int64_t stride, Number* to) {
  if (matrix.data == nullptr) {
    std::fill_n(to, kSheet, Number{0});
    return;
  }
  with_dtype(matrix.dtype, [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    if constexpr (sizeof(typename T::Number) <= sizeof(Number)) {
      const auto* bits = static_cast<const typename T::Bits*>(matrix.data) + visit.entry;
      const auto* next = static_cast<const typename T::Bits*>(matrix.data) + ahead;
      for (int p = 0; p < visit.count; ++p, bits += stride, next += stride, to += kPart) {
        prefetch(next, visit.n * static_cast<int64_t>(sizeof(*next)));
        if (visit.n == kPart) {  // of a length that the compiler knows
          for (int i = 0; i < kPart; ++i) to[i] = T::load(bits[i]);
        } else {
          for (int i = 0; i < visit.n; ++i) to[i] = T::load(bits[i]);
        }
      }
    }
  });
}

// The same piece by piece, beside the arithmetic of the visit before: only so many lines can be
// under way at once, and a processor looks only so far ahead.
template <class T, class Lanes>
struct Loading {
  const typename T::Bits* bits;
  const typename T::Bits* ahead;
  int64_t stride;
  int count;
  float* to;

  inline __attribute__((always_inline)) void operator()(int piece) const {
    if (piece >= count) return;
    constexpr int kBytes = kPart * sizeof(*bits);
    const auto* line = reinterpret_cast<const char*>(ahead + piece * stride);
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(line + i, 0, 2);
    const auto* from = bits + piece * stride;
    float* numbers = to + piece * kPart;
    if constexpr (std::is_same_v<T, BF16> && std::is_same_v<Lanes, Eight>) {
      using Wide = uint32_t __attribute__((vector_size(64)));
      using Narrow = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));
      for (int i = 0; i < kPart; i += 16) {
        Wide wide;  // by one instruction, of which GCC 12 makes three
        asm("vpmovzxwd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Narrow*>(from + i)));
        wide <<= 16;
        memcpy(numbers + i, &wide, sizeof(wide));
      }
    } else {
#pragma GCC ivdep
      for (int i = 0; i < kPart; ++i) numbers[i] = T::load(from[i]);
    }
  }
};

struct LoadingNothing {
  void operator()(int) const {}
};

template <class One, class Other>
struct LoadingBoth {
  One one;
  Other other;

  inline __attribute__((always_inline)) void operator()(int piece) const {
    one(piece);
    other(piece);
  }
};

// Calls f with what loads the sheet of a visit of whole parts, if pieces of its dtype can be.
template <class Lanes, class F>
inline __attribute__((always_inline)) void with_loading(const Matrix& matrix, const Visit& visit,
                                                        int64_t ahead, int64_t stride, float* to,
                                                        const F& f) {
  const auto load = [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    const auto* bits = static_cast<const typename T::Bits*>(matrix.data);
    f(Loading<T, Lanes>{bits + visit.entry, bits + ahead, stride, visit.count, to});
  };
  if (matrix.data == nullptr) return f(LoadingNothing{});
  matrix.dtype == Dtype::bf16 ? load(BF16{}) : load(F32{});
}

inline bool loads_by_piece(const Matrix& matrix) {
  return matrix.data == nullptr || matrix.dtype == Dtype::bf16 || matrix.dtype == Dtype::f32;
}

template <class Number, class Lanes, int kMatrices, class F>
inline __attribute__((always_inline)) void each_lanes_of(As<Lanes> lanes,
                                                         const Matrix (&matrices)[kMatrices],
                                                         const Pieces& pieces, const F& f) {
  constexpr int kWide = kLanesOf<Lanes>;
  constexpr int kTurns = kPart / kWide;  // each loads a matrix, or two
  static_assert(kMatrices <= kMostMatrices && kMostMatrices <= 2 * kTurns);
  alignas(64) Number numbers[2][kMatrices * kSheet];
  const bool by_piece =
      std::is_same_v<Number, float> && std::all_of(matrices, matrices + kMatrices, loads_by_piece);
  Visit visit(pieces), next = visit, ahead = visit;
  for (int i = 0; i < kAheadOf; ++i) ahead.advance();
  const auto load_all = [&](const Visit& of, Number* to) __attribute__((always_inline)) {
    for (int m = 0; m < kMatrices; ++m) {
      load_sheet(matrices[m], of, ahead.entry, pieces.stride, to + m * kSheet);
    }
    ahead.advance();
  };
  Number *here = numbers[0], *there = numbers[1];
  load_all(visit, here);
  for (int m = 0; m < kMatrices; ++m) {
    if (matrices[m].data == nullptr) std::fill_n(there + m * kSheet, kSheet, Number{0});
  }
  for (bool goes_on = true; goes_on; std::swap(here, there), visit = next) {
    goes_on = next.advance();
    if constexpr (std::is_same_v<Number, float>) {
      if (by_piece && goes_on && visit.n == kPart && next.n == kPart) {
        for (int i = 0, m = 0; i < kPart; i += kWide, ++m) {
          const auto add = [&](auto loading) __attribute__((always_inline)) {
            f(lanes, visit.count, loading, here + i, visit.place + i);
            for (int p = visit.count; p < next.count; ++p) loading(p);
          };
          const auto load = [&](int matrix, const auto& then) __attribute__((always_inline)) {
            with_loading<Lanes>(matrices[matrix], next, ahead.entry, pieces.stride,
                                there + matrix * kSheet, then);
          };
          if (m >= kMatrices) {
            add(LoadingNothing{});
          } else if (kMatrices > kTurns && m + kTurns < kMatrices) {
            load(m, [&](auto one) __attribute__((always_inline)) {
              load(m + kTurns, [&](auto other) __attribute__((always_inline)) {
                add(LoadingBoth<decltype(one), decltype(other)>{one, other});
              });
            });
          } else {
            load(m, add);
          }
        }
        ahead.advance();
        continue;
      }
    }
    int i = 0;
    for (; i + kWide <= visit.n; i += kWide) {
      f(lanes, visit.count, LoadingNothing{}, here + i, visit.place + i);
    }
    for (; i < visit.n; ++i) {
      f(As<double>{}, visit.count, LoadingNothing{}, here + i, visit.place + i);
    }
    if (goes_on) load_all(next, there);
  }
}

// Calls f(As<Lanes>, n, next, numbers, i) to add entries of n pieces to accumulators i, i + 1, ...:
// those of piece p of matrix m are numbers[m * kSheet + p * kPart] on. f has to call next(p) for
// each piece, which loads that of the next visit beside f's arithmetic.
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
      add(Pieces{entry, next, w.columns, 0, 1, pieces, n}, sums + column - tile.column,
          tile.columns);
    }
    row += pieces;
  }
}

// Sums along runs [begin, end) of `length` consecutive entries of the window, of which the last may
// be shorter: calls store(run, k, sum) for k below `count`.
template <class Add, class Store>
void sum_runs(const Window& w, int64_t length, int64_t count, int64_t begin, int64_t end,
              const Add& add, const Store& store) {
  constexpr int64_t kEntries = kVisits * kSheet;
  const int64_t entries = w.rows * w.columns;
  const int64_t most = std::clamp<int64_t>(kEntries / std::max<int64_t>(1, length), 1, 8);
  const int64_t stride = most * kLanes + kLanes / 8;  // not of pages: they would share a place
  std::vector<double> lanes(static_cast<size_t>(count * stride));
  for (int64_t run = begin; run < end;) {
    const int64_t first = run * length, own = std::min(length, entries - first);
    const int64_t equal = own < length ? 1 : (entries - first) / std::max<int64_t>(1, length);
    const int runs = static_cast<int>(std::clamp<int64_t>(std::min(equal, end - run), 1, most));
    const int64_t whole = own / kLanes, rest = own % kLanes;
    std::fill(lanes.begin(), lanes.end(), 0.0);
    for (int64_t piece = 0; piece < whole;) {
      const int pieces = static_cast<int>(std::min<int64_t>(kEntries / kLanes, whole - piece));
      const int64_t entry = first + piece * kLanes;
      piece += pieces;
      const int64_t next = piece < whole ? entry + pieces * kLanes : first + runs * length;
      add(Pieces{entry, next, kLanes, length, runs, pieces, kLanes}, lanes.data(), stride);
    }
    for (int i = 0; i < runs; ++i, ++run) {
      double* of_run = lanes.data() + i * kLanes;
      if (rest != 0) {
        const int64_t entry = run * length + whole * kLanes;
        add(Pieces{entry, entry, 0, 0, 1, 1, static_cast<int>(rest)}, of_run, stride);
      }
      for (int64_t k = 0; k < count; ++k) store(run, k, sum_lanes(of_run + k * stride));
    }
  }
}

// Window rows [begin, end) into sums[count][total_rows] at the tensor's row.
template <class Add>
void sum_rows(const Window& w, int64_t count, double* sums, int64_t total_rows, int64_t begin,
              int64_t end, const Add& add) {
  sum_runs(w, w.columns, count, begin, end, add, [&](int64_t row, int64_t k, double sum) {
    sums[k * total_rows + w.first_row + row] = sum;
  });
}

}  // namespace mergecore::cpu
