// What a sleep and a wake share: what they need of the engine, the contexts in which they work, and
// the figures that they leave.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/contexts.h"
#include "core/device_waits.h"
#include "core/driver.h"
#include "core/memory/pool.h"
#include "core/range.h"
#include "core/sleep/progress.h"
#include "core/sleep/requests.h"
#include "core/stats.h"
#include "core/status.h"
#include "core/tags.h"
#include "core/transition.h"

namespace dormouse {

class ContentHasher;
class DeviceKernels;
class DiskStore;
class HostMemory;
class Reaper;

// All of it outlives the operations.
struct OperationEnv {
  const Driver& driver;
  const EngineOptions& options;
  TagTable& tags;
  Contexts& contexts;
  DeviceWaits& waits;
  HostMemory& host;
  Reaper& reaper;
  DiskStore& disk;
  DeviceKernels& kernels;
  ContentHasher& hasher;
  ProgressBoard& progress;
  const bool& gate_closed;
  // These devices, and those whose work may use their tagged memory.
  std::function<std::set<int>(const std::set<int>& devices)> reached_from;
  // Empty chunks of a device go; false if there were none.
  std::function<bool(int device)> release_retained;
  // Backups of what is awake go, on devices that have been waited for.
  std::function<void(const std::set<int>& devices)> drop_idle_backups;
  // What need not be backed up, by address and sorted.
  std::function<Ranges()> unused_ranges;
};

inline constexpr const char* kCapturing =
    "a stream of the program is capturing a CUDA graph: try again when the capture has ended";

// A chunk in an operation: begun by its pool, to be finished by the operation exactly once.
struct OperationChunk {
  Pool* pool = nullptr;
  Chunk* chunk = nullptr;
  Ranges copied;                      // what goes to the backup, or comes from it
  std::size_t unfinished_copies = 0;  // to or from host memory; its CopyRun's while that runs

  int device() const noexcept { return pool->options().ordinal; }
};

class Operation {
 public:
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

 protected:
  using Clock = std::chrono::steady_clock;

  // The transition's lock is held as long as the operation lives.
  Operation(const OperationEnv& env, const Transition& transition, std::vector<Pool*> pools);
  ~Operation() = default;

  // Contexts of the devices stay until the operation ends. kBusy if a device has none.
  Status pin_contexts(const std::set<int>& devices);
  CUcontext context_on(int device) const noexcept;

  // Ends the step that began when the last one ended; logged at the end, to see where the time
  // went.
  void step_done(const char* name) noexcept;
  double seconds() const;
  const std::string& steps() const noexcept { return steps_; }

  const OperationEnv& env_;
  const Driver& driver_;
  const std::vector<Pool*> pools_;
  ContextPins pins_;

 private:
  Clock::time_point began_ = Clock::now();
  Clock::time_point step_began_ = began_;
  std::string steps_;
};

// About equal parts of `items`, each with chunks of all devices: every bus is busy from the first
// on. The first is small, so that copying begins early.
template <typename Item>
std::vector<std::vector<Item*>> split_in_stages(const std::vector<Item*>& items,
                                                std::uint64_t stage_bytes) {
  constexpr unsigned kFirstStagePart = 4;
  const std::uint64_t first = stage_bytes / kFirstStagePart;
  std::map<int, std::uint64_t> before;  // by device
  std::vector<std::vector<Item*>> stages;
  for (Item* item : items) {
    std::uint64_t& bytes = before[item->device()];
    const std::size_t stage = bytes < first ? 0 : 1 + (bytes - first) / stage_bytes;
    // A chunk that is larger than a stage leaves out the numbers it covers; they stay empty.
    if (stages.size() <= stage) stages.resize(stage + 1);
    stages[stage].push_back(item);
    bytes += item->chunk->bytes;
  }
  std::erase_if(stages, [](const auto& stage) { return stage.empty(); });
  return stages;
}

// Figures of the operation, all and by pool: `add(item, stats)` adds what is particular to it.
template <typename Item, typename Add>
std::map<Pool*, OperationStats> figures_of(const std::vector<Item>& items, double seconds, Add add,
                                           OperationStats* all) {
  std::map<Pool*, OperationStats> by_pool;
  for (const Item& item : items) {
    std::uint64_t copied = 0;
    for (const Range& range : item.copied) copied += range.bytes;
    for (OperationStats* stats : {all, &by_pool[item.pool]}) {
      stats->bytes += item.chunk->bytes;
      stats->copied_bytes += copied;
      ++stats->chunks;
      add(item, stats);
    }
  }
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  for (auto& [pool, stats] : by_pool) {
    stats.seconds = seconds;
    stats.unix_time = now;
  }
  all->seconds = seconds;
  all->unix_time = now;
  return by_pool;
}

inline double gib(std::uint64_t bytes) {
  return static_cast<double>(bytes) / (1u << 30);
}

inline double milliseconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double, std::milli>(time).count();
}

}  // namespace dormouse
