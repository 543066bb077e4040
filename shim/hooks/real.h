// The real functions behind the hooks, callable by name: real::cuMemAlloc_v2(...) is libcuda's.
// They are found when first called, in the libcuda that the process itself loaded; libcuda is never
// loaded for their sake. A function that is not there returns CUDA_ERROR_NOT_SUPPORTED. What is
// found where is asked in process/linker.h. For the shim only.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "shim/hooks/hooks.h"
#include "shim/process/linker.h"

namespace dormouse::shim {

// Functions without a hook that hooks call.
#define DORMOUSE_ALSO_CALLED(X) \
  X(cuCtxGetCurrent)            \
  X(cuCtxGetDevice)             \
  X(cuCtxGetFlags)              \
  X(cuCtxPopCurrent_v2)         \
  X(cuCtxPushCurrent_v2)        \
  X(cuCtxSetFlags)              \
  X(cuDeviceGetCount)           \
  X(cuDeviceGetMemPool)         \
  X(cuDevicePrimaryCtxGetState) \
  X(cuDevicePrimaryCtxRetain)   \
  X(cuEventCreate)              \
  X(cuEventDestroy_v2)          \
  X(cuEventRecord)              \
  X(cuMemPoolGetAccess)         \
  X(cuStreamCreate)             \
  X(cuStreamGetCtx)             \
  X(cuStreamIsCapturing)        \
  X(cuStreamSynchronize)        \
  X(cuStreamWaitEvent)

// One slot per row of the table, then those above.
enum class Function : std::uint16_t {
#define HOOK(name, ret, params, args, group) name,
#include "shim/hooks/hooks.def"
#define DORMOUSE_ENUMERATOR(name) name,
  DORMOUSE_ALSO_CALLED(DORMOUSE_ENUMERATOR)
#undef DORMOUSE_ENUMERATOR
      count
};

inline constexpr std::size_t kFunctions = static_cast<std::size_t>(Function::count);

// Driver functions, filled on first use; null before. They are the next preloaded library's, where
// one behind us defines them (a limiter of memory stays in force), else libcuda's; never our own.
extern std::array<std::atomic<void*>, kFunctions> driver_functions;

// Fills driver_functions if libcuda is there. Returns what to call for `function` (never null).
void* resolve_driver(Function function) noexcept;

inline void* driver_function(Function function) noexcept {
  void* found =
      driver_functions[static_cast<std::size_t>(function)].load(std::memory_order_relaxed);
  return __builtin_expect(found != nullptr, 1) ? found : resolve_driver(function);
}

// Where another library was found in front of it: libcuda's own functions.
extern std::array<std::atomic<void*>, kFunctions> passed_over;

namespace real {

#define HOOK(name, ret, params, args, group)                                      \
  inline ret name params {                                                        \
    return reinterpret_cast<ret(*) params>(driver_function(Function::name)) args; \
  }
#include "shim/hooks/hooks.def"

#define DORMOUSE_CALL(name)                                                                    \
  template <typename... Arguments>                                                             \
  CUresult name(Arguments... arguments) {                                                      \
    return reinterpret_cast<decltype(&::name)>(driver_function(Function::name))(arguments...); \
  }
DORMOUSE_ALSO_CALLED(DORMOUSE_CALL)
#undef DORMOUSE_CALL

}  // namespace real

}  // namespace dormouse::shim
