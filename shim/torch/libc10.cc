// See libc10.h.
#include "shim/torch/libc10.h"

#include <iterator>
#include <memory>
#include <new>
#include <string_view>

#include "core/log.h"
#include "shim/process/settings.h"
#include "shim/torch/symbols.h"

#define KEY_READER(function) DORMOUSE_ACCELERATOR_CONFIG function "ERKNS0_15ConfigTokenizerEm"

namespace dormouse::shim::torch::libc10 {

constinit std::array<std::atomic<const CallSite*>, kBuckets> call_sites{};
constinit std::atomic<const Copy*> followed_copy{nullptr};

namespace {

// As libtorch_cpu gives its version: major, minor and patch, a byte each from the top.
constexpr std::uint64_t kChecksPinnedBlocks = std::uint64_t{2} << 56 | std::uint64_t{14} << 48;
using VersionFunction = std::uint64_t (*)();

// The functions of libc10 that read the later keys.
struct LaterKey {
  std::string_view name;
  const char* reader;
};
constexpr LaterKey kKeys[] = {
    {"large_segment_size_mb", KEY_READER("21parseLargeSegmentSize")},
    {"pinned_max_cached_size_mb", KEY_READER("24parsePinnedMaxCachedSize")},
    {"pinned_max_round_threshold_mb", KEY_READER("28parsePinnedMaxRoundThreshold")},
};
static_assert(std::size(kKeys) == kLaterKeys);

constinit std::atomic<const Copy*> copies{nullptr};
constinit std::atomic<VersionFunction> torch_version{nullptr};  // once libtorch_cpu is loaded

template <typename Function>
void find(Function& function, const void* code, const char* symbol) noexcept {
  function = reinterpret_cast<Function>(find_in_library_of(code, symbol));
}

// The list's copy with this instance(), which is added if need be.
const Copy* copy_with(void* instance) {
  auto made = std::make_unique<Copy>();
  made->instance = reinterpret_cast<void* (*)()>(instance);
  find(made->parse, instance, DORMOUSE_LIBC10_PARSE);
  find(made->construct, instance, DORMOUSE_ACCELERATOR_CONFIG "C1Ev");
  find(made->keys, instance, DORMOUSE_ACCELERATOR_CONFIG "7getKeysB5cxx11Ev");
  find(made->device_parser, instance, DORMOUSE_ACCELERATOR_CONFIG "19getConfigParserHookB5cxx11Ev");
  for (std::size_t i = 0; i < kLaterKeys; ++i) {
    made->knows[i] = find_in_library_of(instance, kKeys[i].reader) != nullptr;
  }
  const Copy* head = copies.load(std::memory_order_acquire);
  do {
    for (const Copy* each = head; each != nullptr; each = each->next) {
      if (each->instance == made->instance) return each;
    }
    made->next = head;
  } while (!copies.compare_exchange_weak(head, made.get(), std::memory_order_acq_rel));
  return made.release();
}

void say_second_copy() noexcept {
  if (settings().regions.items.empty() || !first_time("torch second copy")) return;
  log().warn(
      "A second copy of PyTorch's libc10 is loaded into this process. Regions suspend expandable "
      "segments for the first one alone");
}

const Copy* find_copy(const void* caller) {
  void* instance = find_behind(caller, DORMOUSE_LIBC10_INSTANCE);
  if (instance == nullptr) instance = find_in_library("libc10.so", DORMOUSE_LIBC10_INSTANCE);
  if (instance == nullptr) return nullptr;
  const Copy* copy = copy_with(instance);
  if (!switched_on()) return copy;
  const Copy* first = nullptr;
  if (!followed_copy.compare_exchange_strong(first, copy) && first != copy) say_second_copy();
  return copy;
}

void look_for_version(const void* caller) noexcept {
  if (torch_version.load(std::memory_order_acquire) != nullptr) return;
  constexpr const char* kVersion = "aoti_torch_abi_version";
  void* found = find_in_library_of(caller, kVersion);
  if (found == nullptr) found = find_in_library("libtorch_cpu.so", kVersion);
  if (found != nullptr) torch_version.store(reinterpret_cast<VersionFunction>(found));
}

}  // namespace

const Copy* followed() noexcept {
  return followed_copy.load(std::memory_order_acquire);
}

const Copy* copy_for(const void* caller) noexcept {
  std::atomic<const CallSite*>& bucket = call_sites[bucket_of(caller)];
  const CallSite* head = bucket.load(std::memory_order_acquire);
  for (const CallSite* site = head; site != nullptr; site = site->next) {
    if (site->address != caller) continue;
    if (site->copy == followed()) look_for_version(caller);
    return site->copy;
  }
  try {
    const Copy* copy = find_copy(caller);
    if (copy == nullptr) return nullptr;
    if (copy == followed()) look_for_version(caller);
    auto* site = new CallSite{caller, copy, head};  // twice if two threads come at once: no harm
    while (!bucket.compare_exchange_weak(site->next, site, std::memory_order_acq_rel)) {
    }
    return copy;
  } catch (const std::bad_alloc&) {
    return followed();
  }
}

bool knows(const std::string& key) {
  const Copy* copy = followed();
  if (copy->keys != nullptr) return copy->keys().contains(key);
  for (std::size_t i = 0; i < kLaterKeys; ++i) {
    if (kKeys[i].name == key) return copy->knows[i];
  }
  return true;
}

const char* obstacle_to(const std::string& key) {
  if (!knows(key)) return "this PyTorch does not know it";
  // Both leave blocks of pinned memory unrounded that other threads get from the shared cache, and
  // 2.13 does not ask whether a cached block is large enough.
  const bool unrounded =
      key == "pinned_max_cached_size_mb" || key == "pinned_max_round_threshold_mb";
  const VersionFunction version = torch_version.load(std::memory_order_acquire);
  if (unrounded && version != nullptr && version() < kChecksPinnedBlocks) {
    return "PyTorch before 2.14 would give blocks that are too small to threads outside";
  }
  return nullptr;
}

}  // namespace dormouse::shim::torch::libc10
