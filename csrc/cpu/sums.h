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

constexpr int kPart = 32;                // entries of each piece that are added at a time
constexpr int kVisits = 64;              // in one go, about
constexpr int kBlock = kVisits * kPart;  // entries of a piece at most
// Visits between asking for a line and loading it. Pieces begin anywhere in a line: with one visit
// the line in which a piece ends, asked for as the next one's first, would come too late.
constexpr int kAheadOf = 2;

// Pieces added per visit of the accumulators: what a visit holds of a matrix has one size.
template <class T>
constexpr int kPieces = 64 / sizeof(typename T::Bits);
constexpr int kMostPieces = kPieces<BF16>;

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
// of some pieces come in this order: all parts of the first kMost, and so on, run after run.
template <int kMost>
class Visit {
 public:
  explicit Visit(const Pieces& pieces) : pieces_(&pieces), from_(pieces.entry) { take(); }

  int64_t entry;
  int place, count, n;

  // Whether there was one more; else this is the first of the pieces that come next.
  bool advance() {
    if ((first_ += kPart) >= pieces_->n) {
      first_ = 0;
      if ((piece_ += kMost) >= pieces_->count) {
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
    count = std::min(kMost, pieces_->count - piece_);
    n = std::min(kPart, pieces_->n - first_);
  }

  const Pieces* pieces_;
  int64_t from_;
  int run_ = 0, piece_ = 0, first_ = 0;
};

// The entries of a visit, one matrix after the other and one piece after the other. Copied, for
// entries of one column in many rows compete for the same few places of the L1 cache.
template <class T>
struct Sheet {
  // As they lie in the matrix, too.
  using Entry = std::conditional_t<std::is_same_v<T, BF16>, BF16::Bits, typename T::Number>;
  static constexpr int kEntries = kPieces<T> * kPart;  // of a matrix

  Entry* first;

  Entry* operator()(int matrix, int piece) const {
    return first + matrix * kEntries + piece * kPart;
  }
};

// Loads n entries of a matrix, and asks for those from `ahead` on. kCopied: the matrix is of T,
// which else holds its numbers.
template <class T, bool kCopied>
inline __attribute__((always_inline)) void load_piece(const Matrix& matrix, int64_t entry,
                                                      int64_t ahead, int n,
                                                      typename Sheet<T>::Entry* to) {
  const auto load = [&](auto type) __attribute__((always_inline)) {
    using From = decltype(type);
    if constexpr (sizeof(typename From::Number) <= sizeof(typename T::Number)) {
      const auto* bits = static_cast<const typename From::Bits*>(matrix.data);
      prefetch(bits + ahead, kPart * sizeof(*bits));
      if constexpr (kCopied) {
        memcpy(to, bits + entry, n * sizeof(*bits));
      } else {
        for (int i = 0; i < n; ++i) to[i] = From::load(bits[entry + i]);
      }
    }
  };
  if constexpr (kCopied) {
    load(T{});
  } else {
    with_dtype(matrix.dtype, load);
  }
}

// kCopied: all matrices are of T.
template <class T, bool kCopied, class Lanes, int kMatrices, class F>
inline __attribute__((always_inline)) void each_lanes_of(As<Lanes> lanes,
                                                         const Matrix (&matrices)[kMatrices],
                                                         const Pieces& pieces, const F& f) {
  constexpr int kWide = kLanesOf<Lanes>;
  constexpr int kTurns = kPart / kWide;
  alignas(64) typename Sheet<T>::Entry entries[2][kMatrices * Sheet<T>::kEntries];
  for (int m = 0; m < kMatrices; ++m) {
    if (matrices[m].data != nullptr) continue;
    for (auto& of : entries) std::fill_n(Sheet<T>{of}(m, 0), Sheet<T>::kEntries, 0);
  }
  Sheet<T> here{entries[0]}, there{entries[1]};
  Visit<kPieces<T>> visit(pieces), next = visit, ahead = visit;
  for (int i = 0; i < kAheadOf; ++i) ahead.advance();
  // A piece of the next visit, of every kTurns-th matrix from `first` on.
  const auto load_next = [&](int first, int piece, int n) __attribute__((always_inline)) {
    const int64_t distance = piece * pieces.stride;
#pragma GCC unroll 7
    for (int m = first; m < kMatrices; m += kTurns) {
      if (matrices[m].data == nullptr) continue;
      load_piece<T, kCopied>(matrices[m], next.entry + distance, ahead.entry + distance, n,
                             there(m, piece));
    }
  };
  const auto load_from = [&](int first_piece) __attribute__((always_inline)) {
    for (int p = first_piece; p < next.count; ++p) {
      for (int turn = 0; turn < kTurns; ++turn) load_next(turn, p, next.n);
    }
  };
  load_from(0);
  for (bool goes_on = true; goes_on;) {
    std::swap(here, there);
    visit = next;
    ahead.advance();
    goes_on = next.advance();
    int i = 0;
    if (goes_on && visit.n == kPart && next.n == kPart && visit.count <= next.count) {
      // Piece by piece beside the arithmetic: only so many lines can be under way at once, and a
      // processor looks only so far ahead.
#pragma GCC unroll 2
      for (int turn = 0; turn < kTurns; ++turn, i += kWide) {
        const auto load = [&](int piece)
                              __attribute__((always_inline)) { load_next(turn, piece, kPart); };
        f(lanes, visit.count, load, Sheet<T>{here.first + i}, visit.place + i);
      }
      load_from(visit.count);
      continue;
    }
    const auto nothing = [](int) {};
    for (; i + kWide <= visit.n; i += kWide) {
      f(lanes, visit.count, nothing, Sheet<T>{here.first + i}, visit.place + i);
    }
    for (; i < visit.n; ++i) {
      f(As<double>{}, visit.count, nothing, Sheet<T>{here.first + i}, visit.place + i);
    }
    if (goes_on) load_from(0);
  }
}

// Calls f(As<Lanes>, n, next, sheet, i) to add entries of n pieces to accumulators i, i + 1, ...:
// those of piece p of matrix m are sheet(m, p)[0], [1], ... f has to call next(p) for each piece,
// which loads that of the next visit beside f's arithmetic.
template <int kMatrices, class F>
void each_lanes(const Matrix (&matrices)[kMatrices], const Pieces& pieces, const F& f) {
  const auto all = [&](auto is) {
    return std::all_of(matrices, matrices + kMatrices, [&](const Matrix& matrix) {
      return matrix.data == nullptr || is(matrix.dtype);
    });
  };
  const auto run = [&](auto type, auto copied, const auto& lanes_for) {
    with_lanes([&](auto lanes) __attribute__((always_inline)) {
      each_lanes_of<decltype(type), copied()>(lanes_for(lanes), matrices, pieces, f);
    });
  };
  const auto same = [](auto lanes) { return lanes; };
  const auto pairs = [](auto lanes) { return in_pairs(lanes); };
  if (all([](Dtype dtype) { return dtype == Dtype::bf16; })) {
    run(BF16{}, std::true_type{}, pairs);
  } else if (all([](Dtype dtype) { return dtype == Dtype::f32; })) {
    run(F32{}, std::true_type{}, same);
  } else if (all([](Dtype dtype) { return dtype != Dtype::f64; })) {
    run(F32{}, std::false_type{}, same);
  } else {
    run(F64{}, std::false_type{}, same);
  }
}

// A tile's columns into runs of tile.columns sums, in blocks of at most kBlock columns.
template <class Add>
void sum_columns(const Window& w, const Tile& tile, double* sums, const Add& add) {
  const int64_t end = tile.row + tile.rows, end_column = tile.column + tile.columns;
  for (int64_t row = tile.row; row < end;) {
    const int pieces = static_cast<int>(std::min<int64_t>(kMostPieces, end - row));
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
  constexpr int64_t kEntries = kVisits * kMostPieces * kPart;
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
