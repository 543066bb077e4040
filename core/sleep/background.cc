// See background.h.
#include "core/sleep/background.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/backup/content_hash.h"
#include "core/backup/host_image.h"
#include "core/context.h"
#include "core/log.h"
#include "core/threads.h"

namespace dormouse {
namespace {

// Preparation looks again after this time whether those who asked have gone.
constexpr std::chrono::milliseconds kGivingWay{1};
// Between looks at what the device has passed; twice as long each time.
constexpr std::chrono::milliseconds kFirstPause{1};
constexpr std::chrono::milliseconds kLongestPause{100};
// And whether backups that an operation was using can go.
constexpr std::chrono::milliseconds kLookAgain{100};

}  // namespace

Background::Background(const OperationEnv& env, AskedLock& operation, AskedLock& transition,
                       std::function<std::vector<Pool*>()> pools)
    : env_(env), operation_(operation), transition_(transition), pools_(std::move(pools)) {}

void Background::woke() noexcept {
  if (env_.options.keep_backups && env_.options.keep_backups_for.count() != 0) notify(false);
}

// At first need: most processes never have one.
bool Background::start() {
  if (stop_) return false;
  if (!thread_.joinable()) {
    ended_ = false;
    thread_ = start_background_thread("dormouse-bg", [this] { run(); });
  }
  return true;
}

void Background::notify(bool prepare) noexcept {
  try {
    MutexLock lock(background_mutex_);
    if (stop_) return;
    if (prepare) {
      prepare_wanted_ = true;
    } else {
      drop_backups_at_ = std::min(drop_backups_at_, Clock::now() + env_.options.keep_backups_for);
    }
    start();
    wanted_.notify_one();
  } catch (const std::exception& error) {
    if (first_time("background")) log().warn("no thread for background work: {}", error.what());
  }
}

void Background::run() {
  MutexLock lock(background_mutex_);
  while (!stop_) {
    if (Clock::now() >= collect_at_) {
      lock.unlock();
      const bool more = collect();
      lock.lock();
      collect_pause_ = more ? std::min(2 * collect_pause_, kLongestPause) : kFirstPause;
      collect_at_ = more ? Clock::now() + collect_pause_ : Clock::time_point::max();
    } else if (prepare_wanted_ && give_way()) {
      wanted_.wait_for(lock.waiting(), kGivingWay);
    } else if (prepare_wanted_) {
      prepare_wanted_ = false;
      lock.unlock();
      bool more = false;
      try {
        more = prepare_one();
      } catch (const std::exception& error) {
        log().info("no more host memory is prepared: {}", error.what());
      }
      lock.lock();
      prepare_wanted_ = prepare_wanted_ || more;
    } else if (Clock::now() >= drop_backups_at_) {
      drop_backups_at_ = Clock::time_point::max();
      lock.unlock();
      const auto next = drop_old_backups();
      lock.lock();
      drop_backups_at_ = std::min(drop_backups_at_, next);
    } else if (const auto next = std::min(drop_backups_at_, collect_at_);
               next == Clock::time_point::max()) {
      wanted_.wait(lock.waiting());
    } else {
      wanted_.wait_until(lock.waiting(), next);
    }
  }
  ended_ = true;
  wanted_.notify_all();
}

void Background::collect_later() noexcept {
  try {
    MutexLock lock(background_mutex_);
    if (collect_at_ != Clock::time_point::max() || !start()) return;
    collect_at_ = Clock::now() + collect_pause_;
    wanted_.notify_one();
  } catch (const std::exception&) {
    // Another free finds out.
  }
}

// True if a pool still has memory to give back when the device has passed its free.
bool Background::collect() noexcept {
  bool more = false;
  try {
    for (Pool* pool : pools_()) more = pool->collect() || more;
  } catch (const std::exception&) {
    more = true;
  }
  return more;
}

bool Background::give_way() const noexcept {
  return operation_.is_asked_for() || transition_.is_asked_for() || stop_.load();
}

// Of pools that woke long enough ago. Returns when the next is due.
Background::Clock::time_point Background::drop_old_backups() {
  auto next = Clock::time_point::max();
  try {
    for (Pool* pool : pools_()) {
      const auto woke_at = pool->woke_at();
      if (!woke_at) continue;
      const auto due = *woke_at + env_.options.keep_backups_for;
      if (due > Clock::now()) {
        next = std::min(next, due);
        continue;
      }
      pool->drop_backups(true);
      if (pool->woke_at()) next = std::min(next, Clock::now() + kLookAgain);
    }
  } catch (const std::bad_alloc&) {
    return Clock::now() + env_.options.keep_backups_for;
  }
  return next;
}

// Gets host memory ready for one chunk. An operation that the program or its owner asks for comes
// first: the lock is held for one chunk only. True if there may be more to do.
bool Background::prepare_one() {
  std::lock_guard operation(operation_);
  std::lock_guard transition(transition_);
  std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
  if (const std::uint64_t limit = env_.options.prepare_limit_bytes; limit != 0)
    most = limit - std::min(limit, env_.host.held_bytes());
  for (Pool* pool : pools_()) {
    const PoolOptions& options = pool->options();
    if (options.info.backup != Backup::kHost || options.unified_memory) continue;
    Ranges ranges;
    Chunk* chunk = pool->begin_prepare(most, &ranges);
    if (chunk == nullptr) continue;
    ImagePtr<HostImage> made;
    Status status;
    try {
      status = prepare_chunk(*pool, *chunk, ranges, &made);
    } catch (const std::exception& error) {
      status = {Code::kOutOfHostMemory, error.what()};
    }
    pool->end_prepare(*chunk, status.is_ok() ? std::move(made) : nullptr);
    if (status.is_ok()) return true;
    log().info("no more host memory is prepared: {}", status.message());
    return false;
  }
  return false;
}

// `made` is the chunk's new image, if it had none.
Status Background::prepare_chunk(const Pool& pool, Chunk& chunk, const Ranges& ranges,
                                 ImagePtr<HostImage>* made) {
  const int device = pool.options().ordinal;
  ContextPins pins;
  if (env_.contexts.pin_all({device}, &pins) != CUDA_SUCCESS || pins.for_work_on(device) == nullptr)
    return {Code::kBusy, "the program has no context on the device"};
  const ContextPin& pin = *pins.for_work_on(device);
  if (chunk.image == nullptr) {
    *made = reaped(env_.reaper,
                   HostImage::reserve(env_.driver, env_.contexts, env_.host, device, chunk.bytes));
    if (*made == nullptr) return {Code::kOutOfHostMemory, "no address space"};
  }
  HostImage& image = *made != nullptr ? **made : *chunk.image;
  const std::uint64_t missing = image.missing_bytes(ranges);
  Status status = env_.host.admit(missing);
  if (!status.is_ok()) return status;
  Admitted(env_.host, missing).held(image.add_pieces(ranges));
  image.forget_other_contexts(pins);
  ScopedContext current(env_.driver, pin.context());
  RelaxedCapture relaxed(env_.driver);
  for (HostImage::Piece& piece : image.pieces()) {
    if (give_way()) return Status::ok();  // the rest is prepared later
    status = image.make_ready(piece, pin.id());
    if (!status.is_ok()) return status;
  }
  // The driver compiles the kernel when it loads it; a sleep that fails to hash copies everything.
  if (env_.options.hash) (void)env_.hasher.prepare(pin.context());
  return Status::ok();
}

void Background::stop(std::chrono::milliseconds at_most) noexcept {
  std::thread thread;
  bool ended = true;
  {
    MutexLock lock(background_mutex_);
    stop_ = true;
    wanted_.notify_all();
    thread = std::move(thread_);
    if (at_most != std::chrono::milliseconds::max()) {
      ended = wanted_.wait_for(lock.waiting(), at_most,
                               [this]() REQUIRES(background_mutex_) { return ended_; });
    }
  }
  if (thread.joinable()) ended ? thread.join() : thread.detach();
}

}  // namespace dormouse
