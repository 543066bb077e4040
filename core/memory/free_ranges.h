// What is free in the awake chunks of a pool, and when it may be handed out again. Running work may
// still use what was freed: a free range waits in a batch until the device has passed the free, and
// nobody waits for that. Used by Pool, whose lock protects it.
//
// What cuMemFreeAsync freed on a stream serves that stream at once, others behind an event. What
// cuMemFree freed may be in use by any stream: an event of the whole context tells (CUDA 12.5), or
// somebody waits beside.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "core/driver.h"
#include "core/extents.h"
#include "core/memory/chunk_store.h"

namespace dormouse {

// A stream of the current context, and a number that no other stream ever has.
struct StreamName {
  CUstream stream = nullptr;
  std::uint64_t id = 0;
};

class FreeRanges {
 public:
  // Both must stay as long.
  FreeRanges(const Driver& driver, const ChunkStore& chunks) : driver_(driver), chunks_(chunks) {}
  ~FreeRanges();
  FreeRanges(const FreeRanges&) = delete;
  FreeRanges& operator=(const FreeRanges&) = delete;

  // Adds a part of the chunk that no running work uses; that any may use; that only work up to now
  // of this stream of the current context `context` may use. What there is no memory to remember is
  // not handed out before its chunk is made anew.
  void add(const Chunk& chunk, const Range& part) noexcept;
  void add_used(const Chunk& chunk, const Range& part) noexcept;
  void add_used_by(const StreamName& stream, CUcontext context, const Chunk& chunk,
                   const Range& part) noexcept;

  // Takes `bytes` out of the smallest range that holds them: one that no running work uses; one
  // that the stream itself freed; one that another stream freed, and the stream waits for that.
  // Small blocks and others do not share chunks.
  std::optional<CUdeviceptr> take(std::size_t bytes, std::size_t alignment, bool small);
  std::optional<CUdeviceptr> take_own(const StreamName& stream, std::size_t bytes,
                                      std::size_t alignment, bool small);
  std::optional<CUdeviceptr> take_behind(CUstream stream, std::size_t bytes, std::size_t alignment,
                                         bool small);

  // Counts how often something became free for good.
  std::uint64_t changes() const noexcept { return changes_; }
  // Whether cuMemFree has freed something with no event recorded behind it yet.
  bool has_open() const noexcept;
  // Bytes that wait for the device.
  std::uint64_t waiting_bytes() const noexcept;
  // Records an event in each context behind what cuMemFree freed. No stream of theirs may capture.
  // False if the driver cannot; a wait beside remains then: all that is waiting at close() is free
  // once somebody has waited for these contexts and told passed().
  bool record(const std::set<CUcontext>& contexts) noexcept;
  std::uint64_t close() noexcept;
  void passed(std::uint64_t closed) noexcept;
  // Asks the driver what has passed; waits for nothing. True if nothing is waiting any more.
  bool collect() noexcept;

  // Whether all of the chunk is free and no running work uses it.
  bool is_unused(const Chunk& chunk) const;
  // The chunk goes, or sleeps.
  void forget(const Chunk& chunk) noexcept;
  // The context is about to go, or has gone: its events are destroyed if they still are there. What
  // waits for one needs another event.
  void give_up(CUcontext context, bool still_there) noexcept;

 private:
  using BySize = std::array<Extents, 2>;  // of small blocks' chunks, of others

  struct Event {
    CUcontext context = nullptr;
    CUevent event = nullptr;
  };
  enum class State : std::uint8_t {
    kOpen,      // takes what is freed now
    kRecorded,  // has its events
    kClosed,    // somebody waits beside
  };
  struct Batch {
    std::uint64_t stream = 0;  // 0: freed by cuMemFree
    std::uint64_t number = 0;
    State state = State::kOpen;
    std::vector<Event> events;  // of contexts that have not gone
    BySize ranges;
  };
  using Batches = std::list<Batch>;

  static void insert(BySize& to, const Chunk& chunk, const Range& part) noexcept;
  Batch* find_open(std::uint64_t stream) noexcept;
  Batch* begin_batch(std::uint64_t stream);
  CUresult get_event(CUcontext context, CUevent* out);
  void keep_event(const Event& event) noexcept;
  bool record_in(const std::set<CUcontext>& contexts, Batch& batch) noexcept;
  bool has_passed(Batch& batch) noexcept;
  void make_clean(Batch& batch) noexcept;
  void destroy(CUevent event) const noexcept;

  const Driver& driver_;
  const ChunkStore& chunks_;
  BySize clean_;
  Batches batches_;  // in the order in which they were begun
  std::uint64_t next_number_ = 0;
  std::uint64_t changes_ = 0;
  std::map<CUcontext, std::vector<CUevent>> spare_events_;
};

}  // namespace dormouse
