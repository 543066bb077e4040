// Memory pools of the simulation. Memory goes back to the device as soon as it is freed in stream
// order, so a pool is little more than a name and its settings. For the simulated driver's sources
// only.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "tests/simgpu/driver_headers.h"

namespace simgpu {

struct Pool {
  int device;
  bool is_default;
  std::map<CUmemPool_attribute, uint64_t> settings;
  std::map<int, CUmemAccess_flags> access;  // of other devices
};

// Thread-safe.
class Pools {
 public:
  CUmemoryPool create(int device);
  CUresult destroy(CUmemoryPool handle);
  Pool* find(CUmemoryPool handle);
  CUmemoryPool default_of(int device);
  // The pool that cuMemAllocAsync uses on a device.
  CUmemoryPool current(int device);
  void set_current(int device, CUmemoryPool handle);
  uint64_t setting(CUmemoryPool handle, CUmemPool_attribute attribute);
  void set_setting(CUmemoryPool handle, CUmemPool_attribute attribute, uint64_t value);
  // Of a device to the pool's memory; its own has all. Nothing for a pool that has gone.
  std::optional<CUmemAccess_flags> access(CUmemoryPool handle, int device);
  void set_access(CUmemoryPool handle, int device, CUmemAccess_flags flags);

 private:
  CUmemoryPool add(int device, bool is_default);

  std::mutex mutex_;  // protects what follows
  std::map<CUmemoryPool, std::unique_ptr<Pool>> pools_;
  std::map<int, CUmemoryPool> defaults_;
  std::map<int, CUmemoryPool> current_;
};
Pools& pools();

}  // namespace simgpu
