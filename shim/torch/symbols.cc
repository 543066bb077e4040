// See symbols.h. dlopen with RTLD_NOLOAD finds what wheels load with RTLD_LOCAL, which dlsym
// with RTLD_DEFAULT or RTLD_NEXT does not.
#include "shim/torch/symbols.h"

#include <dlfcn.h>

#include "shim/process/linker.h"

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

void* find_from_caller(const void* address, const char* symbol) noexcept {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return nullptr;
  return find(dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD), symbol);
}

}  // namespace dormouse::shim::torch
