// Loading and forking; see lifecycle.h. What happens at exit is runtime.cc's.
#include "shim/process/lifecycle.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>

#include "core/log.h"
#include "core/region.h"
#include "core/sleep/gate.h"
#include "shim/abi/dormouse.h"
#include "shim/hooks/real.h"
#include "shim/process/runtime.h"
#include "shim/rules/regions.h"
#include "shim/torch/torch.h"

namespace dormouse::shim {
namespace {

enum class Role : int { unknown, acts, passive };

// Zero before anything of the library ran: hooks can be called before its constructor.
constinit std::atomic<Role> role{Role::unknown};
constinit std::atomic<bool> switched_off{false};

// Of several copies the one acts that a lookup in the global order finds first.
Role find_role() noexcept {
  const void* first = real_dlsym(RTLD_DEFAULT, "dormouse_version");
  const void* own = reinterpret_cast<const void*>(&dormouse_version);
  return first == nullptr || first == own ? Role::acts : Role::passive;
}

void before_fork() {
  lock_for_fork();
}

void in_parent() {
  unlock_in_parent();
}

void in_child() {
  gate::reset_after_fork();
  reset_log_after_fork();
  region::reset_thread();
  forget_after_fork();  // first: what follows may ask for the settings
  torch::forget_after_fork();
}

__attribute__((constructor)) void loaded() {
  if (!active()) {
    log().warn("two copies of Dormouse are loaded into this process; only the first acts");
    return;
  }
  pthread_atfork(&before_fork, &in_parent, &in_child);
  // Most processes that a shell starts have nothing set: they need not read the options.
  if (std::getenv("DORMOUSE") != nullptr || std::getenv("DORMOUSE_REGIONS") != nullptr) {
    switched_off.store(!settings().enabled, std::memory_order_relaxed);
  }
}

}  // namespace

bool active() noexcept {
  Role known = role.load(std::memory_order_relaxed);
  if (known == Role::unknown) {
    known = find_role();
    role.store(known, std::memory_order_relaxed);
  }
  return known == Role::acts && !switched_off.load(std::memory_order_relaxed);
}

}  // namespace dormouse::shim
