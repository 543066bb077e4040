// The memory of one tag on one device: reserved addresses, chunks mapped into them, blocks handed
// out. Used by Engine (allocate, free, find) and by Operation (sleep, wake).
//
// Invariants: a block lies in one chunk. A free range is handed out only from an awake chunk, and
// only after the device has passed its free, or in the order of a stream. No call of the program
// waits for the device here.
#pragma once

#include <cuda.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "core/driver.h"
#include "core/extents.h"
#include "core/held.h"
#include "core/memory/chunk_store.h"
#include "core/memory/free_ranges.h"
#include "core/memory/unused_memory.h"
#include "core/range.h"
#include "core/stats.h"
#include "core/status.h"
#include "core/tags.h"
#include "core/thread_annotations.h"

namespace dormouse {

struct Block {
  std::size_t bytes = 0;     // as asked for
  std::size_t occupied = 0;  // rounded up
  Chunk* chunk = nullptr;
  CUcontext context = nullptr;
  std::uint64_t number = 0;  // of the pool's allocations
  std::uint32_t holds = 0;   // by others, for life
  Holder by = Holder::kNobody;
  bool kept_awake = false;   // by the program
  bool sync_memops = false;  // as the program set it
  // Of this content in the process: another one after a sleep, since the physical memory is.
  std::uint64_t buffer_id = 0;  // set by find() alone

  bool held() const noexcept { return holds != 0 || kept_awake; }
};

class Pool {
 public:
  // Told of each reservation before anything is handed out of it.
  using RegisterReservation = std::function<CUresult(Pool*, const Range&)>;

  Pool(const Driver& driver, PoolOptions options, RegisterReservation register_reservation);
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // As cuMemAlloc, with the calling thread's current context being `context`; with a stream, as
  // cuMemAllocAsync. Waits for nothing: out of memory while freed memory still waits for the device
  // is for release_empty() and another try. Thread-safe, as all that follows.
  CUresult allocate(std::size_t bytes, CUcontext context, const StreamName* stream,
                    CUdeviceptr* out);
  // As cuMemFree or, with a stream, cuMemFreeAsync, but waits for nothing.
  CUresult free(CUdeviceptr address, CUcontext context, const StreamName* stream);

  // The block that contains `address`: its base and a copy of it.
  bool find(CUdeviceptr address, CUdeviceptr* base, Block* block, bool* asleep) const;
  // Where the live blocks begin, asleep or awake.
  std::vector<CUdeviceptr> block_addresses() const;

  // Releases empty awake chunks down to `keep` bytes. Running work may still use them: waits for it
  // at most `limit`, and releases none that it may use. Returns the bytes released.
  std::uint64_t release_empty(std::uint64_t keep, std::chrono::milliseconds limit);
  // Releases what the device has passed beyond what is retained. True if there is more to come.
  bool collect();
  // Waits until the device has passed all that was freed, at most `limit`.
  void wait(std::chrono::milliseconds limit);
  // Whether freed memory waits for the device.
  bool is_waiting() const;
  std::uint64_t empty_bytes() const;

  CUresult set_peer_access(int device, bool enabled);

  // `chunk` (address, bytes, handle, state, mapping and backup are set:
  // core/memory/mapped_memory.h) becomes the pool's, with one block that fills it. `context` (may
  // be null) is where its device's work is done. Nothing has changed if it throws.
  Chunk* adopt(std::unique_ptr<Chunk>& chunk, CUcontext context);
  // Takes such a chunk out again, as it is. No operation may have begun it.
  std::unique_ptr<Chunk> disown(Chunk& chunk) noexcept;
  ChunkState state_of(const Chunk& chunk) const;

  // The blocks in the range stay awake for life: others hold their physical memory. What of it is
  // not awake yet is added to `not_awake`, for the caller to wake.
  std::vector<HeldBlock> hold(CUdeviceptr address, std::size_t bytes, Holder by,
                              std::set<const Chunk*>* not_awake);
  // Undoes a hold() that came to nothing.
  void let_go(const std::vector<HeldBlock>& blocks) noexcept;
  // The same for the block around `address`, for as long as the program wants. Returns its bytes, 0
  // if there is none.
  std::size_t keep_awake(CUdeviceptr address, bool on, std::set<const Chunk*>* not_awake);
  // CU_POINTER_ATTRIBUTE_SYNC_MEMOPS of the block around `address`, for find().
  void set_sync_memops(CUdeviceptr address, bool on) noexcept;

  // The context is about to go, or stays after all: nothing is done in it meanwhile.
  void context_going(CUcontext context);
  void context_stays(CUcontext context) noexcept;
  // It has gone, with its work; its blocks stay.
  void context_lost(CUcontext context) noexcept;
  // It has gone, and its blocks with it.
  void drop_context(CUcontext context);

  // --- For Operation, which holds the engine's operation lock. ---

  // Marks the awake chunks that hold live blocks, up to the one of this sequence, as falling asleep
  // and returns them; empty ones are released instead.
  std::vector<Chunk*> begin_sleep(std::uint64_t last_sequence);
  // The awake chunks that begin_sleep() could take: bytes by sequence.
  std::map<std::uint64_t, std::size_t> awake_chunks();
  // Marks the sleeping chunks that are wanted as waking and returns them.
  std::vector<Chunk*> begin_wake(const std::function<bool(const Chunk&)>& wanted);
  // What is live in the chunk now, merged and sorted.
  Ranges live_ranges(const Chunk& chunk) const;
  // Blocks that are made from now on have this number or a larger one.
  std::uint64_t next_number() const;
  // What of `range` lies in the block around its beginning, in whole units of a block's alignment;
  // nothing if there is no such block, or its number is not below `before`.
  Range in_block(const Range& range, std::uint64_t before) const;
  // For the physical memory of chunks that an operation has begun.
  ChunkStore& chunks() noexcept { return chunks_; }
  // Ends begin_sleep() / begin_wake(): the chunk is now in `state`; a chunk that lost its last
  // block meanwhile is released.
  void finish(Chunk& chunk, ChunkState state) noexcept;
  void note_sleep(const OperationStats& stats);
  void note_wake(const OperationStats& stats);
  // Drops the content of sleeping chunks: they will read as zero. Returns the bytes of content that
  // were kept.
  std::uint64_t discard_sleeping();
  // Drops the backups of awake chunks. `only_kept` leaves what was prepared for a first sleep.
  void drop_backups(bool only_kept);
  // When the pool woke last, unless its backups were dropped since.
  std::optional<std::chrono::steady_clock::time_point> woke_at() const;

  // Background preparation: an awake chunk that will need host memory it does not have yet, held
  // until end_prepare(), and what is live in it. Those that need more than `most_bytes` are passed
  // over. Null if there is none.
  Chunk* begin_prepare(std::uint64_t most_bytes, Ranges* ranges);
  // `image` (may be null) becomes the chunk's; a chunk that already has one keeps it.
  void end_prepare(Chunk& chunk, ImagePtr<HostImage> image);
  bool any_awake() const;
  bool any_asleep() const;
  bool any_slept_outside() const;
  // Devices that have access to the pool's memory: their running work may use it.
  std::set<int> reached_by() const;
  // Host copy of a range of a block that sleeps, or that has slept and whose backup was kept; else
  // null. What the program's allocator held free has any content in it.
  const void* host_backup(CUdeviceptr address, std::size_t bytes) const;

  TagStats stats() const;
  const PoolOptions& options() const noexcept { return options_; }

 private:
  mutable Mutex pool_mutex_;

  using Blocks = std::map<CUdeviceptr, Block>;
  static constexpr std::size_t kBlockAlignment = 512;  // as cudaMalloc's at the least

  struct Want {
    std::size_t bytes = 0;  // rounded up
    std::size_t alignment = 0;
    bool small = false;
  };
  enum class Passing : std::uint8_t {
    kAll,      // nothing that was freed waits for the device any more
    kWaits,    // an event tells when it may be used
    kUnknown,  // no event can be recorded now
  };
  static constexpr std::size_t kAll = std::numeric_limits<std::size_t>::max();

  Want want_for(std::size_t bytes) const noexcept;
  std::optional<CUdeviceptr> take(const Want& want, const StreamName* stream) REQUIRES(pool_mutex_);
  std::uint64_t slack() const noexcept REQUIRES(pool_mutex_);
  std::uint64_t allowed_slack() const noexcept REQUIRES(pool_mutex_);
  std::uint64_t retained() const noexcept REQUIRES(pool_mutex_);
  bool leaves_rest(std::uint64_t bytes) const noexcept;
  std::size_t chunk_bytes_for(const Want& want) const noexcept REQUIRES(pool_mutex_);
  std::size_t shared_bytes_for(std::uint64_t bytes, std::uint64_t most) const noexcept;
  CUresult grow(std::size_t bytes, const Want& want) REQUIRES(pool_mutex_);
  Passing collect_passed() noexcept REQUIRES(pool_mutex_);
  bool synchronize() const noexcept REQUIRES(pool_mutex_);
  bool wait_until_passed(std::chrono::milliseconds limit) REQUIRES(pool_mutex_);
  bool wait_beside(std::chrono::milliseconds limit) REQUIRES(pool_mutex_);
  void forget_block(Blocks::iterator at, CUcontext context, const StreamName* stream) noexcept
      REQUIRES(pool_mutex_);
  template <typename Change>
  void change_hold(Block& block, Change change) noexcept;
  void became_empty(Chunk& chunk) noexcept REQUIRES(pool_mutex_);
  void no_longer_empty(Chunk& chunk) noexcept REQUIRES(pool_mutex_);
  std::uint64_t release_unused(std::uint64_t keep, std::size_t at_most) noexcept
      REQUIRES(pool_mutex_);
  void release_if_gone(Chunk& chunk) REQUIRES(pool_mutex_);
  void return_free_ranges(const Chunk& chunk, bool used) noexcept REQUIRES(pool_mutex_);
  Ranges live_ranges_locked(const Chunk& chunk) const REQUIRES(pool_mutex_);

  const Driver& driver_;
  const PoolOptions options_;

  ChunkStore chunks_ GUARDED_BY(pool_mutex_);
  FreeRanges free_ GUARDED_BY(pool_mutex_);
  std::vector<Chunk*> empty_ GUARDED_BY(pool_mutex_);  // awake, without a block
  std::uint64_t empty_bytes_ GUARDED_BY(pool_mutex_) = 0;
  std::uint64_t released_at_ GUARDED_BY(pool_mutex_) =
      0;  // what free_ had counted when empty chunks were released last
  // DeviceWork::calls() when the last event was recorded, and when the device was last seen idle.
  std::optional<std::uint64_t> recorded_at_ GUARDED_BY(pool_mutex_);
  std::optional<std::uint64_t> idle_at_ GUARDED_BY(pool_mutex_);
  Blocks blocks_ GUARDED_BY(pool_mutex_);
  std::set<CUcontext> contexts_
      GUARDED_BY(pool_mutex_);  // allocated in: running work of theirs may use the memory
  std::set<CUcontext> going_ GUARDED_BY(pool_mutex_);  // are about to go
  std::optional<std::chrono::steady_clock::time_point> woke_at_ GUARDED_BY(pool_mutex_);
  TagStats stats_ GUARDED_BY(pool_mutex_);
};

}  // namespace dormouse
