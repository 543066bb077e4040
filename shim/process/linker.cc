// See linker.h.
#include "shim/process/linker.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstddef>
#include <cstring>

namespace dormouse::shim {
namespace {

constinit std::atomic<unsigned long long> lookups{1};
constinit std::atomic<const void*> code_of_python{nullptr};

// Whether `found`, an address in `object`, is a function there. Some libraries have variables that
// are called like the driver's functions and hold their addresses.
bool is_function(const void* found) noexcept {
  Dl_info info{};
  const ElfW(Sym)* symbol = nullptr;
  if (dladdr1(found, &info, const_cast<void**>(reinterpret_cast<const void**>(&symbol)),
              RTLD_DL_SYMENT) == 0 ||
      symbol == nullptr) {
    return true;
  }
  return ELF64_ST_TYPE(symbol->st_info) != STT_OBJECT || info.dli_saddr != found;
}

}  // namespace

Dlsym libc_dlsym() noexcept {
  static std::atomic<Dlsym> found{nullptr};
  Dlsym function = found.load(std::memory_order_relaxed);
  if (function != nullptr) return function;
  // dlsym moved from libdl to libc in 2.34; the other versions are x86-64's and AArch64's first.
  constexpr const char* kVersions[] = {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"};
  const auto find_in = [&](void* library) {
    function = nullptr;
    for (const char* version : kVersions) {
      if (function == nullptr) {
        function = reinterpret_cast<Dlsym>(dlvsym(library, "dlsym", version));
      }
    }
    const link_map* object = object_of(reinterpret_cast<void*>(function));
    return object != nullptr && is_called(object, "libc.so");
  };
  // The second way allocates memory, which the first lookups of a process may be made for.
  if (!find_in(RTLD_NEXT)) find_in(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD));
  found.store(function, std::memory_order_relaxed);
  return function;
}

void* real_dlsym(void* handle, const char* name) noexcept {
  const Dlsym function = libc_dlsym();
  // volatile: the call must not become a jump, which would make the caller's caller the caller.
  void* volatile found = function != nullptr ? function(handle, name) : nullptr;
  return found;
}

Dlsym next_dlsym(const void* caller) noexcept {
  static std::atomic<Dlsym> next{nullptr};
  const Dlsym libcs = libc_dlsym();
  Dlsym function = next.load(std::memory_order_relaxed);
  if (function == nullptr) {
    function = reinterpret_cast<Dlsym>(real_dlsym(RTLD_NEXT, "dlsym"));
    if (function == nullptr) function = libcs;
    next.store(function, std::memory_order_relaxed);
  }
  if (__builtin_expect(function == libcs, 1)) return function;
  // Where that one calls dlsym itself, it means libc's.
  return object_of(caller) == object_of(reinterpret_cast<void*>(function)) ? libcs : function;
}

link_map* object_of(const void* address) noexcept {
  Dl_info info{};
  link_map* map = nullptr;
  if (dladdr1(address, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) return nullptr;
  return map;
}

void* symbol_of(const link_map* object, const char* name) noexcept {
  // A link map is a handle only once it was opened as one.
  const bool executable = object->l_name[0] == '\0';
  void* handle = dlopen(executable ? nullptr : object->l_name, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return nullptr;
  void* found = real_dlsym(handle, name);
  dlclose(handle);
  return found;
}

link_map* own_object() noexcept {
  static std::atomic<link_map*> found{nullptr};
  link_map* map = found.load(std::memory_order_relaxed);
  if (map == nullptr) {
    map = object_of(reinterpret_cast<void*>(&own_object));
    found.store(map, std::memory_order_relaxed);
  }
  return map;
}

bool is_called(const link_map* object, const char* name) noexcept {
  const char* slash = std::strrchr(object->l_name, '/');
  const char* file = slash != nullptr ? slash + 1 : object->l_name;
  return std::strncmp(file, name, std::strlen(name)) == 0;
}

bool is_in_front(const link_map* object) noexcept {
  const link_map* own = own_object();
  if (own == nullptr) return false;
  for (const link_map* map = own->l_prev; map != nullptr; map = map->l_prev) {
    if (map == object) return true;
  }
  return false;
}

void* next_function(const char* name) noexcept {
  void* found = real_dlsym(RTLD_NEXT, name);
  return found != nullptr && is_function(found) ? found : nullptr;
}

bool is_defined_by_caller(const char* name, const void* caller) noexcept {
  link_map* object = object_of(caller);
  if (object == nullptr || object == own_object() || is_in_front(object)) return false;
  const void* found = symbol_of(object, name);
  return found != nullptr && object_of(found) == object;
}

void* libcuda() noexcept {
  static std::atomic<void*> handle{nullptr};
  void* known = handle.load(std::memory_order_acquire);
  if (known != nullptr) return known;
  known = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (known != nullptr) handle.store(known, std::memory_order_release);
  return known;
}

void* libcuda_symbol(const char* name) noexcept {
  void* library = libcuda();
  return library != nullptr ? real_dlsym(library, name) : nullptr;
}

void* next_driver_function(const char* name) noexcept {
  void* found = next_function(name);
  if (found != nullptr) {
    // A second copy of this library only calls on.
    const link_map* object = object_of(found);
    if (object == nullptr || object == libcuda()) return found;
    const void* copy = symbol_of(object, "dormouse_version");
    if (copy == nullptr || object_of(copy) != object) return found;
  }
  return libcuda_symbol(name);
}

void program_looks_up(const char* name, const void* caller) noexcept {
  lookups.fetch_add(1, std::memory_order_relaxed);
  if (name == nullptr || std::strncmp(name, "PyInit_", 7) != 0) return;
  if (code_of_python.load(std::memory_order_relaxed) == nullptr) python_is_at(caller);
}

unsigned long long libraries_loaded() noexcept {
  return lookups.load(std::memory_order_relaxed);
}

void python_is_at(const void* address) noexcept {
  code_of_python.store(address, std::memory_order_relaxed);
}

void* python_symbol(const char* name) noexcept {
  if (void* found = real_dlsym(RTLD_DEFAULT, name)) return found;
  const void* code = code_of_python.load(std::memory_order_relaxed);
  const link_map* object = code != nullptr ? object_of(code) : nullptr;
  return object != nullptr ? symbol_of(object, name) : nullptr;
}

}  // namespace dormouse::shim
