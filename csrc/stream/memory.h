// Memory that windows lie in: buffers, and mapped files whose bad pages become faults instead of
// signals.
//
// A mapped file that shrinks, or whose disk fails, raises SIGBUS in whichever thread touches the
// page. The handler here maps zero pages over the rest of that mapping and notes the place.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

namespace {

const uint64_t kPage = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
constexpr uint64_t kHugePage = uint64_t{2} << 20;
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
    // What is not there yet is read in large pages, which are mapped and dropped at once.
    madvise(data, length, MADV_HUGEPAGE);
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

}  // namespace
