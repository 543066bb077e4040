// How far the operation that runs is, for those who wait for it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "core/stats.h"
#include "core/thread_annotations.h"

namespace dormouse {

// Thread-safe.
class ProgressBoard {
 public:
  // An operation runs while this lives; one at a time.
  class Running {
   public:
    Running(ProgressBoard& board, const char* operation) : board_(board) {
      MutexLock lock(board.progress_mutex_);
      board.done_.store(0, std::memory_order_relaxed);
      board.progress_ = Progress{true, operation, 0, 0, 0};
      board.began_ = std::chrono::steady_clock::now();
    }
    ~Running() {
      MutexLock lock(board_.progress_mutex_);
      board_.progress_ = Progress{};
    }
    Running(const Running&) = delete;
    Running& operator=(const Running&) = delete;

   private:
    ProgressBoard& board_;
  };

  // So many bytes will be known to need no copy (sleeping) or copied.
  void expect(std::uint64_t bytes) {
    MutexLock lock(progress_mutex_);
    progress_.total_bytes = bytes;
  }
  void add(std::uint64_t bytes) noexcept { done_.fetch_add(bytes, std::memory_order_relaxed); }
  std::atomic<std::uint64_t>* done() noexcept { return &done_; }

  Progress now() const {
    MutexLock lock(progress_mutex_);
    Progress progress = progress_;
    if (!progress.active) return progress;
    progress.done_bytes = done_.load(std::memory_order_relaxed);
    progress.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
    return progress;
  }

 private:
  mutable Mutex progress_mutex_;
  Progress progress_ GUARDED_BY(progress_mutex_);
  std::chrono::steady_clock::time_point began_ GUARDED_BY(progress_mutex_);
  std::atomic<std::uint64_t> done_{0};
};

}  // namespace dormouse
