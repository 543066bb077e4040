// Looking up PyTorch's functions in the libraries that the program has loaded. Nothing is ever
// loaded. For shim/torch*.
#pragma once

namespace dormouse::shim::torch {

// The function in the loaded library with this soname (libraries that the dynamic linker keeps out
// of the global scope included), or null if the library is not loaded or lacks it.
void* find_in_library(const char* soname, const char* symbol) noexcept;

// The same in the library whose code contains `address`, or what that one depends on.
void* find_from_caller(const void* address, const char* symbol) noexcept;

}  // namespace dormouse::shim::torch
