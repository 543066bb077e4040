// The simulated driver's functions by name and version. For the simulated driver's sources only.
#pragma once

#include <string>

#include "tests/simgpu/driver_headers.h"

namespace simgpu {

// Whether the name, with or without version and stream suffix, is one of a simulated function.
bool is_driver_function(const std::string& name);

}  // namespace simgpu
