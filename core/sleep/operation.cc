// See operation.h.
#include "core/sleep/operation.h"

#include "core/log.h"

namespace dormouse {

Operation::Operation(const OperationEnv& env, const Transition&, std::vector<Pool*> pools)
    : env_(env), driver_(env.driver), pools_(std::move(pools)) {}

Status Operation::pin_contexts(const std::set<int>& devices) {
  const CUresult result = env_.contexts.pin_all(devices, &pins_);
  for (const int device : devices) {
    if (result != CUDA_SUCCESS || pins_.for_work_on(device) != nullptr) continue;
    return {Code::kBusy,
            fmt::format("the program has no context on device {} any more, in which its memory "
                        "could be copied: try again when it has made one",
                        device),
            CUDA_ERROR_INVALID_CONTEXT};
  }
  if (result == CUDA_SUCCESS) return Status::ok();
  return {
      Code::kDriver,
      fmt::format("looking for the devices' contexts failed with {}", error_name(driver_, result)),
      result};
}

CUcontext Operation::context_on(int device) const noexcept {
  const ContextPin* pin = pins_.for_work_on(device);
  return pin == nullptr ? nullptr : pin->context();
}

void Operation::step_done(const char* name) noexcept {
  const Clock::time_point now = Clock::now();
  try {
    steps_ += fmt::format("{}{} {:.2f} ms", steps_.empty() ? "" : ", ", name,
                          milliseconds(now - step_began_));
  } catch (const std::bad_alloc&) {
    // One figure less in the log.
  }
  step_began_ = now;
}

double Operation::seconds() const {
  return std::chrono::duration<double>(Clock::now() - began_).count();
}

}  // namespace dormouse
