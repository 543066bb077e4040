// Small things that the hooks share. For this folder alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/log.h"
#include "core/sleep/engine.h"
#include "shim/hooks/real.h"
#include "shim/hooks/unknown.h"
#include "shim/process/process.h"
#include "shim/process/settings.h"

namespace dormouse::shim {

// The ordinal of the current context's device, or -1.
inline int current_device() noexcept {
  CUdevice device = -1;
  return real::cuCtxGetDevice(&device) == CUDA_SUCCESS ? device : -1;
}

inline bool is_capturing(CUstream stream) noexcept {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = real::cuStreamIsCapturing(stream, &status);
  return result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT || status != CU_STREAM_CAPTURE_STATUS_NONE;
}

// Streams 0, 1 and 2 are names for the default streams of the current context.
inline bool is_default_stream(CUstream stream) noexcept {
  return reinterpret_cast<std::uintptr_t>(stream) <= 2;
}

// What the functions for the per-thread default stream mean by stream 0.
inline CUstream per_thread(CUstream stream) noexcept {
  return stream == nullptr ? CU_STREAM_PER_THREAD : stream;
}

// What a program gets that asked for the driver's function `symbol` and would have got `*function`.
inline void hand_out(const char* symbol, void** function, const void* caller) noexcept {
  if (function == nullptr || !active()) return;
  void* const given = substitute(*function, caller);
  if (given == *function) unknown::got(symbol, given);
  *function = given;
  unknown::say();
}

// The engine for an allocation; null when the program's own allocator must serve it.
inline Engine* engine_for_allocation() noexcept {
  Engine* known = engine();
  if (__builtin_expect(known == nullptr, 0)) {
    // The program's cuInit did not pass our hook, but its driver may be in use all the same.
    int devices = 0;
    if (real::cuDeviceGetCount(&devices) == CUDA_SUCCESS) driver_initialised();
    known = engine();
  }
  unknown::say();
  return known != nullptr && !exiting() ? known : nullptr;
}

// Whether pools gave back memory of the device that they did not use. Not inside the gate: a sleep
// waits for who is there.
[[gnu::cold]] inline bool made_room(int device) noexcept {
  Engine* known = engine();
  return known != nullptr && !exiting() && device >= 0 && known->release_retained(device);
}

// A call of the program that found the device full is tried again then.
template <typename Call>
CUresult retried_when_full(Call call) {
  const CUresult result = call();
  if (__builtin_expect(result != CUDA_ERROR_OUT_OF_MEMORY, 1)) return result;
  return made_room(current_device()) ? call() : result;
}

// The same where the call says for which device.
template <typename Call>
CUresult retried_when_full(int device, Call call) {
  const CUresult result = call();
  return result == CUDA_ERROR_OUT_OF_MEMORY && made_room(device) ? call() : result;
}

// An allocation in a region that got no tag after all.
inline void say_untagged(CUresult reason) noexcept {
  if (!first_time("untagged")) return;
  log().warn(
      "allocations in regions go to the program's own allocator and will not sleep: the driver has "
      "no virtual memory management for this device (error {}), as on most vGPUs",
      static_cast<int>(reason));
}

// What pools hold without using it, they give back when it is needed: it counts as free.
inline void add_retained(std::size_t* free_bytes, std::size_t total_bytes) noexcept {
  Engine* known = engine();
  if (known == nullptr || exiting()) return;
  *free_bytes +=
      std::min<std::uint64_t>(known->retained_bytes(current_device()), total_bytes - *free_bytes);
}

}  // namespace dormouse::shim
