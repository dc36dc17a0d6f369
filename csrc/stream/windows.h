// Windows over files in a known order, read ahead by threads of their own.
//
// Two ways to the same windows:
//   map    the file is mapped; the threads make a window's pages resident before it is asked for
//          and drop the pages of windows that are done, so at most depth + 1 windows are resident.
//   pread  the window is read into one of depth + 1 reused buffers (network mounts).
//
// Over a bad page of a mapped file (memory.h) the computation runs on with zeros, and next() or
// check() raise before its result is used.
#pragma once

#include <fcntl.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <signal.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "crew.h"
#include "memory.h"

namespace py = pybind11;

namespace {

constexpr uint64_t kFaultAround = uint64_t{64} << 10;  // pages that a fault maps if they are there
constexpr uint64_t kChunk = uint64_t{4} << 20;         // the thread looks for close() this often

py::object python_path(const std::string& path) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

// ---- files, windows, faults ---------------------------------------------------------------------

struct File {
  std::string path;
  int fd = -1;
  uint64_t size = 0;  // when it was opened
  struct timespec modified = {};
  std::shared_ptr<Mapping> mapping;
};

struct Piece {
  size_t file;
  uint64_t offset;
  uint64_t nbytes;
  uint64_t end() const { return offset + nbytes; }
  bool operator<(const Piece& other) const {
    return std::tie(file, offset, nbytes) < std::tie(other.file, other.offset, other.nbytes);
  }
};

struct Window {
  std::vector<Piece> pieces;
  bool keep;
  bool is_kept;  // by the one before it with the same pieces: the disk need not be asked
  std::shared_ptr<Buffer> buffer;  // pread only
};

struct Fault {  // becomes ReadFault in Python
  std::string path;
  uint64_t offset;
  std::string reason;
};

struct View {  // what a memoryview of a window is taken from
  std::shared_ptr<Memory> memory;
  uint8_t* data;
  uint64_t nbytes;
};

class WindowStream {
 public:
  WindowStream(std::vector<std::string> paths, const std::string& mode, int64_t depth,
               int64_t threads, py::object opener)
      : threads_(threads), opener_(std::move(opener)) {
    if (threads < 1) throw py::value_error("threads must be 1 or more");
    if (mode != "map" && mode != "pread") {
      throw py::value_error("mode is '" + mode + "'; it must be 'map' or 'pread'");
    }
    if (depth < 0) throw py::value_error("depth must be 0 or more windows");
    map_ = mode == "map";
    depth_ = static_cast<uint64_t>(depth);
    files_.resize(paths.size());
    for (size_t i = 0; i < paths.size(); ++i) files_[i].path = std::move(paths[i]);
    if (!map_) ring_.resize(depth_ + 1);
  }

  ~WindowStream() { close(); }

  void submit(const std::vector<std::tuple<int64_t, int64_t, int64_t>>& pieces, bool keep) {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex_);
    refuse_closed();
    Window window{{}, keep, false, nullptr};
    window.pieces.reserve(pieces.size());
    for (const auto& [file_index, offset, nbytes] : pieces) {
      if (file_index < 0 || static_cast<uint64_t>(file_index) >= files_.size()) {
        throw py::index_error("no file " + std::to_string(file_index) + ": the stream has " +
                              std::to_string(files_.size()));
      }
      File& file = files_[static_cast<size_t>(file_index)];
      if (file.fd < 0) open_file(file);
      const auto size = static_cast<int64_t>(file.size);
      if (offset < 0 || nbytes < 0 || offset > size || nbytes > size - offset) {
        throw py::value_error(file.path + ": " + std::to_string(nbytes) + " bytes at offset " +
                              std::to_string(offset) + " are outside the file, which has " +
                              std::to_string(size) + " bytes");
      }
      window.pieces.push_back({static_cast<size_t>(file_index), static_cast<uint64_t>(offset),
                               static_cast<uint64_t>(nbytes)});
    }
    // All before any is noted: a window may show a piece twice, of a model that is named twice.
    window.is_kept = std::all_of(window.pieces.begin(), window.pieces.end(),
                                 [&](const Piece& piece) { return to_keep_.count(piece) != 0; });
    for (const Piece& piece : window.pieces) {
      keep ? void(to_keep_.insert(piece)) : void(to_keep_.erase(piece));
    }
    windows_.push_back(std::move(window));
    ++submitted_;
    if (!thread_.joinable()) start_thread();
    wake_.notify_all();
  }

  std::vector<View> next() {
    {
      py::gil_scoped_release release;
      std::lock_guard<std::mutex> lock(mutex_);
      refuse_closed();
      raise_faults();
      if (handed_ == submitted_) {
        throw std::runtime_error("next() was called, but every submitted window is already out");
      }
      released_ = handed_;
      wake_.notify_all();
    }
    for (;;) {
      {
        py::gil_scoped_release release;
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait_for(lock, std::chrono::milliseconds(200),
                       [this] { return stop_ || filled_ > handed_ || fault_ || failure_; });
        refuse_closed();
        raise_faults();
        if (filled_ > handed_) return hand_out();
      }
      // Python's signal handlers get their turn while a slow disk keeps us waiting.
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }

  void skip() {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex_);
    refuse_closed();
    raise_faults();
    if (handed_ == submitted_) {
      throw std::runtime_error("skip() was called, but every submitted window is already out");
    }
    released_ = ++handed_;
    wake_.notify_all();
  }

  void check() {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(mutex_);
    raise_faults();
  }

  void close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      wake_.notify_all();
    }
    std::lock_guard<std::mutex> closing(close_mutex_);
    if (thread_.joinable()) thread_.join();
    std::lock_guard<std::mutex> lock(mutex_);
    if (files_.empty()) return;
    find_faults();  // what has faulted stays faulted
    handed_ = dropped_ = 0;
    windows_.clear();
    ring_.clear();
    for (File& file : files_) {
      if (file.fd >= 0) ::close(file.fd);
    }
    files_.clear();
  }

 private:
  // -- called with the lock held

  void refuse_closed() const {
    if (stop_) throw py::value_error("the stream is closed");
  }

  int open_path(const std::string& path) const {
    if (!opener_.is_none()) {
      // No other thread waits for the mutex while it holds Python's lock.
      py::gil_scoped_acquire acquire;
      return opener_(python_path(path)).cast<int>();
    }
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw os_error("", path);
    return fd;
  }

  void open_file(File& file) {
    const int fd = open_path(file.path);
    struct stat status;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
      ::close(fd);
      throw py::value_error(file.path + " is not a regular file");
    }
    file.size = static_cast<uint64_t>(status.st_size);
    file.modified = status.st_mtim;
    if (map_ && file.size > 0) {
      install_handler();
      try {
        file.mapping = Mapping::make(fd, file.size, file.path);
      } catch (...) {
        ::close(fd);
        throw;
      }
    } else if (!map_) {
      posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    }
    file.fd = fd;
  }

  void start_thread() {
    // Signals belong to Python's threads; the ones that a bad page raises stay open here.
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (int signal : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) sigdelset(&blocked, signal);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    try {
      thread_ = std::thread([this] { run(); });
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // What is wrong with the file, or nothing: a file may also lose bytes, or be rewritten, without
  // any page of ours faulting.
  static std::optional<std::string> changed(const File& file) {
    struct stat status;
    if (fstat(file.fd, &status) != 0) return std::string("I/O error: ") + std::strerror(errno);
    const auto size = static_cast<uint64_t>(status.st_size);
    if (size < file.size) {
      return "truncated from " + std::to_string(file.size) + " to " + std::to_string(size) +
             " bytes while in use";
    }
    if (size != file.size || status.st_mtim.tv_sec != file.modified.tv_sec ||
        status.st_mtim.tv_nsec != file.modified.tv_nsec) {
      return "modified while in use";
    }
    return std::nullopt;
  }

  void find_faults() {
    for (const File& file : files_) {
      if (fault_) return;
      if (file.mapping && file.mapping->fault() != kNoFault) {
        fault_ = Fault{file.path, file.mapping->fault(), changed(file).value_or("I/O error")};
      }
    }
    if (handed_ == released_) return;  // no window is out
    for (const Piece& piece : windows_[handed_ - 1 - dropped_].pieces) {
      if (fault_) return;
      const File& file = files_[piece.file];
      if (auto reason = changed(file)) fault_ = Fault{file.path, piece.offset, *reason};
    }
  }

  void raise_faults() {
    if (failure_) std::rethrow_exception(failure_);
    if (!stop_) find_faults();
    if (fault_) throw *fault_;
  }

  std::vector<View> hand_out() {
    const Window& window = windows_[handed_ - dropped_];
    ++handed_;
    std::vector<View> views;
    views.reserve(window.pieces.size());
    uint64_t at = 0;  // within the buffer
    for (const Piece& piece : window.pieces) {
      if (piece.nbytes == 0) {
        views.push_back({nullptr, nullptr, 0});
      } else if (map_) {
        const auto& mapping = files_[piece.file].mapping;
        views.push_back({mapping, mapping->data() + piece.offset, piece.nbytes});
      } else {
        views.push_back({window.buffer, window.buffer->data() + at, piece.nbytes});
        at += page_up(piece.nbytes);
      }
    }
    return views;
  }

  // -- the thread

  void run() {
    Crew crew(threads_ - 1);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      const auto may_fill = [this] {
        return filled_ < submitted_ && filled_ < released_ + depth_ + 1 && !fault_ && !failure_;
      };
      wake_.wait(
          lock, [&] { return stop_ || dropped_ < released_ || asked_ < submitted_ || may_fill(); });
      if (stop_) return;
      filled_ = std::max(filled_, handed_);  // windows that are passed over stay as they are
      if (dropped_ < released_) {  // first, so that no more than depth + 1 windows are resident
        if (map_ && !windows_.front().keep) drop_front(lock, crew);
        windows_.pop_front();
        ++dropped_;
        continue;
      }
      if (!may_fill()) {  // the disk works on while windows are read again
        if (asked_ < filled_)
          std::tie(asked_, asked_piece_, asked_bytes_) = std::tuple(filled_, 0, 0);
        if (asked_ == submitted_) continue;
        const Window& next = windows_[asked_ - dropped_];
        lock.unlock();
        const bool is_asked = !ask_disk(next);
        lock.lock();
        if (is_asked) ++asked_;
        continue;
      }
      Window& window = windows_[filled_ - dropped_];
      if (!map_) window.buffer = std::move(ring_[filled_ % ring_.size()]);
      std::optional<Fault> fault;
      std::exception_ptr failure;
      lock.unlock();  // submit() and next() leave this window alone until it is filled
      try {
        fault = fill(window, crew);
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      if (stop_) return;
      if (!map_) ring_[filled_ % ring_.size()] = window.buffer;
      if (fault) fault_ = fault;
      if (failure) failure_ = failure;
      if (!fault && !failure) ++filled_;
      wake_.notify_all();
    }
  }

  // Brings what is next of a window, a huge page or less, into the page cache; false at its end.
  bool ask_disk(const Window& window) {
    for (; asked_piece_ < window.pieces.size(); ++asked_piece_, asked_bytes_ = 0) {
      const Piece& piece = window.pieces[asked_piece_];
      const File& file = files_[piece.file];
      if (asked_bytes_ == piece.nbytes || window.is_kept) continue;
      if (asked_bytes_ == 0 && is_cached(file.fd, piece.offset, piece.nbytes)) continue;
      const uint64_t begin = piece.offset + asked_bytes_;
      const uint64_t end = std::min(piece.end(), (begin / kHugePage + 1) * kHugePage);
      asked_bytes_ = end - piece.offset;
      if (map_ && read_page(file, begin)) {
        madvise(file.mapping->data() + page_down(begin), end - page_down(begin), MADV_DONTNEED);
        if (!is_cached(file.fd, end - 1, 1)) {  // before Linux 5.18, or not known
          posix_fadvise(file.fd, static_cast<off_t>(begin), static_cast<off_t>(end - begin),
                        POSIX_FADV_WILLNEED);
        }
      } else {
        asked_bytes_ = piece.nbytes;
        posix_fadvise(file.fd, static_cast<off_t>(piece.offset), static_cast<off_t>(piece.nbytes),
                      POSIX_FADV_WILLNEED);
      }
      return true;
    }
    asked_piece_ = 0;
    return false;
  }

  // Waits for a page of a mapping, with which the disk reads the huge page around it and goes on
  // with the next one. (POSIX_FADV_WILLNEED fills the page cache with small pages, which are slow
  // to map, this time and the next.) False where the kernel cannot (Linux 5.14) or may not.
  static bool read_page(const File& file, uint64_t offset) {
    return madvise(file.mapping->data() + page_down(offset), kPage, MADV_POPULATE_READ) == 0;
  }

  // Whether all of it lies in the page cache, which takes a tenth of the time of asking for it.
  // (cachestat, Linux 6.5; not for files of others.)
  static bool is_cached(int fd, uint64_t offset, uint64_t nbytes) {
    struct {
      uint64_t offset, nbytes;
    } range{page_down(offset), page_up(offset + nbytes) - page_down(offset)};
    struct {
      uint64_t cached, dirty, written, evicted, recently_evicted;
    } found{};
    constexpr long kCachestat = 451;  // on every architecture
    return syscall(kCachestat, fd, &range, &found, 0) == 0 && found.cached == range.nbytes / kPage;
  }

  struct Chunk {
    Piece piece;
    uint8_t* to;  // pread only
  };

  // Makes a window resident; returns what prevents it, at the first place where something does.
  std::optional<Fault> fill(Window& window, Crew& crew) {
    uint64_t total = 0;
    for (const Piece& piece : window.pieces) total += page_up(piece.nbytes);
    if (!map_ && (!window.buffer || window.buffer->length() < total)) {
      window.buffer.reset();  // the old one first: both at once would break the bound
      window.buffer = Buffer::make(std::max(total, kPage));
    }
    std::vector<Chunk> chunks;
    uint64_t at = 0;  // within the buffer
    for (const Piece& piece : window.pieces) {
      if (piece.nbytes == 0 || kept_.count(piece) != 0) continue;
      const uint64_t first = map_ ? page_down(piece.offset) : piece.offset;
      for (uint64_t begin = first; begin < piece.end(); begin += kChunk) {
        const uint64_t nbytes = std::min(kChunk, piece.end() - begin);
        uint8_t* to = map_ ? nullptr : window.buffer->data() + at + (begin - first);
        chunks.push_back({{piece.file, begin, nbytes}, to});
      }
      at += page_up(piece.nbytes);
    }
    std::vector<std::optional<Fault>> faults(chunks.size());
    crew.share(chunks.size(), [&](size_t i) {
      if (stop_) return;
      const auto& [piece, to] = chunks[i];
      if (map_) {
        touch(files_[piece.file].mapping->data() + piece.offset, piece.nbytes);
      } else {
        faults[i] = read(chunks[i]);
      }
    });
    for (std::optional<Fault>& fault : faults) {
      if (fault) return std::move(fault);
    }
    if (map_ && window.keep) kept_.insert(window.pieces.begin(), window.pieces.end());
    return std::nullopt;
  }

  // One byte for each fault: the kernel maps what it has around it. (MADV_POPULATE_READ goes page
  // by page.) What it does not have yet, or maps less of, faults where it is used.
  static void touch(const uint8_t* begin, uint64_t nbytes) {
    const auto first = reinterpret_cast<uintptr_t>(begin);
    for (uintptr_t at = first; at < first + nbytes; at = (at / kFaultAround + 1) * kFaultAround) {
      static_cast<void>(*reinterpret_cast<const volatile uint8_t*>(at));
    }
  }

  std::optional<Fault> read(const Chunk& chunk) {
    const File& file = files_[chunk.piece.file];
    for (uint64_t done = 0; done < chunk.piece.nbytes && !stop_;) {
      const uint64_t offset = chunk.piece.offset + done;
      const ssize_t got =
          pread(file.fd, chunk.to + done, chunk.piece.nbytes - done, static_cast<off_t>(offset));
      if (got > 0) {
        done += static_cast<uint64_t>(got);
      } else if (got == 0) {
        return Fault{file.path, offset, changed(file).value_or("truncated")};
      } else if (errno != EINTR) {
        return Fault{file.path, offset, std::string("I/O error: ") + std::strerror(errno)};
      }
    }
    return std::nullopt;
  }

  // Drops the pages of the front window, outwards to what a fault at its ends maps, but for those
  // that a window filled after it shows as well: consecutive windows share their edge pages, and
  // faulting one in again would bring its neighbours with it. Without reading ahead windows lie
  // here and there, and a fault may have mapped a large page for each.
  void drop_front(std::unique_lock<std::mutex>& lock, Crew& crew) {
    struct Range {
      uint64_t begin, end;
    };
    const uint64_t around = depth_ == 0 ? kHugePage : kFaultAround;
    std::vector<std::pair<Mapping*, Range>> dropped;
    for (const Piece& piece : windows_.front().pieces) {
      kept_.erase(piece);
      if (piece.nbytes == 0) continue;
      const auto& mapping = files_[piece.file].mapping;
      const auto data = reinterpret_cast<uintptr_t>(mapping->data());
      const uintptr_t begin = (data + piece.offset) / around * around;
      const uintptr_t end = ((data + piece.end() - 1) / around + 1) * around;
      std::vector<Range> ranges{
          {std::max(data, begin) - data, std::min<uint64_t>(end - data, mapping->length())}};
      for (uint64_t i = 1; i < filled_ - dropped_; ++i) {
        for (const Piece& other : windows_[i].pieces) {
          if (other.file != piece.file || other.nbytes == 0) continue;
          const Range kept{page_down(other.offset), page_up(other.end())};
          std::vector<Range> rest;
          for (const Range& range : ranges) {
            if (range.begin < std::min(range.end, kept.begin)) {
              rest.push_back({range.begin, std::min(range.end, kept.begin)});
            }
            if (std::max(range.begin, kept.end) < range.end) {
              rest.push_back({std::max(range.begin, kept.end), range.end});
            }
          }
          ranges = std::move(rest);
        }
      }
      for (const Range& range : ranges) dropped.emplace_back(mapping.get(), range);
    }
    lock.unlock();
    crew.share(dropped.size(), [&](size_t i) {
      const auto& [mapping, range] = dropped[i];
      madvise(mapping->data() + range.begin, range.end - range.begin, MADV_DONTNEED);
    });
    lock.lock();
  }

  bool map_ = true;
  uint64_t depth_ = 1;
  int64_t threads_;
  py::object opener_;              // path -> descriptor, or None
  std::atomic<bool> stop_{false};  // set with the lock held

  std::set<Piece> kept_;  // resident pieces of windows that are kept; the thread's own

  std::mutex close_mutex_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_;
  std::vector<File> files_;
  std::vector<std::shared_ptr<Buffer>> ring_;  // pread only
  std::set<Piece> to_keep_;                    // of the last windows that show them
  // dropped_ <= released_ <= handed_ <= filled_, but for windows that were passed over while
  // another was filled.
  std::deque<Window> windows_;
  uint64_t dropped_ = 0, released_ = 0, handed_ = 0, filled_ = 0, asked_ = 0, submitted_ = 0;
  uint64_t asked_piece_ = 0, asked_bytes_ = 0;  // of the window after those; the thread's own
  std::optional<Fault> fault_;
  std::exception_ptr failure_;  // out of memory and the like
  std::thread thread_;
};

}  // namespace
