// See copies.h.
#include "core/sleep/copies.h"

#include <algorithm>
#include <utility>

#include "core/backup/device_kernels.h"
#include "core/context.h"

namespace dormouse {
namespace {

// While the driver scrubs memory that was just released (in the time in which a fifth as much is
// copied), copies by the copy engine run at half the bus's speed, and those of a kernel at nine
// tenths; afterwards the engine alone is faster. See docs/design.md.
constexpr unsigned kKernelPart = 5;

}  // namespace

Copies::Copies(const OperationEnv& env, const ContextPins& pins, Direction direction,
               const std::map<int, std::uint64_t>& bytes)
    : env_(env), pins_(pins), direction_(direction) {
  CopyOptions options;
  options.direction = direction;
  options.threads =
      std::max<unsigned>(env.options.threads() / std::max<std::size_t>(bytes.size(), 1), 1);
  for (const auto& [device, of_chunks] : bytes) {
    const ContextPin* pin = pins.for_work_on(device);
    options.context = pin->context();
    options.context_id = pin->id();
    if (direction == Direction::kToDevice) {
      options.kernel = copy_kernel(device, options.context);
      options.kernel_bytes = of_chunks / kKernelPart;
    }
    runs_[device] = std::make_unique<CopyRun>(env.driver, options, env.progress.done());
  }
}

// Null where a kernel may not copy. Only behind a closed gate is no work of the program on the
// device, which the kernel would wait for, and which may itself wait for the program.
CUfunction Copies::copy_kernel(int device, CUcontext context) const {
  if (!env_.options.kernel_copies || !env_.gate_closed) return nullptr;
  int same_address = 0;
  if (env_.driver.cuDeviceGetAttribute(&same_address,
                                       CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM,
                                       device) != CUDA_SUCCESS ||
      same_address == 0) {
    return nullptr;
  }
  ScopedContext current(env_.driver, context);
  if (!current.ok()) return nullptr;
  RelaxedCapture relaxed(env_.driver);
  LoadedKernels kernels;
  return env_.kernels.load(context, &kernels) == CUDA_SUCCESS ? kernels.copy : nullptr;
}

Status Copies::add(OperationChunk& item) {
  Chunk& chunk = *item.chunk;
  if (chunk.disk_image != nullptr) {
    Status status = chunk.disk_image->file().reopen_if_lost();
    if (status.is_ok()) plan_disk_copies(*chunk.disk_image, item.copied, &disk_[item.device()]);
    return status;
  }
  if (chunk.image == nullptr) return Status::ok();
  chunk.image->forget_other_contexts(pins_);
  plan_copies(*chunk.image, chunk.address, item.copied, &item.unfinished_copies,
              &plans_[item.device()]);
  return Status::ok();
}

void Copies::start() {
  for (auto& [device, plan] : std::exchange(plans_, {})) runs_.at(device)->add(std::move(plan));
}

bool Copies::failed() const {
  return std::any_of(runs_.begin(), runs_.end(),
                     [](const auto& entry) { return entry.second->failed(); });
}

void Copies::complete() {
  for (auto& [device, run] : runs_) run->complete();
}

bool Copies::wait_until_ready() {
  return std::all_of(runs_.begin(), runs_.end(),
                     [](auto& entry) { return entry.second->wait_until_ready(); });
}

bool Copies::wait_for(const OperationChunk& item) {
  return runs_.at(item.device())->wait_for(item.unfinished_copies);
}

Status Copies::finish() {
  Status first;
  for (auto& [device, run] : runs_) {
    Status status = run->finish();
    if (first.is_ok()) first = std::move(status);
  }
  return first;
}

Status Copies::finish_disk() {
  for (const auto& [device, plan] : disk_) {
    Status status =
        run_disk_copies(env_.driver, env_.contexts, *pins_.for_work_on(device), direction_, plan,
                        env_.options.threads(), env_.options.huge_pages, env_.progress.done());
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

}  // namespace dormouse
