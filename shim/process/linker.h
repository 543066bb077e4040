// Asking the dynamic linker. Nothing is ever loaded. Below everything else in the shim.
#pragma once

namespace dormouse::shim {

using Dlsym = void* (*)(void* handle, const char* name);

// libc's own dlsym; null where it cannot be found.
Dlsym libc_dlsym() noexcept;

// The same, with this library as the caller.
void* real_dlsym(void* handle, const char* name) noexcept;

// The handle of the libcuda that the process has loaded, or null. Thread-safe.
void* libcuda() noexcept;

// A function that libcuda exports, or null. Thread-safe.
void* libcuda_symbol(const char* name) noexcept;

// A number that changes when libraries are loaded: a lookup that failed need not be repeated
// before.
unsigned long long libraries_loaded() noexcept;

}  // namespace dormouse::shim
