// See device_kernels.h.
#include "core/backup/device_kernels.h"

#include "core/backup/device_kernels_ptx.h"
#include "core/context.h"

namespace dormouse {

DeviceKernels::~DeviceKernels() {
  while (!kernels_.empty()) forget(kernels_.begin()->first, true);
}

CUresult DeviceKernels::load(CUcontext context, LoadedKernels* out) {
  MutexLock lock(kernels_mutex_);
  auto at = kernels_.find(context);
  if (at == kernels_.end()) {
    at = kernels_.emplace(context, LoadedKernels{}).first;  // first: nothing is lost if that fails
    LoadedKernels& made = at->second;
    CUresult result = driver_.cuModuleLoadData(&made.module, kDeviceKernelsPtx);
    if (result == CUDA_SUCCESS)
      result = driver_.cuModuleGetFunction(&made.content_hash, made.module, kContentHashKernel);
    if (result == CUDA_SUCCESS)
      result = driver_.cuModuleGetFunction(&made.copy, made.module, kCopyKernel);
    if (result != CUDA_SUCCESS) {
      if (made.module != nullptr) give_back([&] { return driver_.cuModuleUnload(made.module); });
      kernels_.erase(at);
      return result;
    }
  }
  *out = at->second;
  return CUDA_SUCCESS;
}

void DeviceKernels::forget(CUcontext context, bool alive) noexcept {
  MutexLock lock(kernels_mutex_);
  const auto at = kernels_.find(context);
  if (at == kernels_.end()) return;
  if (alive) {
    ScopedContext current(driver_, context);
    if (current.ok()) give_back([&] { return driver_.cuModuleUnload(at->second.module); });
  }
  kernels_.erase(at);
}

}  // namespace dormouse
