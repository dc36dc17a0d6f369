// Threads that share the parts of one piece of work. Knows nothing of files or windows.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

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

}  // namespace
