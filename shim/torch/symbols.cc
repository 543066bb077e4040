// See symbols.h. dlopen with RTLD_NOLOAD finds what wheels load with RTLD_LOCAL, which dlsym
// with RTLD_DEFAULT or RTLD_NEXT does not.
#include "shim/torch/symbols.h"

#include <dlfcn.h>

#include "shim/process/linker.h"
#include "shim/process/settings.h"

namespace dormouse::shim::torch {
namespace {

// The handle stays open: the addresses found are kept for the process's life.
void* find(void* handle, const char* symbol) noexcept {
  return handle == nullptr ? nullptr : real_dlsym(handle, symbol);
}

}  // namespace

void* find_in_library(const char* soname, const char* symbol) noexcept {
  return find(dlopen(soname, RTLD_LAZY | RTLD_NOLOAD), symbol);
}

void* find_in_library_of(const void* address, const char* symbol) noexcept {
  const link_map* object = object_of(address);
  void* found = object == nullptr ? nullptr : symbol_of(object, symbol);
  // From the executable the lookup begins in front of us.
  return found != nullptr && object_of(found) != own_object() ? found : nullptr;
}

void* find_behind(const void* caller, const char* symbol) noexcept {
  void* next = next_function(symbol);
  return next != nullptr ? next : find_in_library_of(caller, symbol);
}

bool cuda_allocator_loaded() noexcept {
  return find_in_library("libc10_cuda.so", "_ZN3c104cuda20CUDACachingAllocator9allocatorE") !=
         nullptr;
}

bool switched_on() noexcept {
  // Read once: the variable is the process's, and the answer is asked for at every region.
  static const bool value = settings().enabled && settings().options.torch != config::Torch::kOff;
  return value;
}

}  // namespace dormouse::shim::torch
