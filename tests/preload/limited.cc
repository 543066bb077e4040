// Allocates more than the limiter of other_libraries.cc allows, by each way to the driver that a
// program without CUDA linked has, and prints what came of it.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>

namespace {

constexpr size_t kBytes = size_t{100} << 20;

template <typename Function>
Function look_up(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

int main() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  using Get = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
  using Alloc = CUresult (*)(CUdeviceptr*, size_t);
  const auto get = look_up<Get>(library, "cuGetProcAddress_v2");
  const auto init = look_up<CUresult (*)(unsigned)>(library, "cuInit");
  CUcontext context = nullptr;
  std::printf("init %d\n", init(0));
  look_up<CUresult (*)(CUcontext*, CUdevice)>(library, "cuDevicePrimaryCtxRetain")(&context, 0);
  look_up<CUresult (*)(CUcontext)>(library, "cuCtxSetCurrent")(context);
  void* found = nullptr;
  CUdriverProcAddressQueryResult status;
  CUdeviceptr address = 0;
  get("cuMemAlloc", &found, 12000, 0, &status);
  std::printf("by cuGetProcAddress %d\n", reinterpret_cast<Alloc>(found)(&address, kBytes));
  std::printf("by dlsym %d\n", look_up<Alloc>(library, "cuMemAlloc_v2")(&address, kBytes));
  std::printf("small %d\n", look_up<Alloc>(library, "cuMemAlloc_v2")(&address, kBytes / 100));
  return 0;
}
