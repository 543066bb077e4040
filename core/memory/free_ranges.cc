// See free_ranges.h.
#include "core/memory/free_ranges.h"

#include <algorithm>
#include <new>
#include <utility>

#include "core/context.h"
#include "core/contexts.h"

namespace dormouse {
namespace {

// Batches of cuMemFree that have an event. While so many wait, what is freed joins the open one.
constexpr std::ptrdiff_t kMostRecorded = 4;

}  // namespace

FreeRanges::~FreeRanges() {
  for (const Batch& batch : batches_) {
    for (const Event& each : batch.events) keep_event(each);
  }
  for (const auto& [context, events] : spare_events_) {
    for (CUevent event : events) destroy(event);
  }
}

void FreeRanges::destroy(CUevent event) const noexcept {
  give_back([&] { return driver_.cuEventDestroy_v2(event); });
}

void FreeRanges::insert(BySize& to, const Chunk& chunk, const Range& part) noexcept {
  try {
    to[chunk.small ? 0 : 1].insert(part.begin, part.bytes, chunk.address, chunk.end());
  } catch (const std::bad_alloc&) {
    // Not handed out again before its chunk is made anew.
  }
}

FreeRanges::Batch* FreeRanges::find_open(std::uint64_t stream) noexcept {
  for (Batch& batch : batches_) {
    if (batch.state == State::kOpen && batch.stream == stream) return &batch;
  }
  return nullptr;
}

FreeRanges::Batch* FreeRanges::begin_batch(std::uint64_t stream) {
  Batch& made = batches_.emplace_back();
  made.stream = stream;
  made.number = next_number_++;
  return &made;
}

void FreeRanges::add(const Chunk& chunk, const Range& part) noexcept {
  insert(clean_, chunk, part);
  ++changes_;
}

void FreeRanges::add_used(const Chunk& chunk, const Range& part) noexcept {
  try {
    Batch* batch = find_open(0);
    if (batch == nullptr) batch = begin_batch(0);
    insert(batch->ranges, chunk, part);
  } catch (const std::bad_alloc&) {
  }
}

// The event is recorded now: the stream may be gone when somebody asks. Recorded again behind the
// next free, it stands for the whole batch.
void FreeRanges::add_used_by(const StreamName& stream, CUcontext context, const Chunk& chunk,
                             const Range& part) noexcept {
  try {
    Batch* batch = find_open(stream.id);
    if (batch == nullptr) {
      CUevent event = nullptr;
      if (get_event(context, &event) != CUDA_SUCCESS) return add_used(chunk, part);
      batch = begin_batch(stream.id);
      batch->events.push_back({context, event});
    }
    if (batch->events.empty() ||
        driver_.cuEventRecord(batch->events[0].event, stream.stream) != CUDA_SUCCESS) {
      return add_used(chunk, part);
    }
    insert(batch->ranges, chunk, part);
  } catch (const std::bad_alloc&) {
    add_used(chunk, part);
  }
}

std::optional<CUdeviceptr> FreeRanges::take(std::size_t bytes, std::size_t alignment, bool small) {
  return clean_[small ? 0 : 1].take(bytes, alignment);
}

std::optional<CUdeviceptr> FreeRanges::take_own(const StreamName& stream, std::size_t bytes,
                                                std::size_t alignment, bool small) {
  for (Batch& batch : batches_) {
    if (batch.stream != stream.id) continue;
    if (auto address = batch.ranges[small ? 0 : 1].take(bytes, alignment)) return address;
  }
  return std::nullopt;
}

std::optional<CUdeviceptr> FreeRanges::take_behind(CUstream stream, std::size_t bytes,
                                                   std::size_t alignment, bool small) {
  for (Batch& batch : batches_) {
    if (batch.events.empty()) continue;
    Extents& ranges = batch.ranges[small ? 0 : 1];
    const auto address = ranges.take(bytes, alignment);
    if (!address) continue;
    const bool waits =
        std::all_of(batch.events.begin(), batch.events.end(), [&](const Event& each) {
          return driver_.cuStreamWaitEvent(stream, each.event, 0) == CUDA_SUCCESS;
        });
    if (waits) return address;
    ranges.insert(*address, bytes, *address, *address + bytes);
  }
  return std::nullopt;
}

std::uint64_t FreeRanges::waiting_bytes() const noexcept {
  std::uint64_t bytes = 0;
  for (const Batch& batch : batches_) bytes += batch.ranges[0].total() + batch.ranges[1].total();
  return bytes;
}

bool FreeRanges::has_open() const noexcept {
  return std::any_of(batches_.begin(), batches_.end(), [](const Batch& batch) {
    return batch.stream == 0 && batch.state != State::kRecorded;
  });
}

bool FreeRanges::record(const std::set<CUcontext>& contexts) noexcept {
  Batch* open = find_open(0);
  if (open == nullptr) return true;
  if (driver_.cuCtxRecordEvent == nullptr) return false;
  const auto recorded = std::count_if(batches_.begin(), batches_.end(), [](const Batch& batch) {
    return batch.stream == 0 && batch.state == State::kRecorded;
  });
  if (recorded >= kMostRecorded) return true;
  if (!record_in(contexts, *open)) {
    for (const Event& each : std::exchange(open->events, {})) keep_event(each);
    return false;
  }
  open->state = State::kRecorded;
  return true;
}

bool FreeRanges::record_in(const std::set<CUcontext>& contexts, Batch& batch) noexcept {
  try {
    batch.events.reserve(contexts.size());
    for (CUcontext context : contexts) {
      CUevent event = nullptr;
      CUresult result = get_event(context, &event);
      if (result == CUDA_SUCCESS) {
        batch.events.push_back({context, event});
        result = driver_.cuCtxRecordEvent(context, event);
        if (is_gone(result)) batch.events.pop_back();
      }
      // The work of a context that has gone without a word is over.
      if (result != CUDA_SUCCESS && !is_gone(result)) return false;
    }
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

std::uint64_t FreeRanges::close() noexcept {
  if (Batch* open = find_open(0)) open->state = State::kClosed;
  return next_number_;
}

void FreeRanges::passed(std::uint64_t closed) noexcept {
  for (auto at = batches_.begin(); at != batches_.end();) {
    auto next = std::next(at);
    if (at->state == State::kClosed && at->number < closed) {
      make_clean(*at);
      batches_.erase(at);
    }
    at = next;
  }
}

bool FreeRanges::collect() noexcept {
  for (auto at = batches_.begin(); at != batches_.end();) {
    auto next = std::next(at);
    if (has_passed(*at)) {
      make_clean(*at);
      batches_.erase(at);
    }
    at = next;
  }
  return batches_.empty();
}

// Batches of streams have their event from the first free on.
bool FreeRanges::has_passed(Batch& batch) noexcept {
  if (batch.state == State::kClosed || (batch.state == State::kOpen && batch.stream == 0))
    return false;
  while (!batch.events.empty()) {
    if (driver_.cuEventQuery(batch.events.back().event) != CUDA_SUCCESS) return false;
    keep_event(batch.events.back());
    batch.events.pop_back();
  }
  return true;
}

void FreeRanges::make_clean(Batch& batch) noexcept {
  ++changes_;
  for (const Extents& ranges : batch.ranges) {
    ranges.for_each([&](CUdeviceptr address, std::uint64_t bytes) {
      insert(clean_, *chunks_.at(address), {address, bytes});
    });
  }
}

CUresult FreeRanges::get_event(CUcontext context, CUevent* out) {
  std::vector<CUevent>& spare = spare_events_[context];
  if (!spare.empty()) {
    *out = spare.back();
    spare.pop_back();
    return CUDA_SUCCESS;
  }
  ScopedContext current(driver_, context);
  return current.ok() ? driver_.cuEventCreate(out, CU_EVENT_DISABLE_TIMING) : current.result();
}

void FreeRanges::keep_event(const Event& event) noexcept {
  try {
    spare_events_[event.context].push_back(event.event);
  } catch (const std::bad_alloc&) {
    destroy(event.event);
  }
}

bool FreeRanges::is_unused(const Chunk& chunk) const {
  return clean_[chunk.small ? 0 : 1].has(chunk.address, chunk.bytes);
}

void FreeRanges::forget(const Chunk& chunk) noexcept {
  const std::size_t size = chunk.small ? 0 : 1;
  clean_[size].erase_within(chunk.address, chunk.end());
  for (Batch& batch : batches_) batch.ranges[size].erase_within(chunk.address, chunk.end());
}

void FreeRanges::give_up(CUcontext context, bool still_there) noexcept {
  const auto belongs = [&](const Event& each) { return each.context == context; };
  for (auto at = batches_.begin(); at != batches_.end();) {
    auto next = std::next(at);
    if (std::any_of(at->events.begin(), at->events.end(), belongs)) {
      const Batch batch = std::move(*at);
      batches_.erase(at);
      for (const Event& each : batch.events) {
        if (!belongs(each) || still_there) keep_event(each);
      }
      for (const Extents& ranges : batch.ranges) {
        ranges.for_each([&](CUdeviceptr address, std::uint64_t bytes) {
          add_used(*chunks_.at(address), {address, bytes});
        });
      }
    }
    at = next;
  }
  const auto spare = spare_events_.find(context);
  if (spare == spare_events_.end()) return;
  if (still_there) {
    for (CUevent event : spare->second) destroy(event);
  }
  spare_events_.erase(spare);
}

}  // namespace dormouse
