// The real functions behind the hooks, callable by name: real::cuMemAlloc_v2(...) is libcuda's.
// They are found when first called, in the libcuda that the process itself loaded; libcuda is never
// loaded for their sake. A function that is not there returns CUDA_ERROR_NOT_SUPPORTED. For the
// shim only.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "shim/hooks/hooks.h"

namespace dormouse::shim {

// Functions without a hook that hooks call.
#define DORMOUSE_ALSO_CALLED(X) \
  X(cuCtxGetCurrent)            \
  X(cuCtxGetDevice)             \
  X(cuCtxPopCurrent_v2)         \
  X(cuCtxPushCurrent_v2)        \
  X(cuDeviceGetCount)           \
  X(cuDevicePrimaryCtxGetState) \
  X(cuDevicePrimaryCtxRetain)   \
  X(cuStreamGetCtx)             \
  X(cuStreamIsCapturing)

// One slot per row of the table, then those above.
enum class Function : std::uint16_t {
#define HOOK(name, ret, params, args, level, group) name,
#include "shim/hooks/hooks.def"
#define DORMOUSE_ENUMERATOR(name) name,
  DORMOUSE_ALSO_CALLED(DORMOUSE_ENUMERATOR)
#undef DORMOUSE_ENUMERATOR
      count
};

inline constexpr std::size_t kFunctions = static_cast<std::size_t>(Function::count);

// Driver functions, filled on first use; null before.
extern std::array<std::atomic<void*>, kFunctions> driver_functions;

// Fills driver_functions if libcuda is there. Returns what to call for `function` (never null).
void* resolve_driver(Function function) noexcept;

inline void* driver_function(Function function) noexcept {
  void* found =
      driver_functions[static_cast<std::size_t>(function)].load(std::memory_order_relaxed);
  return __builtin_expect(found != nullptr, 1) ? found : resolve_driver(function);
}

// One libcudart of the process: a process can have several, each with its own last error.
struct Cudart {
  std::array<void*, kFunctions> functions{};  // never null for runtime rows
  const void* base = nullptr;                 // where it is loaded
  // It was seen to allocate without passing our driver hooks, so the runtime hooks must act.
  std::atomic<bool> bypasses_driver_hooks{false};
};

// The libcudart that the code at `return_address` would have reached without us: its own
// dependency, else the next one in the global order, else the one whose functions dlsym handed out.
// Never null; where there is none, a Cudart whose functions return cudaErrorNotSupported. Lock-free
// after the first call from an address.
Cudart& cudart_of(void* return_address) noexcept;

// Whether dlsym may hand out our wrapper for a function found in the libcudart at `base`: for the
// first one asked about. A wrapper that is called from code without a libcudart of its own goes to
// that one. Others' functions are left as they are; what they do is seen at the driver level.
bool adopt_cudart(const void* base) noexcept;

namespace real {

#define DORMOUSE_CALL_driver(name, ret, params, args)                             \
  inline ret name params {                                                        \
    return reinterpret_cast<ret(*) params>(driver_function(Function::name)) args; \
  }
#define DORMOUSE_CALL_runtime(name, ret, params, args)
#define HOOK(name, ret, params, args, level, group) DORMOUSE_CALL_##level(name, ret, params, args)
#include "shim/hooks/hooks.def"
#undef DORMOUSE_CALL_driver
#undef DORMOUSE_CALL_runtime

#define DORMOUSE_CALL(name)                                                                    \
  template <typename... Arguments>                                                             \
  CUresult name(Arguments... arguments) {                                                      \
    return reinterpret_cast<decltype(&::name)>(driver_function(Function::name))(arguments...); \
  }
DORMOUSE_ALSO_CALLED(DORMOUSE_CALL)
#undef DORMOUSE_CALL

}  // namespace real

// The same for a runtime function of one libcudart: DORMOUSE_CUDART(cudart, cudaMalloc)(...).
#define DORMOUSE_CUDART(cudart, name)  \
  reinterpret_cast<decltype(&::name)>( \
      (cudart).functions[static_cast<std::size_t>(::dormouse::shim::Function::name)])

}  // namespace dormouse::shim
