// Libraries that others preload beside ours: one that hooks the runtime's allocations, one that
// limits the driver's memory through a dlsym of its own, and a libcuda that only loads another one.
// Which, says the macro it is compiled with. The hookers count what reaches them and say it at the
// end: whoever stands beside them must change nothing in it.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <initializer_list>

#define EXPORTED extern "C" __attribute__((visibility("default")))

#if defined(RUNTIME_HOOKER) || defined(RUNTIME_HOOKER_BY_HANDLE)

namespace {

int allocations = 0;
int frees = 0;

// volatile: see lookup_libraries.cc.
template <typename Function>
Function behind(const char* name) {
#if defined(RUNTIME_HOOKER)
  void* volatile found = dlsym(RTLD_NEXT, name);
#else
  void* volatile found = dlsym(dlopen("libcudart.so.13", RTLD_NOW), name);
#endif
  return reinterpret_cast<Function>(found);
}

__attribute__((destructor)) void end() {
  std::fprintf(stderr, "hooker: %d allocations, %d frees\n", allocations, frees);
}

}  // namespace

EXPORTED int cudaFree(void* address) {
  ++frees;
  return behind<int (*)(void*)>("cudaFree")(address);
}

EXPORTED int cudaMalloc(void** address, size_t size) {
  ++allocations;
  cudaFree(nullptr);
  return behind<int (*)(void**, size_t)>("cudaMalloc")(address, size);
}

#if defined(HOOKS_ERRORS)
EXPORTED int cudaGetLastError() {
  return behind<int (*)()>("cudaGetLastError")();
}
#endif

#elif defined(LIMITER)

namespace {

using Lookup = void* (*)(void*, const char*);
using GetProcAddress = int (*)(const char*, void**, int, unsigned long long, void*);
using Alloc = int (*)(unsigned long long*, size_t);
using Free = int (*)(unsigned long long);

constexpr size_t kLimit = size_t{64} << 20;
int allocations = 0;
int refused = 0;

Lookup libcs() {
  static const Lookup found = [] {
    Lookup function = nullptr;
    for (const char* version : {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"}) {
      if (function == nullptr) {
        function = reinterpret_cast<Lookup>(dlvsym(RTLD_NEXT, "dlsym", version));
      }
    }
    return function;
  }();
  return found;
}

template <typename Function>
Function drivers(const char* name) {
  static void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
  return reinterpret_cast<Function>(libcs()(driver, name));
}

__attribute__((destructor)) void end() {
  std::fprintf(stderr, "limiter: %d allocations, %d refused\n", allocations, refused);
}

}  // namespace

EXPORTED int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  ++allocations;
  if (bytes > kLimit) {
    ++refused;
    return 2;
  }
  return drivers<Alloc>("cuMemAlloc_v2")(address, bytes);
}

EXPORTED int cuMemFree_v2(unsigned long long address) {
  return drivers<Free>("cuMemFree_v2")(address);
}

EXPORTED int cuGetProcAddress_v2(const char* name, void** function, int version,
                                 unsigned long long flags, void* status) {
  const int result =
      drivers<GetProcAddress>("cuGetProcAddress_v2")(name, function, version, flags, status);
  if (std::strcmp(name, "cuMemAlloc") == 0) *function = reinterpret_cast<void*>(&cuMemAlloc_v2);
  if (std::strcmp(name, "cuMemFree") == 0) *function = reinterpret_cast<void*>(&cuMemFree_v2);
  if (std::strcmp(name, "cuGetProcAddress") == 0) {
    *function = reinterpret_cast<void*>(&cuGetProcAddress_v2);
  }
  return result;
}

// As the linker has bound the names: to the first library that defines them.
EXPORTED void* LIMITER_DLSYM(void* handle, const char* name) {
  if (std::strcmp(name, "cuMemAlloc_v2") == 0) return reinterpret_cast<void*>(&cuMemAlloc_v2);
  if (std::strcmp(name, "cuMemFree_v2") == 0) return reinterpret_cast<void*>(&cuMemFree_v2);
  if (std::strcmp(name, "cuGetProcAddress_v2") == 0) {
    return reinterpret_cast<void*>(&cuGetProcAddress_v2);
  }
  return libcs()(handle, name);
}
#if defined(LIMITER_VERSIONED)
asm(".symver versioned_dlsym, dlsym@@GLIBC_2.34");
#endif

#elif defined(LOADER)

// Each function jumps to where its slot points.
#if defined(__x86_64__)
#define JUMP(symbol) "  jmp *slot_" symbol "(%rip)\n"
#else
#define JUMP(symbol)         \
  "  adrp x16, slot_" symbol \
  "\n"                       \
  "  ldr x16, [x16, :lo12:slot_" symbol "]\n  br x16\n"
#endif
#define FUNCTION(name, version, symbol)                                                       \
  asm(".bss\n.balign 8\nslot_" #symbol ": .zero 8\n.text\n.globl " #symbol "\n.type " #symbol \
      ", %function\n" #symbol ":\n" JUMP(#symbol) ".size " #symbol ", .-" #symbol "\n");      \
  extern "C" __attribute__((visibility("hidden"))) void* slot_of_##symbol asm("slot_" #symbol);
#define PER_THREAD(name, version, symbol, suffix) FUNCTION(name, version, symbol)
#define NEWER(name, version, symbol) FUNCTION(name, version, symbol)
#define NEWER_PER_THREAD(name, version, symbol, suffix) FUNCTION(name, version, symbol)
#define CUDA_VERSION 13000
#include "tests/simgpu/functions.def"
#undef FUNCTION

__attribute__((constructor)) static void load() {
  void* driver = dlopen("libcuda.so.1.1", RTLD_NOW);
  if (driver == nullptr) std::fprintf(stderr, "%s\n", dlerror());
#define FUNCTION(name, version, symbol) slot_of_##symbol = dlsym(driver, #symbol);
#define NEWER(name, version, symbol) FUNCTION(name, version, symbol)
#define NEWER_PER_THREAD(name, version, symbol, suffix) FUNCTION(name, version, symbol)
#include "tests/simgpu/functions.def"
}

#endif
