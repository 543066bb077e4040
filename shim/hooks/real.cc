// Finding the real functions; see real.h. Nothing here is called from inside dlsym but
// adopt_cudart() and real_dlsym(), which take no lock of ours and allocate nothing.
#include "shim/hooks/real.h"

#include <dlfcn.h>
#include <link.h>

#include <new>
#include <type_traits>

#include "shim/process/linker.h"

namespace dormouse::shim {

std::array<std::atomic<void*>, kFunctions> driver_functions{};

namespace {

constexpr std::array<const char*, kFunctions> kNames = {
#define HOOK(name, ret, params, args, level, group) #name,
#include "shim/hooks/hooks.def"
#define DORMOUSE_NAME(name) #name,
    DORMOUSE_ALSO_CALLED(DORMOUSE_NAME)
#undef DORMOUSE_NAME
};

constexpr std::array<Level, kFunctions> kLevels = {
#define HOOK(name, ret, params, args, level, group) Level::level,
#include "shim/hooks/hooks.def"
#define DORMOUSE_LEVEL(name) Level::driver,
    DORMOUSE_ALSO_CALLED(DORMOUSE_LEVEL)
#undef DORMOUSE_LEVEL
};

// Stands in for a function that is not there.
template <typename Signature>
struct Missing;
template <typename... Arguments>
struct Missing<CUresult(Arguments...)> {
  static CUresult call(Arguments...) { return CUDA_ERROR_NOT_SUPPORTED; }
};
template <typename... Arguments>
struct Missing<cudaError_t(Arguments...)> {
  static cudaError_t call(Arguments...) { return cudaErrorNotSupported; }
};

void* missing(Function function) noexcept {
  static void* const stands_in[kFunctions] = {
#define HOOK(name, ret, params, args, level, group) \
  reinterpret_cast<void*>(&Missing<ret params>::call),
#include "shim/hooks/hooks.def"
#define DORMOUSE_MISSING(name) \
  reinterpret_cast<void*>(&Missing<std::remove_pointer_t<decltype(&::name)>>::call),
      DORMOUSE_ALSO_CALLED(DORMOUSE_MISSING)
#undef DORMOUSE_MISSING
  };
  return stands_in[static_cast<std::size_t>(function)];
}

// --- libcudart

constexpr std::size_t kMaxCudarts = 16;
constexpr std::size_t kCallSites = 1024;  // a power of two

// Entries are filled once and never changed, so readers need no lock. Two threads may fill the same
// one; they write the same.
struct CallSite {
  std::atomic<void*> address{nullptr};
  std::atomic<Cudart*> cudart{nullptr};
};

std::array<CallSite, kCallSites> call_sites;
std::array<std::atomic<Cudart*>, kMaxCudarts> cudarts;
std::atomic<const void*> adopted_base{nullptr};

const void* own_base() noexcept {
  static const void* const base = [] {
    Dl_info info{};
    return dladdr(reinterpret_cast<void*>(&missing), &info) != 0 ? info.dli_fbase : nullptr;
  }();
  return base;
}

Cudart& no_cudart() noexcept {
  static Cudart* const none = [] {
    auto* made = new Cudart;
    for (std::size_t i = 0; i < kFunctions; ++i) {
      made->functions[i] = missing(static_cast<Function>(i));
    }
    return made;
  }();
  return *none;
}

// The library that contains `address`, held so that it stays loaded; null for the executable and
// for ours.
void* hold_library(const void* address) noexcept {
  Dl_info info{};
  struct link_map* map = nullptr;
  if (dladdr1(address, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) return nullptr;
  if (map == nullptr || map->l_name[0] == '\0' || info.dli_fbase == own_base()) return nullptr;
  return dlopen(map->l_name, RTLD_LAZY | RTLD_NOLOAD);
}

Cudart* make_cudart(const void* base, const void* function) noexcept {
  void* library = hold_library(function);
  // The executable can carry the runtime itself; it comes first in the global order.
  if (library == nullptr) library = dlopen(nullptr, RTLD_LAZY | RTLD_NOLOAD);
  auto* made = new (std::nothrow) Cudart;
  if (library == nullptr || made == nullptr) return nullptr;
  made->base = base;
  for (std::size_t i = 0; i < kFunctions; ++i) {
    void* found = kLevels[i] == Level::runtime ? real_dlsym(library, kNames[i]) : nullptr;
    made->functions[i] = found != nullptr ? found : missing(static_cast<Function>(i));
  }
  return made;
}

// The record of the libcudart that contains `function`; null when there are too many.
Cudart* cudart_with(const void* function) noexcept {
  Dl_info info{};
  if (dladdr(function, &info) == 0 || info.dli_fbase == own_base()) return nullptr;
  for (std::atomic<Cudart*>& entry : cudarts) {
    Cudart* known = entry.load(std::memory_order_acquire);
    if (known == nullptr) {
      Cudart* made = make_cudart(info.dli_fbase, function);
      if (made == nullptr) return nullptr;
      if (entry.compare_exchange_strong(known, made)) return made;
      delete made;
    }
    if (known->base == info.dli_fbase) return known;
  }
  return nullptr;
}

Cudart& find_cudart(const void* return_address) noexcept {
  // A caller's own dependency comes first: with several versions of libcudart in one process the
  // next in the global order may be another one. The executable's dependencies are the global
  // order. Another copy of this library only passes a program's call on: its own exports do not
  // count.
  void* caller = hold_library(return_address);
  if (caller != nullptr && real_dlsym(caller, "dormouse_version") == nullptr) {
    void* function = real_dlsym(caller, "cudaMalloc");
    if (function != nullptr) {
      if (Cudart* own = cudart_with(function)) return *own;
    }
  }
  if (void* next = real_dlsym(RTLD_NEXT, "cudaMalloc")) {
    if (Cudart* global = cudart_with(next)) return *global;
  }
  if (const void* adopted = adopted_base.load(std::memory_order_acquire)) {
    void* library = hold_library(adopted);
    void* function = library != nullptr ? real_dlsym(library, "cudaMalloc") : nullptr;
    if (function != nullptr) {
      if (Cudart* known = cudart_with(function)) return *known;
    }
  }
  return no_cudart();
}

}  // namespace

// --- libcuda

void* resolve_driver(Function function) noexcept {
  void* library = libcuda();
  if (library == nullptr) return missing(function);
  for (std::size_t i = 0; i < kFunctions; ++i) {
    if (kLevels[i] != Level::driver) continue;
    void* found = real_dlsym(library, kNames[i]);
    driver_functions[i].store(found != nullptr ? found : missing(static_cast<Function>(i)),
                              std::memory_order_relaxed);
  }
  return driver_functions[static_cast<std::size_t>(function)].load(std::memory_order_relaxed);
}

Cudart& cudart_of(void* return_address) noexcept {
  const std::size_t hash =
      (reinterpret_cast<std::uintptr_t>(return_address) * 0x9E3779B97F4A7C15u) >> 32;
  for (std::size_t probe = 0; probe < 8; ++probe) {
    CallSite& site = call_sites[(hash + probe) % kCallSites];
    void* address = site.address.load(std::memory_order_acquire);
    if (address == nullptr && site.address.compare_exchange_strong(address, return_address)) {
      address = return_address;
    }
    if (address != return_address) continue;
    Cudart* known = site.cudart.load(std::memory_order_acquire);
    if (known != nullptr) return *known;
    Cudart& found = find_cudart(return_address);
    if (&found != &no_cudart()) site.cudart.store(&found, std::memory_order_release);
    return found;
  }
  return find_cudart(return_address);
}

bool adopt_cudart(const void* base) noexcept {
  const void* known = nullptr;
  return adopted_base.compare_exchange_strong(known, base, std::memory_order_acq_rel) ||
         known == base;
}

}  // namespace dormouse::shim
