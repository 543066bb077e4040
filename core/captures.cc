// See captures.h.
#include "core/captures.h"

#include "core/threads.h"

namespace dormouse {

Captures::Excluded::Excluded(Captures& captures, std::chrono::milliseconds limit)
    : captures_(captures) {
  MutexLock lock(captures.captures_mutex_);
  excluded_ =
      captures.changed_.wait_for(lock.waiting(), limit, [&] { return captures.running_ == 0; });
  if (excluded_) ++captures.excluded_;
}

Captures::Excluded::~Excluded() {
  if (!excluded_) return;
  MutexLock lock(captures_.captures_mutex_);
  --captures_.excluded_;
  captures_.changed_.notify_all();
}

void Captures::begin() noexcept {
  const CancellationOff cancellation;
  MutexLock lock(captures_mutex_);
  changed_.wait_for(lock.waiting(), kLongestDelay,
                    [&]() REQUIRES(captures_mutex_) { return excluded_ == 0; });
  ++running_;
}

void Captures::end() noexcept {
  MutexLock lock(captures_mutex_);
  --running_;
  changed_.notify_all();
}

bool Captures::wait_for_none(std::chrono::milliseconds limit) {
  MutexLock lock(captures_mutex_);
  return changed_.wait_for(lock.waiting(), limit, [&] { return running_ == 0; });
}

}  // namespace dormouse
