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
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/backup/disk_calls.h"
#include "core/driver.h"
#include "core/held.h"
#include "core/memory/device_work.h"
#include "core/memory/unused_memory.h"
#include "core/range.h"
#include "core/stats.h"
#include "core/status.h"
#include "core/tags.h"

namespace dormouse {

class Pool;
struct StreamName;
class ContentHasher;
class DeviceKernels;
class DiskStore;
class HostImage;
class HostMemory;
class Image;
class MappedMemory;
class Operation;
struct Chunk;

struct EngineOptions {
  // Blocks of less than half of it share chunks of at most this size.
  std::size_t max_chunk_bytes = std::size_t{2} << 20;
  // Empty physical memory a pool keeps for reuse.
  std::size_t retain_bytes = std::size_t{32} << 20;
  std::uint64_t host_limit_bytes = 0;  // host memory for backups; 0: what the machine has
  bool keep_backups = true;            // keep backups after waking
  std::chrono::milliseconds keep_backups_for{0};  // with keep_backups: for how long; 0 = for ever
  unsigned copy_threads = 0;                      // 0: by the number of processors
  bool huge_pages = true;
  std::size_t piece_bytes = std::size_t{64}
                            << 20;                 // host memory is touched and registered in these
  std::size_t stage_bytes = std::size_t{2} << 30;  // hashed or mapped at a time, beside the copies
  bool hash = true;                                // copy only what changed since the last backup
  bool verify = false;                             // check each wake against the hashes
  bool kernel_copies = true;  // a kernel may copy beside the copy engine (behind a closed gate)
  bool prepare = false;       // get host memory ready in the background
  std::uint64_t prepare_limit_bytes = 0;  // 0 = no limit beyond host_limit_bytes
  // For Backup::kDisk, and for what exceeds the host's memory or its limit; empty: neither. An
  // existing directory that belongs to the user and that others may not write to.
  std::string disk_directory;
  // How long a sleep waits for calls into the driver, and for running work.
  std::chrono::milliseconds drain_timeout{30000};

  // What copy_threads comes to.
  unsigned threads() const noexcept;
};

// Who asks for a sleep. The program itself knows which memory it will not touch; anyone else does
// not, so the gate closes for them.
enum class Origin : std::uint8_t { kProgram, kOutside };

struct SleepRequest {
  std::vector<std::string> tags;  // by name; empty = all
  Origin origin = Origin::kProgram;
  bool discard = false;     // drop the content whatever the tag's policy is
  bool only_awake = false;  // with discard: what sleeps already keeps its content
  // Stop when this much is released; 0 = all of the tags. What was made first goes first, tag by
  // tag where tags are named, else priority by priority.
  // With discard, what sleeps already keeps its content then.
  std::uint64_t at_least_bytes = 0;
};

struct WakeRequest {
  std::vector<std::string> tags;  // by name, in this order; empty = all
};

struct BlockInfo {
  CUdeviceptr address = 0;
  std::size_t bytes = 0;  // as asked for
  TagId tag = kNoTag;
  int device = 0;
  CUcontext context = nullptr;  // current when it was allocated
  bool asleep = false;
};

// Takes a lock that background preparation gives up for whoever asks.
class AskingLock {
 public:
  AskingLock(std::mutex& mutex, std::atomic<int>& asking);
  void unlock() { lock_.unlock(); }

 private:
  std::unique_lock<std::mutex> lock_;
};

class Engine : private DeviceWork {
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

  // Releases the physical memory of all awake chunks of the tags, after backing up what their
  // policy keeps. Idempotent. On error everything is awake and intact, unless the message says
  // which part sleeps (intact, can be woken) or has been discarded. kNotFound for a tag that was
  // never used; kIo if the disk refused a backup, and kUnsupported if one is wanted there and no
  // directory is set. `report` (may be null) is filled on success. Thread-safe, and throws nothing.
  Status sleep(const SleepRequest& request, OperationStats* report);

  // Sleeps ask it what they need not back up. It must outlive the engine; null asks nobody.
  void set_unused_memory(UnusedMemory* source) noexcept { unused_memory_.store(source); }

  // Restores all sleeping chunks of the tags at their addresses. Idempotent. On error all of them
  // stay asleep and intact, and it can be tried again. Thread-safe, and throws nothing.
  Status wake(const WakeRequest& request, OperationStats* report);

  // True if any chunk of the named tags (empty = all) is asleep.
  bool is_sleeping(const std::vector<std::string>& tags) const;

  // kNotFound, with the tags that there are, if one of `tags` was never used. Thread-safe.
  Status check_tags(const std::vector<std::string>& tags) const;

  // Gives back what is held but not used: empty chunks, and with `backups` the host memory and the
  // files of awake chunks. kBusy, with nothing done, if work of the program runs longer than
  // drain_timeout. Thread-safe.
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

  // What the program makes and maps itself for a tag.
  MappedMemory& mapped() noexcept { return *mapped_; }

  // After an allocation failure outside any region: true if memory was given back and a retry makes
  // sense.
  bool release_retained(int device) noexcept;

  // The program enabled or disabled access of one context to the memory of another
  // (cuCtxEnablePeerAccess). A device has access to tagged memory while one of its contexts does.
  // Nothing has changed on failure.
  CUresult set_peer_access(CUcontext from, int from_device, CUcontext to, int to_device,
                           bool enabled) noexcept;

  // A context of the device was made. Its running work may use the memory of tags although nothing
  // is ever allocated in it; primary contexts need not be told.
  void context_created(CUcontext context, int device) noexcept;

  // The context is about to be destroyed or reset: its blocks are gone, as those of cuMemAlloc are.
  void context_destroyed(CUcontext context) noexcept;

  // While captures are active (counted), the device cannot be synchronized; reuse of freed memory
  // waits.
  void capture_began() noexcept;
  void capture_ended() noexcept;

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

  std::vector<TagStats> stats() const;
  Progress progress() const;
  TagTable& tags() noexcept { return tags_; }
  const EngineOptions& options() const noexcept { return options_; }

 private:
  friend class Operation;
  friend class HostCopies;
  friend class MappedMemory;

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
  bool has_peer_access(int from_device, int to_device) const noexcept;
  bool collect() noexcept;
  Pool* pool_for(TagId tag, CUdevice device, CUresult* error);
  Pool* pool_at(CUdeviceptr address) const noexcept;
  CUresult add_reservation(Pool* pool, const Range& range) noexcept;
  std::vector<Pool*> all_pools() const;
  std::vector<Pool*> pools_on(int device) const;
  std::vector<Pool*> select(const std::vector<std::string>& tags) const;
  void look_for_unused(const SleepRequest& request, const std::vector<Pool*>& pools) noexcept;
  Status wake_half_slept(const std::vector<Pool*>& pools, const std::set<const Chunk*>& chunks,
                         const Status& cause, bool discarded);
  Status sleep_locked(const SleepRequest& request, OperationStats* report);
  bool drop_idle_backups(const std::set<CUcontext>& drained);
  CUresult contexts_on(const std::set<int>& devices, std::set<CUcontext>* out);
  void drop(std::vector<std::unique_ptr<Image>> backups) noexcept;
  void drop_later(std::unique_ptr<Image> backup) noexcept;
  bool start_background();
  Status wake_locked(const WakeRequest& request, OperationStats* report);
  bool any_slept_outside() const noexcept;
  void woke() noexcept;
  CUresult wake_held(Pool* pool, const std::set<const Chunk*>& chunks);
  static void say_held(Holder by, std::uint64_t bytes) noexcept;
  std::vector<TagStats> stats_of(const std::vector<Pool*>& pools) const;
  void update_gate() noexcept;
  void background();
  void notify_background(bool prepare) noexcept;
  std::chrono::steady_clock::time_point drop_old_backups();
  bool give_way() const noexcept;
  bool prepare_one();
  Status prepare_chunk(const Pool& pool, Chunk& chunk, const Ranges& ranges,
                       std::unique_ptr<HostImage>* made);

  const Driver& driver_;
  TagTable& tags_;
  const EngineOptions options_;
  std::atomic<UnusedMemory*> unused_memory_{nullptr};
  std::unique_ptr<HostMemory> host_;
  std::unique_ptr<DiskStore> disk_;  // outlives the pools, whose chunks have images in its files
  std::unique_ptr<DeviceKernels> kernels_;
  std::unique_ptr<ContentHasher> hasher_;
  std::unique_ptr<MappedMemory> mapped_;
  std::atomic<std::uint64_t> next_sequence_{0};  // of chunks

  mutable std::mutex pools_mutex_;  // protects pools_ (the vector, not the pools) and peer_access_
  std::vector<std::unique_ptr<Pool>> pools_;
  std::vector<PeerAccess> peer_access_;
  std::mutex reservations_mutex_;  // protects their growth; taken inside a pool's lock
  std::unique_ptr<std::array<Reservation, kMaxReservations>> reservations_;
  std::atomic<std::size_t> reservation_count_{0};

  std::mutex operation_mutex_;  // one sleep, wake or trim at a time
  std::atomic<int> asking_{0};  // who waits for operation_mutex_ or transition_mutex_
  // Held while chunks are on their way from one state to another: by an operation, but not while it
  // asks for unused memory, by background preparation, and by the program's own mappings. Taken
  // inside operation_mutex_.
  std::mutex transition_mutex_;
  bool gate_closed_ = false;  // by this engine; protected by transition_mutex_
  // What unused_memory_ has looked at for the sleep that runs: pools, and the number of the next
  // block of each. Protected by operation_mutex_.
  std::map<const Pool*, std::uint64_t> looked_at_;
  mutable std::mutex progress_mutex_;  // protects progress_ and progress_began_
  Progress progress_;
  std::chrono::steady_clock::time_point progress_began_;
  std::atomic<std::uint64_t> progress_done_{0};
  std::atomic<int> captures_{0};

  // Background work: host memory is prepared after regions end, and kept backups are dropped after
  // their time.
  std::mutex background_mutex_;  // protects what follows
  std::condition_variable background_wanted_;
  std::atomic<bool> background_stop_{false};
  bool background_ended_ = true;
  bool prepare_wanted_ = false;
  std::vector<std::unique_ptr<Image>> to_drop_;
  std::chrono::steady_clock::time_point drop_backups_at_ =
      std::chrono::steady_clock::time_point::max();
  // When pools are asked next what the device has passed, and how long after that.
  std::chrono::steady_clock::time_point collect_at_ = std::chrono::steady_clock::time_point::max();
  std::chrono::milliseconds collect_pause_{1};
  std::thread background_thread_;  // started at first need

  std::mutex contexts_mutex_;  // protects both below
  std::condition_variable dropped_;
  std::multiset<CUcontext> dropping_;       // of backups that are just being dropped
  std::map<CUcontext, int> made_contexts_;  // by the program, and their devices
};

}  // namespace dormouse
