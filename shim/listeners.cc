// Who is told of what happens to the process; see process/listeners.h.
#include "shim/process/listeners.h"

#include "shim/hooks/captures.h"
#include "shim/rules/nvtx.h"
#include "shim/rules/python_rules.h"
#include "shim/torch/torch.h"

namespace dormouse::shim {
namespace {

constexpr Listener kListeners[] = {
    {.process_tag_changed = &torch::process_region,
     .engine_made = &torch::engine_made,
     .cuda_in_use = &torch::driver_initialised,
     .forked_in_child = &torch::forget_after_fork},
    {.cuda_in_use = &triggers::driver_initialised},
    {.before_fork = &nvtx::before_fork,
     .forked_in_parent = &nvtx::forked_in_parent,
     .forked_in_child = &nvtx::forked_in_child},
    {.forked_in_child = &captures::forget_after_fork},
};

}  // namespace

std::span<const Listener> listeners() noexcept {
  return kListeners;
}

}  // namespace dormouse::shim
