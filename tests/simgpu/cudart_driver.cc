#include "tests/simgpu/cudart_driver.h"

#include <dlfcn.h>

#include <atomic>
#include <map>
#include <mutex>
#include <vector>

namespace simgpu::cudart {
namespace {

struct Loaded {
  DriverFunctions functions;
  cudaError_t error = cudaSuccess;
};

template <typename Function>
void get(const DriverFunctions& functions, const char* name, int version, cuuint64_t flags,
         Function* out) {
  void* address = nullptr;
  CUdriverProcAddressQueryResult status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  CUresult result = functions.cuGetProcAddress(name, &address, version, flags, &status);
  bool found = result == CUDA_SUCCESS && status == CU_GET_PROC_ADDRESS_SUCCESS;
  *out = found ? reinterpret_cast<Function>(address) : nullptr;
}

Loaded load() {
  Loaded result;
  DriverFunctions& functions = result.functions;
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  void* entry = library == nullptr ? nullptr : dlsym(library, "cuGetProcAddress_v2");
  if (entry == nullptr) {
    result.error = cudaErrorInsufficientDriver;
    return result;
  }
  functions.cuGetProcAddress = reinterpret_cast<PFN_cuGetProcAddress_v12000>(entry);
  // The function hands out itself too, and who stands in for it sees everything that follows.
  PFN_cuGetProcAddress_v12000 again = nullptr;
  get(functions, "cuGetProcAddress", 12000, CU_GET_PROC_ADDRESS_DEFAULT, &again);
  if (again != nullptr) functions.cuGetProcAddress = again;
#define DRIVER(name, version) \
  get(functions, #name, version, CU_GET_PROC_ADDRESS_DEFAULT, &functions.name);
#define DRIVER_PER_THREAD(name, version, suffix)                                \
  get(functions, #name, version, CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM, \
      &functions.name##_per_thread);
#include "tests/simgpu/cudart_driver.def"
#undef DRIVER
#undef DRIVER_PER_THREAD
  int version = 0;
  if (functions.cuInit == nullptr || functions.cuDriverGetVersion == nullptr ||
      functions.cuDriverGetVersion(&version) != CUDA_SUCCESS ||
      version / 1000 < SIMGPU_CUDART_MAJOR) {
    result.error = cudaErrorInsufficientDriver;
    return result;
  }
  result.error = static_cast<cudaError_t>(functions.cuInit(0));
  return result;
}

const Loaded& loaded() {
  static const auto* instance = new Loaded(load());
  return *instance;
}

struct Primary {
  CUcontext context = nullptr;
  bool retained = false;
};

struct Primaries {
  std::mutex mutex;  // protects by_device
  std::map<int, Primary> by_device;
};

Primaries& primaries() {
  static auto* instance = new Primaries;
  return *instance;
}

struct Thread {
  int device = 0;
  cudaError_t last = cudaSuccess;
};
thread_local Thread thread;

}  // namespace

const DriverFunctions& driver() {
  return loaded().functions;
}

cudaError_t load_driver() {
  return loaded().error;
}

int runtime_version() {
  return SIMGPU_CUDART_MAJOR == 12 ? 12090 : SIMGPU_CUDART_MAJOR * 1000;
}

cudaError_t finish(cudaError_t error) {
  // 'Not ready' is an answer and no error.
  if (error != cudaSuccess && error != cudaErrorNotReady) thread.last = error;
  return error;
}

cudaError_t last_error(bool clear) {
  cudaError_t error = thread.last;
  // An error that lasts comes back from the next call, not from here.
  if (clear) thread.last = cudaSuccess;
  return error;
}

int attribute(int device, CUdevice_attribute which) {
  int value = 0;
  driver().cuDeviceGetAttribute(&value, which, device);
  return value;
}

cudaError_t primary_context(int device, CUcontext* context) {
  std::lock_guard lock(primaries().mutex);
  Primary& primary = primaries().by_device[device];
  if (!primary.retained) {
    CUresult result = driver().cuDevicePrimaryCtxRetain(&primary.context, device);
    if (result != CUDA_SUCCESS) return static_cast<cudaError_t>(result);
    primary.retained = true;
  }
  *context = primary.context;
  return cudaSuccess;
}

void forget_primary(int device) {
  std::lock_guard lock(primaries().mutex);
  primaries().by_device[device].retained = false;
  thread.last = cudaSuccess;
}

cudaError_t ensure_context() {
  if (cudaError_t error = load_driver(); error != cudaSuccess) return error;
  CUcontext current = nullptr;
  CUresult result = driver().cuCtxGetCurrent(&current);
  if (result != CUDA_SUCCESS) return static_cast<cudaError_t>(result);
  if (current != nullptr) {
    // A primary context that was reset, by this or another thread, is made again at the next call.
    int device = -1;
    {
      std::lock_guard lock(primaries().mutex);
      for (auto& [ordinal, primary] : primaries().by_device) {
        if (primary.context == current && !primary.retained) device = ordinal;
      }
    }
    return device < 0 ? cudaSuccess : primary_context(device, &current);
  }
  if (cudaError_t error = primary_context(thread.device, &current); error != cudaSuccess) {
    return error;
  }
  return static_cast<cudaError_t>(driver().cuCtxSetCurrent(current));
}

int current_device() {
  CUdevice device = 0;
  CUcontext current = nullptr;
  bool has_context = driver().cuCtxGetCurrent(&current) == CUDA_SUCCESS && current != nullptr &&
                     driver().cuCtxGetDevice(&device) == CUDA_SUCCESS;
  return has_context ? device : thread.device;
}

cudaError_t set_device(int device) {
  CUcontext context = nullptr;
  if (cudaError_t error = primary_context(device, &context); error != cudaSuccess) return error;
  CUresult result = driver().cuCtxSetCurrent(context);
  if (result == CUDA_SUCCESS) thread.device = device;
  return static_cast<cudaError_t>(result);
}

}  // namespace simgpu::cudart
