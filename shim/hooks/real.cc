// Finding the real functions; see real.h. Nothing here is called from inside dlsym but
// adopt_cudart(), which takes no lock of ours and allocates nothing.
#include "shim/hooks/real.h"

#include <dlfcn.h>
#include <link.h>

#include <climits>
#include <cstring>
#include <new>
#include <type_traits>

#include "shim/process/linker.h"

namespace dormouse::shim {

std::array<std::atomic<void*>, kFunctions> driver_functions{};
std::array<std::atomic<void*>, kFunctions> passed_over{};
thread_local constinit std::uint64_t handed_on __attribute__((tls_model("initial-exec"))) = 0;

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
constinit Cudart of_nobody{nullptr};
std::array<std::atomic<Cudart*>, kMaxCudarts> cudarts;
std::atomic<link_map*> adopted{nullptr};

bool is_cudart(const void* function) noexcept {
  const link_map* object = object_of(function);
  return object != nullptr && is_called(object, "libcudart");
}

// Of the libraries that are loaded, the first libcudart; null if there is none.
link_map* any_cudart() noexcept {
  char path[PATH_MAX] = "";
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* out) {
        const char* slash = std::strrchr(info->dlpi_name, '/');
        if (slash == nullptr || std::strncmp(slash, "/libcudart.so", 13) != 0) return 0;
        if (std::strlen(info->dlpi_name) >= PATH_MAX) return 0;
        std::strcpy(static_cast<char*>(out), info->dlpi_name);
        return 1;
      },
      path);
  return path[0] == '\0' ? nullptr : static_cast<link_map*>(dlopen(path, RTLD_LAZY | RTLD_NOLOAD));
}

void* function_in(link_map* library, const char* name) noexcept {
  void* found = library != nullptr ? symbol_of(library, name) : nullptr;
  return found != nullptr && object_of(found) != own_object() ? found : nullptr;
}

// The libcudart that the code at `address` depends on, or that it was linked with into one library.
// Null for the executable, whose dependencies are the global order, and for a library in front of
// this one: its calls of what it defines itself do not come here, so that it hooks the runtime.
link_map* cudart_of_library(const void* address) noexcept {
  link_map* library = object_of(address);
  if (library == nullptr || library->l_name[0] == '\0' || library == own_object()) return nullptr;
  const void* found = function_in(library, "cudaGetLastError");
  if (found == nullptr) return nullptr;
  link_map* cudart = object_of(found);
  return is_cudart(found) || (cudart == library && !is_in_front(library)) ? cudart : nullptr;
}

Cudart& find_cudart(const void* return_address) noexcept {
  link_map* library = cudart_of_library(return_address);
  if (library == nullptr) return of_nobody;
  for (std::atomic<Cudart*>& entry : cudarts) {
    Cudart* known = entry.load(std::memory_order_acquire);
    if (known == nullptr) {
      auto* made = new (std::nothrow) Cudart(library);
      if (made == nullptr) return of_nobody;
      if (entry.compare_exchange_strong(known, made)) {
        keep_loaded(library);
        return *made;
      }
      delete made;
    }
    if (known->library() == library) return *known;
  }
  return of_nobody;
}

}  // namespace

void* Cudart::find(Function function) noexcept {
  const char* name = kNames[static_cast<std::size_t>(function)];
  void* next = next_function(name);
  // Another preloaded library behind this one comes before the runtime, as without us.
  void* found = next != nullptr && !is_cudart(next) ? next : function_in(library_, name);
  if (found == nullptr) found = next;
  if (found == nullptr) found = find_past_others(function);
  if (found == nullptr) return missing(function);
  functions_[static_cast<std::size_t>(function)].store(found, std::memory_order_release);
  return found;
}

void* Cudart::find_past_others(Function function) noexcept {
  const char* name = kNames[static_cast<std::size_t>(function)];
  // One of another name may be a library that hooks the runtime as a whole.
  const bool is_runtime = library_ != nullptr && is_called(library_, "libcudart");
  void* found = is_runtime ? function_in(library_, name) : nullptr;
  void* next = found == nullptr ? next_function(name) : nullptr;
  if (next != nullptr && is_cudart(next)) found = next;
  if (found == nullptr) found = function_in(adopted.load(std::memory_order_acquire), name);
  if (found == nullptr) found = function_in(any_cudart(), name);
  return found;
}

void* Cudart::past_others(Function function) noexcept {
  void* found = find_past_others(function);
  return found != nullptr ? found : missing(function);
}

// --- libcuda

void* resolve_driver(Function function) noexcept {
  const bool loaded = libcuda() != nullptr;
  for (std::size_t i = 0; i < kFunctions; ++i) {
    if (kLevels[i] != Level::driver) continue;
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
    site.cudart.store(&found, std::memory_order_release);
    return found;
  }
  return find_cudart(return_address);
}

bool adopt_cudart(link_map* library, const char* name) noexcept {
  const void* next = next_function(name);
  if (next != nullptr) return object_of(next) == library;
  link_map* known = nullptr;
  return adopted.compare_exchange_strong(known, library, std::memory_order_acq_rel) ||
         known == library;
}

}  // namespace dormouse::shim
