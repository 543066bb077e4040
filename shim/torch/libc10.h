// PyTorch 2.10 and later: the functions of libc10 that settings_per_thread.cc stands in for. A
// process can have several copies of libc10, with objects of different size: each caller has its
// answer from the copy that it would have reached without this library. Regions change the settings
// of one copy, the first that is called; with DORMOUSE=off or DORMOUSE_TORCH=off of none.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_set>

#define DORMOUSE_ACCELERATOR_CONFIG "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig"
#define DORMOUSE_LIBC10_INSTANCE DORMOUSE_ACCELERATOR_CONFIG "8instanceEv"
#define DORMOUSE_LIBC10_PARSE \
  DORMOUSE_ACCELERATOR_CONFIG "9parseArgsERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"

namespace dormouse::shim::torch::libc10 {

using Keys = std::unordered_set<std::string>;
using DeviceParser = std::function<void(const std::string&)>;

// Keys that came after 2.10.
inline constexpr std::size_t kLaterKeys = 3;

// One libc10 of the process. Constant once it is found, and never freed.
struct Copy {
  void* (*instance)() = nullptr;
  void (*parse)(void* self, const std::string& text) = nullptr;
  void (*construct)(void* self) = nullptr;
  const Keys& (*keys)() = nullptr;  // this and the next are missing in 2.11
  const DeviceParser& (*device_parser)() = nullptr;
  std::array<bool, kLaterKeys> knows{};
  const Copy* next = nullptr;
};

// The copy whose settings regions change; null before one is called. Thread-safe.
const Copy* followed() noexcept;

// The copy that answers code at `caller`; null if there is none. Asks the dynamic linker once for
// each place that calls: not under a lock of ours, since initialisers of PyTorch's run under the
// linker's own.
const Copy* copy_for(const void* caller) noexcept;

// Whether that is known to be the copy that regions follow. Cheap: PyTorch asks for its settings
// several times in an allocation.
struct CallSite {
  const void* address;
  const Copy* copy;
  const CallSite* next;
};
inline constexpr std::size_t kBuckets = 256;
extern std::array<std::atomic<const CallSite*>, kBuckets> call_sites;
extern std::atomic<const Copy*> followed_copy;

inline std::size_t bucket_of(const void* caller) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(caller);
  return (address ^ address >> 9) % kBuckets;
}

inline bool is_answered_by_followed(const void* caller) noexcept {
  const CallSite* site = call_sites[bucket_of(caller)].load(std::memory_order_acquire);
  while (site != nullptr && site->address != caller) site = site->next;
  return site != nullptr && site->copy == followed_copy.load(std::memory_order_relaxed);
}

// Whether the followed copy has the key. From 2.13 on it tells, before that its functions do.
bool knows(const std::string& key);

// Why no copy of its settings may have the key, if so: the rest of a sentence.
const char* obstacle_to(const std::string& key);

}  // namespace dormouse::shim::torch::libc10
