// The control functions of simgpu_control.h.
#include "tests/simgpu/api_support.h"
#include "tests/simgpu/functions.h"
#include "tests/simgpu/kernels.h"
#include "tests/simgpu/simgpu_control.h"

using namespace simgpu;  // NOLINT: C functions outside the namespace

#define SIMGPU_CONTROL extern "C" __attribute__((visibility("default")))

SIMGPU_CONTROL int simgpu_fail_range(const char* name, unsigned long long first,
                                     unsigned long long last, int result) {
  if (std::string(name) != "*" && !is_driver_function(name)) return -1;
  inject_failure(name, first, last, static_cast<CUresult>(result));
  return 0;
}

SIMGPU_CONTROL int simgpu_fail_at(const char* name, unsigned long long nth, int result) {
  return simgpu_fail_range(name, nth, nth, result);
}

SIMGPU_CONTROL void simgpu_clear_failures(void) {
  clear_failures();
}

SIMGPU_CONTROL unsigned long long simgpu_call_count(const char* name) {
  if (std::string(name) != "*") return call_site(name).count();
  unsigned long long sum = 0;
  for (CallSite* site : all_call_sites()) sum += site->count();
  return sum;
}

SIMGPU_CONTROL void simgpu_for_each_count(void (*visit)(const char*, unsigned long long, void*),
                                          void* user) {
  for (CallSite* site : all_call_sites()) {
    if (site->count() != 0) visit(site->name().c_str(), site->count(), user);
  }
}

SIMGPU_CONTROL void simgpu_reset_counts(void) {
  for (CallSite* site : all_call_sites()) site->reset();
}

SIMGPU_CONTROL size_t simgpu_usage(int device) {
  if (simulation().state() != CUDA_SUCCESS || !simulation().valid(device)) return 0;
  return memory().used(device);
}

SIMGPU_CONTROL size_t simgpu_pinned(void) {
  return simulation().state() == CUDA_SUCCESS ? memory().pinned() : 0;
}

SIMGPU_CONTROL void simgpu_live(simgpu_live_counts* counts) {
  *counts = {};
  if (simulation().state() != CUDA_SUCCESS) return;
  memory().live(counts);
  counts->streams = simulation().stream_count();
  counts->events = simulation().event_count();
}

SIMGPU_CONTROL void simgpu_hold_streams(void) {
  gate().hold();
}

SIMGPU_CONTROL void simgpu_release_streams(void) {
  gate().release();
}

SIMGPU_CONTROL int simgpu_register_kernel(const char* name, simgpu_kernel kernel, void* user) {
  return register_kernel(name, [=](const simgpu_launch& launch) { kernel(&launch, user); }) ? 0
                                                                                            : -1;
}
