// The simulated devices' virtual addresses: large inaccessible stretches of the process's own
// address space from which ranges are handed out, so that a device pointer is also a host pointer
// and touching a free one faults. For memory.cc only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace simgpu {

inline constexpr size_t kGranularity = size_t{2}
                                       << 20;  // bytes; the real driver's page for device memory

// Not thread-safe: Memory's lock protects it.
class AddressSpace {
 public:
  // A free range of `size` bytes whose start is a multiple of `alignment` (a power of two, at least
  // kGranularity), at `hint` if that is free; 0 if the process has no addresses left.
  uintptr_t take(size_t size, size_t alignment, uintptr_t hint);

  // Makes a range inaccessible and free again. False, with nothing changed, if the kernel refuses.
  bool give_back(uintptr_t address, size_t size);

  // Replaces whatever is mapped in a range by inaccessible addresses. False if the kernel refuses.
  static bool clear(uintptr_t address, size_t size);

  // Whether the address belongs to the simulated devices, in use or free.
  bool contains(uintptr_t address) const;

 private:
  bool grow(size_t size, uintptr_t hint);
  uintptr_t carve(std::map<uintptr_t, size_t>::iterator range, uintptr_t start, size_t size);
  void insert_free(uintptr_t address, size_t size);

  std::vector<std::pair<uintptr_t, size_t>> arenas_;
  std::map<uintptr_t, size_t> free_;
};

}  // namespace simgpu
