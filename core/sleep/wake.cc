// One wake, step by step; see engine.h for what is promised.
//
// Invariants: a backup is dropped only after everything that the operation wakes is restored. A
// step that fails leaves what the destructor needs to go back.
#include "core/sleep/wake.h"

#include <algorithm>

#include "core/context.h"
#include "core/log.h"

namespace dormouse {

WakeOperation::WakeOperation(const OperationEnv& env, const Transition& transition,
                             std::vector<Pool*> pools)
    : Operation(env, transition, std::move(pools)) {}

WakeOperation::~WakeOperation() {
  undo_mapping();
  for (WakeChunk& item : chunks_) item.pool->finish(*item.chunk, ChunkState::kAsleep);
}

Status WakeOperation::run(const std::function<bool(const Chunk&)>& wanted, OperationStats* total) {
  Status status = begin(wanted);
  if (!status.is_ok() || chunks_.empty()) return status;
  status = create_all();
  step_done("create");
  if (status.is_ok()) status = restore();
  step_done("map and copy");
  if (status.is_ok()) status = zero();
  step_done("zero");
  if (!status.is_ok()) return status;
  if (env_.options.verify) verify();
  note(total);
  for (WakeChunk& item : chunks_) {
    // A kept copy in the same memory would take what the wake needs.
    const bool doubled = item.pool->options().unified_memory && item.chunk->image != nullptr;
    if (!env_.options.keep_backups || doubled) item.chunk->drop_backup();
    item.pool->finish(*item.chunk, ChunkState::kAwake);
  }
  chunks_.clear();
  return Status::ok();
}

// Where the program has destroyed all contexts of a device, what it mapped there itself can sleep
// on while nothing can be copied.
Status WakeOperation::begin(const std::function<bool(const Chunk&)>& wanted) {
  std::set<int> devices;
  for (const Pool* pool : pools_) {
    if (pool->any_asleep()) devices.insert(pool->options().ordinal);
  }
  Status status = pin_contexts(devices);
  if (!status.is_ok()) return status;
  for (Pool* pool : pools_) {
    const std::vector<Chunk*> begun = pool->begin_wake(wanted);
    try {
      chunks_.reserve(chunks_.size() + begun.size());
      if (!begun.empty()) bytes_.try_emplace(pool->options().ordinal);
    } catch (...) {
      for (Chunk* chunk : begun) pool->finish(*chunk, ChunkState::kAsleep);
      throw;
    }
    for (Chunk* chunk : begun) {
      WakeChunk& item = chunks_.emplace_back();
      item.pool = pool;
      item.chunk = chunk;
      // A chunk whose unmapping failed on the way back from an earlier wake has its memory still.
      item.mapped = chunk->handle != 0;
      bytes_.at(item.device()) += chunk->bytes;
    }
  }
  return Status::ok();
}

// All or nothing: memory for every chunk that has none, before anything is mapped or copied.
Status WakeOperation::create_all() {
  for (WakeChunk& item : chunks_) {
    if (item.mapped) continue;
    Status status = create_one(item);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status WakeOperation::create_one(WakeChunk& item) {
  const int device = item.device();
  ScopedContext current(driver_, context_on(device));
  CUresult result = item.pool->chunks().create(*item.chunk);
  if (result == CUDA_ERROR_OUT_OF_MEMORY && env_.release_retained(device)) {
    result = item.pool->chunks().create(*item.chunk);
  }
  if (result == CUDA_SUCCESS) return Status::ok();
  if (result != CUDA_ERROR_OUT_OF_MEMORY) {
    return {Code::kDriver, fmt::format("cuMemCreate failed with {}", error_name(driver_, result)),
            result};
  }
  std::uint64_t all = 0;
  for (const WakeChunk& each : chunks_) all += each.chunk->bytes;
  return {Code::kOutOfDeviceMemory,
          fmt::format("device {} has too little free memory for the {:.2f} GiB to be woken: free "
                      "some, or put other memory to sleep first",
                      device, gib(all)),
          result};
}

// Stage by stage: a stage is copied while the next is mapped.
Status WakeOperation::restore() {
  std::vector<WakeChunk*> items;
  std::uint64_t bytes = 0;
  for (WakeChunk& item : chunks_) {
    items.push_back(&item);
    const Image* backup = item.chunk->backup();
    if (backup == nullptr) continue;
    for (const ContentUnit& unit : backup->content()) {
      if (unit.stored()) append({unit.offset, unit.bytes}, &item.copied);
    }
    for (const Range& range : item.copied) bytes += range.bytes;
  }
  env_.progress.expect(bytes);
  Copies copies(env_, pins_, Direction::kToDevice, bytes_);
  Status status;
  for (const Stage& stage : split_in_stages(
           items, std::max<std::uint64_t>(env_.options.stage_bytes, HostImage::kUnitBytes))) {
    const Clock::time_point began = Clock::now();
    status = map(stage);
    if (status.is_ok()) status = set_access(stage);
    mapping_ += Clock::now() - began;
    for (WakeChunk* item : stage) {
      if (status.is_ok()) status = copies.add(*item);
    }
    if (!status.is_ok() || copies.failed()) break;
    copies.start();
  }
  const Status copied = copies.finish();
  if (status.is_ok()) status = copied;
  return status.is_ok() ? copies.finish_disk() : status;
}

Status WakeOperation::map(const Stage& stage) {
  for (WakeChunk* item : stage) {
    if (item->mapped) continue;
    ScopedContext current(driver_, context_on(item->device()));
    const CUresult result = item->pool->chunks().map(*item->chunk);
    if (result != CUDA_SUCCESS) {
      return {Code::kDriver, fmt::format("cuMemMap failed with {}", error_name(driver_, result)),
              result};
    }
    item->mapped = true;
  }
  return Status::ok();
}

// One call for each run of neighbours: the cost of setting access counts calls as well as handles.
Status WakeOperation::set_access(const Stage& stage) {
  for (std::size_t i = 0; i < stage.size();) {
    Pool* pool = stage[i]->pool;
    const Chunk& first = *stage[i]->chunk;
    CUdeviceptr end = first.end();
    for (++i; i < stage.size() && first.program == nullptr && stage[i]->pool == pool &&
              stage[i]->chunk->program == nullptr && stage[i]->chunk->address == end;
         ++i) {
      end = stage[i]->chunk->end();
    }
    ScopedContext current(driver_, context_on(pool->options().ordinal));
    const CUresult result = first.program != nullptr
                                ? pool->chunks().set_program_access(first)
                                : pool->chunks().set_access(first.address, end - first.address);
    if (result != CUDA_SUCCESS) {
      return {Code::kDriver,
              fmt::format("cuMemSetAccess failed with {}", error_name(driver_, result)), result};
    }
  }
  return Status::ok();
}

// What was discarded reads as zero, as programs expect of fresh pages; and so does what was all
// zero when it fell asleep.
Status WakeOperation::zero() {
  for (const auto& [device, bytes] : bytes_) {
    Ranges ranges;
    for (const WakeChunk& item : chunks_) {
      if (item.device() != device) continue;
      const Image* backup = item.chunk->backup();
      if (backup == nullptr) {
        ranges.push_back({item.chunk->address, item.chunk->bytes});
        continue;
      }
      Ranges zeros;
      for (const ContentUnit& unit : backup->content()) {
        if (!unit.stored()) append({unit.offset, unit.bytes}, &zeros);
      }
      for (const Range& range : zeros) {
        ranges.push_back({item.chunk->address + range.begin, range.bytes});
      }
    }
    Status status = zero_ranges(device, ranges);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status WakeOperation::zero_ranges(int device, const Ranges& ranges) {
  if (ranges.empty()) return Status::ok();
  ScopedContext current(driver_, context_on(device));
  RelaxedCapture relaxed(driver_);
  CUstream stream = nullptr;
  CUresult result =
      current.ok() ? driver_.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING) : current.result();
  if (result == CUDA_SUCCESS) {
    for (const Range& range : ranges) {
      result = driver_.cuMemsetD8Async(range.begin, 0, range.bytes, stream);
      if (result != CUDA_SUCCESS) break;
    }
    const CUresult synchronized = synchronize_stream(driver_, stream);
    give_back([&] { return driver_.cuStreamDestroy_v2(stream); });
    if (result == CUDA_SUCCESS) result = synchronized;
  }
  if (result == CUDA_SUCCESS) return Status::ok();
  return {Code::kDriver, fmt::format("zeroing memory failed with {}", error_name(driver_, result)),
          result};
}

// Counts the bytes whose hash is not what it was when they fell asleep: a fault of memory or bus,
// or of Dormouse. And those of which it is not known.
void WakeOperation::verify() {
  for (const auto& [device, bytes] : bytes_) {
    Ranges ranges;
    std::vector<ContentHash> expected;
    std::vector<WakeChunk*> owners;
    for (WakeChunk& item : chunks_) {
      const Image* backup = item.chunk->backup();
      if (item.device() != device || backup == nullptr) continue;
      for (const ContentUnit& unit : backup->content()) {
        if (!unit.hashed) {
          item.unchecked_bytes += unit.bytes;
          continue;
        }
        ranges.push_back({item.chunk->address + unit.offset, unit.bytes});
        expected.push_back(unit.hash);
        owners.push_back(&item);
      }
    }
    std::vector<ContentHash> found;
    const CUresult result = env_.hasher.hash(context_on(device), ranges, &found);
    if (result != CUDA_SUCCESS) {
      log().error("woken memory on device {} could not be checked: {}", device,
                  error_name(driver_, result));
      for (std::size_t i = 0; i < ranges.size(); ++i) {
        owners[i]->unchecked_bytes += ranges[i].bytes;
      }
      continue;
    }
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      if (found[i] == expected[i]) continue;
      owners[i]->differing_bytes += ranges[i].bytes;
      log().error("{} bytes at {:#x} differ from what fell asleep", ranges[i].bytes,
                  ranges[i].begin);
    }
  }
}

// Waking failed: the physical memory that this operation made goes back; the content is in the
// images still.
void WakeOperation::undo_mapping() {
  for (WakeChunk& item : chunks_) {
    if (item.chunk->handle == 0) continue;
    if (!item.mapped) {
      item.pool->chunks().release_handle(*item.chunk);
      continue;
    }
    const CUresult result = give_back([&] { return item.pool->chunks().unmap(*item.chunk); });
    if (result != CUDA_SUCCESS) {
      log().error("cuMemUnmap of a chunk that could not be woken failed with {}",
                  error_name(driver_, result));
      continue;
    }
    item.mapped = false;
  }
}

// What has been done does not fail for want of figures about it.
void WakeOperation::note(OperationStats* total) noexcept {
  try {
    OperationStats all;
    const auto add = [](const WakeChunk& item, OperationStats* stats) {
      stats->differing_bytes += item.differing_bytes;
      stats->unchecked_bytes += item.unchecked_bytes;
    };
    for (const auto& [pool, stats] : figures_of(chunks_, seconds(), add, &all))
      pool->note_wake(stats);
    log().debug("wake of {:.2f} GiB in {} chunks: {}; of these, mapping {:.2f} ms", gib(all.bytes),
                all.chunks, steps(), milliseconds(mapping_));
    if (total != nullptr) *total = all;
  } catch (const std::bad_alloc&) {
    if (first_time("figures"))
      log().warn("out of host memory: statistics of this operation were not recorded");
  }
}

}  // namespace dormouse
