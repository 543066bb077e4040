// Pools: address space, chunks, blocks; see pool.h for the invariants.
#include "core/memory/pool.h"

#include <algorithm>
#include <new>
#include <utility>

#include "core/context.h"
#include "core/device_waits.h"
#include "core/log.h"
#include "core/memory/mapped_memory.h"
#include "core/round_up.h"

namespace dormouse {
namespace {

constexpr std::size_t kBlockAlignment = 512;  // as cudaMalloc's at the least
constexpr std::size_t kFirstChunkBytes = std::size_t{32} << 20;
}  // namespace

Pool::Pool(const Driver& driver, PoolOptions options, RegisterReservation register_reservation)
    : driver_(driver),
      options_(std::move(options)),
      chunks_(driver, options_,
              [this, registered = std::move(register_reservation)](const Range& range) {
                return registered(this, range);
              }) {
  stats_.tag = options_.info.name;
  stats_.backup = options_.info.backup;
  stats_.device = options_.ordinal;
}

CUresult Pool::allocate(std::size_t bytes, CUcontext context, bool can_synchronize,
                        CUdeviceptr* out) {
  if (bytes > options_.device_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
  RelaxedCapture relaxed(driver_);
  Lock lock(pool_mutex_);
  contexts_.insert(context);
  return take_block(lock, bytes, context, can_synchronize, out);
}

// Out of what is free in awake chunks. If only what the device has not passed would do, it is
// waited for; another thread may wait for it already.
std::optional<CUdeviceptr> Pool::take_clean(Lock& lock, std::size_t occupied,
                                            bool can_synchronize) {
  const std::size_t alignment =
      occupied >= options_.granularity ? options_.granularity : kBlockAlignment;
  auto address = clean_.take(occupied, alignment);
  if (address || !can_synchronize) return address;
  if (pending_.total() >= occupied) {
    let_pending_pass(lock, kNoLimit);
  } else if (passing_bytes_ >= occupied) {
    waited_.wait(lock, [this, seen = waits_ended_] { return waits_ended_ != seen; });
  } else {
    return std::nullopt;
  }
  return clean_.take(occupied, alignment);
}

CUresult Pool::take_block(Lock& lock, std::size_t bytes, CUcontext context, bool can_synchronize,
                          CUdeviceptr* out) {
  const std::size_t occupied = round_up(bytes, kBlockAlignment);
  auto address = take_clean(lock, occupied, can_synchronize);
  if (!address) {
    Chunk* chunk = nullptr;
    CUresult result = grow(occupied, false, &chunk);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
      // A shared chunk is larger than the request; the device may still have what was asked for.
      release_empty_locked(lock, 0, can_synchronize, kNoLimit);
      result = grow(occupied, true, &chunk);
    }
    if (result != CUDA_SUCCESS) return result;
    address = take_clean(lock, occupied, false);
    if (!address) return CUDA_ERROR_UNKNOWN;  // a fresh chunk holds what it was made for
  }
  Chunk* chunk = chunks_.at(*address);
  blocks_.emplace(*address, Block{bytes, occupied, chunk, context, stats_.allocations});
  ++chunk->live_blocks;
  ++stats_.allocations;
  ++stats_.blocks;
  stats_.allocated += bytes;
  stats_.peak_allocated = std::max(stats_.peak_allocated, stats_.allocated);
  *out = *address;
  return CUDA_SUCCESS;
}

// A large request gets its own chunk; small ones share chunks that grow with the pool, so that the
// number of handles stays small while at most a quarter of the pool (or the first chunk) is unused.
std::size_t Pool::chunk_bytes_for(std::size_t bytes) const {
  const std::size_t own = round_up(bytes, options_.granularity);
  if (own >= options_.max_chunk_bytes / 2) return own;
  const std::size_t quarter = static_cast<std::size_t>(stats_.mapped / 4);
  const std::size_t shared = std::clamp(
      quarter, std::min(kFirstChunkBytes, options_.max_chunk_bytes), options_.max_chunk_bytes);
  // Programs ask for one size again and again (PyTorch's segments): whole multiples leave no rest.
  return std::max(own, shared / own * own);
}

CUresult Pool::grow(std::size_t bytes, bool exact, Chunk** out) {
  const CUresult result =
      chunks_.make(exact ? round_up(bytes, options_.granularity) : chunk_bytes_for(bytes), out);
  if (result != CUDA_SUCCESS) return result;
  stats_.mapped += (*out)->bytes;
  stats_.peak_mapped = std::max(stats_.peak_mapped, stats_.mapped);
  ++stats_.chunks;
  clean_.insert((*out)->address, (*out)->bytes, (*out)->address, (*out)->end());
  return CUDA_SUCCESS;
}

bool Pool::synchronize(const std::set<CUcontext>& contexts, std::chrono::milliseconds limit) const {
  if (limit != kNoLimit) {
    try {
      return options_.waits->wait_for({options_.ordinal}, limit).passed();
    } catch (const std::exception&) {
      return false;
    }
  }
  for (CUcontext context : contexts) {
    ScopedContext current(driver_, context);
    if (!current.ok() || driver_.cuCtxSynchronize() != CUDA_SUCCESS) return false;
  }
  return true;
}

// What is pending becomes clean. The device is waited for without the lock: what it runs may wait
// for something that the program does only after another call of this pool. False if the wait
// failed.
bool Pool::let_pending_pass(Lock& lock, std::chrono::milliseconds limit) {
  struct Pending {
    Range range;
    std::uint64_t sequence;
    std::uint64_t era;
  };
  std::vector<Pending> ranges;
  const std::set<CUcontext> contexts = contexts_;
  pending_.for_each([&](CUdeviceptr address, std::uint64_t bytes) {
    const Chunk& chunk = *chunks_.at(address);
    ranges.push_back({{address, bytes}, chunk.sequence, chunk.era});
  });
  const std::uint64_t bytes = pending_.total();
  pending_.clear();
  passing_bytes_ += bytes;
  ++waiting_;
  lock.unlock();
  const bool passed = synchronize(contexts, limit);
  lock.lock();
  --waiting_;
  ++waits_ended_;
  passing_bytes_ -= bytes;
  waited_.notify_all();
  for (const Pending& each : ranges) {
    const Chunk* chunk = chunks_.at(each.range.begin);
    // Gone meanwhile, or asleep since: its free ranges are made anew when it wakes.
    if (chunk == nullptr || chunk->sequence != each.sequence || chunk->era != each.era) continue;
    add_free(passed ? clean_ : pending_, each.range.begin, each.range.bytes, *chunk);
  }
  return passed;
}

// What there is no memory to remember is not handed out again before its chunk is made anew.
void Pool::add_free(Extents& to, CUdeviceptr address, std::size_t bytes,
                    const Chunk& chunk) noexcept {
  try {
    to.insert(address, bytes, chunk.address, chunk.end());
  } catch (const std::bad_alloc&) {
  }
}

CUresult Pool::free(CUdeviceptr address, bool can_synchronize) {
  RelaxedCapture relaxed(driver_);
  Lock lock(pool_mutex_);
  auto at = blocks_.find(address);
  if (at == blocks_.end()) return CUDA_ERROR_INVALID_VALUE;
  ++stats_.frees;
  Chunk& chunk = *at->second.chunk;
  forget_block(at);
  if (chunk.live_blocks == 0) release_if_gone(chunk);
  try {
    if (empty_bytes_locked() > options_.retain_bytes) {
      release_empty_locked(lock, options_.retain_bytes, can_synchronize, kNoLimit);
    }
  } catch (const std::bad_alloc&) {
    // The block is free all the same; what is empty is released another time.
  }
  return CUDA_SUCCESS;
}

void Pool::forget_block(Blocks::iterator at) {
  const Block& block = at->second;
  Chunk& chunk = *block.chunk;
  if (chunk.state == ChunkState::kAwake) {
    add_free(pending_, at->first, block.occupied, chunk);
  }
  --chunk.live_blocks;
  if (block.held()) --chunk.held_blocks;
  --stats_.blocks;
  stats_.allocated -= block.bytes;
  blocks_.erase(at);
}

// A sleeping chunk without blocks has nothing to come back for.
void Pool::release_if_gone(Chunk& chunk) {
  if (chunk.state != ChunkState::kAsleep || chunk.live_blocks != 0) return;
  const std::size_t bytes = chunk.bytes;
  if (!chunks_.release(chunk) && !chunks_.release(chunk)) return;
  stats_.asleep -= bytes;
  --stats_.chunks;
}

bool Pool::release_chunk(Chunk& chunk) {
  const Range range{chunk.address, chunk.bytes};
  if (!chunks_.release(chunk)) return false;
  clean_.erase_within(range.begin, range.end());
  pending_.erase_within(range.begin, range.end());
  stats_.mapped -= range.bytes;
  --stats_.chunks;
  return true;
}

std::uint64_t Pool::empty_bytes_locked() const {
  std::uint64_t empty = 0;
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state == ChunkState::kAwake && chunk->live_blocks == 0) empty += chunk->bytes;
  }
  return empty;
}

std::uint64_t Pool::empty_bytes() const {
  std::lock_guard lock(pool_mutex_);
  return empty_bytes_locked();
}

std::uint64_t Pool::release_empty_locked(Lock& lock, std::uint64_t keep, bool can_synchronize,
                                         std::chrono::milliseconds limit) {
  if (empty_bytes_locked() <= keep) return 0;
  // Running work may still use what was freed.
  if (!can_synchronize || !let_pending_pass(lock, limit)) return 0;
  std::uint64_t empty = empty_bytes_locked();
  std::vector<Chunk*> candidates;
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state != ChunkState::kAwake || chunk->live_blocks != 0 || chunk->held) continue;
    const bool passed = clean_.has(address, chunk->bytes) ||
                        (waiting_ == 0 && !pending_.touches(address, chunk->end()));
    if (passed) candidates.push_back(chunk.get());
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const Chunk* a, const Chunk* b) { return a->bytes > b->bytes; });
  std::uint64_t released = 0;
  for (Chunk* chunk : candidates) {
    if (empty <= keep) break;
    const std::size_t bytes = chunk->bytes;
    if (!release_chunk(*chunk)) continue;
    empty -= bytes;
    released += bytes;
  }
  return released;
}

std::uint64_t Pool::release_empty(std::uint64_t keep, bool can_synchronize) {
  RelaxedCapture relaxed(driver_);
  Lock lock(pool_mutex_);
  return release_empty_locked(lock, keep, can_synchronize, options_.drain_timeout);
}

bool Pool::find(CUdeviceptr address, CUdeviceptr* base, Block* block, bool* asleep) const {
  std::lock_guard lock(pool_mutex_);
  auto at = blocks_.upper_bound(address);
  if (at == blocks_.begin()) return false;
  --at;
  if (address >= at->first + at->second.bytes) return false;
  *base = at->first;
  *block = at->second;
  // The driver's own numbers are small.
  block->buffer_id = std::uint64_t{1} << 63 | (options_.tag & std::uint64_t{0x1ff}) << 54 |
                     (options_.ordinal & std::uint64_t{0xf}) << 50 |
                     (block->chunk->era & 0x3ff) << 40 | (block->number & 0xff'ffff'ffff);
  *asleep = at->second.chunk->state == ChunkState::kAsleep ||
            at->second.chunk->state == ChunkState::kWaking;
  return true;
}

CUresult Pool::set_peer_access(int device, bool enabled) {
  std::lock_guard lock(pool_mutex_);
  return chunks_.set_peer_access(device, enabled);
}

Chunk* Pool::adopt(std::unique_ptr<Chunk>& chunk, CUcontext context) {
  std::lock_guard lock(pool_mutex_);
  if (context != nullptr) contexts_.insert(context);
  if (context == nullptr && !contexts_.empty()) context = *contexts_.begin();
  const CUdeviceptr address = chunk->address;
  const std::size_t bytes = chunk->bytes;
  const auto block =
      blocks_.emplace(address, Block{bytes, bytes, chunk.get(), context, stats_.allocations}).first;
  try {
    chunks_.adopt(chunk);
  } catch (...) {
    blocks_.erase(block);
    throw;
  }
  Chunk& adopted = *block->second.chunk;
  adopted.live_blocks = 1;
  ++stats_.allocations;
  ++stats_.blocks;
  ++stats_.chunks;
  stats_.allocated += bytes;
  stats_.peak_allocated = std::max(stats_.peak_allocated, stats_.allocated);
  (adopted.state == ChunkState::kAwake ? stats_.mapped : stats_.asleep) += bytes;
  stats_.peak_mapped = std::max(stats_.peak_mapped, stats_.mapped);
  return &adopted;
}

std::unique_ptr<Chunk> Pool::disown(Chunk& chunk) noexcept {
  std::lock_guard lock(pool_mutex_);
  (chunk.state == ChunkState::kAwake ? stats_.mapped : stats_.asleep) -= chunk.bytes;
  stats_.allocated -= chunk.bytes;
  ++stats_.frees;
  --stats_.blocks;
  --stats_.chunks;
  blocks_.erase(chunk.address);
  return chunks_.disown(chunk);
}

ChunkState Pool::state_of(const Chunk& chunk) const {
  std::lock_guard lock(pool_mutex_);
  return chunk.state;
}

std::set<int> Pool::reached_by() const {
  std::lock_guard lock(pool_mutex_);
  std::set<int> devices(chunks_.peers().begin(), chunks_.peers().end());
  devices.insert(options_.ordinal);
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->program == nullptr) continue;
    for (const CUmemAccessDesc& access : chunk->program->access) {
      if (access.location.type == CU_MEM_LOCATION_TYPE_DEVICE &&
          access.flags != CU_MEM_ACCESS_FLAGS_PROT_NONE) {
        devices.insert(access.location.id);
      }
    }
  }
  return devices;
}

// What the program mapped itself belongs to no context.
void Pool::drop_context(CUcontext context) {
  std::lock_guard lock(pool_mutex_);
  contexts_.erase(context);
  for (auto at = blocks_.begin(); at != blocks_.end();) {
    auto next = std::next(at);
    if (at->second.context == context && at->second.chunk->program == nullptr) {
      Chunk& chunk = *at->second.chunk;
      forget_block(at);
      release_if_gone(chunk);
    }
    at = next;
  }
}

Ranges Pool::live_ranges_locked(const Chunk& chunk) const {
  Ranges ranges;
  for (auto at = blocks_.lower_bound(chunk.address); at != blocks_.end() && at->first < chunk.end();
       ++at) {
    append({at->first - chunk.address, at->second.occupied}, &ranges);
  }
  return ranges;
}

Ranges Pool::live_ranges(const Chunk& chunk) const {
  std::lock_guard lock(pool_mutex_);
  return live_ranges_locked(chunk);
}

std::uint64_t Pool::next_number() const {
  std::lock_guard lock(pool_mutex_);
  return stats_.allocations;
}

Range Pool::in_block(const Range& range, std::uint64_t before) const {
  std::lock_guard lock(pool_mutex_);
  auto at = blocks_.upper_bound(range.begin);
  if (at == blocks_.begin()) return {};
  --at;
  const CUdeviceptr block_end = at->first + at->second.occupied;
  if (range.begin >= block_end || at->second.number >= before) return {};
  const std::size_t bytes = std::min<std::size_t>(range.bytes, block_end - range.begin);
  return round_inward({range.begin, bytes}, kBlockAlignment);
}

std::map<std::uint64_t, std::size_t> Pool::awake_chunks() {
  Lock lock(pool_mutex_);
  release_empty_locked(lock, 0, true, options_.drain_timeout);
  std::map<std::uint64_t, std::size_t> found;
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state == ChunkState::kAwake && chunk->held_blocks == 0)
      found.emplace(chunk->sequence, chunk->bytes);
  }
  return found;
}

std::vector<Chunk*> Pool::begin_sleep(std::uint64_t last_sequence) {
  Lock lock(pool_mutex_);
  release_empty_locked(lock, 0, true, options_.drain_timeout);
  std::vector<Chunk*> chunks;
  chunks.reserve(chunks_.all().size());  // nothing may fail between here and the return
  // By address: neighbours come together, and access is set for runs of them.
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state != ChunkState::kAwake || chunk->sequence > last_sequence) continue;
    if (chunk->held_blocks != 0) continue;
    chunk->state = ChunkState::kFallingAsleep;
    ++chunk->era;
    chunk->slept_before_block = stats_.allocations;
    clean_.erase_within(chunk->address, chunk->end());
    pending_.erase_within(chunk->address, chunk->end());
    chunks.push_back(chunk.get());
  }
  return chunks;
}

std::vector<Chunk*> Pool::begin_wake(const std::function<bool(const Chunk&)>& wanted) {
  std::lock_guard lock(pool_mutex_);
  std::vector<Chunk*> chunks;
  chunks.reserve(chunks_.all().size());
  for (const auto& [address, chunk] : chunks_.all()) {
    if (chunk->state != ChunkState::kAsleep || !wanted(*chunk)) continue;
    chunk->state = ChunkState::kWaking;
    chunks.push_back(chunk.get());
  }
  return chunks;
}

void Pool::return_free_ranges(const Chunk& chunk, Extents& to) noexcept {
  CUdeviceptr free_from = chunk.address;
  for (auto at = blocks_.lower_bound(chunk.address); at != blocks_.end() && at->first < chunk.end();
       ++at) {
    add_free(to, free_from, at->first - free_from, chunk);
    free_from = at->first + at->second.occupied;
  }
  add_free(to, free_from, chunk.end() - free_from, chunk);
}

void Pool::finish(Chunk& chunk, ChunkState state) noexcept {
  std::lock_guard lock(pool_mutex_);
  const bool was_mapped = chunk.state == ChunkState::kFallingAsleep;
  chunk.state = state;
  if (state == ChunkState::kAwake) {
    // A chunk that stays awake may have seen frees that the device has not passed; a woken one had
    // no running work.
    return_free_ranges(chunk, was_mapped ? pending_ : clean_);
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
  std::lock_guard lock(pool_mutex_);
  ++stats_.sleeps;
  stats_.last_sleep = stats;
}

void Pool::note_wake(const OperationStats& stats) {
  std::lock_guard lock(pool_mutex_);
  ++stats_.wakes;
  stats_.last_wake = stats;
  woke_at_ = std::chrono::steady_clock::now();
}

std::uint64_t Pool::discard_sleeping() {
  std::lock_guard lock(pool_mutex_);
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
  std::lock_guard lock(pool_mutex_);
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
  std::lock_guard lock(pool_mutex_);
  return woke_at_;
}

Chunk* Pool::begin_prepare(std::uint64_t most_bytes, Ranges* ranges) {
  std::lock_guard lock(pool_mutex_);
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
  std::lock_guard lock(pool_mutex_);
  chunk.held = false;
  if (chunk.backup() == nullptr) chunk.image = std::move(image);
}

bool Pool::any_awake() const {
  std::lock_guard lock(pool_mutex_);
  return stats_.mapped != 0;
}

bool Pool::any_asleep() const {
  std::lock_guard lock(pool_mutex_);
  return stats_.asleep != 0;
}

bool Pool::any_slept_outside() const {
  std::lock_guard lock(pool_mutex_);
  return std::any_of(chunks_.all().begin(), chunks_.all().end(), [](const auto& entry) {
    return entry.second->state == ChunkState::kAsleep && entry.second->slept_outside;
  });
}

std::set<CUcontext> Pool::contexts() const {
  std::lock_guard lock(pool_mutex_);
  return contexts_;
}

const void* Pool::host_backup(CUdeviceptr address, std::size_t bytes) const {
  std::lock_guard lock(pool_mutex_);
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

TagStats Pool::stats() const {
  std::lock_guard lock(pool_mutex_);
  TagStats stats = stats_;
  for (const auto& [address, chunk] : chunks_.all()) {
    // During an operation the image belongs to that operation; its size is read when that is over.
    if (chunk->state == ChunkState::kFallingAsleep || chunk->state == ChunkState::kWaking) continue;
    if (chunk->held_blocks != 0 && chunk->state == ChunkState::kAwake) {
      auto at = blocks_.lower_bound(address);
      while (!at->second.held()) ++at;
      add_held(&stats.held, at->second.holds != 0 ? at->second.by : Holder::kProgram, chunk->bytes);
    }
    if (chunk->image != nullptr) stats.backed_up += chunk->image->held_bytes();
    if (chunk->disk_image != nullptr) stats.on_disk += chunk->disk_image->held_bytes();
  }
  return stats;
}

}  // namespace dormouse
