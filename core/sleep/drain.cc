// See drain.h.
#include "core/sleep/drain.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>

#include "core/context.h"
#include "core/threads.h"

namespace dormouse {
namespace {

// Outlives whichever of the two threads ends first.
struct Wait {
  std::mutex wait_mutex;  // protects both below
  std::condition_variable changed;
  bool over = false;
  CUresult result = CUDA_SUCCESS;
  // Nobody waits any more: the contexts that were not reached may be destroyed, or in a capture.
  std::atomic<bool> given_up{false};
};

CUresult wait_for_all(const Driver& driver, const std::set<CUcontext>& contexts,
                      const Wait& wait) noexcept {
  for (CUcontext context : contexts) {
    if (wait.given_up.load()) break;
    ScopedContext current(driver, context);
    const CUresult result = current.ok() ? driver.cuCtxSynchronize() : current.result();
    if (result != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}

}  // namespace

DrainResult wait_for_device(const Driver& driver, const std::set<CUcontext>& contexts,
                            std::chrono::milliseconds limit) {
  const auto wait = std::make_shared<Wait>();
  try {
    start_thread("dormouse-drain", [&driver, contexts, wait] {
      const CUresult result = wait_for_all(driver, contexts, *wait);
      std::lock_guard lock(wait->wait_mutex);
      wait->over = true;
      wait->result = result;
      wait->changed.notify_all();
    }).detach();
  } catch (const std::system_error& error) {
    throw std::system_error(
        error.code(),
        "the system gave no thread to wait for the device's work with (see ulimit -u)");
  }
  std::unique_lock lock(wait->wait_mutex);
  if (wait->changed.wait_for(lock, limit, [&] { return wait->over; })) {
    return {false, wait->result};
  }
  wait->given_up.store(true);
  return {true, CUDA_SUCCESS};
}

}  // namespace dormouse
