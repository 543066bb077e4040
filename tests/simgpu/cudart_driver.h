// How the simulated CUDA runtime reaches the driver: as the real one does, by dlopen of
// libcuda.so.1, dlsym of cuGetProcAddress_v2 alone, and everything else through that. For the
// simulated runtime's sources only.
#pragma once

#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

// Whether the functions whose form changed in CUDA 13 are built in that form; else those of
// cudart_12.cc are. CUDA 12's headers do not declare the new forms.
#if SIMGPU_CUDART_MAJOR >= 13 && CUDART_VERSION >= 13000
#define SIMGPU_FORMS_13 1
#else
#define SIMGPU_FORMS_13 0
#endif

#define SIMGPU_RUNTIME extern "C" __attribute__((visibility("default")))

namespace simgpu::cudart {

// The driver's functions; a null pointer is one that this driver does not have. `name_per_thread`
// is the form whose default stream is the thread's own.
struct DriverFunctions {
#define DRIVER(name, version) PFN_##name##_v##version name = nullptr;
#define DRIVER_PER_THREAD(name, version, suffix) \
  PFN_##name##_v##version##_##suffix name##_per_thread = nullptr;
#include "tests/simgpu/cudart_driver.def"
#undef DRIVER
#undef DRIVER_PER_THREAD
  PFN_cuGetProcAddress_v12000 cuGetProcAddress = nullptr;
};

// The driver, loaded and initialized at the first call of the process.
const DriverFunctions& driver();

// cudaSuccess, or why there is no driver: cudaErrorInsufficientDriver (no libcuda.so.1),
// cudaErrorNoDevice, ...
cudaError_t load_driver();

// The version of CUDA that this runtime is of, 13000 or 12090.
int runtime_version();

// Makes sure that the thread has a context: its current one, else the primary context of its
// device.
cudaError_t ensure_context();

// Keeps `error` as the thread's last one and returns it.
cudaError_t finish(cudaError_t error);
inline cudaError_t finish(CUresult result) {
  return finish(static_cast<cudaError_t>(result));
}

// The thread's last error; `clear` forgets it.
cudaError_t last_error(bool clear);

int current_device();
// The context of a device, made if need be.
cudaError_t primary_context(int device, CUcontext* context);
cudaError_t set_device(int device);
// An attribute of a device; 0 if there is no such device.
int attribute(int device, CUdevice_attribute which);
// Forgets a primary context that was reset.
void forget_primary(int device);

}  // namespace simgpu::cudart

// Returns from a runtime function, with the error kept as the thread's last, unless a context is
// there.
#define SIMGPU_CONTEXT()                                                              \
  if (cudaError_t ready_ = ::simgpu::cudart::ensure_context(); ready_ != cudaSuccess) \
  return ::simgpu::cudart::finish(ready_)

// The same for functions that need the driver but no context.
#define SIMGPU_DRIVER()                                                            \
  if (cudaError_t ready_ = ::simgpu::cudart::load_driver(); ready_ != cudaSuccess) \
  return ::simgpu::cudart::finish(ready_)

#define SIMGPU_CHECK(condition, error) \
  if (!(condition)) return ::simgpu::cudart::finish(error)
