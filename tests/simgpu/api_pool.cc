// Exported functions of the simulated driver: memory pools.
#include <cstring>

#include "tests/simgpu/api_support.h"
#include "tests/simgpu/pool.h"
#include "tests/simgpu/settings.h"

namespace simgpu {

Pools& pools() {
  static auto* instance = new Pools;
  return *instance;
}

CUmemoryPool Pools::add(int device, bool is_default) {
  auto pool = std::make_unique<Pool>(Pool{device, is_default, {}, {}});
  auto handle = reinterpret_cast<CUmemoryPool>(pool.get());
  pools_[handle] = std::move(pool);
  return handle;
}

CUmemoryPool Pools::create(int device) {
  std::lock_guard lock(mutex_);
  return add(device, false);
}

CUresult Pools::destroy(CUmemoryPool handle) {
  std::lock_guard lock(mutex_);
  auto pool = pools_.find(handle);
  if (pool == pools_.end() || pool->second->is_default) return CUDA_ERROR_INVALID_VALUE;
  std::erase_if(current_, [&](const auto& entry) { return entry.second == handle; });
  pools_.erase(pool);
  return CUDA_SUCCESS;
}

Pool* Pools::find(CUmemoryPool handle) {
  std::lock_guard lock(mutex_);
  auto pool = pools_.find(handle);
  return pool == pools_.end() ? nullptr : pool->second.get();
}

CUmemoryPool Pools::default_of(int device) {
  std::lock_guard lock(mutex_);
  CUmemoryPool& handle = defaults_[device];
  if (handle == nullptr) handle = add(device, true);
  return handle;
}

CUmemoryPool Pools::current(int device) {
  CUmemoryPool otherwise = default_of(device);
  std::lock_guard lock(mutex_);
  auto entry = current_.find(device);
  return entry == current_.end() ? otherwise : entry->second;
}

void Pools::set_current(int device, CUmemoryPool handle) {
  std::lock_guard lock(mutex_);
  current_[device] = handle;
}

uint64_t Pools::setting(CUmemoryPool handle, CUmemPool_attribute attribute) {
  std::lock_guard lock(mutex_);
  auto& values = pools_.at(handle)->settings;
  auto value = values.find(attribute);
  return value == values.end() ? 0 : value->second;
}

void Pools::set_setting(CUmemoryPool handle, CUmemPool_attribute attribute, uint64_t value) {
  std::lock_guard lock(mutex_);
  pools_.at(handle)->settings[attribute] = value;
}

std::optional<CUmemAccess_flags> Pools::access(CUmemoryPool handle, int device) {
  std::lock_guard lock(mutex_);
  auto pool = pools_.find(handle);
  if (pool == pools_.end()) return std::nullopt;
  if (pool->second->device == device) return CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  auto entry = pool->second->access.find(device);
  return entry == pool->second->access.end() ? CU_MEM_ACCESS_FLAGS_PROT_NONE : entry->second;
}

void Pools::set_access(CUmemoryPool handle, int device, CUmemAccess_flags flags) {
  std::lock_guard lock(mutex_);
  pools_.at(handle)->access[device] = flags;
}

namespace {

// Attributes are 4 bytes for the reuse policies and 8 for the rest.
size_t attribute_size(CUmemPool_attribute attribute) {
  return attribute < CU_MEMPOOL_ATTR_RELEASE_THRESHOLD ? sizeof(int) : sizeof(uint64_t);
}

bool known(CUmemPool_attribute attribute) {
  return attribute >= CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES &&
         attribute <= CU_MEMPOOL_ATTR_USED_MEM_HIGH;
}

}  // namespace
}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

SIMGPU_API CUresult CUDAAPI cuDeviceGetDefaultMemPool(CUmemoryPool* pool_out, CUdevice dev) {
  SIMGPU_ENTER(cuDeviceGetDefaultMemPool);
  SIMGPU_REQUIRE(pool_out != nullptr);
  if (!simulation().valid(dev)) return CUDA_ERROR_INVALID_DEVICE;
  *pool_out = pools().default_of(dev);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice dev) {
  SIMGPU_ENTER(cuDeviceGetMemPool);
  SIMGPU_REQUIRE(pool != nullptr);
  if (!simulation().valid(dev)) return CUDA_ERROR_INVALID_DEVICE;
  *pool = pools().current(dev);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceSetMemPool(CUdevice dev, CUmemoryPool pool) {
  SIMGPU_ENTER(cuDeviceSetMemPool);
  if (!simulation().valid(dev)) return CUDA_ERROR_INVALID_DEVICE;
  Pool* found = pools().find(pool);
  SIMGPU_REQUIRE(found != nullptr && found->device == dev);
  pools().set_current(dev, pool);
  return CUDA_SUCCESS;
}

#if CUDA_VERSION >= 13000
SIMGPU_API CUresult CUDAAPI cuMemSetMemPool(CUmemLocation* location, CUmemAllocationType type,
                                            CUmemoryPool pool) {
  SIMGPU_ENTER(cuMemSetMemPool);
  SIMGPU_REQUIRE(location != nullptr && location->type == CU_MEM_LOCATION_TYPE_DEVICE &&
                 type == CU_MEM_ALLOCATION_TYPE_PINNED);
  if (!simulation().valid(location->id)) return CUDA_ERROR_INVALID_DEVICE;
  Pool* found = pools().find(pool);
  SIMGPU_REQUIRE(found != nullptr && found->device == location->id);
  pools().set_current(location->id, pool);
  return CUDA_SUCCESS;
}
#endif

SIMGPU_API CUresult CUDAAPI cuMemPoolCreate(CUmemoryPool* pool, const CUmemPoolProps* poolProps) {
  SIMGPU_ENTER(cuMemPoolCreate);
  SIMGPU_REQUIRE(pool != nullptr && poolProps != nullptr);
  SIMGPU_REQUIRE(poolProps->allocType == CU_MEM_ALLOCATION_TYPE_PINNED &&
                 poolProps->location.type == CU_MEM_LOCATION_TYPE_DEVICE);
  if (poolProps->handleTypes != CU_MEM_HANDLE_TYPE_NONE) return CUDA_ERROR_NOT_SUPPORTED;
  if (!simulation().valid(poolProps->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  *pool = pools().create(poolProps->location.id);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemPoolDestroy(CUmemoryPool pool) {
  SIMGPU_ENTER(cuMemPoolDestroy);
  return pools().destroy(pool);
}

SIMGPU_API CUresult CUDAAPI cuMemPoolTrimTo(CUmemoryPool pool, size_t) {
  SIMGPU_ENTER(cuMemPoolTrimTo);
  SIMGPU_REQUIRE(pools().find(pool) != nullptr);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attr,
                                                  void* value) {
  SIMGPU_ENTER(cuMemPoolSetAttribute);
  SIMGPU_REQUIRE(value != nullptr && known(attr) && pools().find(pool) != nullptr);
  uint64_t number = 0;
  std::memcpy(&number, value, attribute_size(attr));
  pools().set_setting(pool, attr, number);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attr,
                                                  void* value) {
  SIMGPU_ENTER(cuMemPoolGetAttribute);
  SIMGPU_REQUIRE(value != nullptr && known(attr) && pools().find(pool) != nullptr);
  uint64_t number = pools().setting(pool, attr);
  std::memcpy(value, &number, attribute_size(attr));
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemPoolSetAccess(CUmemoryPool pool, const CUmemAccessDesc* map,
                                               size_t count) {
  SIMGPU_ENTER(cuMemPoolSetAccess);
  SIMGPU_REQUIRE(pools().find(pool) != nullptr && map != nullptr && count != 0);
  for (size_t i = 0; i < count; ++i) {
    SIMGPU_REQUIRE(map[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE);
    if (!simulation().valid(map[i].location.id)) return CUDA_ERROR_INVALID_DEVICE;
    SIMGPU_REQUIRE(settings().peers || map[i].location.id == pools().find(pool)->device);
  }
  for (size_t i = 0; i < count; ++i) {
    pools().set_access(pool, map[i].location.id, map[i].flags);
  }
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemPoolGetAccess(CUmemAccess_flags* flags, CUmemoryPool memPool,
                                               CUmemLocation* location) {
  SIMGPU_ENTER(cuMemPoolGetAccess);
  SIMGPU_REQUIRE(flags != nullptr && location != nullptr &&
                 location->type == CU_MEM_LOCATION_TYPE_DEVICE);
  if (!simulation().valid(location->id)) return CUDA_ERROR_INVALID_DEVICE;
  std::optional<CUmemAccess_flags> access = pools().access(memPool, location->id);
  SIMGPU_REQUIRE(access.has_value());
  *flags = *access;
  return CUDA_SUCCESS;
}
