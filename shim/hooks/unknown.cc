// Functions that the tables do not know; see unknown.h.
#include "shim/hooks/unknown.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstring>
#include <string_view>

#include "core/log.h"
#include "shim/hooks/hooks.h"
#include "shim/hooks/real.h"
#include "shim/process/linker.h"
#include "shim/process/process.h"

namespace dormouse::shim::unknown {
namespace {

// How functions begin that take device memory, a stream or a graph.
constexpr std::string_view kBeginnings[] = {
    "cuMem",    "cuLaunch",    "cuGraph", "cuStream", "cuMulticast",       "cuPointer",
    "cuTexRef", "cuTexObject", "cuIpc",   "cuFabric", "cuLogicalEndpoint",
};

bool may_take_memory(std::string_view name) noexcept {
  if (name.starts_with("cuGraphics")) return false;
  for (std::string_view beginning : kBeginnings) {
    if (name.starts_with(beginning)) return true;
  }
  return false;
}

struct Kept {
  enum State : int { kFree, kBeingWritten, kWritten, kSaid };
  std::atomic<int> state{kFree};
  std::array<char, 96> name{};

  bool is(std::string_view other) const noexcept {
    return state.load(std::memory_order_acquire) >= kWritten && other == name.data();
  }
};

std::array<Kept, 64> kept;
std::atomic<bool> any_unsaid{false};

bool is_kept(std::string_view name) noexcept {
  for (const Kept& each : kept) {
    if (each.is(name)) return true;
  }
  return false;
}

void keep(std::string_view name) noexcept {
  if (name.size() >= kept[0].name.size() || is_kept(name)) return;
  for (Kept& each : kept) {
    int expected = Kept::kFree;
    if (!each.state.compare_exchange_strong(expected, Kept::kBeingWritten)) continue;
    std::memcpy(each.name.data(), name.data(), name.size());
    each.state.store(Kept::kWritten, std::memory_order_release);
    any_unsaid.store(true, std::memory_order_release);
    return;
  }
}

}  // namespace

void asked_for(const char* name) noexcept {
  if (may_take_memory(name) && knowledge_of(name) == Knowledge::kNone) keep(name);
}

void got(const char* name, void* function) noexcept {
  if (name == nullptr || function == nullptr || !may_take_memory(name)) return;
  const Knowledge known = knowledge_of(name);
  if (known == Knowledge::kNone) keep(name);
  if (known != Knowledge::kHooked) return;
  // Of its versions the driver chose one that has no hook: a very old one, or a newer one.
  Dl_info info{};
  if (dladdr(function, &info) == 0 || info.dli_saddr != function) return;
  asked_for(info.dli_sname);
}

void say() noexcept {
  if (!any_unsaid.load(std::memory_order_relaxed) || engine() == nullptr) return;
  any_unsaid.store(false, std::memory_order_relaxed);
  for (Kept& each : kept) {
    int expected = Kept::kWritten;
    if (!each.state.compare_exchange_strong(expected, Kept::kSaid)) continue;
    if (libcuda_symbol(each.name.data()) == nullptr) continue;
    log().info(
        "the program asked for {}, a function of the driver that is newer than this library: calls "
        "of it do not wait for memory that is asleep, and memory that it allocates gets no tag",
        each.name.data());
  }
}

}  // namespace dormouse::shim::unknown
