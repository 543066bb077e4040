// The driver that this process finds as libcuda.so.1, real or simulated, with a context: for
// benchmarks and tests that use core without the preloaded library.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "core/driver.h"

namespace dormouse {

[[noreturn]] inline void die(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

/// Exit status of a program that cannot run here, as test runners know it.
inline constexpr int kSkipped = 77;

struct LoadedDriver {
  Driver functions;
  decltype(&::cuMemcpyDtoDAsync_v2) copy_on_device = nullptr;
  decltype(&::cuMemAlloc_v2) allocate = nullptr;
  decltype(&::cuMemFree_v2) free = nullptr;

  void check(CUresult result, const char* what) const {
    if (result != CUDA_SUCCESS) die(std::string(what) + ": " + error_name(functions, result));
  }
};

template <typename Function>
void load_symbol(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) die(std::string("the driver lacks ") + name);
}

/// Loads the driver and makes the first device's primary context current on the calling thread.
/// Ends the process with kSkipped where there is no driver or device, with 1 where it does not
/// work.
inline const LoadedDriver& loaded_driver() {
  static const LoadedDriver driver = [] {
    LoadedDriver made;
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
      std::fprintf(stderr, "no CUDA driver: %s\n", dlerror());
      std::exit(kSkipped);
    }
    const char* missing =
        load_driver(made.functions, [&](const char* name) { return dlsym(library, name); });
    if (missing != nullptr) die(std::string("the driver lacks ") + missing);
    decltype(&::cuInit) init = nullptr;
    decltype(&::cuDevicePrimaryCtxRetain) retain = nullptr;
    load_symbol(library, "cuInit", init);
    load_symbol(library, "cuDevicePrimaryCtxRetain", retain);
    load_symbol(library, "cuMemcpyDtoDAsync_v2", made.copy_on_device);
    load_symbol(library, "cuMemAlloc_v2", made.allocate);
    load_symbol(library, "cuMemFree_v2", made.free);
    if (init(0) != CUDA_SUCCESS) {
      std::fprintf(stderr, "no GPU: cuInit failed\n");
      std::exit(kSkipped);
    }
    CUdevice device = 0;
    CUcontext context = nullptr;
    made.check(made.functions.cuDeviceGet(&device, 0), "cuDeviceGet");
    made.check(retain(&context, device), "cuDevicePrimaryCtxRetain");
    made.check(made.functions.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent");
    return made;
  }();
  return driver;
}

}  // namespace dormouse
