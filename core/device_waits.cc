// See device_waits.h.
#include "core/device_waits.h"

#include <condition_variable>
#include <cstdint>
#include <system_error>
#include <vector>

#include "core/context.h"
#include "core/thread_annotations.h"
#include "core/threads.h"

namespace dormouse {

// A wait is numbered; what begins after it was asked for serves it.
struct DeviceWaits::Wait {
  std::uint64_t asked = 0;
  std::uint64_t ended = 0;
  int callers = 0;
  bool has_thread = false;
  CUresult result = CUDA_SUCCESS;  // of the last that ended
};

// Threads share it: one may still be in its last steps when the owner goes.
struct DeviceWaits::Shared {
  Mutex waits_mutex;
  std::condition_variable changed;
  std::map<CUcontext, Wait> waits GUARDED_BY(waits_mutex);
  int threads GUARDED_BY(waits_mutex) = 0;
};

DeviceWaits::DeviceWaits(const Driver& driver, Contexts& contexts, Captures& captures,
                         std::chrono::milliseconds capture_limit)
    : driver_(driver),
      contexts_(contexts),
      captures_(captures),
      capture_limit_(capture_limit),
      shared_(std::make_shared<Shared>()) {}

DeviceWaits::~DeviceWaits() {
  MutexLock lock(shared_->waits_mutex);
  shared_->changed.wait(lock.waiting(),
                        [&]() REQUIRES(shared_->waits_mutex) { return shared_->threads == 0; });
}

WaitResult DeviceWaits::wait_for(const std::set<int>& devices, std::chrono::milliseconds limit) {
  const CancellationOff cancellation;
  const Captures::Excluded excluded(captures_, capture_limit_);
  if (!excluded) return {.captured = true};
  if (!contexts_.wait_for_retiring(devices, limit)) return {.timed_out = true};
  std::vector<CUcontext> contexts;
  {
    ContextPins pins;
    const CUresult result = contexts_.pin_all(devices, &pins);
    if (result != CUDA_SUCCESS) return {.result = result};
    for (const ContextPin& pin : pins.all()) contexts.push_back(pin.context());
  }
  struct Asked {
    CUcontext context;
    Wait* wait;
    std::uint64_t number;
  };
  std::vector<Asked> asked;
  asked.reserve(contexts.size());
  WaitResult result;
  std::vector<CUcontext> gone;
  gone.reserve(contexts.size());
  MutexLock lock(shared_->waits_mutex);
  const auto leave = [&]() REQUIRES(shared_->waits_mutex) {
    for (const Asked& each : asked) {
      if (--each.wait->callers == 0 && !each.wait->has_thread) shared_->waits.erase(each.context);
    }
  };
  try {
    for (CUcontext context : contexts) {
      Wait& wait = shared_->waits[context];
      asked.push_back({context, &wait, ++wait.asked});
      ++wait.callers;
      if (wait.has_thread) continue;
      start(context);
      wait.has_thread = true;
      ++shared_->threads;
    }
  } catch (...) {
    leave();
    throw;
  }
  const auto ended = [&](const Asked& each) { return each.wait->ended >= each.number; };
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (const Asked& each : asked) {
    if (!shared_->changed.wait_until(lock.waiting(), deadline, [&] { return ended(each); })) {
      result.timed_out = true;
    } else if (is_gone(each.wait->result)) {
      gone.push_back(each.context);
    } else if (result.result == CUDA_SUCCESS) {
      result.result = each.wait->result;
    }
  }
  leave();
  lock.unlock();
  for (CUcontext context : gone) contexts_.lost(context);
  return result;
}

void DeviceWaits::start(CUcontext context) {
  try {
    start_thread("dormouse-drain", [&driver = driver_, &contexts = contexts_, context,
                                    shared = shared_] {
      work(driver, contexts, context, *shared);
    }).detach();
  } catch (const std::system_error& error) {
    throw std::system_error(
        error.code(), "no thread could be started to wait for the device's work (see ulimit -u)");
  }
}

// What nobody waits for any more is not begun: a capture may run by then.
void DeviceWaits::work(const Driver& driver, Contexts& contexts, CUcontext context,
                       Shared& shared) {
  MutexLock lock(shared.waits_mutex);
  const auto at = shared.waits.find(context);
  Wait& wait = at->second;
  while (wait.callers != 0 && wait.ended != wait.asked) {
    const std::uint64_t number = wait.asked;
    lock.unlock();
    CUresult result = CUDA_SUCCESS;
    if (const ContextPin pin(contexts, context); pin) {
      ScopedContext current(driver, context);
      result = current.ok() ? driver.cuCtxSynchronize() : current.result();
    }
    lock.lock();
    wait.ended = number;
    wait.result = result;
    shared.changed.notify_all();
  }
  wait.has_thread = false;
  if (wait.callers == 0) shared.waits.erase(at);
  --shared.threads;
  shared.changed.notify_all();
}

}  // namespace dormouse
