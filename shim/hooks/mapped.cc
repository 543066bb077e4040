// The hooks of memory that programs map themselves (cuMemCreate, cuMemMap). What is made while a
// tag is in force goes to the engine (core/memory/mapped_memory.h), which hands out names of its
// own in place of handles; so every function that takes or gives a handle is here.
#include <algorithm>
#include <new>
#include <vector>

#include "core/memory/mapped_memory.h"
#include "core/region.h"
#include "shim/hooks/hooks.h"
#include "shim/hooks/support.h"
#include "shim/process/settings.h"
#include "shim/rules/regions.h"

namespace {

using namespace dormouse;
using namespace dormouse::shim;

// Null while no handle is known: the driver's answer is right then.
MappedMemory* mapped() noexcept {
  Engine* known = engine();
  return known != nullptr && known->mapped().any() ? &known->mapped() : nullptr;
}

// At the end of the process nobody waits for what is left of an operation any more, and all memory
// goes as a whole.
template <typename Ours, typename Drivers>
CUresult answered(Ours ours, Drivers drivers) noexcept {
  MappedMemory* known = mapped();
  if (known == nullptr) return drivers();
  return exiting() ? CUDA_SUCCESS : ours(*known);
}

// Calls `drivers(real handle)` with a handle that stays awake from then on.
template <typename Drivers>
CUresult shared(CUmemGenericAllocationHandle handle, Holder by, Drivers drivers) noexcept {
  MappedMemory* known = mapped();
  CUmemGenericAllocationHandle real = handle;
  const CUresult result = known == nullptr ? CUDA_SUCCESS : known->share(handle, by, &real);
  return result == CUDA_SUCCESS ? drivers(real) : result;
}

// The same for a range of any tagged memory.
template <typename Drivers>
CUresult shared_range(CUdeviceptr address, std::size_t bytes, Holder by, Drivers drivers) noexcept {
  Engine* known = engine();
  if (known == nullptr || exiting()) return drivers();
  Engine::Hold hold;
  CUresult result = known->hold(address, bytes, by, &hold);
  if (result != CUDA_SUCCESS) return result;
  result = drivers();
  if (result != CUDA_SUCCESS) known->let_go(hold);
  return result;
}

// Sparse arrays: their tiles are not at addresses that could be restored.
template <typename Drivers>
CUresult array_mapped(CUarrayMapInfo* list, unsigned int count, Drivers drivers) noexcept {
  // Asked once: the last handle may go meanwhile.
  MappedMemory* known = mapped();
  if (known == nullptr || list == nullptr) return drivers(list);
  try {
    std::vector<CUarrayMapInfo> real(list, list + count);
    for (CUarrayMapInfo& each : real) {
      if (each.memHandleType != CU_MEM_HANDLE_TYPE_GENERIC ||
          each.memOperationType != CU_MEM_OPERATION_TYPE_MAP) {
        continue;
      }
      const CUresult result =
          known->share(each.memHandle.memHandle, Holder::kArray, &each.memHandle.memHandle);
      if (result != CUDA_SUCCESS) return result;
    }
    return drivers(real.data());
  } catch (const std::bad_alloc&) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
}

}  // namespace

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                     const CUmemAllocationProp* prop, unsigned long long flags) {
  physical_memory_made();
  const TagId tag = region::current();
  Engine* known =
      tag != kNoTag && settings().options.mapped_memory ? engine_for_allocation() : nullptr;
  return retried_when_full([&] {
    return known != nullptr ? known->mapped().create(tag, handle, size, prop, flags)
                            : real::cuMemCreate(handle, size, prop, flags);
  });
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return answered([&](MappedMemory& known) { return known.release(handle); },
                  [&] { return real::cuMemRelease(handle); });
}

CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  return answered([&](MappedMemory& known) { return known.map(ptr, size, offset, handle, flags); },
                  [&] { return real::cuMemMap(ptr, size, offset, handle, flags); });
}

CUresult cuMemUnmap(CUdeviceptr ptr, size_t size) {
  return answered([&](MappedMemory& known) { return known.unmap(ptr, size); },
                  [&] { return real::cuMemUnmap(ptr, size); });
}

CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* desc, size_t count) {
  return answered([&](MappedMemory& known) { return known.set_access(ptr, size, desc, count); },
                  [&] { return real::cuMemSetAccess(ptr, size, desc, count); });
}

CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size) {
  // The driver sees nothing where something sleeps, and would give its place to others.
  MappedMemory* known = mapped();
  if (known != nullptr && known->any_asleep(ptr, size)) {
    return exiting() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  }
  return real::cuMemAddressFree(ptr, size);
}

CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location, CUdeviceptr ptr) {
  const CUresult result = real::cuMemGetAccess(flags, location, ptr);
  MappedMemory* known = mapped();
  if (result == CUDA_SUCCESS || known == nullptr || flags == nullptr || location == nullptr) {
    return result;
  }
  return known->access(ptr, *location, flags) ? CUDA_SUCCESS : result;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* addr) {
  // As for memory of cuMemAlloc, which a pool's stands in for.
  Engine* owner = engine();
  if (owner != nullptr && owner->owns(reinterpret_cast<CUdeviceptr>(addr)))
    return CUDA_ERROR_INVALID_VALUE;
  MappedMemory* known = mapped();
  if (known != nullptr && known->retain(reinterpret_cast<CUdeviceptr>(addr), handle)) {
    return CUDA_SUCCESS;
  }
  return real::cuMemRetainAllocationHandle(handle, addr);
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* prop,
                                                CUmemGenericAllocationHandle handle) {
  MappedMemory* known = mapped();
  if (known != nullptr && known->properties(handle, prop)) return CUDA_SUCCESS;
  return real::cuMemGetAllocationPropertiesFromHandle(prop, handle);
}

CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  return shared(handle, Holder::kHandle, [&](CUmemGenericAllocationHandle real) {
    return real::cuMemExportToShareableHandle(shareable, real, type, flags);
  });
}

CUresult cuMemGetHandleForAddressRange(void* handle, CUdeviceptr ptr, size_t size,
                                       CUmemRangeHandleType type, unsigned long long flags) {
  return shared_range(ptr, size, Holder::kDmaBuf, [&] {
    return real::cuMemGetHandleForAddressRange(handle, ptr, size, type, flags);
  });
}

CUresult cuMemMapArrayAsync(CUarrayMapInfo* list, unsigned int count, CUstream stream) {
  return array_mapped(list, count, [&](CUarrayMapInfo* real) {
    return real::cuMemMapArrayAsync(real, count, stream);
  });
}

CUresult cuMemMapArrayAsync_ptsz(CUarrayMapInfo* list, unsigned int count, CUstream stream) {
  return array_mapped(list, count, [&](CUarrayMapInfo* real) {
    return real::cuMemMapArrayAsync_ptsz(real, count, stream);
  });
}

CUresult cuMulticastBindMem(CUmemGenericAllocationHandle multicast, size_t multicast_offset,
                            CUmemGenericAllocationHandle handle, size_t offset, size_t size,
                            unsigned long long flags) {
  return shared(handle, Holder::kMulticast, [&](CUmemGenericAllocationHandle real) {
    return real::cuMulticastBindMem(multicast, multicast_offset, real, offset, size, flags);
  });
}

CUresult cuMulticastBindAddr(CUmemGenericAllocationHandle multicast, size_t multicast_offset,
                             CUdeviceptr ptr, size_t size, unsigned long long flags) {
  return shared_range(ptr, size, Holder::kMulticast, [&] {
    return real::cuMulticastBindAddr(multicast, multicast_offset, ptr, size, flags);
  });
}

CUresult cuMulticastBindMem_v2(CUmemGenericAllocationHandle multicast, CUdevice device,
                               size_t multicast_offset, CUmemGenericAllocationHandle handle,
                               size_t offset, size_t size, unsigned long long flags) {
  return shared(handle, Holder::kMulticast, [&](CUmemGenericAllocationHandle real) {
    return real::cuMulticastBindMem_v2(multicast, device, multicast_offset, real, offset, size,
                                       flags);
  });
}

CUresult cuMulticastBindAddr_v2(CUmemGenericAllocationHandle multicast, CUdevice device,
                                size_t multicast_offset, CUdeviceptr ptr, size_t size,
                                unsigned long long flags) {
  return shared_range(ptr, size, Holder::kMulticast, [&] {
    return real::cuMulticastBindAddr_v2(multicast, device, multicast_offset, ptr, size, flags);
  });
}

CUresult cuLogicalEndpointBindMem(CUlogicalEndpointId endpoint, CUdevice device,
                                  cuuint64_t endpoint_offset, CUmemGenericAllocationHandle handle,
                                  cuuint64_t offset, cuuint64_t size, unsigned long long flags) {
  return shared(handle, Holder::kEndpoint, [&](CUmemGenericAllocationHandle real) {
    return real::cuLogicalEndpointBindMem(endpoint, device, endpoint_offset, real, offset, size,
                                          flags);
  });
}

CUresult cuLogicalEndpointBindAddr(CUlogicalEndpointId endpoint, CUdevice device, cuuint64_t offset,
                                   void* ptr, cuuint64_t size, unsigned long long flags) {
  return shared_range(reinterpret_cast<CUdeviceptr>(ptr), size, Holder::kEndpoint, [&] {
    return real::cuLogicalEndpointBindAddr(endpoint, device, offset, ptr, size, flags);
  });
}
