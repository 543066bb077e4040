// The real functions behind the hooks, callable by name: real::cuMemAlloc_v2(...) is libcuda's.
// They are found when first called, in the libcuda that the process itself loaded; libcuda is never
// loaded for their sake. A function that is not there returns CUDA_ERROR_NOT_SUPPORTED. What is
// found where is asked in process/linker.h. For the
// shim only.
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
#define HOOK(name, ret, params, args, level, group) name,
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

// The runtime's functions for callers from one libcudart: a process can have several, each with its
// own last error. Each function is found by itself: another preloaded library behind this one may
// define some of them.
class Cudart {
 public:
  // Of callers with a libcudart of their own, or null for all others.
  explicit constexpr Cudart(link_map* library) noexcept : library_(library) {}

  link_map* library() const noexcept { return library_; }

  // What a caller would have reached without us: the next preloaded library's function, else its
  // own libcudart's, else the next one's in the global order, else that of the libcudart whose
  // functions dlsym handed out, or of any. Where there is none, a function that returns
  // cudaErrorNotSupported.
  void* function(Function function) noexcept {
    void* known = functions_[static_cast<std::size_t>(function)].load(std::memory_order_acquire);
    return known != nullptr ? known : find(function);
  }

  // The same without the other preloaded libraries.
  void* past_others(Function function) noexcept;

 private:
  void* find(Function function) noexcept;
  void* find_past_others(Function function) noexcept;

  link_map* const library_;
  std::array<std::atomic<void*>, kFunctions> functions_{};
};

// The functions for the code at `return_address`. (Where that code ended with the call, so that the
// compiler made a jump of it, it is its caller's: with two libcudarts in the process perhaps the
// other one. Memory and contexts are both's; only the last error is not.) Lock-free after the first
// call from an address.
Cudart& cudart_of(void* return_address) noexcept;

// Whether dlsym may hand out our wrapper for the function `name` of the libcudart `library`: if the
// wrapper calls on to that libcudart. Where there is none in the global order, the first one asked
// about is the one for callers without a libcudart of their own. Other functions are left as they
// are; what they do is seen at the driver level.
bool adopt_cudart(link_map* library, const char* name) noexcept;

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

// The runtime functions that the calling thread is inside of, by their place in the table
// (modulo 64: two that share a bit call past other libraries, no more).
extern thread_local constinit std::uint64_t handed_on __attribute__((tls_model("initial-exec")));

// A call of a runtime function behind us. If that one comes back to our function of the same name
// on the same thread, the runtime's own is called: no order of preloaded libraries makes a circle.
template <typename Signature>
class Onward;
template <typename... Parameters>
class Onward<cudaError_t (*)(Parameters...)> {
 public:
  Onward(Cudart& cudart, Function function) noexcept : cudart_(cudart), function_(function) {}

  cudaError_t operator()(Parameters... arguments) {
    const std::uint64_t bit = std::uint64_t{1} << (static_cast<std::size_t>(function_) % 64);
    const std::uint64_t outer = handed_on;
    void* behind =
        (outer & bit) == 0 ? cudart_.function(function_) : cudart_.past_others(function_);
    handed_on = outer | bit;
    const cudaError_t result =
        reinterpret_cast<cudaError_t (*)(Parameters...)>(behind)(arguments...);
    handed_on = outer;
    return result;
  }

 private:
  Cudart& cudart_;
  const Function function_;
};

// A function behind us, as a caller from `cudart` reaches it: DORMOUSE_CUDART(cudart,
// cudaMalloc)(...).
#define DORMOUSE_CUDART(cudart, name) \
  ::dormouse::shim::Onward<decltype(&::name)>(cudart, ::dormouse::shim::Function::name)

}  // namespace dormouse::shim
