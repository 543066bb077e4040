// Waiting for the work that a program gave to the device. Used by Operation before a sleep.
#pragma once

#include <cuda.h>

#include <chrono>
#include <set>

#include "core/driver.h"

namespace dormouse {

struct DrainResult {
  bool timed_out = false;
  CUresult result = CUDA_SUCCESS;  // the first error
};

// Returns when all work of the contexts has ended, or after `limit`: a kernel may wait for
// something that the program only does when the sleep is over. The driver has no wait with a
// limit, so another thread waits; after a timeout it stays until the work of one context has ended,
// and the driver must stay as long. Throws std::system_error if the system gives no thread: the
// calling one would have to wait without limit, behind a gate that may hold up what it waits for.
// Thread-safe.
DrainResult wait_for_device(const Driver& driver, const std::set<CUcontext>& contexts,
                            std::chrono::milliseconds limit);

}  // namespace dormouse
