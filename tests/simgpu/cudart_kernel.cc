// Exported functions of the simulated CUDA runtime for code compiled by nvcc. Such code registers
// itself when it is loaded; its kernels are for a real GPU, so a launch says that there is no image
// for this one.
#include <mutex>
#include <set>

#include "tests/simgpu/cudart_driver.h"

using namespace simgpu::cudart;  // NOLINT: the functions below carry the real runtime's names

namespace {

struct Functions {
  std::mutex mutex;  // protects registered
  std::set<const void*> registered;
};

Functions& functions() {
  static auto* instance = new Functions;
  return *instance;
}

struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local CallConfiguration configuration;

cudaError_t refuse(const void* function) {
  SIMGPU_CONTEXT();
  std::lock_guard lock(functions().mutex);
  bool known = functions().registered.contains(function);
  return finish(known ? cudaErrorNoKernelImageForDevice : cudaErrorInvalidDeviceFunction);
}

}  // namespace

SIMGPU_RUNTIME void** CUDARTAPI __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
SIMGPU_RUNTIME void CUDARTAPI __cudaRegisterFatBinaryEnd(void**) {}
SIMGPU_RUNTIME void CUDARTAPI __cudaUnregisterFatBinary(void**) {}
SIMGPU_RUNTIME void CUDARTAPI __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int,
                                                int) {}
SIMGPU_RUNTIME void CUDARTAPI __cudaRegisterManagedVar(void**, void**, char*, const char*, int,
                                                       size_t, int, int) {}
SIMGPU_RUNTIME char CUDARTAPI __cudaInitModule(void**) {
  return 1;
}

SIMGPU_RUNTIME void CUDARTAPI __cudaRegisterFunction(void**, const char* hostFun, char*,
                                                     const char*, int, uint3*, uint3*, dim3*, dim3*,
                                                     int*) {
  std::lock_guard lock(functions().mutex);
  functions().registered.insert(hostFun);
}

SIMGPU_RUNTIME unsigned CUDARTAPI __cudaPushCallConfiguration(dim3 gridDim, dim3 blockDim,
                                                              size_t sharedMem,
                                                              CUstream_st* stream) {
  configuration = {gridDim, blockDim, sharedMem, stream};
  return 0;
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI __cudaPopCallConfiguration(dim3* gridDim, dim3* blockDim,
                                                                size_t* sharedMem, void* stream) {
  *gridDim = configuration.grid;
  *blockDim = configuration.block;
  *sharedMem = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaLaunchKernel(const void* func, dim3, dim3, void**, size_t,
                                                      cudaStream_t) {
  return refuse(func);
}
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaLaunchKernel_ptsz(const void* func, dim3, dim3, void**,
                                                           size_t, cudaStream_t) {
  return refuse(func);
}
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t*,
                                                         const void* func, void**) {
  return refuse(func);
}
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaLaunchKernelExC_ptsz(const cudaLaunchConfig_t*,
                                                              const void* func, void**) {
  return refuse(func);
}
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaLaunchCooperativeKernel(const void* func, dim3, dim3,
                                                                 void**, size_t, cudaStream_t) {
  return refuse(func);
}
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaLaunchCooperativeKernel_ptsz(const void* func, dim3, dim3,
                                                                      void**, size_t,
                                                                      cudaStream_t) {
  return refuse(func);
}
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes*, const void* func) {
  return refuse(func);
}
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* func, cudaFuncAttribute,
                                                          int) {
  return refuse(func);
}
SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int*, const void* func, int, size_t, unsigned int) {
  return refuse(func);
}
