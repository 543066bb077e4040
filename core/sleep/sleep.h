// One sleep over several pools, with its way back. Used by Engine, under its operation lock.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "core/backup/content_hash.h"
#include "core/backup/image.h"
#include "core/sleep/copies.h"
#include "core/sleep/operation.h"

namespace dormouse {

class DiskFile;

struct SleepChunk : OperationChunk {
  std::vector<ContentUnit> units;  // what is live, in units of hashing; what the image will hold
  std::uint64_t unchanged_bytes = 0;
  bool new_image = false;  // the backup was made by this operation
  bool to_disk = false;    // the backup is in a file
};

class SleepOperation : private Operation {
 public:
  SleepOperation(const OperationEnv& env, const Transition& transition, std::vector<Pool*> pools,
                 const SleepRequest& request);
  // What was begun and not finished is awake again, or asleep where its memory has gone.
  ~SleepOperation();

  // On error everything is awake, but for what take_half_slept() returns.
  Status run(OperationStats* total);
  // After a failed run(), once: the chunks that are asleep all the same, intact.
  std::set<const Chunk*> take_half_slept() noexcept;

 private:
  // Some chunks of an operation, worked on while those before them are copied.
  using Stage = std::vector<SleepChunk*>;

  // In this order.
  Status drain();
  void begin();
  Status put_to_sleep(OperationStats* total);
  void plan_units();
  Status back_up();
  Status release();
  void discard_sleeping(OperationStats* total);

  int priority_of(const Pool& pool) const;
  void add_chunks(Pool& pool, const std::vector<Chunk*>& begun);
  bool keeps_content(const SleepChunk& item) const;
  std::vector<Stage> stages();
  bool host_memory_surely_suffices() const;
  void hash_units(const Stage& stage);
  void find_changed(SleepChunk& item);
  void choose_tier(SleepChunk& item);
  Status make_images(const Stage& stage);
  Status make_host_images(const Stage& stage);
  void move_to_disk(SleepChunk& item);
  Status make_disk_images(const Stage& stage);
  Status get_disk_space(const std::vector<SleepChunk*>& items);
  Status release_behind(Copies& copies);
  void remember_content(SleepChunk& item);
  Status sync_files();
  void plan_release();
  Status release_next();
  void finish_asleep(SleepChunk& item) noexcept;
  void note(OperationStats* total) noexcept;

  const SleepRequest& request_;
  std::set<int> waited_for_;  // devices
  std::vector<SleepChunk> chunks_;
  std::map<int, std::uint64_t> bytes_;  // of chunks_, by device
  std::set<const Chunk*> half_slept_;   // made before any chunk goes, of all chunks
  std::size_t released_ = 0;            // so many chunks, from the first on, have been released
  // Of the time, part of it beside copies.
  Clock::duration hashing_{0};
  Clock::duration releasing_{0};
};

}  // namespace dormouse
