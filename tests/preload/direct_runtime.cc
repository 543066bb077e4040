// A CUDA runtime that gets past the hooks: it takes libcuda's functions from behind the preloaded
// library. For direct.cc.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

namespace {

// volatile: see lookup_libraries.cc.
template <typename Function>
Function behind(const char* name) {
  void* volatile found = dlsym(RTLD_NEXT, name);
  return reinterpret_cast<Function>(found);
}
#define DRIVER(name) behind<decltype(&::name)>(#name)

cudaError_t error_of(CUresult result) {
  return static_cast<cudaError_t>(result);
}

cudaError_t start() {
  static const CUresult result = [] {
    CUcontext context = nullptr;
    CUresult step = DRIVER(cuInit)(0);
    if (step == CUDA_SUCCESS) step = DRIVER(cuDevicePrimaryCtxRetain)(&context, 0);
    return step == CUDA_SUCCESS ? DRIVER(cuCtxSetCurrent)(context) : step;
  }();
  return error_of(result);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED cudaError_t cudaMalloc(void** address, size_t size) {
  if (const cudaError_t problem = start(); problem != cudaSuccess) return problem;
  return error_of(DRIVER(cuMemAlloc_v2)(reinterpret_cast<CUdeviceptr*>(address), size));
}

EXPORTED cudaError_t cudaFree(void* address) {
  if (const cudaError_t problem = start(); problem != cudaSuccess) return problem;
  return error_of(DRIVER(cuMemFree_v2)(reinterpret_cast<CUdeviceptr>(address)));
}
