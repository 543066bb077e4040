// Looking up PyTorch's functions in the libraries that the program has loaded. Nothing is ever
// loaded. For shim/torch*.
#pragma once

namespace dormouse::shim::torch {

// The function in the loaded library with this soname (libraries that the dynamic linker keeps out
// of the global scope included), or null if the library is not loaded or lacks it. Of several the
// one that was loaded first.
void* find_in_library(const char* soname, const char* symbol) noexcept;

// The same in the library whose code contains `address`, or what that one depends on.
void* find_in_library_of(const void* address, const char* symbol) noexcept;

// What code at `caller` would have reached by linking without this library, or null: the next
// function in the global order, else that of the caller's own library or of what it depends on.
void* find_behind(const void* caller, const char* symbol) noexcept;

// Whether PyTorch's allocator for CUDA is in the process.
bool cuda_allocator_loaded() noexcept;

// Whether the library changes anything of PyTorch's: not with DORMOUSE=off or DORMOUSE_TORCH=off.
bool switched_on() noexcept;

}  // namespace dormouse::shim::torch
