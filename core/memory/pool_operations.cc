// What operations and background preparation do with the chunks of a pool. Part of Pool.
#include <algorithm>
#include <utility>

#include "core/memory/pool.h"
#include "core/round_up.h"

namespace dormouse {

Ranges Pool::live_ranges_locked(const Chunk& chunk) const {
  Ranges ranges;
  for (auto at = blocks_.lower_bound(chunk.address); at != blocks_.end() && at->first < chunk.end();
       ++at) {
    append({at->first - chunk.address, at->second.occupied}, &ranges);
  }
  return ranges;
}

Ranges Pool::live_ranges(const Chunk& chunk) const {
  MutexLock lock(pool_mutex_);
  return live_ranges_locked(chunk);
}

std::uint64_t Pool::next_number() const {
  MutexLock lock(pool_mutex_);
  return stats_.allocations;
}

Range Pool::in_block(const Range& range, std::uint64_t before) const {
  MutexLock lock(pool_mutex_);
  auto at = blocks_.upper_bound(range.begin);
  if (at == blocks_.begin()) return {};
  --at;
  const CUdeviceptr block_end = at->first + at->second.occupied;
  if (range.begin >= block_end || at->second.number >= before) return {};
  const std::size_t bytes = std::min<std::size_t>(range.bytes, block_end - range.begin);
  return round_inward({range.begin, bytes}, kBlockAlignment);
}

std::map<std::uint64_t, std::size_t> Pool::awake_chunks() {
  release_empty(0, options_.drain_timeout);
  MutexLock lock(pool_mutex_);
  std::map<std::uint64_t, std::size_t> found;
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state == ChunkState::kAwake && chunk->held_blocks == 0)
      found.emplace(chunk->sequence, chunk->bytes);
  }
  return found;
}

std::vector<Chunk*> Pool::begin_sleep(std::uint64_t last_sequence) {
  release_empty(0, options_.drain_timeout);
  MutexLock lock(pool_mutex_);
  std::vector<Chunk*> chunks;
  chunks.reserve(chunks_.all().size());  // nothing may fail between here and the return
  // By address: neighbours come together, and access is set for runs of them.
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state != ChunkState::kAwake || chunk->sequence > last_sequence) continue;
    if (chunk->held_blocks != 0) continue;
    chunk->state = ChunkState::kFallingAsleep;
    ++chunk->era;
    chunk->slept_before_block = stats_.allocations;
    free_.forget(*chunk);
    if (chunk->live_blocks == 0) no_longer_empty(*chunk);
    chunks.push_back(chunk.get());
  }
  return chunks;
}

std::vector<Chunk*> Pool::begin_wake(const std::function<bool(const Chunk&)>& wanted) {
  MutexLock lock(pool_mutex_);
  std::vector<Chunk*> chunks;
  chunks.reserve(chunks_.all().size());
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state != ChunkState::kAsleep || !wanted(*chunk)) continue;
    chunk->state = ChunkState::kWaking;
    chunks.push_back(chunk.get());
  }
  return chunks;
}

void Pool::return_free_ranges(const Chunk& chunk, bool used) noexcept {
  const auto add = [&](CUdeviceptr from, CUdeviceptr to) REQUIRES(pool_mutex_) {
    if (from == to) return;
    used ? free_.add_used(chunk, {from, to - from}) : free_.add(chunk, {from, to - from});
  };
  CUdeviceptr free_from = chunk.address;
  for (auto at = blocks_.lower_bound(chunk.address); at != blocks_.end() && at->first < chunk.end();
       ++at) {
    add(free_from, at->first);
    free_from = at->first + at->second.occupied;
  }
  add(free_from, chunk.end());
}

void Pool::finish(Chunk& chunk, ChunkState state) noexcept {
  MutexLock lock(pool_mutex_);
  const bool was_mapped = chunk.state == ChunkState::kFallingAsleep;
  chunk.state = state;
  if (state == ChunkState::kAwake) {
    // A chunk that stays awake may have seen frees that the device has not passed; a woken one had
    // no running work.
    return_free_ranges(chunk, was_mapped);
    if (chunk.live_blocks == 0) became_empty(chunk);
    chunk.discarded = false;
    chunk.slept_outside = false;
    if (!was_mapped) {
      stats_.mapped += chunk.bytes;
      stats_.asleep -= chunk.bytes;
      stats_.peak_mapped = std::max(stats_.peak_mapped, stats_.mapped);
    }
    return;
  }
  if (was_mapped) {
    stats_.mapped -= chunk.bytes;
    stats_.asleep += chunk.bytes;
  }
  release_if_gone(chunk);
}

void Pool::note_sleep(const OperationStats& stats) {
  MutexLock lock(pool_mutex_);
  ++stats_.sleeps;
  stats_.last_sleep = stats;
}

void Pool::note_wake(const OperationStats& stats) {
  MutexLock lock(pool_mutex_);
  ++stats_.wakes;
  stats_.last_wake = stats;
  woke_at_ = std::chrono::steady_clock::now();
}

std::uint64_t Pool::discard_sleeping() {
  MutexLock lock(pool_mutex_);
  std::uint64_t dropped = 0;
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state != ChunkState::kAsleep) continue;
    if (const Image* backup = chunk->backup()) {
      for (const ContentUnit& unit : backup->content()) dropped += unit.bytes;
    }
    chunk->drop_backup();
    chunk->discarded = true;
  }
  return dropped;
}

void Pool::drop_backups(bool only_kept) {
  MutexLock lock(pool_mutex_);
  bool all = true;
  for (const auto& [address, chunk] : chunks_.all()) {
    // What an operation or preparation works on is theirs.
    if (chunk->state != ChunkState::kAwake || chunk->held) {
      all = false;
      continue;
    }
    const Image* backup = chunk->backup();
    if (backup != nullptr && !(only_kept && backup->content().empty())) chunk->drop_backup();
  }
  if (all) woke_at_.reset();
}

std::optional<std::chrono::steady_clock::time_point> Pool::woke_at() const {
  MutexLock lock(pool_mutex_);
  return woke_at_;
}

Chunk* Pool::begin_prepare(std::uint64_t most_bytes, Ranges* ranges) {
  MutexLock lock(pool_mutex_);
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state != ChunkState::kAwake || chunk->live_blocks == 0 || chunk->held) continue;
    if (chunk->held_blocks != 0) continue;
    if (chunk->disk_image != nullptr) continue;  // its backup is kept on the disk
    *ranges = live_ranges_locked(*chunk);
    if (chunk->image != nullptr && chunk->image->is_ready(*ranges)) continue;
    if ((chunk->image != nullptr ? chunk->image->missing_bytes(*ranges) : chunk->bytes) >
        most_bytes)
      continue;
    chunk->held = true;
    return chunk.get();
  }
  return nullptr;
}

void Pool::end_prepare(Chunk& chunk, ImagePtr<HostImage> image) {
  MutexLock lock(pool_mutex_);
  chunk.held = false;
  released_at_ = 0;
  if (chunk.backup() == nullptr) chunk.image = std::move(image);
}

bool Pool::any_awake() const {
  MutexLock lock(pool_mutex_);
  return stats_.mapped != 0;
}

bool Pool::any_asleep() const {
  MutexLock lock(pool_mutex_);
  return stats_.asleep != 0;
}

bool Pool::any_slept_outside() const {
  MutexLock lock(pool_mutex_);
  return std::any_of(chunks_.all().begin(), chunks_.all().end(), [](const auto& entry) {
    return entry.second->state == ChunkState::kAsleep && entry.second->slept_outside;
  });
}

const void* Pool::host_backup(CUdeviceptr address, std::size_t bytes) const {
  MutexLock lock(pool_mutex_);
  auto at = blocks_.upper_bound(address);
  if (at == blocks_.begin()) return nullptr;
  --at;
  const Chunk& chunk = *at->second.chunk;
  if (bytes > at->second.occupied || address - at->first > at->second.occupied - bytes)
    return nullptr;
  const bool kept = chunk.state == ChunkState::kAwake && chunk.image != nullptr &&
                    !chunk.image->content().empty() && at->second.number < chunk.slept_before_block;
  if (!kept && (chunk.state != ChunkState::kAsleep || chunk.image == nullptr)) return nullptr;
  chunk.image->write_zeros(address - chunk.address, bytes);
  return chunk.image->data() + (address - chunk.address);
}

}  // namespace dormouse
