// The grammar in which the environment asks for failures. For the simulated driver and its tests.
#pragma once

#include <string>

namespace simgpu {

// Injects what SIMGPU_FAIL says: "name:which:result,..." where which is n, n-m or * and the result
// a code's name or number (default CUDA_ERROR_UNKNOWN). False if it is malformed.
bool inject_failures(const std::string& specification);

}  // namespace simgpu
