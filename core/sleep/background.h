// What an engine does on a thread of its own, when nobody asks for anything: host memory is
// prepared after regions end, kept backups are dropped after their time, and pools give back what
// the device has passed.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "core/backup/host_image.h"
#include "core/backup/reaper.h"
#include "core/sleep/operation.h"
#include "core/thread_annotations.h"
#include "core/transition.h"

namespace dormouse {

class Background {
 public:
  // The locks are the engine's, one operation at a time and transitions.
  Background(const OperationEnv& env, AskedLock& operation, AskedLock& transition,
             std::function<std::vector<Pool*>()> pools);

  // A region ended: host memory may be prepared.
  void prepare() noexcept { notify(true); }
  // Memory woke: the time of kept backups begins.
  void woke() noexcept;
  // A pool has memory to give back once the device has passed its free. Takes no lock of pools.
  void collect_later() noexcept;
  // See Engine::stop_background.
  void stop(std::chrono::milliseconds at_most) noexcept;

 private:
  using Clock = std::chrono::steady_clock;

  void notify(bool prepare) noexcept;
  bool start() REQUIRES(background_mutex_);
  void run();
  Clock::time_point drop_old_backups();
  bool collect() noexcept;
  bool give_way() const noexcept;
  bool prepare_one();
  Status prepare_chunk(const Pool& pool, Chunk& chunk, const Ranges& ranges,
                       ImagePtr<HostImage>* made);

  const OperationEnv& env_;
  AskedLock& operation_;
  AskedLock& transition_;
  const std::function<std::vector<Pool*>()> pools_;

  Mutex background_mutex_;
  std::condition_variable wanted_;
  std::atomic<bool> stop_{false};
  bool ended_ GUARDED_BY(background_mutex_) = true;
  bool prepare_wanted_ GUARDED_BY(background_mutex_) = false;
  Clock::time_point drop_backups_at_ = Clock::time_point::max();
  // When pools are asked next what the device has passed, and how long after that.
  Clock::time_point collect_at_ GUARDED_BY(background_mutex_) = Clock::time_point::max();
  std::chrono::milliseconds collect_pause_{1};
  std::thread thread_ GUARDED_BY(background_mutex_);  // started at first need
};

}  // namespace dormouse
