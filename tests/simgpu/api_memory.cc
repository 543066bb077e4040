// Exported functions of the simulated driver: virtual memory, allocations, host memory, sharing,
// pointer queries.
#include <cstring>

#include "tests/simgpu/api_support.h"
#include "tests/simgpu/pool.h"

namespace simgpu {
namespace {

// Allocates; when the device is full, once more after the work that may free something in stream
// order.
CUresult allocate(Context* context, size_t size, const AllocationTraits& traits, CUdeviceptr* out) {
  SIMGPU_REQUIRE(out != nullptr);
  uintptr_t address = 0;
  CUresult result = memory().allocate(context, context->device(), size, traits, &address);
  if (result == CUDA_ERROR_OUT_OF_MEMORY && size <= memory().capacity(context->device())) {
    simulation().drain(context);
    result = memory().allocate(context, context->device(), size, traits, &address);
  }
  if (result == CUDA_SUCCESS) *out = address;
  return result;
}

CUresult allocate_in_order(Context* context, size_t size, const AllocationTraits& traits,
                           CUdeviceptr* out) {
  SIMGPU_REQUIRE(out != nullptr);
  *out = 0;
  return size == 0 ? CUDA_SUCCESS : allocate(context, size, traits, out);
}

CUresult pointer_value(const RangeInfo& range, CUpointer_attribute attribute, CUdeviceptr pointer,
                       void* data) {
  bool host =
      range.kind == RangeKind::kHostAllocation || range.kind == RangeKind::kHostRegistration;
  auto put = [data](auto value) {
    std::memcpy(data, &value, sizeof(value));
    return CUDA_SUCCESS;
  };
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      return put(range.context == nullptr ? CUcontext{nullptr} : range.context->handle());
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return put(host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return put(pointer);
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (!host && !range.managed) return CUDA_ERROR_INVALID_VALUE;
      return put(reinterpret_cast<void*>(pointer));
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      return put(static_cast<unsigned long long>(range.buffer_id));
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return put(static_cast<int>(range.managed));
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return put(host ? (range.context == nullptr ? 0 : range.context->device()) : range.device);
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      return put(static_cast<int>(range.kind == RangeKind::kAllocation && !range.managed &&
                                  range.pool == nullptr && !range.imported));
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      return put(static_cast<CUdeviceptr>(range.outer_base));
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      return put(range.outer_size);
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return put(1);
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      return put(static_cast<unsigned long long>(range.handle_types));
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      return put(0);
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
      return put(static_cast<int>(range.sync_memops));
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      return put(CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE);
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      return put(range.pool);
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

// What a list of attributes says about a pointer that the driver does not know.
void put_unknown(CUpointer_attribute attribute, void* data) {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    case CU_POINTER_ATTRIBUTE_MAPPED:
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      std::memset(data, 0, sizeof(int));
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(data) = -2;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      break;  // left as it is
    default:
      std::memset(data, 0, sizeof(void*));
  }
}

}  // namespace
}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

// Virtual memory management. It needs cuInit but no context.

SIMGPU_API CUresult CUDAAPI cuMemGetAllocationGranularity(size_t* granularity,
                                                          const CUmemAllocationProp* prop,
                                                          CUmemAllocationGranularity_flags option) {
  SIMGPU_ENTER(cuMemGetAllocationGranularity);
  SIMGPU_REQUIRE(granularity != nullptr && prop != nullptr);
  SIMGPU_REQUIRE(option == CU_MEM_ALLOC_GRANULARITY_MINIMUM ||
                 option == CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  SIMGPU_REQUIRE(prop->type == CU_MEM_ALLOCATION_TYPE_PINNED);
  SIMGPU_REQUIRE(prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE);
  if (!simulation().valid(prop->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  *granularity = kGranularity;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr* ptr, size_t size, size_t alignment,
                                                CUdeviceptr addr, unsigned long long flags) {
  SIMGPU_ENTER(cuMemAddressReserve);
  SIMGPU_REQUIRE(ptr != nullptr && flags == 0);
  uintptr_t address = 0;
  SIMGPU_TRY(memory().reserve(size, alignment, addr, &address));
  *ptr = address;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemAddressFree(CUdeviceptr ptr, size_t size) {
  SIMGPU_ENTER(cuMemAddressFree);
  return memory().unreserve(ptr, size);
}

SIMGPU_API CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                                        const CUmemAllocationProp* prop, unsigned long long flags) {
  SIMGPU_ENTER(cuMemCreate);
  SIMGPU_REQUIRE(handle != nullptr && prop != nullptr && flags == 0);
  return memory().create(size, *prop, handle);
}

SIMGPU_API CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle) {
  SIMGPU_ENTER(cuMemRelease);
  return memory().release(handle);
}

SIMGPU_API CUresult CUDAAPI cuMemMap(CUdeviceptr ptr, size_t size, size_t offset,
                                     CUmemGenericAllocationHandle handle,
                                     unsigned long long flags) {
  SIMGPU_ENTER(cuMemMap);
  SIMGPU_REQUIRE(flags == 0);
  return memory().map(ptr, size, offset, handle);
}

SIMGPU_API CUresult CUDAAPI cuMemUnmap(CUdeviceptr ptr, size_t size) {
  SIMGPU_ENTER(cuMemUnmap);
  return memory().unmap(ptr, size);
}

SIMGPU_API CUresult CUDAAPI cuMemSetAccess(CUdeviceptr ptr, size_t size,
                                           const CUmemAccessDesc* desc, size_t count) {
  SIMGPU_ENTER(cuMemSetAccess);
  SIMGPU_REQUIRE(desc != nullptr);
  return memory().set_access(ptr, size, desc, count);
}

SIMGPU_API CUresult CUDAAPI cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location,
                                           CUdeviceptr ptr) {
  SIMGPU_ENTER(cuMemGetAccess);
  SIMGPU_REQUIRE(flags != nullptr && location != nullptr);
  return memory().get_access(ptr, *location, flags);
}

SIMGPU_API CUresult CUDAAPI cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle,
                                                        void* addr) {
  SIMGPU_ENTER(cuMemRetainAllocationHandle);
  SIMGPU_REQUIRE(handle != nullptr);
  return memory().retain(reinterpret_cast<uintptr_t>(addr), handle);
}

SIMGPU_API CUresult CUDAAPI cuMemGetAllocationPropertiesFromHandle(
    CUmemAllocationProp* prop, CUmemGenericAllocationHandle handle) {
  SIMGPU_ENTER(cuMemGetAllocationPropertiesFromHandle);
  SIMGPU_REQUIRE(prop != nullptr);
  return memory().properties(handle, prop);
}

SIMGPU_API CUresult CUDAAPI cuMemExportToShareableHandle(void* shareableHandle,
                                                         CUmemGenericAllocationHandle handle,
                                                         CUmemAllocationHandleType handleType,
                                                         unsigned long long flags) {
  SIMGPU_ENTER(cuMemExportToShareableHandle);
  SIMGPU_REQUIRE(shareableHandle != nullptr && flags == 0);
  SIMGPU_REQUIRE(handleType == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  int fd = -1;
  SIMGPU_TRY(memory().export_handle(handle, &fd));
  *static_cast<int*>(shareableHandle) = fd;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle,
                                                           void* osHandle,
                                                           CUmemAllocationHandleType shHandleType) {
  SIMGPU_ENTER(cuMemImportFromShareableHandle);
  SIMGPU_REQUIRE(handle != nullptr && shHandleType == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  return memory().import_handle(static_cast<int>(reinterpret_cast<intptr_t>(osHandle)), handle);
}

SIMGPU_API CUresult CUDAAPI cuMemGetHandleForAddressRange(void* handle, CUdeviceptr dptr,
                                                          size_t size,
                                                          CUmemRangeHandleType handleType,
                                                          unsigned long long flags) {
  SIMGPU_ENTER(cuMemGetHandleForAddressRange);
  SIMGPU_REQUIRE(handle != nullptr && flags == 0 &&
                 handleType == CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD);
  return memory().export_range(dptr, size, static_cast<int*>(handle));
}

// Multicast objects.

SIMGPU_API CUresult CUDAAPI cuMulticastCreate(CUmemGenericAllocationHandle* mcHandle,
                                              const CUmulticastObjectProp* prop) {
  SIMGPU_ENTER(cuMulticastCreate);
  SIMGPU_REQUIRE(mcHandle != nullptr && prop != nullptr && prop->flags == 0);
  return memory().create_multicast(prop->size, mcHandle);
}

SIMGPU_API CUresult CUDAAPI cuMulticastBindMem(CUmemGenericAllocationHandle mcHandle,
                                               size_t mcOffset,
                                               CUmemGenericAllocationHandle memHandle,
                                               size_t memOffset, size_t size,
                                               unsigned long long flags) {
  SIMGPU_ENTER(cuMulticastBindMem);
  SIMGPU_REQUIRE(flags == 0 && memOffset == 0);
  return memory().bind_multicast(mcHandle, mcOffset, memHandle, size);
}

SIMGPU_API CUresult CUDAAPI cuMulticastBindAddr(CUmemGenericAllocationHandle mcHandle,
                                                size_t mcOffset, CUdeviceptr memptr, size_t size,
                                                unsigned long long flags) {
  SIMGPU_ENTER(cuMulticastBindAddr);
  SIMGPU_REQUIRE(flags == 0);
  return memory().bind_multicast_range(mcHandle, mcOffset, memptr, size);
}

SIMGPU_API CUresult CUDAAPI cuMulticastUnbind(CUmemGenericAllocationHandle mcHandle, CUdevice dev,
                                              size_t mcOffset, size_t size) {
  SIMGPU_ENTER(cuMulticastUnbind);
  if (!simulation().valid(dev)) return CUDA_ERROR_INVALID_DEVICE;
  return memory().unbind_multicast(mcHandle, mcOffset, size);
}

// Allocations.

SIMGPU_API CUresult CUDAAPI cuMemGetInfo_v2(size_t* free, size_t* total) {
  SIMGPU_ENTER(cuMemGetInfo);
  SIMGPU_REQUIRE(free != nullptr && total != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  *total = memory().capacity(context->device());
  *free = *total - memory().used(context->device());
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr* dptr, size_t bytesize) {
  SIMGPU_ENTER(cuMemAlloc);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  return allocate(context, bytesize, {}, dptr);
}

SIMGPU_API CUresult CUDAAPI cuMemAllocPitch_v2(CUdeviceptr* dptr, size_t* pPitch,
                                               size_t WidthInBytes, size_t Height,
                                               unsigned int ElementSizeBytes) {
  SIMGPU_ENTER(cuMemAllocPitch);
  constexpr size_t kPitch = 512;
  SIMGPU_REQUIRE(pPitch != nullptr && WidthInBytes != 0 && Height != 0);
  SIMGPU_REQUIRE(ElementSizeBytes == 4 || ElementSizeBytes == 8 || ElementSizeBytes == 16);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  size_t pitch = (WidthInBytes + kPitch - 1) / kPitch * kPitch;
  if (pitch < WidthInBytes || Height > SIZE_MAX / pitch) return CUDA_ERROR_INVALID_VALUE;
  SIMGPU_TRY(allocate(context, pitch * Height, {}, dptr));
  *pPitch = pitch;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemAllocManaged(CUdeviceptr* dptr, size_t bytesize,
                                              unsigned int flags) {
  SIMGPU_ENTER(cuMemAllocManaged);
  SIMGPU_REQUIRE(flags == CU_MEM_ATTACH_GLOBAL || flags == CU_MEM_ATTACH_HOST);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  AllocationTraits traits;
  traits.managed = true;
  return allocate(context, bytesize, traits, dptr);
}

SIMGPU_API CUresult CUDAAPI cuMemFree_v2(CUdeviceptr dptr) {
  SIMGPU_ENTER(cuMemFree);
  if (dptr == 0) return CUDA_SUCCESS;
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  SIMGPU_TRY(memory().check_free(dptr));
  // Freeing waits for the work that may use the memory, of the owner and of the caller.
  std::optional<RangeInfo> range = memory().find(dptr);
  if (range.has_value() && range->context != nullptr) simulation().drain(range->context);
  simulation().drain(context);
  SIMGPU_TRY(context->error());
  SIMGPU_TRY(memory().begin_free(dptr));
  return memory().free(dptr);
}

SIMGPU_API CUresult CUDAAPI cuMemGetAddressRange_v2(CUdeviceptr* pbase, size_t* psize,
                                                    CUdeviceptr dptr) {
  SIMGPU_ENTER(cuMemGetAddressRange);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  std::optional<RangeInfo> range = memory().find(dptr);
  if (!range.has_value()) return CUDA_ERROR_NOT_FOUND;
  if (range->kind == RangeKind::kMapping) {
    // The driver finds a mapping only once the context's device may use it.
    unsigned long long flags = 0;
    CUmemLocation here{CU_MEM_LOCATION_TYPE_DEVICE, {context->device()}};
    SIMGPU_TRY(memory().get_access(dptr, here, &flags));
    if (flags == CU_MEM_ACCESS_FLAGS_PROT_NONE) return CUDA_ERROR_NOT_FOUND;
  }
  if (pbase != nullptr) *pbase = range->base;
  if (psize != nullptr) *psize = range->size;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemAdvise(CUdeviceptr devPtr, size_t count, CUmem_advise advice,
                                        CUdevice device) {
  SIMGPU_ENTER(cuMemAdvise);
  SIMGPU_REQUIRE(count != 0 && advice >= CU_MEM_ADVISE_SET_READ_MOSTLY &&
                 advice <= CU_MEM_ADVISE_UNSET_ACCESSED_BY);
  if (device != CU_DEVICE_CPU && !simulation().valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::optional<RangeInfo> range = memory().find(devPtr);
  SIMGPU_REQUIRE(range.has_value() && range->managed);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemAdvise_v2(CUdeviceptr devPtr, size_t count, CUmem_advise advice,
                                           CUmemLocation location) {
  bool on_device = location.type == CU_MEM_LOCATION_TYPE_DEVICE;
  return cuMemAdvise(devPtr, count, advice, on_device ? location.id : CU_DEVICE_CPU);
}

SIMGPU_API CUresult CUDAAPI cuMemPrefetchAsync(CUdeviceptr devPtr, size_t count, CUdevice dstDevice,
                                               CUstream hStream) {
  SIMGPU_ENTER(cuMemPrefetchAsync);
  SIMGPU_REQUIRE(count != 0);
  if (dstDevice != CU_DEVICE_CPU && !simulation().valid(dstDevice))
    return CUDA_ERROR_INVALID_DEVICE;
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  std::optional<RangeInfo> range = memory().find(devPtr);
  SIMGPU_REQUIRE(range.has_value() && range->managed);
  return CUDA_SUCCESS;  // simulated managed memory is where it is needed already
}

SIMGPU_API CUresult CUDAAPI cuMemPrefetchAsync_v2(CUdeviceptr devPtr, size_t count,
                                                  CUmemLocation location, unsigned int flags,
                                                  CUstream hStream) {
  SIMGPU_REQUIRE(flags == 0);
  bool on_device = location.type == CU_MEM_LOCATION_TYPE_DEVICE;
  return cuMemPrefetchAsync(devPtr, count, on_device ? location.id : CU_DEVICE_CPU, hStream);
}

SIMGPU_API CUresult CUDAAPI cuMemPrefetchAsync_ptsz(CUdeviceptr devPtr, size_t count,
                                                    CUdevice dstDevice, CUstream hStream) {
  return cuMemPrefetchAsync(devPtr, count, dstDevice, per_thread(hStream));
}

SIMGPU_API CUresult CUDAAPI cuMemPrefetchAsync_v2_ptsz(CUdeviceptr devPtr, size_t count,
                                                       CUmemLocation location, unsigned int flags,
                                                       CUstream hStream) {
  return cuMemPrefetchAsync_v2(devPtr, count, location, flags, per_thread(hStream));
}

// Host memory.

SIMGPU_API CUresult CUDAAPI cuMemHostAlloc(void** pp, size_t bytesize, unsigned int Flags) {
  SIMGPU_ENTER(cuMemHostAlloc);
  SIMGPU_REQUIRE(pp != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  return memory().host_allocate(context, bytesize, Flags, pp);
}

SIMGPU_API CUresult CUDAAPI cuMemAllocHost_v2(void** pp, size_t bytesize) {
  SIMGPU_ENTER(cuMemAllocHost);
  SIMGPU_REQUIRE(pp != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  return memory().host_allocate(context, bytesize, 0, pp);
}

SIMGPU_API CUresult CUDAAPI cuMemFreeHost(void* p) {
  SIMGPU_ENTER(cuMemFreeHost);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  std::optional<RangeInfo> range = memory().find(reinterpret_cast<uintptr_t>(p));
  if (range.has_value() && range->context != nullptr) simulation().drain(range->context);
  return memory().host_free(p);
}

SIMGPU_API CUresult CUDAAPI cuMemHostRegister_v2(void* p, size_t bytesize, unsigned int Flags) {
  SIMGPU_ENTER(cuMemHostRegister);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  return memory().host_register(context, p, bytesize, Flags);
}

SIMGPU_API CUresult CUDAAPI cuMemHostUnregister(void* p) {
  SIMGPU_ENTER(cuMemHostUnregister);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  std::optional<RangeInfo> range = memory().find(reinterpret_cast<uintptr_t>(p));
  if (range.has_value() && range->context != nullptr) simulation().drain(range->context);
  return memory().host_unregister(p);
}

SIMGPU_API CUresult CUDAAPI cuMemHostGetDevicePointer_v2(CUdeviceptr* pdptr, void* p,
                                                         unsigned int Flags) {
  SIMGPU_ENTER(cuMemHostGetDevicePointer);
  SIMGPU_REQUIRE(pdptr != nullptr && Flags == 0);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  std::optional<RangeInfo> range = memory().find(reinterpret_cast<uintptr_t>(p));
  SIMGPU_REQUIRE(range.has_value() && (range->kind == RangeKind::kHostAllocation ||
                                       range->kind == RangeKind::kHostRegistration));
  *pdptr = reinterpret_cast<CUdeviceptr>(p);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuMemHostGetFlags(unsigned int* pFlags, void* p) {
  SIMGPU_ENTER(cuMemHostGetFlags);
  SIMGPU_REQUIRE(pFlags != nullptr);
  std::optional<RangeInfo> range = memory().find(reinterpret_cast<uintptr_t>(p));
  SIMGPU_REQUIRE(range.has_value() && range->kind == RangeKind::kHostAllocation);
  *pFlags = range->flags | CU_MEMHOSTALLOC_DEVICEMAP;
  return CUDA_SUCCESS;
}

// Sharing with other processes.

SIMGPU_API CUresult CUDAAPI cuIpcGetMemHandle(CUipcMemHandle* pHandle, CUdeviceptr dptr) {
  SIMGPU_ENTER(cuIpcGetMemHandle);
  SIMGPU_REQUIRE(pHandle != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  return memory().ipc_export(dptr, pHandle);
}

SIMGPU_API CUresult CUDAAPI cuIpcOpenMemHandle_v2(CUdeviceptr* pdptr, CUipcMemHandle handle,
                                                  unsigned int Flags) {
  SIMGPU_ENTER(cuIpcOpenMemHandle);
  SIMGPU_REQUIRE(pdptr != nullptr && Flags == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  uintptr_t address = 0;
  SIMGPU_TRY(memory().ipc_open(context, handle, &address));
  *pdptr = address;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuIpcOpenMemHandle(CUdeviceptr* pdptr, CUipcMemHandle handle,
                                               unsigned int Flags) {
  return cuIpcOpenMemHandle_v2(pdptr, handle, Flags);
}

SIMGPU_API CUresult CUDAAPI cuIpcCloseMemHandle(CUdeviceptr dptr) {
  SIMGPU_ENTER(cuIpcCloseMemHandle);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  simulation().drain(context);
  return memory().ipc_close(dptr);
}

// Queries.

SIMGPU_API CUresult CUDAAPI cuPointerGetAttribute(void* data, CUpointer_attribute attribute,
                                                  CUdeviceptr ptr) {
  SIMGPU_ENTER(cuPointerGetAttribute);
  SIMGPU_REQUIRE(data != nullptr);
  std::optional<RangeInfo> range = memory().find(ptr);
  SIMGPU_REQUIRE(range.has_value());
  return pointer_value(*range, attribute, ptr, data);
}

SIMGPU_API CUresult CUDAAPI cuPointerGetAttributes(unsigned int numAttributes,
                                                   CUpointer_attribute* attributes, void** data,
                                                   CUdeviceptr ptr) {
  SIMGPU_ENTER(cuPointerGetAttributes);
  SIMGPU_REQUIRE(attributes != nullptr && data != nullptr);
  std::optional<RangeInfo> range = memory().find(ptr);
  for (unsigned i = 0; i < numAttributes; ++i) {
    // An attribute that does not apply to the pointer is left zero; the call succeeds all the same.
    if (!range.has_value() || pointer_value(*range, attributes[i], ptr, data[i]) != CUDA_SUCCESS) {
      put_unknown(attributes[i], data[i]);
    }
  }
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuPointerSetAttribute(const void* value, CUpointer_attribute attribute,
                                                  CUdeviceptr ptr) {
  SIMGPU_ENTER(cuPointerSetAttribute);
  SIMGPU_REQUIRE(value != nullptr && attribute == CU_POINTER_ATTRIBUTE_SYNC_MEMOPS);
  return memory().set_sync_memops(ptr, *static_cast<const unsigned int*>(value) != 0);
}

// Allocation in stream order.

SIMGPU_API CUresult CUDAAPI cuMemAllocFromPoolAsync(CUdeviceptr* dptr, size_t bytesize,
                                                    CUmemoryPool pool, CUstream hStream) {
  SIMGPU_ENTER(cuMemAllocFromPoolAsync);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  SIMGPU_REQUIRE(pools().find(pool) != nullptr);
  if (simulation().is_capturing(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  AllocationTraits traits;
  traits.pool = pool;
  return allocate_in_order(context, bytesize, traits, dptr);
}

SIMGPU_API CUresult CUDAAPI cuMemAllocAsync(CUdeviceptr* dptr, size_t bytesize, CUstream hStream) {
  SIMGPU_ENTER(cuMemAllocAsync);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  if (simulation().is_capturing(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  AllocationTraits traits;
  traits.pool = pools().current(context->device());
  return allocate_in_order(context, bytesize, traits, dptr);
}

SIMGPU_API CUresult CUDAAPI cuMemFreeAsync(CUdeviceptr dptr, CUstream hStream) {
  SIMGPU_ENTER(cuMemFreeAsync);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  if (simulation().is_capturing(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (dptr == 0) return CUDA_SUCCESS;
  SIMGPU_TRY(memory().begin_free(dptr));
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_MEM_FREE;
  work.action = [dptr] { return memory().free(dptr); };
  return simulation().submit(stream, std::move(work), nullptr);
}

SIMGPU_API CUresult CUDAAPI cuMemAllocFromPoolAsync_ptsz(CUdeviceptr* dptr, size_t bytesize,
                                                         CUmemoryPool pool, CUstream hStream) {
  return cuMemAllocFromPoolAsync(dptr, bytesize, pool, per_thread(hStream));
}

SIMGPU_API CUresult CUDAAPI cuMemAllocAsync_ptsz(CUdeviceptr* dptr, size_t bytesize,
                                                 CUstream hStream) {
  return cuMemAllocAsync(dptr, bytesize, per_thread(hStream));
}

SIMGPU_API CUresult CUDAAPI cuMemFreeAsync_ptsz(CUdeviceptr dptr, CUstream hStream) {
  return cuMemFreeAsync(dptr, per_thread(hStream));
}
