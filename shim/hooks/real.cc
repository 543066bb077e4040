// Finding the real functions; see real.h.
#include "shim/hooks/real.h"

#include <dlfcn.h>
#include <link.h>

#include <climits>
#include <cstring>
#include <new>
#include <type_traits>

#include "shim/process/linker.h"
#include "shim/process/process.h"

namespace dormouse::shim {

std::array<std::atomic<void*>, kFunctions> driver_functions{};
std::array<std::atomic<void*>, kFunctions> passed_over{};

namespace {

constexpr std::array<const char*, kFunctions> kNames = {
#define HOOK(name, ret, params, args, group) #name,
#include "shim/hooks/hooks.def"
#define DORMOUSE_NAME(name) #name,
    DORMOUSE_ALSO_CALLED(DORMOUSE_NAME)
#undef DORMOUSE_NAME
};

// Stands in for a function that is not there.
template <typename Signature>
struct Missing;
template <typename... Arguments>
struct Missing<CUresult(Arguments...)> {
  static CUresult call(Arguments...) { return CUDA_ERROR_NOT_SUPPORTED; }
};

void* missing(Function function) noexcept {
  static void* const stands_in[kFunctions] = {
#define HOOK(name, ret, params, args, group) reinterpret_cast<void*>(&Missing<ret params>::call),
#include "shim/hooks/hooks.def"
#define DORMOUSE_MISSING(name) \
  reinterpret_cast<void*>(&Missing<std::remove_pointer_t<decltype(&::name)>>::call),
      DORMOUSE_ALSO_CALLED(DORMOUSE_MISSING)
#undef DORMOUSE_MISSING
  };
  return stands_in[static_cast<std::size_t>(function)];
}

}  // namespace

void* resolve_driver(Function function) noexcept {
  const bool loaded = libcuda() != nullptr;
  hooks_are_called();
  for (std::size_t i = 0; i < kFunctions; ++i) {
    void* found = next_driver_function(kNames[i]);
    if (found == nullptr && loaded) found = missing(static_cast<Function>(i));
    if (void* libcudas = libcuda_symbol(kNames[i]); libcudas != nullptr && libcudas != found) {
      passed_over[i].store(libcudas, std::memory_order_relaxed);
    }
    driver_functions[i].store(found, std::memory_order_relaxed);
  }
  void* found =
      driver_functions[static_cast<std::size_t>(function)].load(std::memory_order_relaxed);
  return found != nullptr ? found : missing(function);
}

}  // namespace dormouse::shim
