// Which devices reach tagged memory of which others: the pools' mappings give them access, and a
// sleep waits for their work.
#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include "core/memory/pool.h"
#include "core/sleep/engine.h"

namespace dormouse {

bool Engine::has_access(unsigned reaches) noexcept {
  return (reaches & ~(1u << static_cast<unsigned>(Reach::kWithout))) != 0;
}

// By the first reason that gives access, until the last has gone. With pools_mutex_ held: no pool
// comes meanwhile, and one change follows the other.
CUresult Engine::set_access(int from_device, int to_device, Reach why, bool enabled) {
  unsigned& reaches = reaches_[{from_device, to_device}];
  const unsigned bit = 1u << static_cast<unsigned>(why);
  const unsigned after = enabled ? reaches | bit : reaches & ~bit;
  const bool before = has_access(reaches);
  const bool now = has_access(after);
  const auto change = [&](Pool& pool, bool access) {
    if (now == before || pool.options().ordinal != to_device) return CUDA_SUCCESS;
    return pool.set_peer_access(from_device, access);
  };
  for (auto at = pools_.begin(); at != pools_.end(); ++at) {
    const CUresult result = change(**at, now);
    if (result == CUDA_SUCCESS) continue;
    while (at != pools_.begin()) (void)change(**--at, before);
    return result;
  }
  reaches = after;
  return CUDA_SUCCESS;
}

CUresult Engine::set_peer_access(CUcontext from, int from_device, CUcontext to, int to_device,
                                 bool enabled) noexcept {
  try {
    MutexLock lock(pools_mutex_);
    const auto found =
        std::find_if(peer_access_.begin(), peer_access_.end(),
                     [&](const PeerAccess& each) { return each.from == from && each.to == to; });
    if ((found != peer_access_.end()) == enabled) return CUDA_SUCCESS;
    const auto of_devices =
        std::count_if(peer_access_.begin(), peer_access_.end(), [&](const PeerAccess& each) {
          return each.from_device == from_device && each.to_device == to_device;
        });
    std::vector<PeerAccess> after = peer_access_;
    if (enabled) {
      after.push_back({from, from_device, to, to_device});
    } else {
      after.erase(after.begin() + (found - peer_access_.begin()));
    }
    if (of_devices == (enabled ? 0 : 1)) {
      const CUresult result = set_access(from_device, to_device, Reach::kPeer, enabled);
      if (result != CUDA_SUCCESS) return result;
    }
    peer_access_ = std::move(after);
    return CUDA_SUCCESS;
  } catch (const std::bad_alloc&) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
}

// The access of a context that has gone.
void Engine::drop_peer_access(CUcontext context) noexcept {
  std::vector<PeerAccess> gone;
  try {
    MutexLock lock(pools_mutex_);
    std::copy_if(
        peer_access_.begin(), peer_access_.end(), std::back_inserter(gone),
        [&](const PeerAccess& each) { return each.from == context || each.to == context; });
  } catch (const std::bad_alloc&) {
    // Their devices keep it.
  }
  for (const PeerAccess& each : gone)
    (void)set_peer_access(each.from, each.from_device, each.to, each.to_device, false);
}

CUresult Engine::set_pool_access(int from_device, int to_device, bool enabled) noexcept {
  try {
    MutexLock lock(pools_mutex_);
    return set_access(from_device, to_device, Reach::kPool, enabled);
  } catch (const std::bad_alloc&) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
}

bool Engine::reach_by_copies(int from_device, int to_device) noexcept {
  try {
    MutexLock lock(pools_mutex_);
    unsigned& reaches = reaches_[{from_device, to_device}];
    // Access or not, a sleep waits for the copies.
    const unsigned without = 1u << static_cast<unsigned>(Reach::kWithout);
    if (has_access(reaches)) return true;
    if ((reaches & without) != 0) return false;
    if (set_access(from_device, to_device, Reach::kCopies, true) == CUDA_SUCCESS) return true;
    reaches |= without;
  } catch (const std::bad_alloc&) {
    // As without access.
  }
  return false;
}

std::set<int> Engine::reached_from(const std::set<int>& devices) const {
  std::set<int> from = devices;
  MutexLock lock(pools_mutex_);
  for (const auto& [pair, reaches] : reaches_) {
    if (reaches != 0 && devices.count(pair.second) != 0) from.insert(pair.first);
  }
  return from;
}

}  // namespace dormouse
