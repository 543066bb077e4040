// A library of kernels as SIMGPU_KERNELS names them, for the tests.
#include "tests/simgpu/simgpu_control.h"

extern "C" __attribute__((visibility("default"))) void simgpu_register_kernels(
    int (*add)(const char* name, simgpu_kernel kernel, void* user)) {
  static int runs = 0;
  add(
      "kernel_from_a_library", [](const simgpu_launch*, void* user) { ++*static_cast<int*>(user); },
      &runs);
}
