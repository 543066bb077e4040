// Counts the uses of every simulated driver function and makes chosen uses fail.
// For the simulated driver's sources only; tests reach it through simgpu_control.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/simgpu/driver_headers.h"
#include "tests/simgpu/failures.h"

namespace simgpu {

// The name without "_ptds", "_ptsz" and "_v2": what counts and failures are kept by.
std::string base_name(const std::string& function);

// One function of the driver API. Objects live for ever.
class CallSite {
 public:
  explicit CallSite(std::string name) : name_(std::move(name)) {}

  // Counts one use; returns the failure that was injected for it, else CUDA_SUCCESS. Thread-safe.
  CUresult use();

  const std::string& name() const { return name_; }
  uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  void reset() { count_.store(0, std::memory_order_relaxed); }

 private:
  const std::string name_;
  std::atomic<uint64_t> count_{0};
};

// The site of a function, created at first use. Thread-safe.
CallSite& call_site(const char* function);

// Every site so far, in the order of names.
std::vector<CallSite*> all_call_sites();

// Uses `first` to `last` from now on (1 is the next; 0 to 0 means all) of `function` ("*": any)
// return `result`.
void inject_failure(const std::string& function, uint64_t first, uint64_t last, CUresult result);
void clear_failures();

}  // namespace simgpu
