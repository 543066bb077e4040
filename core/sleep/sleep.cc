// One sleep, step by step; see engine.h for what is promised.
//
// Invariants: physical memory is released only after its backup is complete, and not before all
// that can fail for want of anything has been done: then only copies are left, which fail only with
// the device itself. A chunk's backup is in host memory or in a file, never in both. A step that
// fails leaves what the destructor needs to go back.
#include "core/sleep/sleep.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "core/backup/disk_store.h"
#include "core/backup/reaper.h"
#include "core/log.h"
#include "core/round_up.h"

namespace dormouse {
namespace {

// Content is compared in stretches of this many bytes: small enough that scattered changes copy
// little, large enough that a hash costs nothing beside its stretch.
constexpr std::size_t kHashUnitBytes = std::size_t{256} << 10;

// Its ranges by offset, of what is given by address and sorted.
Ranges in_chunk(const Ranges& ranges, const Chunk& chunk) {
  Ranges inside;
  auto at = std::partition_point(ranges.begin(), ranges.end(),
                                 [&](const Range& each) { return each.end() <= chunk.address; });
  for (; at != ranges.end() && at->begin < chunk.end(); ++at) {
    const CUdeviceptr begin = std::max<CUdeviceptr>(at->begin, chunk.address);
    const CUdeviceptr end = std::min<CUdeviceptr>(at->end(), chunk.end());
    inside.push_back({begin - chunk.address, end - begin});
  }
  return inside;
}

}  // namespace

SleepOperation::SleepOperation(const OperationEnv& env, const Transition& transition,
                               std::vector<Pool*> pools, const SleepRequest& request)
    : Operation(env, transition, std::move(pools)), request_(request) {}

SleepOperation::~SleepOperation() {
  for (SleepChunk& item : chunks_) {
    if (item.chunk->handle == 0) {
      finish_asleep(item);  // its backup is all there is
      continue;
    }
    // A write that failed may have harmed what lies beside it on the disk.
    const bool written = item.to_disk && !item.copied.empty();
    if (item.new_image || written) item.chunk->drop_backup();
    item.pool->finish(*item.chunk, ChunkState::kAwake);
  }
}

std::set<const Chunk*> SleepOperation::take_half_slept() noexcept {
  for (std::size_t i = released_; i < chunks_.size(); ++i) half_slept_.erase(chunks_[i].chunk);
  return std::move(half_slept_);
}

bool SleepOperation::keeps_content(const SleepChunk& item) const {
  return !request_.discard && item.pool->options().info.backup != Backup::kNone;
}

Status SleepOperation::run(OperationStats* total) {
  Status status = drain();
  if (!status.is_ok()) return status;
  begin();
  step_done("drain");
  if (!chunks_.empty()) status = put_to_sleep(total);
  if (status.is_ok() && request_.discards_sleeping()) discard_sleeping(total);
  return status;
}

Status SleepOperation::put_to_sleep(OperationStats* total) {
  std::set<int> devices;
  for (const auto& [device, bytes] : bytes_) devices.insert(device);
  Status status = pin_contexts(devices);
  if (!status.is_ok()) return status;
  plan_units();
  status = back_up();
  step_done("back up");
  if (status.is_ok()) {
    for (std::size_t i = released_; i < chunks_.size(); ++i) remember_content(chunks_[i]);
    status = sync_files();
    step_done("sync");
  }
  if (status.is_ok()) {
    status = release();
    step_done("release");
  }
  if (!status.is_ok()) return status;
  half_slept_.clear();
  note(total);
  for (SleepChunk& item : chunks_) finish_asleep(item);
  chunks_.clear();
  return Status::ok();
}

void SleepOperation::discard_sleeping(OperationStats* total) {
  std::uint64_t dropped = 0;
  for (Pool* pool : pools_) dropped += pool->discard_sleeping();
  if (total != nullptr) total->dropped_bytes = dropped;
}

// Work that runs may write to what is about to be backed up.
Status SleepOperation::drain() {
  for (Pool* pool : pools_) {
    if (pool->any_awake()) waited_for_.merge(pool->reached_by());
  }
  waited_for_ = env_.reached_from(waited_for_);
  const std::chrono::milliseconds limit = env_.options.drain_timeout;
  const WaitResult waited = env_.waits.wait_for(waited_for_, limit);
  if (waited.captured) return {Code::kBusy, kCapturing};
  if (waited.timed_out) {
    return {Code::kBusy, fmt::format("work that the program gave to the device is still running "
                                     "after {} ms: try again when it has ended",
                                     limit.count())};
  }
  if (waited.result == CUDA_SUCCESS) return Status::ok();
  return {Code::kDriver,
          fmt::format("waiting for the device's work failed with {}",
                      error_name(driver_, waited.result)),
          waited.result};
}

// Pools come in the order in which they go: by name as asked, else by priority. Those of one
// priority go together, what is older first.
void SleepOperation::begin() {
  const bool by_name = !request_.tags.empty();
  std::uint64_t left = request_.at_least_bytes;
  for (auto first = pools_.begin(); first != pools_.end();) {
    auto last = std::next(first);
    while (!by_name && last != pools_.end() && priority_of(**last) == priority_of(**first)) ++last;
    std::uint64_t last_sequence = std::numeric_limits<std::uint64_t>::max();
    if (request_.at_least_bytes != 0) {
      if (left == 0) return;
      std::map<std::uint64_t, std::size_t> chunks;
      for (auto pool = first; pool != last; ++pool) chunks.merge((*pool)->awake_chunks());
      for (const auto& [sequence, bytes] : chunks) {
        last_sequence = sequence;
        left -= std::min<std::uint64_t>(left, bytes);
        if (left == 0) break;
      }
    }
    for (; first != last; ++first) {
      if (env_.contexts.any_on((*first)->options().ordinal))
        add_chunks(**first, (*first)->begin_sleep(last_sequence));
    }
  }
}

int SleepOperation::priority_of(const Pool& pool) const {
  return env_.tags.get(pool.options().tag).priority;
}

// What the pool has begun becomes the operation's, or goes back to how it was.
void SleepOperation::add_chunks(Pool& pool, const std::vector<Chunk*>& begun) {
  try {
    chunks_.reserve(chunks_.size() + begun.size());
    if (!begun.empty()) bytes_.try_emplace(pool.options().ordinal);
  } catch (...) {
    for (Chunk* chunk : begun) pool.finish(*chunk, ChunkState::kAwake);
    throw;
  }
  for (Chunk* chunk : begun) {
    SleepChunk& item = chunks_.emplace_back();
    item.pool = &pool;
    item.chunk = chunk;
    bytes_.at(item.device()) += chunk->bytes;
  }
}

// Live ranges, cut at multiples of the unit: the same blocks give the same units every time.
void SleepOperation::plan_units() {
  const Ranges unused = request_.discard ? Ranges{} : env_.unused_ranges();
  std::uint64_t bytes = 0;
  for (SleepChunk& item : chunks_) {
    if (!keeps_content(item)) continue;
    const Ranges live =
        subtract(item.pool->live_ranges(*item.chunk), in_chunk(unused, *item.chunk));
    item.units.reserve(item.chunk->bytes / kHashUnitBytes + 2 * live.size());
    for (const Range& range : live) {
      for (std::size_t at = range.begin; at < range.end();) {
        const std::size_t next = (at / kHashUnitBytes + 1) * kHashUnitBytes;
        const std::size_t end = std::min(next, range.end());
        item.units.push_back({at, end - at, {}, false});
        at = end;
      }
      bytes += range.bytes;
    }
  }
  env_.progress.expect(bytes);
}

// Copying begins before all is hashed, unless host memory may run out: then what it takes is known
// before anything is touched. What is kept on the disk comes last and in one stage, so that its
// space is asked for at once.
std::vector<SleepOperation::Stage> SleepOperation::stages() {
  std::vector<SleepChunk*> host;
  Stage disk;
  for (SleepChunk& item : chunks_) {
    const bool to_disk =
        item.pool->options().info.backup == Backup::kDisk || item.chunk->disk_image != nullptr;
    to_disk ? disk.push_back(&item) : host.push_back(&item);
  }
  std::vector<Stage> stages;
  if (host_memory_surely_suffices()) {
    stages = split_in_stages(
        host, std::max<std::uint64_t>(env_.options.stage_bytes, HostImage::kUnitBytes));
  } else if (!host.empty()) {
    stages.push_back(std::move(host));
  }
  if (!disk.empty()) stages.push_back(std::move(disk));
  return stages;
}

// Even if all of it changed and none of it is zero.
bool SleepOperation::host_memory_surely_suffices() const {
  std::uint64_t most = 0;
  for (const SleepChunk& item : chunks_) {
    if (item.units.empty()) continue;
    most += round_up(item.chunk->bytes, HostImage::kUnitBytes);
    if (item.chunk->image != nullptr) most -= item.chunk->image->held_bytes();
  }
  if (env_.host.fits(most)) return true;
  env_.reaper.wait(env_.options.drain_timeout);
  return env_.host.fits(most);
}

// Stage by stage: what changed is found and given a place, and is copied while the next stage is
// looked at. Once only copies to host memory are left, chunks go as their copies end.
Status SleepOperation::back_up() {
  Copies copies(env_, pins_, Direction::kToHost, bytes_);
  Status status;
  for (const Stage& stage : stages()) {
    hash_units(stage);
    for (SleepChunk* item : stage) find_changed(*item);
    status = make_images(stage);
    for (SleepChunk* item : stage) {
      if (status.is_ok()) status = copies.add(*item);
    }
    if (!status.is_ok() || copies.failed()) break;
    copies.start();
    for (const SleepChunk* item : stage) env_.progress.add(item->unchanged_bytes);
  }
  const bool to_disk = std::any_of(chunks_.begin(), chunks_.end(),
                                   [](const SleepChunk& item) { return item.to_disk; });
  if (status.is_ok() && !to_disk && !copies.failed()) status = release_behind(copies);
  const Status copied = copies.finish();
  if (status.is_ok()) status = copied;
  return status.is_ok() ? copies.finish_disk() : status;
}

// What is left when a copy has failed stays awake, and finish() has the error.
Status SleepOperation::release_behind(Copies& copies) {
  plan_release();
  copies.complete();
  Status status;
  if (!copies.wait_until_ready()) return status;
  while (status.is_ok() && released_ < chunks_.size() && copies.wait_for(chunks_[released_])) {
    remember_content(chunks_[released_]);
    status = release_next();
  }
  return status;
}

// Without hashes (no memory for the kernel, say) everything is copied: slower, never wrong.
void SleepOperation::hash_units(const Stage& stage) {
  if (!env_.options.hash) return;
  const Clock::time_point began = Clock::now();
  for (const auto& [device, bytes] : bytes_) {
    Ranges ranges;
    std::vector<ContentUnit*> units;
    for (SleepChunk* item : stage) {
      if (item->device() != device) continue;
      for (ContentUnit& unit : item->units) {
        ranges.push_back({item->chunk->address + unit.offset, unit.bytes});
        units.push_back(&unit);
      }
    }
    std::vector<ContentHash> hashes;
    const CUresult result = env_.hasher.hash(context_on(device), ranges, &hashes);
    if (result != CUDA_SUCCESS) {
      if (first_time("hash")) {
        log().warn("content on device {} cannot be hashed ({}): every sleep will copy everything",
                   device, error_name(driver_, result));
      }
      continue;
    }
    for (std::size_t i = 0; i < units.size(); ++i) {
      units[i]->hash = hashes[i];
      units[i]->hashed = true;
    }
  }
  hashing_ += Clock::now() - began;
}

// Compares with what the backup holds since the last sleep. Units of both are sorted.
void SleepOperation::find_changed(SleepChunk& item) {
  static const std::vector<ContentUnit> kNothing;
  Image* backup = item.chunk->backup();
  const auto& held = backup == nullptr ? kNothing : backup->content();
  auto old = held.begin();
  std::vector<ContentUnit> unchanged;
  unchanged.reserve(held.size());
  item.copied.clear();
  item.unchanged_bytes = 0;
  for (const ContentUnit& unit : item.units) {
    while (old != held.end() && old->offset < unit.offset) ++old;
    const bool same = old != held.end() && old->offset == unit.offset && old->bytes == unit.bytes &&
                      old->hashed && unit.hashed && old->hash == unit.hash;
    if (same) unchanged.push_back(unit);
    if (same || !unit.stored()) {
      item.unchanged_bytes += unit.bytes;
    } else {
      append({unit.offset, unit.bytes}, &item.copied);
    }
  }
  // From here on the backup is only trusted for what is not going to be overwritten.
  if (backup != nullptr) backup->content() = std::move(unchanged);
}

// A place for the backup of every chunk of the stage that keeps content.
Status SleepOperation::make_images(const Stage& stage) {
  for (SleepChunk* item : stage) choose_tier(*item);
  Status status = make_host_images(stage);
  return status.is_ok() ? make_disk_images(stage) : status;
}

// What overflowed to the disk stays there while that saves writing; else host memory is tried
// again.
void SleepOperation::choose_tier(SleepChunk& item) {
  if (item.units.empty()) return item.chunk->drop_backup();
  if (item.pool->options().info.backup == Backup::kDisk) {
    item.to_disk = true;
  } else if (item.chunk->disk_image != nullptr) {
    item.to_disk = !item.chunk->disk_image->content().empty();
    if (!item.to_disk) item.chunk->drop_backup();
  }
}

// Address space for each image, and the budget for all of them together; what the budget refuses
// goes to the disk, if there is one.
Status SleepOperation::make_host_images(const Stage& stage) {
  std::uint64_t missing = 0;
  std::vector<SleepChunk*> items;
  for (SleepChunk* item : stage) {
    if (item->units.empty() || item->to_disk) continue;
    ImagePtr<HostImage>& image = item->chunk->image;
    if (image == nullptr) {
      item->new_image = true;
      image = reaped(env_.reaper, HostImage::reserve(driver_, env_.contexts, env_.host,
                                                     item->device(), item->chunk->bytes));
      if (image == nullptr) {
        return {Code::kOutOfHostMemory,
                "the process has no address space left for the backup (see ulimit -v)"};
      }
    }
    missing += image->missing_bytes(item->copied);
    items.push_back(item);
  }
  Status all = env_.host.admit(missing);
  // What was dropped may not have been given back yet, and what is awake can do without its backup.
  if (!all.is_ok()) {
    env_.drop_idle_backups(waited_for_);
    all = env_.host.admit(missing);
  }
  if (!all.is_ok() && !env_.disk.configured()) return all;
  Admitted admitted(env_.host, all.is_ok() ? missing : 0);
  for (SleepChunk* item : items) {
    HostImage& image = *item->chunk->image;
    if (all.is_ok()) {
      admitted.held(image.add_pieces(item->copied));
      continue;
    }
    const std::uint64_t bytes = image.missing_bytes(item->copied);
    if (env_.host.admit(bytes).is_ok()) {
      Admitted alone(env_.host, bytes);
      alone.held(image.add_pieces(item->copied));
    } else {
      move_to_disk(*item);
    }
  }
  return Status::ok();
}

// An older image in host memory goes: the content is on the device, all of it.
void SleepOperation::move_to_disk(SleepChunk& item) {
  item.chunk->drop_backup();
  item.new_image = false;
  item.to_disk = true;
  find_changed(item);
}

// An image in its pool's file for each chunk, and space for what has to be written.
Status SleepOperation::make_disk_images(const Stage& stage) {
  std::map<Pool*, std::vector<SleepChunk*>> by_pool;
  for (SleepChunk* item : stage) {
    if (item->to_disk) by_pool[item->pool].push_back(item);
  }
  for (auto& [pool, items] : by_pool) {
    const PoolOptions& options = pool->options();
    std::shared_ptr<DiskFile> file;
    Status status = env_.disk.file_for(options.tag, options.ordinal, &file);
    for (SleepChunk* item : items) {
      Chunk& chunk = *item->chunk;
      if (!status.is_ok() || chunk.disk_image != nullptr) continue;
      item->new_image = true;
      std::unique_ptr<DiskImage> image;
      status = DiskImage::reserve(file, chunk.address, chunk.bytes, &image);
      chunk.disk_image = reaped(env_.reaper, std::move(image));
    }
    if (status.is_ok()) status = get_disk_space(items);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

// Of one pool. The file system is asked for all of it first, so that a refusal takes nothing.
Status SleepOperation::get_disk_space(const std::vector<SleepChunk*>& items) {
  std::uint64_t missing = 0;
  for (SleepChunk* item : items) missing += item->chunk->disk_image->missing_bytes(item->copied);
  if (missing == 0) return Status::ok();
  env_.reaper.wait(env_.options.drain_timeout);  // for the space of what was dropped
  std::uint64_t available = 0;
  Status status = items.front()->chunk->disk_image->file().available_bytes(&available);
  if (status.is_ok() && available < missing) {
    status = {Code::kIo,
              fmt::format("the backup needs {:.2f} GiB more on the disk, and the file system of "
                          "{} has only {:.2f} GiB left: free some, or sleep fewer tags",
                          gib(missing), env_.options.disk_directory_option, gib(available))};
  }
  for (SleepChunk* item : items) {
    if (status.is_ok()) status = item->chunk->disk_image->get_space(item->copied);
  }
  return status;
}

void SleepOperation::remember_content(SleepChunk& item) {
  Image* backup = item.chunk->backup();
  if (backup != nullptr) backup->content() = std::move(item.units);
}

Status SleepOperation::sync_files() {
  std::set<DiskFile*> files;
  for (const SleepChunk& item : chunks_) {
    if (item.to_disk) files.insert(&item.chunk->disk_image->file());
  }
  Status status;
  for (DiskFile* file : files) {
    if (status.is_ok()) status = file->sync();
  }
  return status;
}

// From here on content is safe in the images. If the driver refuses to unmap a chunk, it and those
// after it stay awake; those before it are asleep, and the engine wakes them again.
Status SleepOperation::release() {
  plan_release();
  Status status;
  while (status.is_ok() && released_ < chunks_.size()) status = release_next();
  return status;
}

// Before the first chunk goes: what follows must not run out of memory.
void SleepOperation::plan_release() {
  if (!half_slept_.empty()) return;
  std::set<const Chunk*> all;
  for (const SleepChunk& item : chunks_) all.insert(item.chunk);
  half_slept_.swap(all);
}

Status SleepOperation::release_next() {
  const Clock::time_point began = Clock::now();
  SleepChunk& item = chunks_[released_];
  const CUresult result = item.pool->chunks().unmap(*item.chunk);
  releasing_ += Clock::now() - began;
  if (result == CUDA_SUCCESS) {
    ++released_;
    return Status::ok();
  }
  return {Code::kDriver, fmt::format("cuMemUnmap failed with {}", error_name(driver_, result)),
          result};
}

void SleepOperation::finish_asleep(SleepChunk& item) noexcept {
  item.chunk->discarded = item.chunk->backup() == nullptr;
  item.chunk->slept_outside = request_.origin == Origin::kOutside;
  item.pool->finish(*item.chunk, ChunkState::kAsleep);
}

// What has been done does not fail for want of figures about it.
void SleepOperation::note(OperationStats* total) noexcept {
  try {
    OperationStats all;
    const auto add = [](const SleepChunk& item, OperationStats* stats) {
      stats->unchanged_bytes += item.unchanged_bytes;
    };
    for (const auto& [pool, stats] : figures_of(chunks_, seconds(), add, &all))
      pool->note_sleep(stats);
    log().debug(
        "sleep of {:.2f} GiB in {} chunks: {}; of these, hashing {:.2f} ms, releasing {:.2f} ms",
        gib(all.bytes), all.chunks, steps(), milliseconds(hashing_), milliseconds(releasing_));
    if (total != nullptr) *total = all;
  } catch (const std::bad_alloc&) {
    if (first_time("figures"))
      log().warn("out of host memory: statistics of this operation were not recorded");
  }
}

}  // namespace dormouse
