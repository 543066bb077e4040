// Exported functions of the simulated CUDA runtime: memory, copies, fills; with the per-thread
// default stream varieties.
#include <cstring>

#include "tests/simgpu/cudart_driver.h"

using namespace simgpu::cudart;  // NOLINT: the functions below carry the real runtime's names

namespace {

CUdeviceptr address(const void* pointer) {
  return reinterpret_cast<CUdeviceptr>(pointer);
}

// The driver functions of one default stream variety, for copies and fills.
struct Variety {
  const DriverFunctions& d = driver();
  bool per_thread;

  CUresult copy(void* dst, const void* src, size_t count, cudaMemcpyKind kind) const {
    switch (kind) {
      case cudaMemcpyHostToDevice:
        return (per_thread ? d.cuMemcpyHtoD_per_thread : d.cuMemcpyHtoD)(address(dst), src, count);
      case cudaMemcpyDeviceToHost:
        return (per_thread ? d.cuMemcpyDtoH_per_thread : d.cuMemcpyDtoH)(dst, address(src), count);
      case cudaMemcpyDeviceToDevice:
        return (per_thread ? d.cuMemcpyDtoD_per_thread : d.cuMemcpyDtoD)(address(dst), address(src),
                                                                         count);
      default:
        return (per_thread ? d.cuMemcpy_per_thread : d.cuMemcpy)(address(dst), address(src), count);
    }
  }

  CUresult copy_async(void* dst, const void* src, size_t count, cudaMemcpyKind kind,
                      CUstream stream) const {
    switch (kind) {
      case cudaMemcpyHostToDevice:
        return (per_thread ? d.cuMemcpyHtoDAsync_per_thread : d.cuMemcpyHtoDAsync)(
            address(dst), src, count, stream);
      case cudaMemcpyDeviceToHost:
        return (per_thread ? d.cuMemcpyDtoHAsync_per_thread : d.cuMemcpyDtoHAsync)(
            dst, address(src), count, stream);
      case cudaMemcpyDeviceToDevice:
        return (per_thread ? d.cuMemcpyDtoDAsync_per_thread : d.cuMemcpyDtoDAsync)(
            address(dst), address(src), count, stream);
      default:
        return (per_thread ? d.cuMemcpyAsync_per_thread : d.cuMemcpyAsync)(
            address(dst), address(src), count, stream);
    }
  }
};
const auto legacy = [] { return Variety{driver(), false}; };
const auto own = [] { return Variety{driver(), true}; };

bool is_kind(cudaMemcpyKind kind) {
  return kind >= cudaMemcpyHostToHost && kind <= cudaMemcpyDefault;
}

CUmemorytype source_type(cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDefault) return CU_MEMORYTYPE_UNIFIED;
  return kind == cudaMemcpyHostToHost || kind == cudaMemcpyHostToDevice ? CU_MEMORYTYPE_HOST
                                                                        : CU_MEMORYTYPE_DEVICE;
}

CUmemorytype target_type(cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDefault) return CU_MEMORYTYPE_UNIFIED;
  return kind == cudaMemcpyHostToHost || kind == cudaMemcpyDeviceToHost ? CU_MEMORYTYPE_HOST
                                                                        : CU_MEMORYTYPE_DEVICE;
}

CUDA_MEMCPY2D plane(void* dst, size_t dpitch, const void* src, size_t spitch, size_t width,
                    size_t height, cudaMemcpyKind kind) {
  CUDA_MEMCPY2D p{};
  p.srcMemoryType = source_type(kind);
  p.srcHost = src;
  p.srcDevice = address(src);
  p.srcPitch = spitch;
  p.dstMemoryType = target_type(kind);
  p.dstHost = dst;
  p.dstDevice = address(dst);
  p.dstPitch = dpitch;
  p.WidthInBytes = width;
  p.Height = height;
  return p;
}

// Arrays are not simulated.
cudaError_t volume(const cudaMemcpy3DParms* p, CUDA_MEMCPY3D* out) {
  if (p == nullptr || !is_kind(p->kind)) return cudaErrorInvalidValue;
  if (p->srcArray != nullptr || p->dstArray != nullptr) return cudaErrorNotSupported;
  *out = {};
  out->srcMemoryType = source_type(p->kind);
  out->srcHost = p->srcPtr.ptr;
  out->srcDevice = address(p->srcPtr.ptr);
  out->srcPitch = p->srcPtr.pitch;
  out->srcHeight = p->srcPtr.ysize;
  out->srcXInBytes = p->srcPos.x;
  out->srcY = p->srcPos.y;
  out->srcZ = p->srcPos.z;
  out->dstMemoryType = target_type(p->kind);
  out->dstHost = p->dstPtr.ptr;
  out->dstDevice = address(p->dstPtr.ptr);
  out->dstPitch = p->dstPtr.pitch;
  out->dstHeight = p->dstPtr.ysize;
  out->dstXInBytes = p->dstPos.x;
  out->dstY = p->dstPos.y;
  out->dstZ = p->dstPos.z;
  out->WidthInBytes = p->extent.width;
  out->Height = p->extent.height;
  out->Depth = p->extent.depth;
  return cudaSuccess;
}

// Fills the rows of every slice; `fill_rows` fills one slice.
template <typename FillRows>
CUresult fill_slices(const cudaPitchedPtr& to, const cudaExtent& extent, FillRows fill_rows) {
  for (size_t z = 0; z < extent.depth; ++z) {
    CUdeviceptr slice = address(to.ptr) + z * to.ysize * to.pitch;
    CUresult result = fill_rows(slice);
    if (result != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}

unsigned char byte(int value) {
  return static_cast<unsigned char>(value);
}

}  // namespace

// Allocation.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMalloc(void** devPtr, size_t size) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(devPtr != nullptr, cudaErrorInvalidValue);
  *devPtr = nullptr;
  if (size == 0) return cudaSuccess;
  CUdeviceptr pointer = 0;
  CUresult result = driver().cuMemAlloc(&pointer, size);
  if (result == CUDA_SUCCESS) *devPtr = reinterpret_cast<void*>(pointer);
  return finish(result);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaFree(void* devPtr) {
  SIMGPU_CONTEXT();
  if (devPtr == nullptr) return cudaSuccess;
  return finish(driver().cuMemFree(address(devPtr)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMallocPitch(void** devPtr, size_t* pitch, size_t width,
                                                     size_t height) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(devPtr != nullptr && pitch != nullptr, cudaErrorInvalidValue);
  *devPtr = nullptr;
  *pitch = 0;
  if (width == 0 || height == 0) return cudaSuccess;
  CUdeviceptr pointer = 0;
  CUresult result = driver().cuMemAllocPitch(&pointer, pitch, width, height, 4);
  if (result == CUDA_SUCCESS) *devPtr = reinterpret_cast<void*>(pointer);
  return finish(result);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMalloc3D(cudaPitchedPtr* pitchedDevPtr,
                                                  cudaExtent extent) {
  SIMGPU_CHECK(pitchedDevPtr != nullptr, cudaErrorInvalidValue);
  *pitchedDevPtr = {nullptr, 0, extent.width, extent.height};
  return cudaMallocPitch(&pitchedDevPtr->ptr, &pitchedDevPtr->pitch, extent.width,
                         extent.height * extent.depth);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMallocManaged(void** devPtr, size_t size,
                                                       unsigned int flags) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(devPtr != nullptr, cudaErrorInvalidValue);
  CUdeviceptr pointer = 0;
  CUresult result = driver().cuMemAllocManaged(&pointer, size, flags);
  if (result == CUDA_SUCCESS) *devPtr = reinterpret_cast<void*>(pointer);
  return finish(result);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemGetInfo(size_t* free, size_t* total) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemGetInfo(free, total));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMallocHost(void** ptr, size_t size) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemHostAlloc(ptr, size, 0));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaHostAlloc(void** pHost, size_t size, unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemHostAlloc(pHost, size, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaFreeHost(void* ptr) {
  SIMGPU_CONTEXT();
  if (ptr == nullptr) return cudaSuccess;
  return finish(driver().cuMemFreeHost(ptr));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaHostRegister(void* ptr, size_t size, unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemHostRegister(ptr, size, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaHostUnregister(void* ptr) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemHostUnregister(ptr));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaHostGetDevicePointer(void** pDevice, void* pHost,
                                                              unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(
      driver().cuMemHostGetDevicePointer(reinterpret_cast<CUdeviceptr*>(pDevice), pHost, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaHostGetFlags(unsigned int* pFlags, void* pHost) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemHostGetFlags(pFlags, pHost));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                                              const void* ptr) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(attributes != nullptr, cudaErrorInvalidValue);
  unsigned type = 0;
  int managed = 0, device = -2;
  void* on_device = nullptr;
  void* on_host = nullptr;
  CUpointer_attribute asked[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED,
                                 CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                                 CU_POINTER_ATTRIBUTE_DEVICE_POINTER,
                                 CU_POINTER_ATTRIBUTE_HOST_POINTER};
  void* answers[] = {&type, &managed, &device, &on_device, &on_host};
  CUresult result = driver().cuPointerGetAttributes(5, asked, answers, address(ptr));
  if (result != CUDA_SUCCESS) return finish(result);
  *attributes = {};
  attributes->device = device;
  attributes->devicePointer = on_device;
  attributes->hostPointer = on_host;
  if (managed != 0) {
    attributes->type = cudaMemoryTypeManaged;
  } else if (type == CU_MEMORYTYPE_DEVICE) {
    attributes->type = cudaMemoryTypeDevice;
  } else if (type == CU_MEMORYTYPE_HOST) {
    attributes->type = cudaMemoryTypeHost;
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->hostPointer = const_cast<void*>(ptr);
  }
  return cudaSuccess;
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* devPtr) {
  SIMGPU_CONTEXT();
  static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(CUipcMemHandle));
  return finish(
      driver().cuIpcGetMemHandle(reinterpret_cast<CUipcMemHandle*>(handle), address(devPtr)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaIpcOpenMemHandle(void** devPtr, cudaIpcMemHandle_t handle,
                                                          unsigned int flags) {
  SIMGPU_CONTEXT();
  CUipcMemHandle same;
  std::memcpy(&same, &handle, sizeof(same));
  return finish(driver().cuIpcOpenMemHandle(reinterpret_cast<CUdeviceptr*>(devPtr), same, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaIpcCloseMemHandle(void* devPtr) {
  SIMGPU_CONTEXT();
  return finish(driver().cuIpcCloseMemHandle(address(devPtr)));
}

// Allocation in stream order.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMallocAsync(void** devPtr, size_t size,
                                                     cudaStream_t hStream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemAllocAsync(reinterpret_cast<CUdeviceptr*>(devPtr), size, hStream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMallocAsync_ptsz(void** devPtr, size_t size,
                                                          cudaStream_t hStream) {
  SIMGPU_CONTEXT();
  return finish(
      driver().cuMemAllocAsync_per_thread(reinterpret_cast<CUdeviceptr*>(devPtr), size, hStream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMallocFromPoolAsync(void** ptr, size_t size,
                                                             cudaMemPool_t memPool,
                                                             cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemAllocFromPoolAsync(reinterpret_cast<CUdeviceptr*>(ptr), size,
                                                 reinterpret_cast<CUmemoryPool>(memPool), stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMallocFromPoolAsync_ptsz(void** ptr, size_t size,
                                                                  cudaMemPool_t memPool,
                                                                  cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemAllocFromPoolAsync_per_thread(
      reinterpret_cast<CUdeviceptr*>(ptr), size, reinterpret_cast<CUmemoryPool>(memPool), stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaFreeAsync(void* devPtr, cudaStream_t hStream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemFreeAsync(address(devPtr), hStream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaFreeAsync_ptsz(void* devPtr, cudaStream_t hStream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemFreeAsync_per_thread(address(devPtr), hStream));
}

// Copies.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy(void* dst, const void* src, size_t count,
                                                cudaMemcpyKind kind) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_kind(kind), cudaErrorInvalidMemcpyDirection);
  return finish(legacy().copy(dst, src, count, kind));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy_ptds(void* dst, const void* src, size_t count,
                                                     cudaMemcpyKind kind) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_kind(kind), cudaErrorInvalidMemcpyDirection);
  return finish(own().copy(dst, src, count, kind));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpyAsync(void* dst, const void* src, size_t count,
                                                     cudaMemcpyKind kind, cudaStream_t stream) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_kind(kind), cudaErrorInvalidMemcpyDirection);
  return finish(legacy().copy_async(dst, src, count, kind, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpyAsync_ptsz(void* dst, const void* src, size_t count,
                                                          cudaMemcpyKind kind,
                                                          cudaStream_t stream) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_kind(kind), cudaErrorInvalidMemcpyDirection);
  return finish(own().copy_async(dst, src, count, kind, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy2D(void* dst, size_t dpitch, const void* src,
                                                  size_t spitch, size_t width, size_t height,
                                                  cudaMemcpyKind kind) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_kind(kind), cudaErrorInvalidMemcpyDirection);
  CUDA_MEMCPY2D p = plane(dst, dpitch, src, spitch, width, height, kind);
  return finish(driver().cuMemcpy2DUnaligned(&p));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy2D_ptds(void* dst, size_t dpitch, const void* src,
                                                       size_t spitch, size_t width, size_t height,
                                                       cudaMemcpyKind kind) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_kind(kind), cudaErrorInvalidMemcpyDirection);
  CUDA_MEMCPY2D p = plane(dst, dpitch, src, spitch, width, height, kind);
  return finish(driver().cuMemcpy2DUnaligned_per_thread(&p));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy2DAsync(void* dst, size_t dpitch, const void* src,
                                                       size_t spitch, size_t width, size_t height,
                                                       cudaMemcpyKind kind, cudaStream_t stream) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_kind(kind), cudaErrorInvalidMemcpyDirection);
  CUDA_MEMCPY2D p = plane(dst, dpitch, src, spitch, width, height, kind);
  return finish(driver().cuMemcpy2DAsync(&p, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy2DAsync_ptsz(void* dst, size_t dpitch,
                                                            const void* src, size_t spitch,
                                                            size_t width, size_t height,
                                                            cudaMemcpyKind kind,
                                                            cudaStream_t stream) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_kind(kind), cudaErrorInvalidMemcpyDirection);
  CUDA_MEMCPY2D p = plane(dst, dpitch, src, spitch, width, height, kind);
  return finish(driver().cuMemcpy2DAsync_per_thread(&p, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy3D(const cudaMemcpy3DParms* p) {
  SIMGPU_CONTEXT();
  CUDA_MEMCPY3D copy;
  if (cudaError_t error = volume(p, &copy); error != cudaSuccess) return finish(error);
  return finish(driver().cuMemcpy3D(&copy));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy3D_ptds(const cudaMemcpy3DParms* p) {
  SIMGPU_CONTEXT();
  CUDA_MEMCPY3D copy;
  if (cudaError_t error = volume(p, &copy); error != cudaSuccess) return finish(error);
  return finish(driver().cuMemcpy3D_per_thread(&copy));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy3DAsync(const cudaMemcpy3DParms* p,
                                                       cudaStream_t stream) {
  SIMGPU_CONTEXT();
  CUDA_MEMCPY3D copy;
  if (cudaError_t error = volume(p, &copy); error != cudaSuccess) return finish(error);
  return finish(driver().cuMemcpy3DAsync(&copy, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpy3DAsync_ptsz(const cudaMemcpy3DParms* p,
                                                            cudaStream_t stream) {
  SIMGPU_CONTEXT();
  CUDA_MEMCPY3D copy;
  if (cudaError_t error = volume(p, &copy); error != cudaSuccess) return finish(error);
  return finish(driver().cuMemcpy3DAsync_per_thread(&copy, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpyPeer(void* dst, int dstDevice, const void* src,
                                                    int srcDevice, size_t count) {
  SIMGPU_CONTEXT();
  CUcontext to = nullptr, from = nullptr;
  if (cudaError_t error = primary_context(dstDevice, &to); error != cudaSuccess)
    return finish(error);
  if (cudaError_t error = primary_context(srcDevice, &from); error != cudaSuccess)
    return finish(error);
  return finish(driver().cuMemcpyPeer(address(dst), to, address(src), from, count));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemcpyPeerAsync(void* dst, int dstDevice, const void* src,
                                                         int srcDevice, size_t count,
                                                         cudaStream_t stream) {
  SIMGPU_CONTEXT();
  CUcontext to = nullptr, from = nullptr;
  if (cudaError_t error = primary_context(dstDevice, &to); error != cudaSuccess)
    return finish(error);
  if (cudaError_t error = primary_context(srcDevice, &from); error != cudaSuccess)
    return finish(error);
  return finish(driver().cuMemcpyPeerAsync(address(dst), to, address(src), from, count, stream));
}

// Fills.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset(void* devPtr, int value, size_t count) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemsetD8(address(devPtr), byte(value), count));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset_ptds(void* devPtr, int value, size_t count) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemsetD8_per_thread(address(devPtr), byte(value), count));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemsetAsync(void* devPtr, int value, size_t count,
                                                     cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemsetD8Async(address(devPtr), byte(value), count, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemsetAsync_ptsz(void* devPtr, int value, size_t count,
                                                          cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemsetD8Async_per_thread(address(devPtr), byte(value), count, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset2D(void* devPtr, size_t pitch, int value,
                                                  size_t width, size_t height) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemsetD2D8(address(devPtr), pitch, byte(value), width, height));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset2D_ptds(void* devPtr, size_t pitch, int value,
                                                       size_t width, size_t height) {
  SIMGPU_CONTEXT();
  return finish(
      driver().cuMemsetD2D8_per_thread(address(devPtr), pitch, byte(value), width, height));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset2DAsync(void* devPtr, size_t pitch, int value,
                                                       size_t width, size_t height,
                                                       cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(
      driver().cuMemsetD2D8Async(address(devPtr), pitch, byte(value), width, height, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset2DAsync_ptsz(void* devPtr, size_t pitch, int value,
                                                            size_t width, size_t height,
                                                            cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemsetD2D8Async_per_thread(address(devPtr), pitch, byte(value), width,
                                                      height, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset3D(cudaPitchedPtr pitchedDevPtr, int value,
                                                  cudaExtent extent) {
  SIMGPU_CONTEXT();
  return finish(fill_slices(pitchedDevPtr, extent, [&](CUdeviceptr slice) {
    return driver().cuMemsetD2D8(slice, pitchedDevPtr.pitch, byte(value), extent.width,
                                 extent.height);
  }));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset3D_ptds(cudaPitchedPtr pitchedDevPtr, int value,
                                                       cudaExtent extent) {
  SIMGPU_CONTEXT();
  return finish(fill_slices(pitchedDevPtr, extent, [&](CUdeviceptr slice) {
    return driver().cuMemsetD2D8_per_thread(slice, pitchedDevPtr.pitch, byte(value), extent.width,
                                            extent.height);
  }));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset3DAsync(cudaPitchedPtr pitchedDevPtr, int value,
                                                       cudaExtent extent, cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(fill_slices(pitchedDevPtr, extent, [&](CUdeviceptr slice) {
    return driver().cuMemsetD2D8Async(slice, pitchedDevPtr.pitch, byte(value), extent.width,
                                      extent.height, stream);
  }));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemset3DAsync_ptsz(cudaPitchedPtr pitchedDevPtr, int value,
                                                            cudaExtent extent,
                                                            cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(fill_slices(pitchedDevPtr, extent, [&](CUdeviceptr slice) {
    return driver().cuMemsetD2D8Async_per_thread(slice, pitchedDevPtr.pitch, byte(value),
                                                 extent.width, extent.height, stream);
  }));
}

#if SIMGPU_FORMS_13
// CUDA 12's forms of these two are in cudart_12.cc.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemAdvise(const void* devPtr, size_t count,
                                                   cudaMemoryAdvise advice,
                                                   cudaMemLocation location) {
  SIMGPU_CONTEXT();
  int device = location.type == cudaMemLocationTypeDevice ? location.id : cudaCpuDeviceId;
  return finish(
      driver().cuMemAdvise(address(devPtr), count, static_cast<CUmem_advise>(advice), device));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemPrefetchAsync(const void* devPtr, size_t count,
                                                          cudaMemLocation location,
                                                          unsigned int flags, cudaStream_t stream) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(flags == 0, cudaErrorInvalidValue);
  int device = location.type == cudaMemLocationTypeDevice ? location.id : cudaCpuDeviceId;
  return finish(driver().cuMemPrefetchAsync(address(devPtr), count, device, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemPrefetchAsync_ptsz(const void* devPtr, size_t count,
                                                               cudaMemLocation location,
                                                               unsigned int flags,
                                                               cudaStream_t stream) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(flags == 0, cudaErrorInvalidValue);
  int device = location.type == cudaMemLocationTypeDevice ? location.id : cudaCpuDeviceId;
  return finish(driver().cuMemPrefetchAsync_per_thread(address(devPtr), count, device, stream));
}

#endif
