// Pools: address space, chunks, blocks; see pool.h for the invariants.
#include "core/memory/pool.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "core/context.h"
#include "core/contexts.h"
#include "core/device_waits.h"
#include "core/log.h"
#include "core/memory/mapped_memory.h"
#include "core/round_up.h"
#include "core/threads.h"

namespace dormouse {
namespace {

constexpr std::uint64_t kAllowedSlack = std::uint64_t{32} << 20;  // or 3% of what is allocated
constexpr std::size_t kSmallBytes = std::size_t{8} << 20;
constexpr std::uint64_t kPoolPart = 64;  // of a pool: a chunk that small blocks share
constexpr std::uint64_t kMostShared = std::uint64_t{64} << 20;  // by blocks of an odd size
constexpr std::size_t kAtOnce = 16;                             // chunks that one free releases
constexpr std::chrono::microseconds kLongestPause{2000};

}  // namespace

Pool::Pool(const Driver& driver, PoolOptions options, RegisterReservation register_reservation)
    : driver_(driver),
      options_(std::move(options)),
      chunks_(driver, options_,
              [this, registered = std::move(register_reservation)](const Range& range) {
                return registered(this, range);
              }),
      free_(driver, chunks_) {
  stats_.tag = options_.info.name;
  stats_.backup = options_.info.backup;
  stats_.device = options_.ordinal;
}

// A stream's own frees come first, then what nobody uses any more, then new memory. Only when that
// runs out does a stream wait for another; the caller waits for nothing.
CUresult Pool::allocate(std::size_t bytes, CUcontext context, const StreamName* stream,
                        CUdeviceptr* out) {
  if (bytes > options_.device_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
  const Want want = want_for(bytes);
  Blocks made;  // what may run out of host memory comes before there is a range to lose
  made.emplace(0, Block{bytes, want.bytes, nullptr, context, 0});
  Blocks::node_type node = made.extract(made.begin());
  MutexLock lock(pool_mutex_);
  if (contexts_.insert(context).second) idle_at_.reset();
  auto address = take(want, stream);
  const bool grows = !address;
  if (grows) {
    RelaxedCapture relaxed(driver_);
    CUresult result = grow(chunk_bytes_for(want), want);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
      release_unused(0, kAll);
      result = grow(round_up(want.bytes, options_.granularity), want);
    }
    if (result == CUDA_SUCCESS) address = free_.take(want.bytes, want.alignment, want.small);
    if (!address && stream != nullptr)
      address = free_.take_behind(stream->stream, want.bytes, want.alignment, want.small);
    if (!address) return result == CUDA_SUCCESS ? CUDA_ERROR_UNKNOWN : result;
  }
  Chunk* chunk = chunks_.at(*address);
  node.key() = *address;
  node.mapped().chunk = chunk;
  node.mapped().number = stats_.allocations;
  blocks_.insert(std::move(node));
  if (chunk->live_blocks++ == 0) no_longer_empty(*chunk);
  ++stats_.allocations;
  ++stats_.blocks;
  stats_.allocated += bytes;
  stats_.peak_allocated = std::max(stats_.peak_allocated, stats_.allocated);
  // What is empty and did not serve goes where new memory leaves less room for it.
  if (grows && empty_bytes_ > retained()) {
    collect_passed();
    release_unused(retained(), kAtOnce);
  }
  *out = *address;
  return CUDA_SUCCESS;
}

// Small blocks share chunks with each other alone: one of them would keep a large block's memory.
// Those of whole granules begin at one, as cudaMalloc's do.
Pool::Want Pool::want_for(std::size_t bytes) const noexcept {
  Want want;
  want.bytes = round_up(bytes, kBlockAlignment);
  const bool granules = want.bytes >= options_.granularity;
  const bool odd = granules && leaves_rest(want.bytes);
  want.small = want.bytes < std::min(options_.max_chunk_bytes / 2, kSmallBytes) && !odd;
  want.alignment = granules && !odd ? options_.granularity : kBlockAlignment;
  return want;
}

// Whether so much leaves more than 3% of itself unused in whole granules.
bool Pool::leaves_rest(std::uint64_t bytes) const noexcept {
  return (round_up(bytes, options_.granularity) - bytes) * 100 > bytes * 3;
}

std::optional<CUdeviceptr> Pool::take(const Want& want, const StreamName* stream) {
  if (stream != nullptr) {
    if (auto address = free_.take_own(*stream, want.bytes, want.alignment, want.small))
      return address;
  }
  auto address = free_.take(want.bytes, want.alignment, want.small);
  if (address || free_.waiting_bytes() < want.bytes) return address;
  collect_passed();
  return free_.take(want.bytes, want.alignment, want.small);
}

// A block has a chunk of its own, in whole granules. Small ones, and as many of an odd size as
// leave next to no rest, share one: as large as keeps what is held within 3% or 32 MiB of what is
// allocated. For small ones it also grows with the pool: few blocks have granules of their own,
// which any free gives back, and many cost few handles.
std::size_t Pool::chunk_bytes_for(const Want& want) const noexcept {
  const std::size_t own = round_up(want.bytes, options_.granularity);
  if (!want.small && !leaves_rest(want.bytes)) return own;
  const std::uint64_t allowed = allowed_slack();
  const std::uint64_t room = allowed - std::min(allowed, slack()) + want.bytes;
  if (!want.small) return shared_bytes_for(want.bytes, std::min(room, kMostShared));
  const std::uint64_t held = stats_.mapped + stats_.asleep;
  // Half of the room is for what large blocks leave in their granules.
  const std::uint64_t most =
      std::min<std::uint64_t>({options_.max_chunk_bytes, room / 2, held / kPoolPart});
  return std::max<std::size_t>(own, most / own * own);
}

// What is held over what is allocated, and may be.
std::uint64_t Pool::slack() const noexcept {
  const std::uint64_t held = stats_.mapped + stats_.asleep;
  return held - std::min(held, stats_.allocated);
}

std::uint64_t Pool::allowed_slack() const noexcept {
  return std::max<std::uint64_t>(kAllowedSlack, stats_.allocated / 100 * 3);
}

// Of empty memory, unless the program's owner wants more kept than may be held anyway.
std::uint64_t Pool::retained() const noexcept {
  const std::uint64_t allowed = allowed_slack();
  if (options_.retain_bytes > allowed) return options_.retain_bytes;
  const std::uint64_t shared = slack() - std::min(slack(), empty_bytes_);
  return std::min<std::uint64_t>(options_.retain_bytes, allowed - std::min(allowed, shared));
}

// Of whole granules up to `most`: those that so many blocks of this size fill best.
std::size_t Pool::shared_bytes_for(std::uint64_t bytes, std::uint64_t most) const noexcept {
  std::uint64_t best = round_up(bytes, options_.granularity);
  std::uint64_t best_filled = bytes;
  for (std::uint64_t filled = 2 * bytes; round_up(filled, options_.granularity) <= most;
       filled += bytes) {
    const std::uint64_t chunk = round_up(filled, options_.granularity);
    if (filled * best <= best_filled * chunk) continue;
    best = chunk;
    best_filled = filled;
  }
  return best;
}

CUresult Pool::grow(std::size_t bytes, const Want& want) {
  if (empty_.capacity() <= chunks_.all().size()) empty_.reserve(2 * chunks_.all().size() + 16);
  Chunk* chunk = nullptr;
  const CUresult result = chunks_.make(bytes, &chunk);
  if (result != CUDA_SUCCESS) return result;
  chunk->small = want.small;
  stats_.mapped += bytes;
  stats_.peak_mapped = std::max(stats_.peak_mapped, stats_.mapped);
  ++stats_.chunks;
  became_empty(*chunk);
  free_.add(*chunk, {chunk->address, chunk->bytes});
  if (free_.is_unused(*chunk)) return CUDA_SUCCESS;
  // There is no host memory to remember it.
  no_longer_empty(*chunk);
  stats_.mapped -= bytes;
  --stats_.chunks;
  chunks_.release(*chunk);
  return CUDA_ERROR_OUT_OF_MEMORY;
}

// Finds out what the device has passed, and waits for nothing. Where no work was given to it since
// it was last seen idle, the driver's own wait ends at once, and costs less than an event.
Pool::Passing Pool::collect_passed() noexcept {
  if (free_.waiting_bytes() == 0) return Passing::kAll;
  // Work in a context that may go cannot be told by events of it.
  if (!going_.empty()) return Passing::kUnknown;
  RelaxedCapture relaxed(driver_);
  const std::optional<std::uint64_t> calls = options_.work->calls();
  bool known = true;
  try {
    if (!free_.has_open()) {
      // What waits has its events.
    } else if (calls && calls == idle_at_) {
      known =
          options_.work->outside_captures([this]() REQUIRES(pool_mutex_) { return synchronize(); });
      if (known) free_.passed(free_.close());
    } else {
      known = options_.work->outside_captures(
          [this]() REQUIRES(pool_mutex_) { return free_.record(contexts_); });
      if (!free_.has_open()) recorded_at_ = calls;
    }
  } catch (const std::exception&) {
    known = false;
  }
  if (!free_.collect()) return known ? Passing::kWaits : Passing::kUnknown;
  if (calls == recorded_at_) idle_at_ = calls;
  return Passing::kAll;
}

bool Pool::synchronize() const noexcept {
  for (CUcontext context : contexts_) {
    ScopedContext current(driver_, context);
    const CUresult result = current.ok() ? driver_.cuCtxSynchronize() : current.result();
    if (result != CUDA_SUCCESS && !is_gone(result)) return false;
  }
  return true;
}

CUresult Pool::free(CUdeviceptr address, CUcontext context, const StreamName* stream) {
  bool more = false;
  {
    MutexLock lock(pool_mutex_);
    auto at = blocks_.find(address);
    if (at == blocks_.end()) return CUDA_ERROR_INVALID_VALUE;
    ++stats_.frees;
    Chunk& chunk = *at->second.chunk;
    forget_block(at, context, stream);
    release_if_gone(chunk);
    if (empty_bytes_ > retained()) {
      collect_passed();
      release_unused(retained(), kAtOnce);
      more = empty_bytes_ > retained();
    }
  }
  if (more) options_.work->collect_later();
  return CUDA_SUCCESS;
}

void Pool::forget_block(Blocks::iterator at, CUcontext context, const StreamName* stream) noexcept {
  const Block& block = at->second;
  Chunk& chunk = *block.chunk;
  --chunk.live_blocks;
  if (block.held()) --chunk.held_blocks;
  if (chunk.state == ChunkState::kAwake) {
    const Range part{at->first, block.occupied};
    if (stream != nullptr) {
      free_.add_used_by(*stream, context, chunk, part);
    } else {
      free_.add_used(chunk, part);
    }
    if (chunk.live_blocks == 0) became_empty(chunk);
  }
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

// There is room for all chunks.
void Pool::became_empty(Chunk& chunk) noexcept {
  chunk.empty_at = empty_.size();
  empty_.push_back(&chunk);
  empty_bytes_ += chunk.bytes;
}

void Pool::no_longer_empty(Chunk& chunk) noexcept {
  empty_.back()->empty_at = chunk.empty_at;
  empty_[chunk.empty_at] = empty_.back();
  empty_.pop_back();
  empty_bytes_ -= chunk.bytes;
}

// The largest first. Only what became free for good since the last time can be released now.
std::uint64_t Pool::release_unused(std::uint64_t keep, std::size_t at_most) noexcept {
  if (empty_bytes_ <= keep || released_at_ == free_.changes()) return 0;
  std::sort(empty_.begin(), empty_.end(),
            [](const Chunk* a, const Chunk* b) { return a->bytes < b->bytes; });
  for (std::size_t i = 0; i < empty_.size(); ++i) empty_[i]->empty_at = i;
  RelaxedCapture relaxed(driver_);
  std::uint64_t released = 0;
  std::size_t i = empty_.size();
  for (; i > 0 && empty_bytes_ > keep && at_most != 0; --i) {
    Chunk& chunk = *empty_[i - 1];
    const std::size_t bytes = chunk.bytes;
    if (chunk.held || !free_.is_unused(chunk) || chunks_.unmap(chunk) != CUDA_SUCCESS) continue;
    free_.forget(chunk);
    no_longer_empty(chunk);
    chunks_.forget(chunk);
    stats_.mapped -= bytes;
    --stats_.chunks;
    released += bytes;
    --at_most;
  }
  if (i == 0) released_at_ = free_.changes();
  return released;
}

std::uint64_t Pool::empty_bytes() const {
  MutexLock lock(pool_mutex_);
  return empty_bytes_;
}

// Polls: a wait in the driver has no limit. Where there are no events of contexts a thread beside
// waits.
bool Pool::wait_until_passed(std::chrono::milliseconds limit) {
  const CancellationOff cancellation;
  const auto deadline = std::chrono::steady_clock::now() + limit;
  std::chrono::microseconds pause{20};
  while (true) {
    const Passing passing = collect_passed();
    if (passing == Passing::kAll) return true;
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return false;
    if (passing == Passing::kWaits) {
      pool_mutex_.unlock();
      std::this_thread::sleep_for(pause);
      pool_mutex_.lock();
      pause = std::min(2 * pause, kLongestPause);
    } else if (driver_.cuCtxRecordEvent != nullptr || !wait_beside(left)) {
      return false;
    }
  }
}

bool Pool::wait_beside(std::chrono::milliseconds limit) {
  if (!options_.work->outside_captures([] { return true; })) return false;
  const std::uint64_t closed = free_.close();
  pool_mutex_.unlock();
  bool passed = false;
  try {
    passed = options_.waits->wait_for({options_.ordinal}, limit).passed();
  } catch (const std::exception&) {
    // Found out another time.
  }
  pool_mutex_.lock();
  if (passed) free_.passed(closed);
  return passed;
}

std::uint64_t Pool::release_empty(std::uint64_t keep, std::chrono::milliseconds limit) {
  MutexLock lock(pool_mutex_);
  if (empty_bytes_ <= keep) return 0;
  wait_until_passed(limit);
  return release_unused(keep, kAll);
}

void Pool::wait(std::chrono::milliseconds limit) {
  MutexLock lock(pool_mutex_);
  wait_until_passed(limit);
}

bool Pool::collect() {
  MutexLock lock(pool_mutex_);
  if (empty_bytes_ > retained() && collect_passed() == Passing::kUnknown &&
      driver_.cuCtxRecordEvent == nullptr)
    wait_beside(options_.drain_timeout);
  release_unused(retained(), kAll);
  return empty_bytes_ > retained() && free_.waiting_bytes() != 0;
}

bool Pool::is_waiting() const {
  MutexLock lock(pool_mutex_);
  return free_.waiting_bytes() != 0;
}

bool Pool::find(CUdeviceptr address, CUdeviceptr* base, Block* block, bool* asleep) const {
  MutexLock lock(pool_mutex_);
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
  MutexLock lock(pool_mutex_);
  return chunks_.set_peer_access(device, enabled);
}

Chunk* Pool::adopt(std::unique_ptr<Chunk>& chunk, CUcontext context) {
  MutexLock lock(pool_mutex_);
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
  MutexLock lock(pool_mutex_);
  (chunk.state == ChunkState::kAwake ? stats_.mapped : stats_.asleep) -= chunk.bytes;
  stats_.allocated -= chunk.bytes;
  ++stats_.frees;
  --stats_.blocks;
  --stats_.chunks;
  blocks_.erase(chunk.address);
  return chunks_.disown(chunk);
}

ChunkState Pool::state_of(const Chunk& chunk) const {
  MutexLock lock(pool_mutex_);
  return chunk.state;
}

std::set<int> Pool::reached_by() const {
  MutexLock lock(pool_mutex_);
  const std::vector<int> peers = chunks_.peers();
  std::set<int> devices(peers.begin(), peers.end());
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

void Pool::context_going(CUcontext context) {
  MutexLock lock(pool_mutex_);
  going_.insert(context);
  free_.give_up(context, true);
}

void Pool::context_stays(CUcontext context) noexcept {
  MutexLock lock(pool_mutex_);
  going_.erase(context);
}

void Pool::context_lost(CUcontext context) noexcept {
  MutexLock lock(pool_mutex_);
  contexts_.erase(context);
  going_.erase(context);
  free_.give_up(context, false);
}

// What the program mapped itself belongs to no context.
void Pool::drop_context(CUcontext context) {
  context_lost(context);
  MutexLock lock(pool_mutex_);
  for (auto at = blocks_.begin(); at != blocks_.end();) {
    auto next = std::next(at);
    if (at->second.context == context && at->second.chunk->program == nullptr) {
      Chunk& chunk = *at->second.chunk;
      forget_block(at, nullptr, nullptr);
      release_if_gone(chunk);
    }
    at = next;
  }
}

TagStats Pool::stats() const {
  MutexLock lock(pool_mutex_);
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
