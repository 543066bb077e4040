// Exported functions of the simulated CUDA runtime: versions, errors, devices, entry points of the
// driver, pools.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "tests/simgpu/cudart_driver.h"

using namespace simgpu::cudart;  // NOLINT: the functions below carry the real runtime's names

namespace {

cudaError_t entry_point(const char* symbol, void** function, unsigned version,
                        unsigned long long flags, cudaDriverEntryPointQueryResult* status) {
  SIMGPU_DRIVER();
  SIMGPU_CHECK(symbol != nullptr && function != nullptr, cudaErrorInvalidValue);
  CUdriverProcAddressQueryResult found = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  CUresult result =
      driver().cuGetProcAddress(symbol, function, static_cast<int>(version), flags, &found);
  if (status != nullptr) *status = static_cast<cudaDriverEntryPointQueryResult>(found);
  if (result == CUDA_ERROR_INVALID_VALUE) return finish(result);
  return cudaSuccess;  // a function that is not there is told by the status
}

// The thread's own default stream is meant unless the flags say otherwise.
unsigned long long per_thread_flags(unsigned long long flags) {
  constexpr unsigned long long kPerThread = cudaEnablePerThreadDefaultStream;
  return flags == cudaEnableDefault ? kPerThread : flags;
}

bool is_device(int device) {
  int count = 0;
  return driver().cuDeviceGetCount(&count) == CUDA_SUCCESS && device >= 0 && device < count;
}

}  // namespace

#if SIMGPU_FORMS_13
namespace {

void fill_properties(int device, cudaDeviceProp* out) {
  *out = {};
  driver().cuDeviceGetName(out->name, sizeof(out->name), device);
  driver().cuDeviceGetUuid(reinterpret_cast<CUuuid*>(&out->uuid), device);
  driver().cuDeviceTotalMem(&out->totalGlobalMem, device);
  auto get = [device](CUdevice_attribute which) { return attribute(device, which); };
  out->major = get(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  out->minor = get(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  out->multiProcessorCount = get(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  out->sharedMemPerBlock =
      static_cast<size_t>(get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK));
  out->sharedMemPerBlockOptin =
      static_cast<size_t>(get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN));
  out->sharedMemPerMultiprocessor =
      static_cast<size_t>(get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR));
  out->regsPerBlock = get(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  out->regsPerMultiprocessor = get(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
  out->warpSize = get(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  out->maxThreadsPerBlock = get(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  out->maxThreadsPerMultiProcessor = get(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  out->maxBlocksPerMultiProcessor = get(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  const CUdevice_attribute block[] = {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X,
                                      CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y,
                                      CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z};
  const CUdevice_attribute grid[] = {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X,
                                     CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y,
                                     CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z};
  for (int i = 0; i < 3; ++i) {
    out->maxThreadsDim[i] = get(block[i]);
    out->maxGridSize[i] = get(grid[i]);
  }
  out->totalConstMem = static_cast<size_t>(get(CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY));
  out->memPitch = static_cast<size_t>(get(CU_DEVICE_ATTRIBUTE_MAX_PITCH));
  out->textureAlignment = static_cast<size_t>(get(CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT));
  out->l2CacheSize = get(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  out->memoryBusWidth = get(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  out->asyncEngineCount = get(CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
  out->concurrentKernels = get(CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS);
  out->unifiedAddressing = get(CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING);
  out->managedMemory = get(CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY);
  out->canMapHostMemory = get(CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY);
  out->hostRegisterSupported = get(CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED);
  out->memoryPoolsSupported = get(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED);
  out->streamPrioritiesSupported = get(CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED);
  out->computePreemptionSupported = get(CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED);
  out->pciBusID = get(CU_DEVICE_ATTRIBUTE_PCI_BUS_ID);
}

}  // namespace
#endif

// Versions and errors.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* runtimeVersion) {
  SIMGPU_CHECK(runtimeVersion != nullptr, cudaErrorInvalidValue);
  *runtimeVersion = runtime_version();
  return cudaSuccess;
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDriverGetVersion(int* driverVersion) {
  SIMGPU_CHECK(driverVersion != nullptr, cudaErrorInvalidValue);
  load_driver();
  if (driver().cuDriverGetVersion == nullptr) {
    *driverVersion = 0;  // no driver is no error here
    return cudaSuccess;
  }
  return finish(driver().cuDriverGetVersion(driverVersion));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGetLastError(void) {
  return last_error(true);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaPeekAtLastError(void) {
  return last_error(false);
}

SIMGPU_RUNTIME const char* CUDARTAPI cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInitializationError:
      return "cudaErrorInitializationError";
    case cudaErrorCudartUnloading:
      return "cudaErrorCudartUnloading";
    case cudaErrorInvalidMemcpyDirection:
      return "cudaErrorInvalidMemcpyDirection";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    default: {
      // The rest have the driver's numbers and names close to its own.
      const char* name = nullptr;
      bool known = driver().cuGetErrorName != nullptr &&
                   driver().cuGetErrorName(static_cast<CUresult>(error), &name) == CUDA_SUCCESS;
      return known ? name : "unrecognized error code";
    }
  }
}

SIMGPU_RUNTIME const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver)
    return "CUDA driver version is insufficient for CUDA runtime version";
  const char* text = nullptr;
  bool known = driver().cuGetErrorString != nullptr &&
               driver().cuGetErrorString(static_cast<CUresult>(error), &text) == CUDA_SUCCESS;
  return known ? text : cudaGetErrorName(error);
}

// Entry points of the driver.

SIMGPU_RUNTIME cudaError_t CUDARTAPI
cudaGetDriverEntryPoint(const char* symbol, void** funcPtr, unsigned long long flags,
                        cudaDriverEntryPointQueryResult* driverStatus) {
  return entry_point(symbol, funcPtr, static_cast<unsigned>(runtime_version()), flags,
                     driverStatus);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI
cudaGetDriverEntryPoint_ptsz(const char* symbol, void** funcPtr, unsigned long long flags,
                             cudaDriverEntryPointQueryResult* driverStatus) {
  return entry_point(symbol, funcPtr, static_cast<unsigned>(runtime_version()),
                     per_thread_flags(flags), driverStatus);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(
    const char* symbol, void** funcPtr, unsigned int cudaVersion, unsigned long long flags,
    cudaDriverEntryPointQueryResult* driverStatus) {
  return entry_point(symbol, funcPtr, cudaVersion, flags, driverStatus);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion_ptsz(
    const char* symbol, void** funcPtr, unsigned int cudaVersion, unsigned long long flags,
    cudaDriverEntryPointQueryResult* driverStatus) {
  return entry_point(symbol, funcPtr, cudaVersion, per_thread_flags(flags), driverStatus);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGetExportTable(const void** ppExportTable,
                                                        const cudaUUID_t*) {
  SIMGPU_CHECK(ppExportTable != nullptr, cudaErrorInvalidValue);
  *ppExportTable = nullptr;  // the runtime's undocumented tables are not simulated
  return finish(cudaErrorInvalidValue);
}

// Devices.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  SIMGPU_CHECK(count != nullptr, cudaErrorInvalidValue);
  *count = 0;
  SIMGPU_DRIVER();
  return finish(driver().cuDeviceGetCount(count));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  SIMGPU_CHECK(device != nullptr, cudaErrorInvalidValue);
  SIMGPU_DRIVER();
  *device = current_device();
  return cudaSuccess;
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaSetDevice(int device) {
  SIMGPU_DRIVER();
  SIMGPU_CHECK(is_device(device), cudaErrorInvalidDevice);
  return finish(set_device(device));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaInitDevice(int device, unsigned int, unsigned int) {
  SIMGPU_DRIVER();
  SIMGPU_CHECK(is_device(device), cudaErrorInvalidDevice);
  CUcontext context = nullptr;
  return finish(primary_context(device, &context));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaSetDeviceFlags(unsigned int flags) {
  SIMGPU_DRIVER();
  return finish(driver().cuDevicePrimaryCtxSetFlags(current_device(), flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGetDeviceFlags(unsigned int* flags) {
  SIMGPU_DRIVER();
  SIMGPU_CHECK(flags != nullptr, cudaErrorInvalidValue);
  int active = 0;
  return finish(driver().cuDevicePrimaryCtxGetState(current_device(), flags, &active));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceReset(void) {
  SIMGPU_DRIVER();
  int device = current_device();
  CUresult result = driver().cuDevicePrimaryCtxReset(device);
  if (result == CUDA_SUCCESS) forget_primary(device);
  return finish(result);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceSynchronize(void) {
  SIMGPU_CONTEXT();
  return finish(driver().cuCtxSynchronize());
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attr,
                                                            int device) {
  SIMGPU_DRIVER();
  // The runtime's numbers are the driver's.
  return finish(
      driver().cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(attr), device));
}

#if SIMGPU_FORMS_13
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGetDeviceProperties(cudaDeviceProp* prop, int device) {
  SIMGPU_DRIVER();
  SIMGPU_CHECK(prop != nullptr, cudaErrorInvalidValue);
  SIMGPU_CHECK(is_device(device), cudaErrorInvalidDevice);
  fill_properties(device, prop);
  return cudaSuccess;
}
#endif

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetLimit(size_t* pValue, cudaLimit limit) {
  SIMGPU_CONTEXT();
  return finish(driver().cuCtxGetLimit(pValue, static_cast<CUlimit>(limit)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceSetLimit(cudaLimit limit, size_t value) {
  SIMGPU_CONTEXT();
  return finish(driver().cuCtxSetLimit(static_cast<CUlimit>(limit), value));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetStreamPriorityRange(int* leastPriority,
                                                                      int* greatestPriority) {
  SIMGPU_CONTEXT();
  return finish(driver().cuCtxGetStreamPriorityRange(leastPriority, greatestPriority));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetPCIBusId(char* pciBusId, int len, int device) {
  SIMGPU_DRIVER();
  return finish(driver().cuDeviceGetPCIBusId(pciBusId, len, device));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetByPCIBusId(int* device, const char* pciBusId) {
  SIMGPU_DRIVER();
  return finish(driver().cuDeviceGetByPCIBusId(device, pciBusId));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceCanAccessPeer(int* canAccessPeer, int device,
                                                             int peerDevice) {
  SIMGPU_DRIVER();
  return finish(driver().cuDeviceCanAccessPeer(canAccessPeer, device, peerDevice));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr attr,
                                                               int srcDevice, int dstDevice) {
  SIMGPU_DRIVER();
  return finish(driver().cuDeviceGetP2PAttribute(value, static_cast<CUdevice_P2PAttribute>(attr),
                                                 srcDevice, dstDevice));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceEnablePeerAccess(int peerDevice,
                                                                unsigned int flags) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_device(peerDevice) && peerDevice != current_device(), cudaErrorInvalidDevice);
  CUcontext peer = nullptr;
  cudaError_t error = primary_context(peerDevice, &peer);
  return finish(error == cudaSuccess
                    ? static_cast<cudaError_t>(driver().cuCtxEnablePeerAccess(peer, flags))
                    : error);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceDisablePeerAccess(int peerDevice) {
  SIMGPU_CONTEXT();
  SIMGPU_CHECK(is_device(peerDevice) && peerDevice != current_device(), cudaErrorInvalidDevice);
  CUcontext peer = nullptr;
  cudaError_t error = primary_context(peerDevice, &peer);
  return finish(error == cudaSuccess
                    ? static_cast<cudaError_t>(driver().cuCtxDisablePeerAccess(peer))
                    : error);
}

// Memory pools.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetDefaultMemPool(cudaMemPool_t* memPool,
                                                                 int device) {
  SIMGPU_DRIVER();
  return finish(
      driver().cuDeviceGetDefaultMemPool(reinterpret_cast<CUmemoryPool*>(memPool), device));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetMemPool(cudaMemPool_t* memPool, int device) {
  SIMGPU_DRIVER();
  return finish(driver().cuDeviceGetMemPool(reinterpret_cast<CUmemoryPool*>(memPool), device));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaDeviceSetMemPool(int device, cudaMemPool_t memPool) {
  SIMGPU_DRIVER();
  return finish(driver().cuDeviceSetMemPool(device, reinterpret_cast<CUmemoryPool>(memPool)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemPoolCreate(cudaMemPool_t* memPool,
                                                       const cudaMemPoolProps* poolProps) {
  SIMGPU_DRIVER();
  static_assert(sizeof(cudaMemPoolProps) == sizeof(CUmemPoolProps));
  return finish(driver().cuMemPoolCreate(reinterpret_cast<CUmemoryPool*>(memPool),
                                         reinterpret_cast<const CUmemPoolProps*>(poolProps)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemPoolDestroy(cudaMemPool_t memPool) {
  SIMGPU_DRIVER();
  return finish(driver().cuMemPoolDestroy(reinterpret_cast<CUmemoryPool>(memPool)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemPoolTrimTo(cudaMemPool_t memPool,
                                                       size_t minBytesToKeep) {
  SIMGPU_DRIVER();
  return finish(driver().cuMemPoolTrimTo(reinterpret_cast<CUmemoryPool>(memPool), minBytesToKeep));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemPoolSetAttribute(cudaMemPool_t memPool,
                                                             cudaMemPoolAttr attr, void* value) {
  SIMGPU_DRIVER();
  return finish(driver().cuMemPoolSetAttribute(reinterpret_cast<CUmemoryPool>(memPool),
                                               static_cast<CUmemPool_attribute>(attr), value));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemPoolGetAttribute(cudaMemPool_t memPool,
                                                             cudaMemPoolAttr attr, void* value) {
  SIMGPU_DRIVER();
  return finish(driver().cuMemPoolGetAttribute(reinterpret_cast<CUmemoryPool>(memPool),
                                               static_cast<CUmemPool_attribute>(attr), value));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaMemPoolSetAccess(cudaMemPool_t memPool,
                                                          const cudaMemAccessDesc* descList,
                                                          size_t count) {
  SIMGPU_DRIVER();
  static_assert(sizeof(cudaMemAccessDesc) == sizeof(CUmemAccessDesc));
  return finish(driver().cuMemPoolSetAccess(reinterpret_cast<CUmemoryPool>(memPool),
                                            reinterpret_cast<const CUmemAccessDesc*>(descList),
                                            count));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaProfilerStart(void) {
  SIMGPU_CONTEXT();
  return cudaSuccess;
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaProfilerStop(void) {
  SIMGPU_CONTEXT();
  return cudaSuccess;
}
