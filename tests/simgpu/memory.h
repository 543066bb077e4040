// All memory of the simulation: physical handles, reservations, mappings, allocations, pinned host
// memory; every rule of the real driver about them. For the simulated driver's sources only.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "tests/simgpu/address_space.h"
#include "tests/simgpu/driver_headers.h"
#include "tests/simgpu/physical.h"
#include "tests/simgpu/simgpu_control.h"

namespace simgpu {

class Context;

enum class RangeKind { kAllocation, kMapping, kHostAllocation, kHostRegistration };

// What pointer queries tell about the range that holds an address.
struct RangeInfo {
  RangeKind kind;
  uintptr_t base;
  size_t size;
  uintptr_t outer_base;  // of the reservation around a mapping; else the range itself
  size_t outer_size;
  int device;          // of device memory
  Context* context;    // owner; null for mappings
  uint64_t buffer_id;  // unique over the process's life
  unsigned flags;      // of host memory
  bool managed;
  bool sync_memops;
  bool imported;  // opened from another process
  CUmemoryPool pool;
  unsigned handle_types;
};

// What one side of a copy is.
enum class Place { kDevice, kPinned, kPageable };

// Options of an allocation.
struct AllocationTraits {
  CUmemoryPool pool = nullptr;
  bool managed = false;
};

// Thread-safe. Functions return the result that the driver's function would; checked against driver
// 580 on an H100 by driver_rules_test.cc. On purpose stricter than that driver, which lets a
// program unmap what is not mapped, map across a reservation's end, and map a handle that is
// released but still mapped elsewhere: all of these are mistakes.
class Memory {
 public:
  explicit Memory(const std::vector<size_t>& capacities);

  // Physical memory and addresses.
  CUresult create(size_t size, const CUmemAllocationProp& prop,
                  CUmemGenericAllocationHandle* handle);
  CUresult release(CUmemGenericAllocationHandle handle);
  CUresult retain(uintptr_t address, CUmemGenericAllocationHandle* handle);
  CUresult properties(CUmemGenericAllocationHandle handle, CUmemAllocationProp* prop);
  CUresult export_handle(CUmemGenericAllocationHandle handle, int* fd);
  // A dma-buf of device memory: its physical memory stays until the last copy of the descriptor is
  // closed, whatever becomes of the address.
  CUresult export_range(uintptr_t address, size_t size, int* fd);
  CUresult import_handle(int fd, CUmemGenericAllocationHandle* handle);
  CUresult reserve(size_t size, size_t alignment, uintptr_t hint, uintptr_t* address);
  CUresult unreserve(uintptr_t address, size_t size);
  CUresult map(uintptr_t address, size_t size, size_t offset, CUmemGenericAllocationHandle handle);
  CUresult unmap(uintptr_t address, size_t size);
  CUresult set_access(uintptr_t address, size_t size, const CUmemAccessDesc* desc, size_t count);
  CUresult get_access(uintptr_t address, const CUmemLocation& location, unsigned long long* flags);
  // Only allocations keep it, as on driver 580.
  CUresult set_sync_memops(uintptr_t address, bool on);

  // Multicast objects: they hold what is bound to them. Mapping one is not simulated.
  CUresult create_multicast(size_t size, CUmemGenericAllocationHandle* handle);
  CUresult bind_multicast(CUmemGenericAllocationHandle multicast, size_t offset,
                          CUmemGenericAllocationHandle handle, size_t size);
  CUresult bind_multicast_range(CUmemGenericAllocationHandle multicast, size_t offset,
                                uintptr_t address, size_t size);
  CUresult unbind_multicast(CUmemGenericAllocationHandle multicast, size_t offset, size_t size);

  // Allocations of a context.
  CUresult allocate(Context* context, int device, size_t size, const AllocationTraits& traits,
                    uintptr_t* address);
  // Whether `address` is the start of a live allocation that may be freed.
  CUresult check_free(uintptr_t address);
  // Reserves the right to free it later in stream order; a second attempt fails.
  CUresult begin_free(uintptr_t address);
  CUresult free(uintptr_t address);
  CUresult ipc_export(uintptr_t address, CUipcMemHandle* handle);
  CUresult ipc_open(Context* context, const CUipcMemHandle& handle, uintptr_t* address);
  CUresult ipc_close(uintptr_t address);

  // Host memory.
  CUresult host_allocate(Context* context, size_t size, unsigned flags, void** address);
  CUresult host_free(void* address);
  CUresult host_register(Context* context, void* address, size_t size, unsigned flags);
  CUresult host_unregister(void* address);

  // Everything that belongs to a context that ends.
  void free_all_of(Context* context);

  // The range that holds `address`, if any.
  std::optional<RangeInfo> find(uintptr_t address);

  // What [address, address + size) is for a copy by `device`; CUDA_ERROR_INVALID_VALUE when it is
  // device memory that does not exist, ends too early or gives `device` no such access. Copies
  // reach allocations of every device. The lock from `hold` must be held.
  CUresult place(uintptr_t address, size_t size, int device, bool write, Place* place);
  // The device that an allocation is on, and its pool; -1 for anything else. The same lock.
  int device_of(uintptr_t address, CUmemoryPool* pool);

  // Keeps the layout as it is: no range appears or disappears meanwhile.
  std::shared_lock<std::shared_mutex> hold() { return std::shared_lock(layout_mutex_); }

  int device_count() const { return static_cast<int>(devices_.size()); }
  size_t capacity(int device) const { return devices_[device]->capacity(); }
  size_t used(int device);
  size_t pinned();
  void live(simgpu_live_counts* counts);
  // One line for each thing that is alive.
  std::vector<std::string> describe_live();

 private:
  struct Handle {
    std::shared_ptr<Physical> physical;
    int references;
  };
  struct Mapping {
    size_t size;
    std::shared_ptr<Physical> physical;
    std::vector<CUmemAccess_flags> access;  // by device
    uint64_t buffer_id;
  };
  struct Allocation {
    size_t size;  // as asked for
    std::shared_ptr<Physical> physical;
    Context* context;
    uint64_t buffer_id;
    AllocationTraits traits;
    bool sync_memops = false;
    bool imported = false;
    bool freeing = false;
    uintptr_t mapped_at = 0;  // start of the pages that hold it
  };
  struct Exported {
    int witness;  // the other end of the program's descriptor
    std::shared_ptr<Physical> physical;
  };
  struct Multicast {
    size_t size;
    std::map<size_t, std::pair<size_t, std::shared_ptr<Physical>>> bound;  // by offset
  };
  // A page that small allocations share.
  struct SmallPage {
    std::shared_ptr<Physical> physical;
    Context* context;
    std::map<size_t, size_t> used;  // offset and size of its blocks
  };
  struct HostRange {
    size_t size;
    size_t pinned;  // bytes counted against the limit
    bool registered;
    unsigned flags;
    Context* context;
    uint64_t buffer_id;
  };
  using Mappings = std::map<uintptr_t, Mapping>;

  // All private functions need layout_mutex_ held exclusively unless they say otherwise.
  CUresult check_prop(const CUmemAllocationProp& prop) const;
  CUmemGenericAllocationHandle handle_of(const std::shared_ptr<Physical>& physical);
  // The physical memory of device memory in one piece; null if it is none.
  std::shared_ptr<Physical> physical_at(uintptr_t address, size_t size);
  void drop_closed_exports();
  // The mappings that [address, address + size) consists of, whole and without a gap; false if it
  // does not.
  bool whole_mappings(uintptr_t address, size_t size, Mappings::iterator* first,
                      Mappings::iterator* last);
  CUresult place_small(Context* context, int device, size_t size, Allocation* allocation,
                       uintptr_t* address);
  CUresult place_large(int device, size_t size, Allocation* allocation, uintptr_t* address);
  CUresult drop(std::map<uintptr_t, Allocation>::iterator allocation);
  bool pin(size_t bytes);
  bool overlaps_host(uintptr_t address, size_t size) const;

  std::shared_mutex layout_mutex_;  // protects everything below
  std::vector<std::unique_ptr<DeviceMemory>> devices_;
  AddressSpace addresses_;
  std::map<CUmemGenericAllocationHandle, Handle> handles_;
  std::map<CUmemGenericAllocationHandle, Multicast> multicasts_;
  std::vector<Exported> exported_;
  std::map<uintptr_t, size_t> reservations_;
  Mappings mappings_;
  std::map<uintptr_t, Allocation> allocations_;
  std::map<uintptr_t, SmallPage> small_pages_;
  std::map<uintptr_t, HostRange> host_;
  size_t pinned_ = 0;
  CUmemGenericAllocationHandle next_handle_ = 0x100;
  uint64_t next_buffer_id_ = 1;
};

}  // namespace simgpu
