// The kernels that the library brings, loaded once for each context. Used by ContentHasher and by
// Operation.
#pragma once

#include <cuda.h>

#include <map>

#include "core/driver.h"
#include "core/thread_annotations.h"

namespace dormouse {

struct LoadedKernels {
  CUmodule module = nullptr;
  CUfunction content_hash = nullptr;  // see device_kernels_ptx.h, as for all
  CUfunction copy = nullptr;
};

class DeviceKernels {
 public:
  explicit DeviceKernels(const Driver& driver) : driver_(driver) {}
  ~DeviceKernels();
  DeviceKernels(const DeviceKernels&) = delete;
  DeviceKernels& operator=(const DeviceKernels&) = delete;

  // The kernels of `context`, which must be current. The first time the driver compiles them:
  // some milliseconds, more on a machine that has not compiled them before. On failure the driver's
  // error is returned and nothing is kept. Thread-safe.
  CUresult load(CUcontext context, LoadedKernels* out);

  // What is kept for the context goes; if it is not `alive`, it has gone with the context.
  // Thread-safe.
  void forget(CUcontext context, bool alive) noexcept;

 private:
  const Driver& driver_;
  Mutex kernels_mutex_;
  std::map<CUcontext, LoadedKernels> kernels_ GUARDED_BY(kernels_mutex_);
};

}  // namespace dormouse
