// The driver's functions that the programs use, in one struct, and alloc_check's calls on top of
// them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "tests/programs/check.h"

// name, and the CUDA version of the form that the program was compiled for
#define PROGRAM_DRIVER_FUNCTIONS(F)   \
  F(cuInit, 2000)                     \
  F(cuDeviceGet, 2000)                \
  F(cuDevicePrimaryCtxRetain, 7000)   \
  F(cuDevicePrimaryCtxRelease, 11000) \
  F(cuCtxSetCurrent, 4000)            \
  F(cuMemAlloc, 3020)                 \
  F(cuMemFree, 3020)                  \
  F(cuMemcpyHtoD, 3020)               \
  F(cuMemcpyDtoH, 3020)               \
  F(cuMemcpyDtoD, 3020)               \
  F(cuMemsetD8, 3020)

namespace programs {

struct DriverFunctions {
#define F(name, version) decltype(&::name) name = nullptr;
  PROGRAM_DRIVER_FUNCTIONS(F)
#undef F
  // By name, since its form for CUDA 13 is another one.
  CUresult (*synchronize)() = nullptr;
};

class DriverGpu {
 public:
  explicit DriverGpu(const DriverFunctions& functions) : cu_(functions) {}

  void start() {
    CUdevice device = 0;
    CUcontext context = nullptr;
    CHECK(cu_.cuInit(0));
    CHECK(cu_.cuDeviceGet(&device, 0));
    CHECK(cu_.cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cu_.cuCtxSetCurrent(context));
  }
  uint64_t allocate(size_t bytes) {
    CUdeviceptr pointer = 0;
    CHECK(cu_.cuMemAlloc(&pointer, bytes));
    return pointer;
  }
  void release(uint64_t pointer) { CHECK(cu_.cuMemFree(pointer)); }
  void to_device(uint64_t to, const void* from, size_t bytes) {
    CHECK(cu_.cuMemcpyHtoD(to, from, bytes));
  }
  void to_host(void* to, uint64_t from, size_t bytes) { CHECK(cu_.cuMemcpyDtoH(to, from, bytes)); }
  void on_device(uint64_t to, uint64_t from, size_t bytes) {
    CHECK(cu_.cuMemcpyDtoD(to, from, bytes));
  }
  void set(uint64_t pointer, int byte, size_t bytes) {
    CHECK(cu_.cuMemsetD8(pointer, static_cast<unsigned char>(byte), bytes));
  }
  void synchronize() { CHECK(cu_.synchronize()); }

 private:
  const DriverFunctions cu_;
};

}  // namespace programs
