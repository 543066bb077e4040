// The engine: all pools of a process, who owns a pointer, and sleep and wake over them. The one
// door through which the shim, the C API and the control server reach memory.
#pragma once

#include <cuda.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/backup/disk_calls.h"
#include "core/backup/reaper.h"
#include "core/captures.h"
#include "core/contexts.h"
#include "core/device_waits.h"
#include "core/driver.h"
#include "core/held.h"
#include "core/memory/block_info.h"
#include "core/memory/device_work.h"
#include "core/memory/pools_owner.h"
#include "core/memory/unused_memory.h"
#include "core/range.h"
#include "core/sleep/operation.h"
#include "core/sleep/progress.h"
#include "core/sleep/requests.h"
#include "core/stats.h"
#include "core/status.h"
#include "core/tags.h"
#include "core/thread_annotations.h"

namespace dormouse {

class Background;
struct StreamName;
class ContentHasher;
class DeviceKernels;
class DiskStore;
class HostMemory;
class MappedMemory;

class Engine : private PoolsOwner, private DeviceWork {
 public:
  // The driver and the calls must outlive the engine; cuInit must have been called before the first
  // allocate(). Backup files that dead processes left in the disk directory are removed.
  Engine(const Driver& driver, TagTable& tags, EngineOptions options,
         const DiskCalls& disk_calls = system_disk_calls());
  // Removes the backup files, as everything else.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Allocates `bytes` (>0) for `tag` on the current context's device. Returns what cuMemAlloc would
  // (CUDA_ERROR_INVALID_CONTEXT, CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_INVALID_VALUE), or what the
  // driver answers where it has no virtual memory management. Waits for running work only when the
  // device is full and freed memory may come yet, at most for drain_timeout. Thread-safe.
  CUresult allocate(TagId tag, std::size_t bytes, CUdeviceptr* out) noexcept {
    return allocate(tag, bytes, nullptr, out);
  }
  // The same in the order of a stream of the current context, as cuMemAllocAsync.
  CUresult allocate_async(TagId tag, std::size_t bytes, CUstream stream,
                          CUdeviceptr* out) noexcept {
    return allocate(tag, bytes, &stream, out);
  }

  // True if the address lies in a pool's address range. Lock-free; asked on every free of the
  // program.
  bool owns(CUdeviceptr address) const noexcept;

  // Frees the block that begins at `address`, asleep or awake. CUDA_ERROR_INVALID_VALUE if none
  // begins there. The memory is reused only after the device has passed this point. Thread-safe.
  CUresult free(CUdeviceptr address) noexcept { return free(address, nullptr); }
  // The same in the order of a stream of the current context, as cuMemFreeAsync.
  CUresult free_async(CUdeviceptr address, CUstream stream) noexcept {
    return free(address, &stream);
  }

  // The block that contains `address`. Thread-safe.
  bool find(CUdeviceptr address, BlockInfo* out) const noexcept;
  // The live blocks of a tag on all devices. Thread-safe.
  std::vector<BlockInfo> blocks_of(TagId tag) const;

  // Releases the physical memory of all awake chunks of the tags, after backing up what their
  // policy keeps. Idempotent. On error everything is awake and intact, unless the message says
  // which part sleeps (intact, can be woken) or has been discarded. kNotFound for a tag that was
  // never used; kIo if the disk refused a backup, and kUnsupported if one is wanted there and no
  // directory is set. `report` (may be null) is filled on success. Thread-safe, and throws nothing.
  Status sleep(const SleepRequest& request, OperationStats* report);

  // Sleeps ask it what they need not back up. It must outlive the engine; null asks nobody.
  void set_unused_memory(UnusedMemory* source) noexcept { unused_memory_.store(source); }

  // Restores all sleeping chunks of the tags at their addresses. Idempotent. On error all of them
  // stay asleep and intact, and it can be tried again. kBusy if the program has no context on a
  // device in which that could be done. Thread-safe, and throws nothing.
  Status wake(const WakeRequest& request, OperationStats* report);

  // True if any chunk of the named tags (empty = all) is asleep.
  bool is_sleeping(const std::vector<std::string>& tags) const;

  // kNotFound, with the tags that there are, if one of `tags` was never used. Thread-safe.
  Status check_tags(const std::vector<std::string>& tags) const;

  // Gives back what is held but not used: empty chunks, and with `backups` the host memory and the
  // files of awake chunks. kBusy, with nothing done, if work of the program runs longer than
  // drain_timeout, or a capture longer than capture_timeout. Thread-safe.
  Status trim(bool backups);

  // Host copy of [address, address + bytes), as of its last sleep, if it lies in one block that has
  // a backup in host memory; else null. Valid until the block is freed or its backup dropped, which
  // for sleeping memory is a wake that does not keep backups.
  const void* host_backup(CUdeviceptr address, std::size_t bytes) const noexcept;

  // Physical memory that empty chunks of the device hold and that an allocation could use.
  std::uint64_t retained_bytes(int device) const noexcept;

  // What others hold, or the program wants so, stays awake. ---

  struct Hold {
    Pool* pool = nullptr;
    std::vector<HeldBlock> blocks;
  };
  // The tagged memory in the range is about to be handed to others, who will hold its physical
  // memory: it is woken, and stays awake while its blocks live. Memory without a tag is left alone.
  // CUDA_ERROR_INVALID_VALUE if nothing lives there. `hold` is for let_go(). Thread-safe.
  CUresult hold(CUdeviceptr address, std::size_t bytes, Holder by, Hold* hold) noexcept;
  // The others did not get it after all.
  void let_go(const Hold& hold) noexcept;
  // The same at the program's wish, for the buffer around `address`, until it is freed or `on` is
  // false. `bytes` is its size, 0 where no tagged memory is. Thread-safe.
  Status keep_awake(CUdeviceptr address, bool on, std::size_t* bytes) noexcept;

  // The program set CU_POINTER_ATTRIBUTE_SYNC_MEMOPS; find() tells. Thread-safe.
  void set_sync_memops(CUdeviceptr address, bool on) noexcept;

  // What the program makes and maps itself for a tag.
  MappedMemory& mapped() noexcept { return *mapped_; }

  // After an allocation failure outside any region: true if memory was given back and a retry makes
  // sense.
  bool release_retained(int device) noexcept override;

  // The program enabled or disabled access of one context to the memory of another
  // (cuCtxEnablePeerAccess). A device has access to tagged memory while one of its contexts does.
  // Nothing has changed on failure, here and below.
  CUresult set_peer_access(CUcontext from, int from_device, CUcontext to, int to_device,
                           bool enabled) noexcept;
  // The same by the access of the memory pool that stream-ordered allocations of `to_device` use.
  CUresult set_pool_access(int from_device, int to_device, bool enabled) noexcept;
  // A copy by `from_device` needs tagged memory of `to_device`, as it could have cudaMalloc's. True
  // if it has access from now on. If not, sleeps wait all the same for a copy by other means.
  // Thread-safe.
  bool reach_by_copies(int from_device, int to_device) noexcept;

  // A context of the device was made, or one was got from a green one. Its running work may use the
  // memory of tags although nothing is ever allocated in it; primary contexts need not be told.
  void context_created(CUcontext context, int device) noexcept;
  void green_context_created(CUcontext context, int device) noexcept;

  // Around the call that destroys or resets a context: what is kept in it is given back, after what
  // works in it now. If it is `gone`, so are its blocks, as those of cuMemAlloc are.
  void context_going(CUcontext context) noexcept;
  void context_gone(CUcontext context, bool gone) noexcept;
  // Both, before such a call.
  void context_destroyed(CUcontext context) noexcept;
  // The context has gone already; the blocks of a primary one with it.
  void context_lost(CUcontext context, bool primary) noexcept;

  // Around a capture of the program, the first before the call that begins it: while one runs, the
  // device cannot be synchronized, and reuse of freed memory waits.
  void capture_begins() noexcept { captures_.begin(); }
  void capture_ended() noexcept { captures_.end(); }

  // The region of `tag` ended on some thread: background preparation may start.
  void region_ended(TagId tag) noexcept;

  // Backups go to this directory from now on (see EngineOptions::disk_directory); what sleeps in
  // another stays there until it wakes. Thread-safe. Throws bad_alloc.
  void set_disk_directory(const std::string& directory);

  // Removes this process's backup files and makes no more; what sleeps in them can still be woken.
  // For the end of a process whose engine is never destroyed. In a forked child it does nothing.
  // Waits for no operation. Thread-safe.
  void remove_files() noexcept;

  // Ends background work and waits for it: a fraction of a second, but as long as the program's
  // running work where backups are just being dropped. After `at_most` it is left to itself, which
  // only the end of the process allows. Before the driver goes, at the latest; the engine works on
  // without it.
  void stop_background(
      std::chrono::milliseconds at_most = std::chrono::milliseconds::max()) noexcept;

  // Returns when the backups that were dropped so far have been given back, which waits for what
  // the device runs; false after `limit`. Thread-safe.
  bool wait_for_dropped(std::chrono::milliseconds limit) noexcept { return reaper_.wait(limit); }

  std::vector<TagStats> stats() const;
  Progress progress() const { return progress_.now(); }
  TagTable& tags() noexcept { return tags_; }
  const EngineOptions& options() const noexcept { return options_; }

 private:
  struct Reservation {  // written once, then read without a lock
    Range range;
    Pool* pool = nullptr;
  };
  static constexpr std::size_t kMaxReservations = 4096;

  struct PeerAccess {
    CUcontext from = nullptr;
    int from_device = 0;
    CUcontext to = nullptr;
    int to_device = 0;
  };

  // For memory that the program maps itself.
  Transition begin_transition() override { return Transition(transition_lock_); }
  Pool* pool_for(TagId tag, CUdevice device, CUresult* error) override;
  const TagTable& tag_table() const noexcept override { return tags_; }
  bool has_context(int device) override { return contexts_.any_on(device); }
  Status wake_chunk(const Transition& transition, Pool& pool, const Chunk& chunk) override;
  void chunk_left(const Transition& transition) noexcept override { update_gate(transition); }
  void say_held(Holder by, std::uint64_t bytes) noexcept override;

  // For pools.
  bool outside_captures(const std::function<bool()>& call) override;
  std::optional<std::uint64_t> calls() noexcept override;
  void collect_later() noexcept override;

  CUresult allocate(TagId tag, std::size_t bytes, const CUstream* stream,
                    CUdeviceptr* out) noexcept;
  CUresult free(CUdeviceptr address, const CUstream* stream) noexcept;
  bool name_stream(const CUstream* stream, StreamName* out) const noexcept;
  template <typename Try>
  bool retry_while_freed_memory_waits(int device, Try again);
  bool release_retained_now(int device);
  Pool* pool_at(CUdeviceptr address) const noexcept;
  CUresult add_reservation(Pool* pool, const Range& range) noexcept;
  std::vector<Pool*> all_pools() const;
  std::vector<Pool*> pools_on(int device) const;
  std::vector<Pool*> select(const std::vector<std::string>& tags) const;
  template <typename Call>
  void for_pools(Call call) noexcept;
  void drop_blocks_of(CUcontext context) noexcept;
  void look_for_unused(const SleepRequest& request, const std::vector<Pool*>& pools) noexcept;
  Ranges unused_ranges() const;
  Status sleep_locked(const SleepRequest& request, OperationStats* report);
  // Why a device reaches the tagged memory of another. All but kWithout give it access.
  enum class Reach : std::uint8_t { kPeer, kPool, kCopies, kWithout };
  static bool has_access(unsigned reaches) noexcept;
  CUresult set_access(int from_device, int to_device, Reach why, bool enabled)
      REQUIRES(pools_mutex_);
  void drop_peer_access(CUcontext context) noexcept;
  std::set<int> reached_from(const std::set<int>& devices) const;
  Status close_gate(const Transition& transition, Origin origin);
  Status wake_locked(const WakeRequest& request, OperationStats* report);
  Status wake_chunks(const Transition& transition, std::vector<Pool*> pools,
                     const std::set<const Chunk*>& chunks);
  void drop_idle_backups(const std::set<int>& devices);
  bool any_slept_outside() const noexcept;
  CUresult wake_held(Pool* pool, const std::set<const Chunk*>& chunks);
  std::vector<TagStats> stats_of(const std::vector<Pool*>& pools) const;
  void update_gate(const Transition& transition) noexcept;

  const Driver& driver_;
  TagTable& tags_;
  const EngineOptions options_;
  std::atomic<UnusedMemory*> unused_memory_{nullptr};
  Contexts contexts_;
  Captures captures_;
  std::unique_ptr<HostMemory> host_;
  std::unique_ptr<DiskStore> disk_;  // outlives the pools, whose chunks have images in its files
  Reaper reaper_;                    // as them
  std::unique_ptr<DeviceKernels> kernels_;
  std::unique_ptr<ContentHasher> hasher_;
  std::unique_ptr<MappedMemory> mapped_;
  std::atomic<std::uint64_t> next_sequence_{0};  // of chunks

  mutable Mutex pools_mutex_;
  std::vector<std::unique_ptr<Pool>> pools_ GUARDED_BY(pools_mutex_);  // the vector, not the pools
  // By (from, to): a bit for each Reach.
  std::map<std::pair<int, int>, unsigned> reaches_ GUARDED_BY(pools_mutex_);
  std::vector<PeerAccess> peer_access_ GUARDED_BY(pools_mutex_);  // what the program enabled
  Mutex reservations_mutex_;  // protects their growth; taken inside a pool's lock
  std::unique_ptr<std::array<Reservation, kMaxReservations>> reservations_;
  std::atomic<std::size_t> reservation_count_{0};

  AskedLock operation_lock_;   // one sleep, wake or trim at a time
  AskedLock transition_lock_;  // taken inside operation_lock_
  bool gate_closed_ = false;   // by this engine; protected by transition_lock_
  // What unused_memory_ has looked at for the sleep that runs: pools, and the number of the next
  // block of each. Protected by operation_lock_.
  std::map<const Pool*, std::uint64_t> looked_at_;
  ProgressBoard progress_;
  const OperationEnv env_;
  std::unique_ptr<Background> background_;
  DeviceWaits waits_;  // its threads use the others
};

}  // namespace dormouse
