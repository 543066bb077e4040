// Stream captures of the program. A wait of ours for the device ends a capture that runs, with an
// error; so the two take turns.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>

#include "core/thread_annotations.h"

namespace dormouse {

class Captures {
 public:
  // While it lives no capture begins, except for one that has waited for kLongestDelay.
  class Excluded {
   public:
    // Waits for running captures, at most `limit`. False: one still runs.
    explicit Excluded(Captures& captures, std::chrono::milliseconds limit);
    ~Excluded();
    Excluded(const Excluded&) = delete;
    Excluded& operator=(const Excluded&) = delete;

    explicit operator bool() const noexcept { return excluded_; }

   private:
    Captures& captures_;
    bool excluded_ = false;
  };

  // The driver looks for captures when a wait begins. This long after, it has.
  static constexpr std::chrono::milliseconds kLongestDelay{500};

  // Around a capture, from before the call that begins it.
  void begin() noexcept;
  void end() noexcept;
  bool any() const noexcept { return running_.load(std::memory_order_relaxed) != 0; }
  // Returns when none runs; false after `limit`.
  bool wait_for_none(std::chrono::milliseconds limit);

 private:
  Mutex captures_mutex_;
  std::condition_variable changed_;
  std::atomic<int> running_{0};  // changed under the lock
  int excluded_ GUARDED_BY(captures_mutex_) = 0;
};

}  // namespace dormouse
