// One sleep or wake over several pools, with its way back. Used by Engine, under its operation
// lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/backup/content_hash.h"
#include "core/backup/disk_transfer.h"
#include "core/backup/transfer.h"
#include "core/memory/pool.h"
#include "core/sleep/engine.h"
#include "core/status.h"

namespace dormouse {

// A chunk in an operation: begun by its pool, to be finished by the operation exactly once.
struct OperationChunk {
  Pool* pool = nullptr;
  Chunk* chunk = nullptr;
  std::vector<ContentUnit>
      units;       // (sleeping) what is live, in units of hashing; what the image will hold
  Ranges changed;  // (sleeping) what has to be copied
  std::uint64_t unchanged_bytes = 0;
  std::uint64_t differing_bytes = 0;  // (waking, verified) what is not what fell asleep
  std::uint64_t unchecked_bytes = 0;  // (waking, verified) what could not be compared
  std::size_t unfinished_copies = 0;  // to or from host memory; its CopyRun's while that runs
  bool new_image = false;             // the backup was made by this operation
  bool to_disk = false;               // (sleeping) the backup is in a file
  bool distrusted = false;            // (sleeping) the file does not hold what it should
  bool mapped = false;                // (waking) has memory and a mapping
};

// The copies of an operation to and from host memory: one run for each device, all at once.
class HostCopies {
 public:
  // By device: where copies run, and how many bytes of chunks there are.
  HostCopies(Engine& engine, const std::map<int, CUcontext>& contexts, Direction direction,
             const std::map<int, std::uint64_t>& bytes);
  void add(int ordinal, std::vector<PieceCopy> plan);
  bool failed() const;
  // Nothing more will be added.
  void complete();
  // After complete(): returns when all host memory is ready; false if a copy has failed.
  bool wait_until_ready();
  // After complete(): returns when the item's copies have ended, false if they may not have since a
  // copy has failed.
  bool wait_for(const OperationChunk& item);
  // Ends all runs; the first error is returned.
  Status finish();

 private:
  static CUfunction copy_kernel(Engine& engine, int ordinal, CUcontext context);

  std::map<int, std::unique_ptr<CopyRun>> runs_;  // by device
};

class Operation {
 public:
  Operation(Engine& engine, std::vector<Pool*> pools);
  // Whatever was begun and not finished goes back to where it was.
  ~Operation();
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  Status sleep(const SleepRequest& request, OperationStats* total);
  // `only` (may be null: all) restricts it to these chunks.
  Status wake(const std::set<const Chunk*>* only, OperationStats* total);

  // After a failed sleep, once: the chunks that are asleep all the same, intact.
  std::set<const Chunk*> take_half_slept() noexcept;

 private:
  using Clock = std::chrono::steady_clock;

  using DiskPlans = std::map<int, std::vector<DiskCopy>>;  // by device
  // Some chunks of an operation, worked on while those before them are copied.
  using Stage = std::vector<OperationChunk*>;

  // Sleeping, in this order.
  Status drain();
  Status sleep_begun(OperationStats* total);
  void begin_sleep(const SleepRequest& request);
  int priority_of(const Pool& pool) const;
  Ranges unused_ranges() const;
  void plan_units();
  std::vector<Stage> sleep_stages();
  bool host_memory_surely_suffices() const;
  Status back_up();
  void hash_units(const Stage& stage);
  void find_changed(OperationChunk& item);
  Status make_images(const Stage& stage);
  void choose_tier(OperationChunk& item);
  Status make_host_images(const Stage& stage);
  void move_to_disk(OperationChunk& item);
  Status make_disk_images(const Stage& stage);
  Status get_disk_space(const std::vector<OperationChunk*>& items);
  Status release_behind(HostCopies& copies);
  void remember_content(OperationChunk& item);
  Status seal_file(DiskFile& file);
  Status seal_files();
  Status release();
  void plan_release();
  Status release_next();
  // Waking, in this order.
  void begin_wake(const std::set<const Chunk*>* only);
  Status create_all();
  Status create_one(OperationChunk& item);
  Status restore();
  Status map(const Stage& stage);
  Status set_access(const Stage& stage);
  Status zero();
  Status zero_ranges(int ordinal, const Ranges& ranges);
  void verify();
  void undo_mapping();

  // Both.
  std::vector<Stage> split(const std::vector<OperationChunk*>& items) const;
  Status add_copies(const Stage& stage, HostCopies& host, DiskPlans& disk);
  Status run_disk(Direction direction, const DiskPlans& disk);

  void add_chunks(Pool& pool, const std::vector<Chunk*>& begun, ChunkState before);
  void finish_one_asleep(OperationChunk& item) noexcept;
  void finish_sleep() noexcept;
  void finish_wake() noexcept;
  void expect_bytes(std::uint64_t bytes);
  void note(bool sleep, OperationStats* total) noexcept;
  void count(bool sleep, OperationStats* total);
  bool keeps_content(const OperationChunk& item) const;
  CUcontext context_on(int ordinal) const;
  std::map<int, std::uint64_t> bytes_by_device() const;
  std::uint64_t total_bytes() const;

  Engine& engine_;
  const Driver& driver_;
  const std::vector<Pool*> pools_;
  std::vector<OperationChunk> chunks_;
  std::map<int, CUcontext> contexts_;  // by device: where copies run
  std::set<CUcontext> drained_;        // (sleeping) whose work has been waited for
  std::set<const Chunk*> half_slept_;  // made before any chunk goes, of all chunks
  std::size_t released_ = 0;  // (sleeping) so many chunks, from the first on, have been released
  // Of the time, part of it beside copies.
  Clock::duration hashing_{0};
  Clock::duration releasing_{0};
  Clock::duration mapping_{0};
  bool sleeping_ = false;
  bool discard_ = false;
  bool outside_ = false;  // (sleeping) the program did not ask for it
  // Ends the step that began when the last one ended; logged at the end, to see where the time
  // went.
  void step_done(const char* name) noexcept;

  Clock::time_point began_ = Clock::now();
  Clock::time_point step_began_ = began_;
  std::string steps_;
};

}  // namespace dormouse
