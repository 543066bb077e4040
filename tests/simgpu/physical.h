// Physical memory of the simulated devices: bytes of a memory file, counted against the device's
// capacity. For memory.cc only.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <memory>

#include "tests/simgpu/driver_headers.h"

namespace simgpu {

// The memory of one device. Ordinary blocks are stretches of one sparse file, so that ten thousand
// handles do not need ten thousand descriptors; offsets are never used twice and a released stretch
// is punched out.
class DeviceMemory {
 public:
  DeviceMemory(int ordinal, size_t capacity);

  int ordinal() const { return ordinal_; }
  size_t capacity() const { return capacity_; }
  size_t used() const { return used_.load(); }

 private:
  friend struct Physical;
  bool charge(size_t bytes);
  void refund(size_t bytes) { used_.fetch_sub(bytes); }
  bool open();

  const int ordinal_;
  const size_t capacity_;
  std::atomic<size_t> used_{0};
  int fd_ = -1;
  off_t end_ = 0;
};

// A block of physical memory; lives as long as a handle or a mapping refers to it.
struct Physical {
  // A new block of `size` bytes (a multiple of kGranularity). `exportable` gives it a file of its
  // own. CUDA_ERROR_OUT_OF_MEMORY when the device is full. Memory's lock must be held.
  static CUresult create(DeviceMemory& memory, size_t size, const CUmemAllocationProp& prop,
                         bool exportable, std::shared_ptr<Physical>* out);

  // A block that another process made, behind a descriptor that is duplicated. Its bytes are that
  // process's account.
  static CUresult adopt(int fd, off_t offset, size_t size, int device,
                        std::shared_ptr<Physical>* out);

  ~Physical();

  // Maps the block (its first `size` bytes) at an address of the AddressSpace with PROT_
  // `protection`.
  bool map(void* address, size_t size, int protection) const;

  DeviceMemory* memory = nullptr;  // whose account it is on; null for an adopted block
  int device = 0;
  size_t size = 0;
  int fd = -1;
  off_t offset = 0;
  bool owns_fd = false;
  CUmemAllocationProp prop{};
};

}  // namespace simgpu
