// One sleep or wake over several pools, with its way back. Used by Engine, under its operation
// lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "core/disk_transfer.h"
#include "core/engine.h"
#include "core/pool.h"
#include "core/status.h"
#include "core/transfer.h"

namespace dormouse {

// A chunk in an operation: begun by its pool, to be finished by the operation exactly once.
struct OperationChunk {
  Pool* pool = nullptr;
  Chunk* chunk = nullptr;
  std::vector<ContentUnit>
      units;  // (sleeping) what is live, in units of hashing; what the image will hold
  std::vector<LiveRange> changed;  // (sleeping) what has to be copied
  std::uint64_t unchanged_bytes = 0;
  bool new_image = false;  // the backup was made by this operation
  bool to_disk = false;    // (sleeping) the backup is in a file
  bool mapped = false;     // (waking) has memory and a mapping
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

  // After a failed sleep: the chunks that are asleep all the same, intact.
  const std::set<const Chunk*>& half_slept() const noexcept { return half_slept_; }

 private:
  using Clock = std::chrono::steady_clock;

  // Sleeping, in this order.
  void begin_sleep(const SleepRequest& request);
  Status drain();
  void plan_units();
  void hash_units();
  void find_changed(OperationChunk& item);
  Status make_images();
  void choose_tier(OperationChunk& item);
  Status make_host_images();
  void move_to_disk(OperationChunk& item);
  Status make_disk_images();
  Status get_disk_space(const std::vector<OperationChunk*>& items);
  Status copy(Direction direction);
  Status run_plans(Direction direction, std::map<int, std::vector<PieceCopy>>& host,
                   std::map<int, std::vector<DiskCopy>>& disk);
  void remember_content();
  Status seal_files();
  Status release();
  // Waking, in this order.
  void begin_wake(const std::set<const Chunk*>* only);
  Status create_and_map();
  Status map_one(OperationChunk& item);
  Status set_access();
  Status zero();
  Status zero_ranges(int ordinal, const std::vector<HashRange>& ranges);
  std::uint64_t verify();
  void undo_mapping();

  void finish_one_asleep(OperationChunk& item, bool outside);
  void finish_sleep(const SleepRequest& request);
  void finish_wake();
  void note(bool sleep, OperationStats* total);
  bool keeps_content(const OperationChunk& item) const;
  CUcontext context_on(int ordinal) const;
  std::uint64_t total_bytes() const;

  Engine& engine_;
  const Driver& driver_;
  const std::vector<Pool*> pools_;
  std::vector<OperationChunk> chunks_;
  std::map<int, CUcontext> contexts_;  // by device: where copies run
  std::set<const Chunk*> half_slept_;
  std::uint64_t copied_bytes_ = 0;
  bool sleeping_ = false;
  bool discard_ = false;
  // Ends the step that began when the last one ended; logged at the end, to see where the time
  // went.
  void step_done(const char* name);

  Clock::time_point began_ = Clock::now();
  Clock::time_point step_began_ = began_;
  std::string steps_;
};

}  // namespace dormouse
