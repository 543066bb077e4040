// The access to memory pools that the program sets (cuMemPoolSetAccess): stream-ordered memory of a
// tag comes from our pools, and gives the same.
#include "core/log.h"
#include "core/sleep/engine.h"
#include "shim/hooks/hooks.h"
#include "shim/hooks/support.h"

namespace {

using namespace dormouse;
using namespace dormouse::shim;

// Stream-ordered allocations of the device take `pool` from now on, or it has changed.
void take_over(CUdevice device, CUmemoryPool pool) noexcept {
  Engine* known = engine();
  int devices = 0;
  if (known == nullptr || exiting() || real::cuDeviceGetCount(&devices) != CUDA_SUCCESS) return;
  for (int other = 0; other < devices; ++other) {
    CUmemAccess_flags flags = CU_MEM_ACCESS_FLAGS_PROT_NONE;
    CUmemLocation location{};
    location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    location.id = other;
    if (other == device || real::cuMemPoolGetAccess(&flags, pool, &location) != CUDA_SUCCESS) {
      continue;
    }
    const CUresult result =
        known->set_pool_access(other, device, flags != CU_MEM_ACCESS_FLAGS_PROT_NONE);
    if (result != CUDA_SUCCESS && first_time("pool access")) {
      log().warn(
          "access of device {} to tagged memory of device {} could not be changed (error {})",
          other, device, static_cast<int>(result));
    }
  }
}

}  // namespace

CUresult cuMemPoolSetAccess(CUmemoryPool pool, const CUmemAccessDesc* map, size_t count) {
  const CUresult result = real::cuMemPoolSetAccess(pool, map, count);
  int devices = 0;
  if (result != CUDA_SUCCESS || real::cuDeviceGetCount(&devices) != CUDA_SUCCESS) return result;
  for (CUdevice device = 0; device < devices; ++device) {
    CUmemoryPool current = nullptr;
    if (real::cuDeviceGetMemPool(&current, device) == CUDA_SUCCESS && current == pool)
      take_over(device, pool);
  }
  return result;
}

CUresult cuMemSetMemPool(CUmemLocation* location, CUmemAllocationType type, CUmemoryPool pool) {
  const CUresult result = real::cuMemSetMemPool(location, type, pool);
  if (result == CUDA_SUCCESS && type == CU_MEM_ALLOCATION_TYPE_PINNED &&
      location->type == CU_MEM_LOCATION_TYPE_DEVICE) {
    take_over(location->id, pool);
  }
  return result;
}

CUresult cuDeviceSetMemPool(CUdevice device, CUmemoryPool pool) {
  const CUresult result = real::cuDeviceSetMemPool(device, pool);
  if (result == CUDA_SUCCESS) take_over(device, pool);
  return result;
}
