// Kernels of the simulation: C++ functions that stand for kernels of the same name in a module's
// PTX text. To add one, write it beside the others in kernels.cc, or call register_kernel before
// the module is loaded.
#pragma once

#include <cstring>
#include <functional>
#include <string>

#include "tests/simgpu/simgpu_control.h"

namespace simgpu {

// Runs once for a whole launch, on the stream's thread, and touches device memory directly: memory
// that is not mapped or gives no access faults (SIGSEGV), as it would on the device.
using Kernel = std::function<void(const simgpu_launch& launch)>;

// False, with nothing changed, if the name has a kernel already. Thread-safe.
bool register_kernel(const std::string& name, Kernel kernel);

// Loads the libraries of SIMGPU_KERNELS, paths separated by colons. Each exports
//   extern "C" void simgpu_register_kernels(int (*add)(const char*, simgpu_kernel, void*));
// and registers its kernels by it (simgpu_register_kernel's contract). False if one cannot be
// loaded.
bool load_kernel_libraries(const std::string& paths);

// The kernel of a name; empty if there is none. Thread-safe.
Kernel find_kernel(const std::string& name);

// Parameter `index` of a launch. The caller knows the kernel's signature.
template <typename T>
T parameter(const simgpu_launch& launch, unsigned index) {
  T value{};
  std::memcpy(&value, launch.params[index], sizeof(value));
  return value;
}

}  // namespace simgpu
