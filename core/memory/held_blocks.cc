// What others want of blocks: a list of them, and that a chunk stays awake since others hold its
// physical memory or the program wants it so. Part of Pool.
#include <iterator>

#include "core/memory/pool.h"

namespace dormouse {

template <typename Change>
void Pool::change_hold(Block& block, Change change) noexcept {
  const bool before = block.held();
  change(block);
  if (block.held() == before) return;
  before ? --block.chunk->held_blocks : ++block.chunk->held_blocks;
}

std::vector<CUdeviceptr> Pool::block_addresses() const {
  MutexLock lock(pool_mutex_);
  std::vector<CUdeviceptr> addresses;
  for (const auto& [address, block] : blocks_) addresses.push_back(address);
  return addresses;
}

std::vector<HeldBlock> Pool::hold(CUdeviceptr address, std::size_t bytes, Holder by,
                                  std::set<const Chunk*>* not_awake) {
  MutexLock lock(pool_mutex_);
  auto first = blocks_.upper_bound(address);
  if (first != blocks_.begin() &&
      std::prev(first)->first + std::prev(first)->second.occupied > address)
    --first;
  std::vector<HeldBlock> held;
  for (auto at = first; at != blocks_.end() && at->first < address + bytes; ++at) {
    held.push_back({at->first, at->second.number});
    if (at->second.chunk->state != ChunkState::kAwake) not_awake->insert(at->second.chunk);
  }
  for (const HeldBlock& each : held) {
    change_hold(blocks_.at(each.address), [by](Block& block) {
      ++block.holds;
      block.by = by;
    });
  }
  return held;
}

void Pool::let_go(const std::vector<HeldBlock>& blocks) noexcept {
  MutexLock lock(pool_mutex_);
  for (const HeldBlock& each : blocks) {
    const auto at = blocks_.find(each.address);
    if (at == blocks_.end() || at->second.number != each.number) continue;
    change_hold(at->second, [](Block& block) { --block.holds; });
  }
}

void Pool::set_sync_memops(CUdeviceptr address, bool on) noexcept {
  MutexLock lock(pool_mutex_);
  const auto at = blocks_.upper_bound(address);
  if (at != blocks_.begin()) std::prev(at)->second.sync_memops = on;
}

std::size_t Pool::keep_awake(CUdeviceptr address, bool on, std::set<const Chunk*>* not_awake) {
  MutexLock lock(pool_mutex_);
  auto at = blocks_.upper_bound(address);
  if (at == blocks_.begin()) return 0;
  Block& block = (--at)->second;
  if (address >= at->first + block.bytes) return 0;
  if (on && block.chunk->state != ChunkState::kAwake) not_awake->insert(block.chunk);
  change_hold(block, [on](Block& changed) { changed.kept_awake = on; });
  return block.bytes;
}

}  // namespace dormouse
