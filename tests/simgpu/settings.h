// What the environment says about the simulated machine: devices, memory, limits, failures. Read
// once. For the simulated driver's sources only.
#pragma once

#include <cstddef>
#include <limits>
#include <string>
#include <vector>

namespace simgpu {

struct Settings {
  std::vector<size_t> device_memory = {size_t{1} << 30, size_t{1} << 30};  // bytes, one per device
  std::string device_name = "Simulated GPU";
  size_t register_limit = std::numeric_limits<size_t>::max();  // bytes of one cuMemHostRegister
  size_t pin_limit = std::numeric_limits<size_t>::max();       // bytes pinned in all
  int driver_version = 13000;
  bool peers = true;        // devices can reach each other's memory
  bool poison = false;      // new physical memory holds a pattern instead of zeros
  std::string leak_report;  // path (%p is the process id), "-" for standard error, empty for none
  std::string kernels;      // libraries that bring kernels, separated by colons
  std::string failures;     // the grammar of SIMGPU_FAIL
  std::string error;        // what was wrong in the environment; cuInit fails with it
};

// SIMGPU_DEVICES, SIMGPU_MEMORY (one size, or one per device separated by commas), SIMGPU_NAME,
// SIMGPU_REGISTER_LIMIT, SIMGPU_PIN_LIMIT, SIMGPU_DRIVER_VERSION, SIMGPU_PEERS, SIMGPU_POISON,
// SIMGPU_LEAK_REPORT, SIMGPU_FAIL. Sizes are bytes or carry KiB, MiB, GiB (K, M, G mean the same).
// Thread-safe.
const Settings& settings();

// Parses a size such as "512MiB"; false if it is none.
bool parse_size(const std::string& text, size_t* bytes);

}  // namespace simgpu
