// The hooked functions as data (hooks.def): wrappers by name, wrappers by real function. For the
// hooks themselves and for dlsym. Files that include this are compiled with
// __CUDA_API_VERSION_INTERNAL, under which the toolkit's headers declare every versioned and
// per-thread variant under its own name.
#pragma once

#ifndef __CUDA_API_VERSION_INTERNAL
#error "compile with -D__CUDA_API_VERSION_INTERNAL: without it some names here are macros"
#endif

#include <cuda.h>

#include <cstdint>
#include <string_view>

#include "shim/hooks/newer_types.h"
#include "shim/process/export.h"

extern "C" {
#define HOOK(name, ret, params, args, group) DORMOUSE_EXPORT ret name params;
#include "shim/hooks/hooks.def"
}

namespace dormouse::shim {

struct HookRow {
  std::string_view name;
  void* wrapper;
};

// The row of a name; false if it is no hook's. No lock, no allocation.
bool find_hook(std::string_view name, HookRow* out) noexcept;

// What hooks.def and left.def have under a name, which can lack its version ("cuMemFree") and its
// variant for the per-thread default stream. No lock, no allocation.
enum class Knowledge : std::uint8_t {
  kNone,    // the function is newer than this library
  kLeft,    // left to the driver
  kHooked,  // at least one version of it has a hook
};
Knowledge knowledge_of(std::string_view name) noexcept;

// What the code at `caller` gets in place of a function of the driver: our wrapper if `function` is
// the real function of a row, else `function`. Compares addresses: the driver hands out the same
// ones from cuGetProcAddress as dlsym finds under the exported names (checked on driver 580), so no
// name or version has to be guessed. A library behind us that defines the function itself gets
// libcuda's: it is what our wrapper calls on to.
void* substitute(void* function, const void* caller) noexcept;

}  // namespace dormouse::shim
