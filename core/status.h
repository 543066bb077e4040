// The result of everything in core that can fail: a code, the driver's own error where it was the
// cause, and a text that says what to do. Used by core, shim and cli.
#pragma once

#include <cuda.h>

#include <string>
#include <utility>

namespace dormouse {

enum class Code {
  kOk,
  kInvalidArgument,    // the caller's mistake; nothing was done
  kNotFound,           // no such tag, pool or process
  kOutOfDeviceMemory,  // the device has too little free memory; nothing was lost
  kOutOfHostMemory,    // the host's memory or the configured limit does not suffice; nothing was
                       // released
  kBusy,         // another operation, or running work of the program, stands in the way; try again
  kUnsupported,  // this machine or driver cannot do it
  kDriver,       // a driver call failed; `driver` has its result
  kIo,           // a system call failed
};

// The code's name as it stands in JSON and logs, e.g. "out_of_device_memory". Never null.
const char* code_name(Code code) noexcept;

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message, CUresult driver = CUDA_SUCCESS)
      : code_(code), driver_(driver), message_(std::move(message)) {}

  static Status ok() { return {}; }

  bool is_ok() const noexcept { return code_ == Code::kOk; }
  Code code() const noexcept { return code_; }
  // The driver's result behind kDriver and kOutOfDeviceMemory, else CUDA_SUCCESS.
  CUresult driver() const noexcept { return driver_; }
  // Empty when ok; else what happened and what to do about it.
  const std::string& message() const noexcept { return message_; }

 private:
  Code code_ = Code::kOk;
  CUresult driver_ = CUDA_SUCCESS;
  std::string message_;
};

}  // namespace dormouse
