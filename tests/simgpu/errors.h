// Names and texts of the driver's result codes. For the simulated driver's sources only.
#pragma once

#include <string>

#include "tests/simgpu/driver_headers.h"

namespace simgpu {

// "CUDA_ERROR_OUT_OF_MEMORY"; nullptr for a number that is no result code.
const char* result_name(int result);

// "out of memory"; nullptr for a number that is no result code.
const char* result_text(int result);

// The code of a name or of a decimal number that is a result code; false if it is none.
bool parse_result(const std::string& text, CUresult* result);

}  // namespace simgpu
