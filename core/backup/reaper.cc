// See reaper.h.
#include "core/backup/reaper.h"

#include <unistd.h>

#include <utility>

#include "core/log.h"
#include "core/threads.h"

namespace dormouse {

Reaper::~Reaper() {
  stop(std::chrono::milliseconds::max());
  while (first_ != nullptr) delete std::exchange(first_, first_->next_dropped);
}

void Reaper::take(Image* image) noexcept {
  if (getpid() != process_) return;
  {
    MutexLock lock(reaper_mutex_);
    if (!stopped_) {
      image->next_dropped = first_;
      first_ = image;
      ++taken_;
      // If it cannot be started now, the next image tries again.
      if (start()) changed_.notify_all();
      return;
    }
  }
  delete image;
}

bool Reaper::start() noexcept {
  if (thread_.joinable()) return true;
  try {
    thread_ = start_background_thread("dormouse-reaper", [this] { run(); });
    running_ = true;
  } catch (const std::exception& error) {
    if (first_time("reaper"))
      log().warn("backups that are dropped stay for now, for want of a thread: {}", error.what());
    return false;
  }
  return true;
}

void Reaper::run() noexcept {
  MutexLock lock(reaper_mutex_);
  while (true) {
    changed_.wait(lock.waiting(),
                  [this]() REQUIRES(reaper_mutex_) { return stopped_ || first_ != nullptr; });
    if (stopped_) break;
    Image* image = std::exchange(first_, first_->next_dropped);
    lock.unlock();
    delete image;
    lock.lock();
    ++given_back_;
    changed_.notify_all();
  }
  running_ = false;
  changed_.notify_all();
}

bool Reaper::wait(std::chrono::milliseconds limit) noexcept {
  const CancellationOff cancellation;
  MutexLock lock(reaper_mutex_);
  if (first_ != nullptr) start();
  return changed_.wait_for(lock.waiting(), limit, [this]() REQUIRES(reaper_mutex_) {
    return given_back_ == taken_ || !running_ || stopped_;
  }) && given_back_ == taken_;
}

void Reaper::stop(std::chrono::milliseconds at_most) noexcept {
  std::thread thread;
  bool ended = true;
  {
    MutexLock lock(reaper_mutex_);
    stopped_ = true;
    changed_.notify_all();
    thread = std::move(thread_);
    if (at_most != std::chrono::milliseconds::max())
      ended = changed_.wait_for(lock.waiting(), at_most,
                                [this]() REQUIRES(reaper_mutex_) { return !running_; });
  }
  if (thread.joinable()) ended ? thread.join() : thread.detach();
}

}  // namespace dormouse
