// See linker.h.
#include "shim/process/linker.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstddef>

namespace dormouse::shim {

Dlsym libc_dlsym() noexcept {
  static std::atomic<Dlsym> found{nullptr};
  Dlsym function = found.load(std::memory_order_relaxed);
  if (function != nullptr) return function;
  // dlsym moved from libdl to libc in 2.34; the other versions are x86-64's and AArch64's first.
  for (const char* version : {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"}) {
    function = reinterpret_cast<Dlsym>(dlvsym(RTLD_NEXT, "dlsym", version));
    if (function != nullptr) break;
  }
  found.store(function, std::memory_order_relaxed);
  return function;
}

void* real_dlsym(void* handle, const char* name) noexcept {
  const Dlsym function = libc_dlsym();
  return function != nullptr ? function(handle, name) : nullptr;
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

unsigned long long libraries_loaded() noexcept {
  unsigned long long count = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* out) {
        *static_cast<unsigned long long*>(out) = info->dlpi_adds;
        return 1;  // the first one has the count
      },
      &count);
  return count;
}

}  // namespace dormouse::shim
