// mergecore._stream: windows over files in a known order, read ahead by threads of its own; early
// write-back for the writer. Knows bytes, pages and faults; knows nothing of tensors or
// safetensors.
//
// Two ways to the same windows:
//   map    the file is mapped; the thread makes a window's pages resident before it is asked for
//   and
//          drops the pages of windows that are done, so at most depth + 1 windows are resident.
//   pread  the window is read into one of depth + 1 reused buffers (network mounts).
//
// A mapped file that shrinks, or whose disk fails, raises SIGBUS in whichever thread touches the
// page. The handler here maps zero pages over the rest of that mapping and notes the place; the
// computation runs on over zeros and next() or check() raise before its result is used.

#include <fcntl.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace py = pybind11;

namespace {

const uint64_t kPage = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
constexpr uint64_t kHugePage = uint64_t{2} << 20;
constexpr uint64_t kChunk = uint64_t{4} << 20;  // the thread looks for close() this often
constexpr uint64_t kNoFault = ~uint64_t{0};

uint64_t page_down(uint64_t x) { return x / kPage * kPage; }
uint64_t page_up(uint64_t x) { return page_down(x + kPage - 1); }

// Becomes the fitting OSError (FileNotFoundError and so on) in Python.
struct OsError {
  int code;
  std::string message;
  std::string path;  // may be empty
};

OsError os_error(const std::string& what, const std::string& path = "") {
  const int code = errno;
  return {code, what.empty() ? std::strerror(code) : what + ": " + std::strerror(code), path};
}

// ---- SIGBUS -------------------------------------------------------------------------------------
// The registry is a fixed array, because a signal handler may neither lock nor allocate. `begin` is
// published last and cleared first, and the handler reads it twice, so it never pairs the begin of
// one mapping with the end of another that took the same slot.

struct Slot {
  std::atomic<bool> taken{false};
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
  std::atomic<uint64_t> fault{kNoFault};  // lowest faulting offset within the mapping
};
static_assert(std::atomic<uintptr_t>::is_always_lock_free);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

constexpr size_t kSlots = 4096;
Slot slots[kSlots];
struct sigaction previous_action;
std::atomic<bool> passed_on{false};

void note_fault(Slot& slot, uint64_t offset) {
  uint64_t seen = slot.fault.load();
  while (offset < seen && !slot.fault.compare_exchange_weak(seen, offset)) {
  }
}

// To whoever handled SIGBUS before us, or else to the default: the process ends.
void pass_on(int signal, siginfo_t* info, void* context) {
  // A previous handler that reports and then raises the signal again, to end the process
  // (faulthandler does), has put us back in front: the signal comes here a second time.
  const bool raised_again = passed_on.exchange(true) && info->si_code == SI_TKILL;
  const bool siginfo = (previous_action.sa_flags & SA_SIGINFO) != 0;
  if (!raised_again && siginfo) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (!raised_again && previous_action.sa_handler != SIG_DFL &&
             previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
  } else {
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(signal, &standard, nullptr);
    raise(signal);  // stays pending until our handler returns
  }
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  if (info->si_code > 0) {  // from the kernel, for an address; not sent by kill()
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    for (Slot& slot : slots) {
      const uintptr_t begin = slot.begin.load();
      if (begin == 0 || address < begin) continue;
      const uintptr_t end = slot.end.load();
      if (address >= end || slot.begin.load() != begin) continue;
      const uintptr_t page = address / kPage * kPage;
      note_fault(slot, page - begin);  // first: nobody may see the zeros and not the note
      void* zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                         MAP_FIXED | MAP_ANONYMOUS | MAP_PRIVATE | MAP_NORESERVE, -1, 0);
      if (zeros == MAP_FAILED) break;
      errno = saved_errno;
      return;
    }
  }
  pass_on(signal, info, context);
  errno = saved_errno;
}

// Called whenever a file is mapped: something else (faulthandler.enable(), say) may have put its
// own handler in front of ours in the meantime.
void install_handler() {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  struct sigaction current = {};
  sigaction(SIGBUS, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_bus_error) return;
  previous_action = current;
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigemptyset(&ours.sa_mask);
  if (sigaction(SIGBUS, &ours, nullptr) != 0) throw os_error("cannot handle SIGBUS");
}

// ---- memory -------------------------------------------------------------------------------------
// Windows share ownership of the memory that they show: a view that outlives its stream shows stale
// bytes but never unmapped ones.

class Memory {
 public:
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  virtual ~Memory() { munmap(data_, length_); }
  uint8_t* data() const { return data_; }
  uint64_t length() const { return length_; }

 protected:
  Memory(void* data, uint64_t length) : data_(static_cast<uint8_t*>(data)), length_(length) {}

 private:
  uint8_t* data_;
  uint64_t length_;
};

class Buffer : public Memory {
 public:
  static std::shared_ptr<Buffer> make(uint64_t length) {
    length = (length + kHugePage - 1) / kHugePage * kHugePage;
    void* data = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      throw os_error("cannot allocate a window of " + std::to_string(length) + " bytes");
    }
    madvise(data, length, MADV_HUGEPAGE);
    return std::shared_ptr<Buffer>(new Buffer(data, length));
  }

 private:
  using Memory::Memory;
};

class Mapping : public Memory {
 public:
  static std::shared_ptr<Mapping> make(int fd, uint64_t size, const std::string& path) {
    Slot* slot = nullptr;
    for (Slot& candidate : slots) {
      if (!candidate.taken.exchange(true)) {
        slot = &candidate;
        break;
      }
    }
    if (slot == nullptr) {
      throw std::runtime_error("more than " + std::to_string(kSlots) +
                               " files are mapped at once; read with mode 'pread'");
    }
    const uint64_t length = page_up(size);
    void* data = mmap(nullptr, length, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
      const OsError error = os_error("cannot map the file (mode 'pread' may do)", path);
      slot->taken.store(false);
      throw error;
    }
    // Every byte is wanted once or twice, in order: the pages need not push out other programs'.
    madvise(data, length, MADV_SEQUENTIAL);
    slot->fault.store(kNoFault);
    slot->end.store(reinterpret_cast<uintptr_t>(data) + length);
    slot->begin.store(reinterpret_cast<uintptr_t>(data));
    return std::shared_ptr<Mapping>(new Mapping(data, length, slot));
  }

  ~Mapping() override {
    slot_->begin.store(0);
    slot_->taken.store(false);
  }

  void note(uint64_t offset) { note_fault(*slot_, offset); }
  uint64_t fault() const { return slot_->fault.load(); }

 private:
  Mapping(void* data, uint64_t length, Slot* slot) : Memory(data, length), slot_(slot) {}
  Slot* slot_;
};

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
};

struct Window {
  std::vector<Piece> pieces;
  bool keep;
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

// The stream's thread and its helpers, who share the parts of a window.
class Crew {
 public:
  // Called by the stream's thread: helpers inherit which signals it blocks.
  explicit Crew(int64_t helpers) {
    for (int64_t i = 0; i < helpers; ++i) threads_.emplace_back([this] { help(); });
  }

  ~Crew() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Calls work(0) ... work(count - 1), each once, in any order; returns when all are done.
  void share(size_t count, const std::function<void(size_t)>& work) {
    if (threads_.empty() || count < 2) {
      for (size_t i = 0; i < count; ++i) work(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      next_ = 0;
      count_ = count;
      busy_ = threads_.size();
      ++round_;
    }
    wake_.notify_all();
    take_all();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void take_all() {
    for (size_t i; (i = next_.fetch_add(1)) < count_;) (*work_)(i);
  }

  void help() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || round_ != seen; });
        if (stop_) return;
        seen = round_;
      }
      take_all();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(size_t)>* work_ = nullptr;
  std::atomic<size_t> next_{0};
  size_t count_ = 0, busy_ = 0;
  uint64_t round_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

class WindowStream {
 public:
  WindowStream(std::vector<std::string> paths, const std::string& mode, int64_t depth,
               int64_t threads, bool populate, py::object opener)
      : threads_(threads), populate_(populate), opener_(std::move(opener)) {
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
    Window window{{}, keep, nullptr};
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
    if (handed_ == dropped_) return;  // no window is out
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
      wake_.wait(lock, [this] {
        return stop_ || dropped_ < released_ ||
               (filled_ < submitted_ && filled_ < released_ + depth_ + 1 && !fault_ && !failure_);
      });
      if (stop_) return;
      if (dropped_ < released_) {  // first, so that no more than depth + 1 windows are resident
        if (map_ && !windows_.front().keep) drop_front(lock, crew);
        windows_.pop_front();
        ++dropped_;
        continue;
      }
      // One window more than is filled: the disk always has a request to work on.
      for (; asked_ < submitted_ && asked_ < filled_ + 2; ++asked_) {
        ask_disk(windows_[asked_ - dropped_]);
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

  void ask_disk(const Window& window) const {
    for (const Piece& piece : window.pieces) {
      posix_fadvise(files_[piece.file].fd, static_cast<off_t>(piece.offset),
                    static_cast<off_t>(piece.nbytes), POSIX_FADV_WILLNEED);
    }
  }

  struct Chunk {
    Piece piece;
    uint64_t wanted;  // the first byte that was asked for
    uint8_t* to;      // pread only
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
      if (piece.nbytes == 0) continue;
      const uint64_t first = map_ ? page_down(piece.offset) : piece.offset;
      for (uint64_t begin = first; begin < piece.end(); begin += kChunk) {
        const uint64_t nbytes = std::min(kChunk, piece.end() - begin);
        uint8_t* to = map_ ? nullptr : window.buffer->data() + at + (begin - first);
        chunks.push_back({{piece.file, begin, nbytes}, std::max(begin, piece.offset), to});
      }
      at += page_up(piece.nbytes);
    }
    std::vector<std::optional<Fault>> faults(chunks.size());
    crew.share(chunks.size(), [&](size_t i) {
      if (!stop_) faults[i] = map_ ? populate(chunks[i]) : read(chunks[i]);
    });
    for (std::optional<Fault>& fault : faults) {
      if (fault) return std::move(fault);
    }
    return std::nullopt;
  }

  std::optional<Fault> populate(const Chunk& chunk) {
    const File& file = files_[chunk.piece.file];
    const uint64_t at = chunk.piece.offset;
    uint8_t* begin = file.mapping->data() + at;
    const uint64_t length = page_up(chunk.piece.nbytes);
    while (populate_ && madvise(begin, length, MADV_POPULATE_READ) != 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      if (errno == EINVAL) {  // a kernel before 5.14
        populate_ = false;
        break;
      }
      const int error = errno;
      const std::string reason =
          error == EFAULT ? "I/O error" : std::string("cannot be mapped: ") + strerror(error);
      return Fault{file.path, chunk.wanted, changed(file).value_or(reason)};
    }
    if (!populate_) {
      madvise(begin, length, MADV_WILLNEED);
      for (uint64_t i = 0; i < length; i += kPage) {
        static_cast<void>(*const_cast<volatile uint8_t*>(begin + i));
      }
    }
    return std::nullopt;
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

  // Drops the pages of the front window, outwards to whole pages, but for those that a window
  // filled after it shows as well: consecutive windows share their edge pages, and faulting one in
  // again would bring its neighbours with it.
  void drop_front(std::unique_lock<std::mutex>& lock, Crew& crew) {
    struct Range {
      uint64_t begin, end;
    };
    std::vector<std::pair<Mapping*, Range>> dropped;
    for (const Piece& piece : windows_.front().pieces) {
      if (piece.nbytes == 0) continue;
      std::vector<Range> ranges{{page_down(piece.offset), page_up(piece.end())}};
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
      for (const Range& range : ranges)
        dropped.emplace_back(files_[piece.file].mapping.get(), range);
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
  std::atomic<bool> populate_;
  py::object opener_;              // path -> descriptor, or None
  std::atomic<bool> stop_{false};  // set with the lock held

  std::mutex close_mutex_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_;
  std::vector<File> files_;
  std::vector<std::shared_ptr<Buffer>> ring_;  // pread only
  std::deque<Window> windows_;                 // dropped_ <= released_ <= handed_ <= filled_
  uint64_t dropped_ = 0, released_ = 0, handed_ = 0, filled_ = 0, asked_ = 0, submitted_ = 0;
  std::optional<Fault> fault_;
  std::exception_ptr failure_;  // out of memory and the like
  std::thread thread_;
};

// ---- write-back ---------------------------------------------------------------------------------

void sync_range(int fd, int64_t offset, int64_t nbytes, unsigned flags) {
  py::gil_scoped_release release;
  if (sync_file_range(fd, offset, nbytes, flags) == 0) return;
  if (errno == ENOSYS || errno == EINVAL || errno == ESPIPE) return;  // cannot, or need not
  throw os_error("write-back of " + std::to_string(nbytes) + " bytes at offset " +
                 std::to_string(offset) + " failed");
}

// ---- Python -------------------------------------------------------------------------------------

std::string file_path(const py::object& path) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

PyObject* read_fault = nullptr;  // the exception type

void set_read_fault(const Fault& fault) {
  py::str text = py::str("{}: {} (reading at byte {})")
                     .format(python_path(fault.path), py::str(fault.reason), fault.offset);
  py::object error = py::handle(read_fault)(text);
  error.attr("path") = python_path(fault.path);
  error.attr("offset") = fault.offset;
  error.attr("reason") = fault.reason;
  PyErr_SetObject(read_fault, error.ptr());
}

void set_os_error(const OsError& error) {
  py::object path = error.path.empty() ? py::object(py::none()) : python_path(error.path);
  py::tuple arguments = py::make_tuple(error.code, error.message, path);
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

}  // namespace

PYBIND11_MODULE(_stream, module) {
  module.doc() = "Windows over files in a known order, read ahead; early write-back.";

  read_fault = PyErr_NewExceptionWithDoc(
      "mergecore._stream.ReadFault",
      "A file could not be read to its end: truncated or modified while in use, or an I/O error.",
      PyExc_OSError, nullptr);
  if (read_fault == nullptr) throw py::error_already_set();
  module.add_object("ReadFault", py::reinterpret_borrow<py::object>(read_fault));
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Fault& fault) {
      set_read_fault(fault);
    } catch (const OsError& error) {
      set_os_error(error);
    }
  });

  py::class_<View>(module, "_View", py::buffer_protocol()).def_buffer([](View& view) {
    static uint8_t nothing;
    return py::buffer_info(view.nbytes > 0 ? view.data : &nothing, 1,
                           py::format_descriptor<uint8_t>::format(), 1,
                           {static_cast<py::ssize_t>(view.nbytes)}, {1}, false);
  });

  py::class_<WindowStream>(module, "WindowStream",
                           "Windows over files in a known order, read ahead by a thread.")
      .def(py::init([](const std::vector<py::object>& files, const std::string& mode, int64_t depth,
                       int64_t threads, bool populate, py::object opener) {
             std::vector<std::string> paths;
             for (const py::object& file : files) paths.push_back(file_path(file));
             return std::make_unique<WindowStream>(std::move(paths), mode, depth, threads, populate,
                                                   std::move(opener));
           }),
           py::arg("files"), py::arg("mode") = "map", py::arg("depth") = 1, py::kw_only(),
           py::arg("threads") = 1, py::arg("populate") = true, py::arg("opener") = py::none())
      .def("submit", &WindowStream::submit, py::arg("pieces"), py::arg("keep") = false)
      .def("next",
           [](WindowStream& stream) {
             py::list views;
             for (View& view : stream.next()) {
               views.append(py::memoryview(py::cast(std::move(view))));
             }
             return views;
           })
      .def("check", &WindowStream::check)
      .def("close",
           [](WindowStream& stream) {
             py::gil_scoped_release release;
             stream.close();
           })
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](WindowStream& stream, const py::args&) {
        py::gil_scoped_release release;
        stream.close();
      });

  module.def(
      "start_writeback",
      [](int fd, int64_t offset, int64_t nbytes) {
        sync_range(fd, offset, nbytes, SYNC_FILE_RANGE_WRITE);
      },
      py::arg("fd"), py::arg("offset"), py::arg("nbytes"));
  module.def(
      "wait_writeback",
      [](int fd, int64_t offset, int64_t nbytes) {
        sync_range(
            fd, offset, nbytes,
            SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
      },
      py::arg("fd"), py::arg("offset"), py::arg("nbytes"));
}
