// The lock under which chunks are on their way from one state to another.
#pragma once

#include <atomic>
#include <mutex>

#include "core/threads.h"

namespace dormouse {

// A lock whose owner can see that others want it.
class AskedLock {
 public:
  void lock() {
    asking_.fetch_add(1);
    mutex_.lock();
    asking_.fetch_sub(1);
  }
  void unlock() { mutex_.unlock(); }
  bool is_asked_for() const noexcept { return asking_.load() != 0; }

 private:
  std::mutex mutex_;
  std::atomic<int> asking_{0};
};

// Handed on as the proof that the lock is held: by an operation, but not while it asks for unused
// memory, by background preparation, and by the program's own mappings. The thread may be the
// program's: pthread_cancel of it waits.
class Transition {
 public:
  explicit Transition(AskedLock& lock) : lock_(lock) {}
  void unlock() { lock_.unlock(); }

 private:
  const CancellationOff cancellation_;
  std::unique_lock<AskedLock> lock_;
};

}  // namespace dormouse
