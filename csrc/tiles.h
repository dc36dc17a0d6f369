// Column sums of a window, tile by tile of its rows, on all threads.
//
// A tile's sums begin at zero and are added to the total in the order of the tiles: so the result
// depends on neither windows nor threads. Threads take tiles whole: columns of their own would make
// each of them visit every page. Knows nothing of what is summed.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace mergecore {

class TileSums {
 public:
  // sums[count][columns]: of finished tiles; pending[count][columns]: of the one that the window
  // begins or ends in.
  TileSums(const Window& w, int64_t count, double* sums, double* pending, int64_t threads)
      : w_(w), count_(count), sums_(sums), pending_(pending) {
    const int64_t rows = w.rows * std::min<int64_t>(1, w.columns);
    before_ = w.first_row % kTileRows;
    tiles_ = rows == 0 ? 0 : (before_ + rows + kTileRows - 1) / kTileRows;
    const int64_t wanted = threads == 1 ? 1 : threads * kParts;
    const int64_t in_tile = std::min<int64_t>(std::max<int64_t>(1, rows), kTileRows);
    const int64_t least = std::max(kLine, kGrain / in_tile);
    const int64_t most = std::max(kLine, kHeld / count / kLine * kLine);
    const int64_t even = (w.columns * tiles_ + wanted - 1) / wanted;
    width_ = (std::clamp(even, std::min(least, most), most) + kLine - 1) / kLine * kLine;
    width_ = std::max<int64_t>(1, std::min(width_, w.columns));
    strips_ = (w.columns + width_ - 1) / width_;
    slots_ = std::min(parts(), 2 * threads);
    held_.resize(static_cast<size_t>(slots_ * count * width_));
    done_.resize(static_cast<size_t>(slots_));
  }

  // Parts that threads may take at once.
  int64_t parts() const { return tiles_ * strips_; }

  // What each thread calls: add(tile, to) adds a tile's entries to to[count][tile.columns]. Where
  // it throws in one thread, the others return.
  template <class Add>
  void run(const Add& add) {
    try {
      for (int64_t part; (part = next_.fetch_add(1)) < parts();) {
        if (!wait_for_slot(part)) return;
        const Tile tile = tile_of(part);
        begin(tile, held(part));
        add(tile, held(part));
        end(part);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      failed_ = true;
      moved_.notify_all();
      throw;
    }
  }

 private:
  static constexpr int64_t kParts = 4;        // for each thread: one that was held up does fewer
  static constexpr int64_t kLine = 64;        // columns
  static constexpr int64_t kGrain = 1 << 15;  // entries of a part, at least
  static constexpr int64_t kHeld = 128 << 10 >> 3;  // numbers of a part's sums: they stay in an L2

  Tile tile_of(int64_t part) const {
    const int64_t tile = part / strips_, column = part % strips_ * width_;
    const int64_t row = std::max<int64_t>(0, tile * kTileRows - before_);
    const int64_t end = std::min(w_.rows, (tile + 1) * kTileRows - before_);
    return {row, end - row, column, std::min(width_, w_.columns - column)};
  }

  double* held(int64_t part) { return held_.data() + part % slots_ * count_ * width_; }

  bool wait_for_slot(int64_t part) {
    std::unique_lock<std::mutex> lock(mutex_);
    moved_.wait(lock, [&] { return failed_ || part < added_ + slots_; });
    return !failed_;
  }

  // The first tile goes on where the window before stopped; others begin at zero, which take()
  // leaves.
  void begin(const Tile& tile, double* to) const {
    if (tile.row != 0) return;
    const double* from = pending_ + tile.column;
    for (int64_t k = 0; k < count_; ++k, from += w_.columns, to += tile.columns) {
      std::copy_n(from, tile.columns, to);
    }
  }

  // Adds it and those that have waited for it, unless another thread is about it.
  void end(int64_t part) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_[static_cast<size_t>(part % slots_)] = true;
    if (is_adding_) return;
    is_adding_ = true;
    while (added_ < parts() && done_[static_cast<size_t>(added_ % slots_)]) {
      done_[static_cast<size_t>(added_ % slots_)] = false;
      lock.unlock();
      take(tile_of(added_), held(added_));
      lock.lock();
      ++added_;
      moved_.notify_all();
    }
    is_adding_ = false;
  }

  static void move(double* from, int64_t n, double* to) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      to[i] += from[i];
      from[i] = 0.0;
    }
  }

  void take(const Tile& tile, double* from) const {
    const bool is_whole = (w_.first_row + tile.row + tile.rows) % kTileRows == 0;
    for (int64_t k = 0; k < count_; ++k, from += tile.columns) {
      double* sum = sums_ + k * w_.columns + tile.column;
      double* rest = pending_ + k * w_.columns + tile.column;
      if (is_whole) {
        move(from, tile.columns, sum);
        if (tile.row == 0) std::fill_n(rest, tile.columns, 0.0);
      } else {
        std::copy_n(from, tile.columns, rest);  // as they are: a sum of -0.0 stays one
        std::fill_n(from, tile.columns, 0.0);
      }
    }
  }

  const Window w_;
  const int64_t count_;
  double* const sums_;
  double* const pending_;
  int64_t before_, tiles_, width_, strips_, slots_;
  std::vector<double> held_;  // sums of parts that are under way, or wait for those before them
  std::vector<bool> done_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;  // guards what follows, done_ and take()
  std::condition_variable moved_;
  int64_t added_ = 0;
  bool is_adding_ = false;
  bool failed_ = false;
};

}  // namespace mergecore
