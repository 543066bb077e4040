// alloc_check on the bare driver, linked to nothing of CUDA: every function comes from dlsym by its
// exported name, or, with the argument "proc", from cuGetProcAddress.
#include <dlfcn.h>

#include <cstring>

#include "tests/programs/alloc_check_body.h"
#include "tests/programs/driver_gpu.h"

namespace {

// The exported name of the form that the headers mean by a plain name ("cuMemAlloc" is
// "cuMemAlloc_v2").
#define EXPORTED_TEXT(name) #name
#define EXPORTED(name) EXPORTED_TEXT(name)

using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t,
                                    CUdriverProcAddressQueryResult*);

void* symbol(void* library, const char* name) {
  void* address = dlsym(library, name);
  if (address == nullptr) {
    std::fprintf(stderr, "no %s: %s\n", name, dlerror());
    std::exit(1);
  }
  return address;
}

void* entry(GetProcAddress get, const char* name, int version) {
  void* address = nullptr;
  CUdriverProcAddressQueryResult status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  CHECK(get(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT, &status));
  CHECK(status);
  return address;
}

}  // namespace

int main(int argc, char** argv) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  programs::DriverFunctions functions;
  if (argc > 1 && std::strcmp(argv[1], "proc") == 0) {
    auto get = reinterpret_cast<GetProcAddress>(symbol(library, "cuGetProcAddress_v2"));
#define F(name, version) \
  functions.name = reinterpret_cast<decltype(functions.name)>(entry(get, #name, version));
    PROGRAM_DRIVER_FUNCTIONS(F)
#undef F
    functions.synchronize = reinterpret_cast<CUresult (*)()>(entry(get, "cuCtxSynchronize", 2000));
  } else {
#define F(name, version) \
  functions.name = reinterpret_cast<decltype(functions.name)>(symbol(library, EXPORTED(name)));
    PROGRAM_DRIVER_FUNCTIONS(F)
#undef F
    functions.synchronize = reinterpret_cast<CUresult (*)()>(symbol(library, "cuCtxSynchronize"));
  }
  programs::DriverGpu gpu(functions);
  return programs::alloc_check(gpu);
}
