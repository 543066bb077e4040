// Waiting, with a limit, for the work that a program gave to its devices.
#pragma once

#include <cuda.h>

#include <chrono>
#include <map>
#include <memory>
#include <set>

#include "core/captures.h"
#include "core/contexts.h"
#include "core/driver.h"

namespace dormouse {

struct WaitResult {
  bool timed_out = false;
  bool captured = false;  // a capture of the program did not end in time: nothing was waited for
  CUresult result = CUDA_SUCCESS;  // the first error

  bool passed() const noexcept { return !timed_out && !captured && result == CUDA_SUCCESS; }
};

// The driver has no wait with a limit, so threads wait: one for each context, which serves all who
// wait for that context, and ends when nobody does and the driver lets go of it. Thread-safe.
class DeviceWaits {
 public:
  DeviceWaits(const Driver& driver, Contexts& contexts, Captures& captures,
              std::chrono::milliseconds capture_limit);
  // Waits for the threads, and so for the work that they wait for.
  ~DeviceWaits();
  DeviceWaits(const DeviceWaits&) = delete;
  DeviceWaits& operator=(const DeviceWaits&) = delete;

  // Returns when all work has ended that the contexts of these devices had, or after `limit`: a
  // kernel may wait for something that the program does only later. Running captures are waited for
  // first. Throws std::system_error if the system gives no thread: the calling one would have to
  // wait without limit, behind a gate that may hold up what it waits for. The caller holds no pin.
  WaitResult wait_for(const std::set<int>& devices, std::chrono::milliseconds limit);

 private:
  struct Wait;
  struct Shared;

  void start(CUcontext context);
  static void work(const Driver& driver, Contexts& contexts, CUcontext context, Shared& shared);

  const Driver& driver_;
  Contexts& contexts_;
  Captures& captures_;
  const std::chrono::milliseconds capture_limit_;
  const std::shared_ptr<Shared> shared_;
};

}  // namespace dormouse
