// Names of the codes.
#include "core/status.h"

namespace dormouse {

const char* code_name(Code code) noexcept {
  switch (code) {
    case Code::kOk:
      return "ok";
    case Code::kInvalidArgument:
      return "invalid_argument";
    case Code::kNotFound:
      return "not_found";
    case Code::kOutOfDeviceMemory:
      return "out_of_device_memory";
    case Code::kOutOfHostMemory:
      return "out_of_host_memory";
    case Code::kBusy:
      return "busy";
    case Code::kUnsupported:
      return "unsupported";
    case Code::kDriver:
      return "driver_error";
    case Code::kIo:
      return "io_error";
  }
  return "unknown";
}

}  // namespace dormouse
