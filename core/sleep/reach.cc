// Which devices reach tagged memory of which others: the pools' mappings give them access, and a
// sleep waits for their work.
#include <exception>

#include "core/log.h"
#include "core/memory/pool.h"
#include "core/sleep/engine.h"

namespace dormouse {

bool Engine::has_access(unsigned reaches) noexcept {
  return (reaches & ~(1u << static_cast<unsigned>(Reach::kWithout))) != 0;
}

// By the first reason that gives access, until the last has gone.
Status Engine::set_access(int from_device, int to_device, Reach why, bool enabled) noexcept {
  try {
    const unsigned bit = 1u << static_cast<unsigned>(why);
    bool before = false;
    bool now = false;
    {
      std::lock_guard lock(pools_mutex_);
      unsigned& reaches = reaches_[{from_device, to_device}];
      before = has_access(reaches);
      enabled ? reaches |= bit : reaches &= ~bit;
      now = has_access(reaches);
    }
    if (now == before) return Status::ok();
    for (Pool* pool : pools_on(to_device)) {
      const CUresult result = pool->set_peer_access(from_device, now);
      if (result == CUDA_SUCCESS) continue;
      return {
          Code::kDriver,
          fmt::format("access of device {} to tagged memory of device {} could not be changed: {}",
                      from_device, to_device, error_name(driver_, result)),
          result};
    }
    return Status::ok();
  } catch (const std::exception& error) {
    return {Code::kDriver, error.what()};
  }
}

Status Engine::set_peer_access(int from_device, int to_device, bool enabled) noexcept {
  return set_access(from_device, to_device, Reach::kPeer, enabled);
}

Status Engine::set_pool_access(int from_device, int to_device, bool enabled) noexcept {
  return set_access(from_device, to_device, Reach::kPool, enabled);
}

bool Engine::reach_by_copies(int from_device, int to_device) noexcept {
  try {
    {
      std::lock_guard lock(pools_mutex_);
      unsigned& reaches = reaches_[{from_device, to_device}];
      // Access or not, a sleep waits for the copies.
      const bool refused = (reaches & 1u << static_cast<unsigned>(Reach::kWithout)) != 0;
      if (refused || has_access(reaches)) return has_access(reaches);
    }
    if (set_access(from_device, to_device, Reach::kCopies, true).is_ok()) return true;
    (void)set_access(from_device, to_device, Reach::kCopies, false);  // of pools that took it
    std::lock_guard lock(pools_mutex_);
    reaches_[{from_device, to_device}] |= 1u << static_cast<unsigned>(Reach::kWithout);
  } catch (const std::exception&) {
    // As without access.
  }
  return false;
}

std::set<int> Engine::reached_from(const std::set<int>& devices) const {
  std::set<int> from = devices;
  std::lock_guard lock(pools_mutex_);
  for (const auto& [pair, reaches] : reaches_) {
    if (reaches != 0 && devices.count(pair.second) != 0) from.insert(pair.first);
  }
  return from;
}

}  // namespace dormouse
