// The driver calls that core needs, as a struct of function pointers that is handed in: the real
// driver's under the shim, the simulated one's in tests. Core never names a cu* function otherwise.
#pragma once

#include <cuda.h>

#include <type_traits>

namespace dormouse {

// Every function of Driver: X(name). All exist since CUDA 11.2.
#define DORMOUSE_DRIVER_FUNCTIONS(X)   \
  X(cuGetErrorName)                    \
  X(cuCtxGetCurrent)                   \
  X(cuCtxGetDevice)                    \
  X(cuCtxPushCurrent_v2)               \
  X(cuCtxPopCurrent_v2)                \
  X(cuCtxSynchronize)                  \
  X(cuDeviceGet)                       \
  X(cuDeviceGetCount)                  \
  X(cuDeviceGetAttribute)              \
  X(cuDeviceTotalMem_v2)               \
  X(cuDevicePrimaryCtxGetState)        \
  X(cuDevicePrimaryCtxRetain)          \
  X(cuDevicePrimaryCtxRelease_v2)      \
  X(cuMemGetAllocationGranularity)     \
  X(cuMemAddressReserve)               \
  X(cuMemAddressFree)                  \
  X(cuMemCreate)                       \
  X(cuMemRelease)                      \
  X(cuMemMap)                          \
  X(cuMemUnmap)                        \
  X(cuMemSetAccess)                    \
  X(cuMemHostAlloc)                    \
  X(cuMemFreeHost)                     \
  X(cuMemHostRegister_v2)              \
  X(cuMemHostUnregister)               \
  X(cuMemcpyHtoDAsync_v2)              \
  X(cuMemcpyDtoHAsync_v2)              \
  X(cuMemsetD8Async)                   \
  X(cuStreamCreate)                    \
  X(cuStreamDestroy_v2)                \
  X(cuStreamSynchronize)               \
  X(cuStreamWaitEvent)                 \
  X(cuEventCreate)                     \
  X(cuEventDestroy_v2)                 \
  X(cuEventQuery)                      \
  X(cuEventRecord)                     \
  X(cuEventSynchronize)                \
  X(cuThreadExchangeStreamCaptureMode) \
  X(cuModuleLoadData)                  \
  X(cuModuleUnload)                    \
  X(cuModuleGetFunction)               \
  X(cuLaunchKernel)

// Functions that came later, with their types: null where the driver has none.
#define DORMOUSE_LATER_DRIVER_FUNCTIONS(X)                      \
  X(cuStreamGetId, CUresult (*)(CUstream, unsigned long long*)) \
  X(cuCtxRecordEvent, CUresult (*)(CUcontext, CUevent))

struct Driver {
#define DORMOUSE_DRIVER_FIELD(name) decltype(&::name) name = nullptr;
  DORMOUSE_DRIVER_FUNCTIONS(DORMOUSE_DRIVER_FIELD)
#undef DORMOUSE_DRIVER_FIELD
#define DORMOUSE_DRIVER_FIELD(name, type) std::type_identity_t<type> name = nullptr;
  DORMOUSE_LATER_DRIVER_FUNCTIONS(DORMOUSE_DRIVER_FIELD)
#undef DORMOUSE_DRIVER_FIELD
};

// Fills a Driver by asking `lookup(name)` for each function (name as in the list above, e.g.
// "cuMemCreate"). Returns the name of the first function that was not found, or nullptr when all
// were; the later ones may be missing.
template <typename Lookup>
const char* load_driver(Driver& driver, Lookup&& lookup) {
#define DORMOUSE_DRIVER_LOAD(name)                                      \
  driver.name = reinterpret_cast<decltype(driver.name)>(lookup(#name)); \
  if (driver.name == nullptr) return #name;
  DORMOUSE_DRIVER_FUNCTIONS(DORMOUSE_DRIVER_LOAD)
#undef DORMOUSE_DRIVER_LOAD
#define DORMOUSE_DRIVER_LOAD(name, type) \
  driver.name = reinterpret_cast<decltype(driver.name)>(lookup(#name));
  DORMOUSE_LATER_DRIVER_FUNCTIONS(DORMOUSE_DRIVER_LOAD)
#undef DORMOUSE_DRIVER_LOAD
  return nullptr;
}

// A call that gives something back gets a second chance: what it holds would be lost to the process
// otherwise.
template <typename Call>
CUresult give_back(Call&& call) noexcept {
  const CUresult result = call();
  return result == CUDA_SUCCESS ? result : call();
}

// Waits for a stream of the current context whose copies use memory that is about to go. After an
// error it is asked once more, and then the context, so that nothing is still running if it can be
// waited for at all; the first answer is returned.
inline CUresult synchronize_stream(const Driver& driver, CUstream stream) noexcept {
  const CUresult result = driver.cuStreamSynchronize(stream);
  if (result != CUDA_SUCCESS && driver.cuStreamSynchronize(stream) != CUDA_SUCCESS)
    driver.cuCtxSynchronize();
  return result;
}

// The driver's name of an error, e.g. "CUDA_ERROR_OUT_OF_MEMORY"; "CUDA_ERROR_<number>" if it knows
// none.
inline const char* error_name(const Driver& driver, CUresult result) noexcept {
  const char* name = nullptr;
  if (driver.cuGetErrorName == nullptr || driver.cuGetErrorName(result, &name) != CUDA_SUCCESS ||
      name == nullptr) {
    return "an unknown CUDA error";
  }
  return name;
}

}  // namespace dormouse
