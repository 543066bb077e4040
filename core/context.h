// Small guards for driver state of the calling thread. For core's own driver calls.
#pragma once

#include "core/driver.h"

namespace dormouse {

// Makes `context` current for its lifetime. ok() says whether that worked.
class ScopedContext {
 public:
  ScopedContext(const Driver& driver, CUcontext context)
      : driver_(driver), result_(driver.cuCtxPushCurrent_v2(context)) {}
  ~ScopedContext() {
    CUcontext popped = nullptr;
    if (result_ == CUDA_SUCCESS) give_back([&] { return driver_.cuCtxPopCurrent_v2(&popped); });
  }
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;

  bool ok() const noexcept { return result_ == CUDA_SUCCESS; }
  CUresult result() const noexcept { return result_; }

 private:
  const Driver& driver_;
  const CUresult result_;
};

// Lets the calling thread allocate and copy while a stream of the program captures a graph: the
// driver refuses such calls otherwise, and they would end the capture.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    active_ = driver_.cuThreadExchangeStreamCaptureMode(&mode_) == CUDA_SUCCESS;
  }
  ~RelaxedCapture() {
    if (active_) give_back([&] { return driver_.cuThreadExchangeStreamCaptureMode(&mode_); });
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
  bool active_ = false;
};

}  // namespace dormouse
