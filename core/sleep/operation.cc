// Sleep and wake, step by step; see operation.h and engine.h for what is promised.
//
// Invariants: physical memory is released only after its backup is complete, and not before all
// that can fail for want of anything has been done: then only copies are left, which fail only with
// the device itself. A backup is dropped only after everything that the operation wakes is
// restored. A chunk's backup is in host memory or in a file, never in both. A step that fails
// leaves what the destructor needs to go back.
#include "core/sleep/operation.h"

#include <algorithm>
#include <limits>
#include <new>

#include "core/backup/device_kernels.h"
#include "core/backup/disk_store.h"
#include "core/context.h"
#include "core/log.h"
#include "core/round_up.h"
#include "core/sleep/drain.h"
#include "core/threads.h"

namespace dormouse {
namespace {

// Content is compared in stretches of this many bytes: small enough that scattered changes copy
// little, large enough that a hash costs nothing beside its stretch.
constexpr std::size_t kHashUnitBytes = std::size_t{256} << 10;

double unix_now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// While the driver scrubs memory that was just released (in the time in which a fifth as much is
// copied), copies by the copy engine run at half the bus's speed, and those of a kernel at nine
// tenths; afterwards the engine alone is faster. See docs/design.md.
constexpr unsigned kKernelPart = 5;

// The first stage is small, so that copying begins early.
constexpr unsigned kFirstStagePart = 4;

double gib(std::uint64_t bytes) {
  return static_cast<double>(bytes) / (1u << 30);
}

double milliseconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double, std::milli>(time).count();
}

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

HostCopies::HostCopies(Engine& engine, const std::map<int, CUcontext>& contexts,
                       Direction direction, const std::map<int, std::uint64_t>& bytes) {
  const unsigned all = engine.options_.threads();
  CopyOptions options;
  options.direction = direction;
  options.threads = std::max<unsigned>(all / std::max<std::size_t>(contexts.size(), 1), 1);
  for (const auto& [ordinal, context] : contexts) {
    options.context = context;
    if (direction == Direction::kToDevice) {
      options.kernel = copy_kernel(engine, ordinal, context);
      const auto at = bytes.find(ordinal);
      options.kernel_bytes = at == bytes.end() ? 0 : at->second / kKernelPart;
    }
    runs_[ordinal] = std::make_unique<CopyRun>(engine.driver_, options, &engine.progress_done_);
  }
}

// Null where a kernel may not copy. Only behind a closed gate is no work of the program on the
// device, which the kernel would wait for, and which may itself wait for the program.
CUfunction HostCopies::copy_kernel(Engine& engine, int ordinal, CUcontext context) {
  if (!engine.options_.kernel_copies || !engine.gate_closed_) return nullptr;
  int same_address = 0;
  if (engine.driver_.cuDeviceGetAttribute(
          &same_address, CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, ordinal) !=
          CUDA_SUCCESS ||
      same_address == 0) {
    return nullptr;
  }
  ScopedContext current(engine.driver_, context);
  if (!current.ok()) return nullptr;
  RelaxedCapture relaxed(engine.driver_);
  LoadedKernels kernels;
  return engine.kernels_->load(context, &kernels) == CUDA_SUCCESS ? kernels.copy : nullptr;
}

void HostCopies::add(int ordinal, std::vector<PieceCopy> plan) {
  runs_.at(ordinal)->add(std::move(plan));
}

bool HostCopies::failed() const {
  return std::any_of(runs_.begin(), runs_.end(),
                     [](const auto& entry) { return entry.second->failed(); });
}

void HostCopies::complete() {
  for (auto& [ordinal, run] : runs_) run->complete();
}

bool HostCopies::wait_until_ready() {
  return std::all_of(runs_.begin(), runs_.end(),
                     [](auto& entry) { return entry.second->wait_until_ready(); });
}

bool HostCopies::wait_for(const OperationChunk& item) {
  const auto run = runs_.find(item.pool->options().ordinal);
  // Without a context nothing was copied.
  return run == runs_.end() || run->second->wait_for(item.unfinished_copies);
}

Status HostCopies::finish() {
  Status first;
  for (auto& [ordinal, run] : runs_) {
    Status status = run->finish();
    if (first.is_ok()) first = std::move(status);
  }
  return first;
}

Operation::Operation(Engine& engine, std::vector<Pool*> pools)
    : engine_(engine), driver_(engine.driver_), pools_(std::move(pools)) {}

Operation::~Operation() {
  if (!sleeping_) undo_mapping();
  for (OperationChunk& item : chunks_) {
    if (sleeping_ && item.chunk->handle == 0) {
      finish_one_asleep(item);  // its backup is all there is
      continue;
    }
    // A write that failed may have harmed what lies beside it on the disk.
    const bool written = item.to_disk && !item.changed.empty();
    if (sleeping_ && (item.new_image || written || item.distrusted)) item.chunk->drop_backup();
    item.pool->finish(*item.chunk, sleeping_ ? ChunkState::kAwake : ChunkState::kAsleep);
  }
}

std::set<const Chunk*> Operation::take_half_slept() noexcept {
  for (std::size_t i = released_; i < chunks_.size(); ++i) half_slept_.erase(chunks_[i].chunk);
  return std::move(half_slept_);
}

bool Operation::keeps_content(const OperationChunk& item) const {
  return !discard_ && item.pool->options().info.backup != Backup::kNone;
}

CUcontext Operation::context_on(int ordinal) const {
  const auto at = contexts_.find(ordinal);
  return at == contexts_.end() ? nullptr : at->second;
}

std::uint64_t Operation::total_bytes() const {
  std::uint64_t bytes = 0;
  for (const OperationChunk& item : chunks_) bytes += item.chunk->bytes;
  return bytes;
}

std::map<int, std::uint64_t> Operation::bytes_by_device() const {
  std::map<int, std::uint64_t> bytes;
  for (const OperationChunk& item : chunks_)
    bytes[item.pool->options().ordinal] += item.chunk->bytes;
  return bytes;
}

// --- Sleep
// -----------------------------------------------------------------------------------------------------------

Status Operation::sleep(const SleepRequest& request, OperationStats* total) {
  sleeping_ = true;
  discard_ = request.discard;
  outside_ = request.origin == Origin::kOutside;
  Status status = drain();
  if (!status.is_ok()) return status;
  begin_sleep(request);
  step_done("drain");
  if (!chunks_.empty()) status = sleep_begun(total);
  if (!status.is_ok() || !discard_ || request.only_awake || request.at_least_bytes != 0)
    return status;
  std::uint64_t dropped = 0;
  Pool::Backups taken;
  for (Pool* pool : pools_) dropped += pool->discard_sleeping(&taken);
  for (std::unique_ptr<Image>& backup : taken) engine_.drop_later(std::move(backup));
  if (total != nullptr) total->dropped_bytes = dropped;
  return status;
}

Status Operation::sleep_begun(OperationStats* total) {
  Status status = back_up();
  step_done("back up");
  if (status.is_ok()) {
    for (std::size_t i = released_; i < chunks_.size(); ++i) remember_content(chunks_[i]);
    status = seal_files();
    step_done("seal");
  }
  if (status.is_ok()) {
    status = release();
    step_done("release");
  }
  if (!status.is_ok()) return status;
  half_slept_.clear();
  note(true, total);
  finish_sleep();
  return Status::ok();
}

// Pools come in the order in which they go: by name as asked, else by priority. Those of one
// priority go together, what is older first.
void Operation::begin_sleep(const SleepRequest& request) {
  const bool by_name = !request.tags.empty();
  std::uint64_t left = request.at_least_bytes;
  for (auto first = pools_.begin(); first != pools_.end();) {
    auto last = std::next(first);
    while (!by_name && last != pools_.end() && priority_of(**last) == priority_of(**first)) ++last;
    std::uint64_t last_sequence = std::numeric_limits<std::uint64_t>::max();
    if (request.at_least_bytes != 0) {
      if (left == 0) return;
      std::map<std::uint64_t, std::size_t> chunks;
      for (auto pool = first; pool != last; ++pool) chunks.merge((*pool)->awake_chunks());
      for (const auto& [sequence, bytes] : chunks) {
        last_sequence = sequence;
        left -= std::min<std::uint64_t>(left, bytes);
        if (left == 0) break;
      }
    }
    for (; first != last; ++first)
      add_chunks(**first, (*first)->begin_sleep(last_sequence), ChunkState::kAwake);
  }
}

int Operation::priority_of(const Pool& pool) const {
  return engine_.tags_.get(pool.options().tag).priority;
}

// What the pool has begun becomes the operation's, or goes back to how it was `before`.
void Operation::add_chunks(Pool& pool, const std::vector<Chunk*>& begun, ChunkState before) {
  try {
    const std::set<CUcontext> contexts = pool.contexts();
    if (!contexts.empty()) contexts_.emplace(pool.options().ordinal, *contexts.begin());
    chunks_.reserve(chunks_.size() + begun.size());
  } catch (...) {
    for (Chunk* chunk : begun) pool.finish(*chunk, before);
    throw;
  }
  for (Chunk* chunk : begun) chunks_.push_back({&pool, chunk});
}

// Work that runs may write to what is about to be backed up.
Status Operation::drain() {
  std::set<int> devices;
  for (Pool* pool : pools_) {
    if (pool->any_awake()) devices.merge(pool->reached_by());
  }
  if (devices.empty()) return Status::ok();
  std::set<CUcontext>& contexts = drained_;
  const CUresult found = engine_.contexts_on(devices, &contexts);
  if (found != CUDA_SUCCESS) {
    return {
        Code::kDriver,
        fmt::format("nothing was put to sleep: looking for the devices' contexts failed with {}",
                    error_name(driver_, found)),
        found};
  }
  if (contexts.empty()) return Status::ok();
  const std::chrono::milliseconds limit = engine_.options_.drain_timeout;
  const DrainResult drained = wait_for_device(driver_, contexts, limit);
  if (drained.timed_out) {
    return {Code::kBusy,
            fmt::format("nothing was put to sleep: work that the program gave to the device is "
                        "still running after {} ms: try again when it has ended",
                        limit.count())};
  }
  if (drained.result == CUDA_SUCCESS) return Status::ok();
  return {Code::kDriver,
          fmt::format("nothing was put to sleep: waiting for the device's work failed with {}",
                      error_name(driver_, drained.result)),
          drained.result};
}

// Of blocks that are still those which were looked at: a freed one may be in use again.
Ranges Operation::unused_ranges() const {
  UnusedMemory* source = engine_.unused_memory_.load();
  const auto& looked_at = engine_.looked_at_;
  if (source == nullptr || discard_ || looked_at.empty()) return {};
  Ranges ranges;
  for (const Range& each : source->unused()) {
    const Pool* pool = engine_.pool_at(each.begin);
    const auto before = looked_at.find(pool);
    if (before == looked_at.end()) continue;
    const Range inside = pool->in_block(each, before->second);
    if (inside.bytes != 0) ranges.push_back(inside);
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return ranges;
}

// Live ranges, cut at multiples of the unit: the same blocks give the same units every time.
void Operation::plan_units() {
  const Ranges unused = unused_ranges();
  std::uint64_t bytes = 0;
  for (OperationChunk& item : chunks_) {
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
  expect_bytes(bytes);
}

// So many will be looked at (sleeping) or copied (waking): progress is measured by them.
void Operation::expect_bytes(std::uint64_t bytes) {
  std::lock_guard lock(engine_.progress_mutex_);
  engine_.progress_.total_bytes = bytes;
}

// About equal parts, each with chunks of all devices: every bus is busy from the first on.
std::vector<Operation::Stage> Operation::split(const std::vector<OperationChunk*>& items) const {
  const std::uint64_t most =
      std::max<std::uint64_t>(engine_.options_.stage_bytes, HostImage::kUnitBytes);
  std::map<int, std::uint64_t> before;  // by device
  std::vector<Stage> stages;
  for (OperationChunk* item : items) {
    std::uint64_t& bytes = before[item->pool->options().ordinal];
    const std::uint64_t first = most / kFirstStagePart;
    const std::size_t stage = bytes < first ? 0 : 1 + (bytes - first) / most;
    // A chunk that is larger than a stage leaves out the numbers it covers; they stay empty.
    if (stages.size() <= stage) stages.resize(stage + 1);
    stages[stage].push_back(item);
    bytes += item->chunk->bytes;
  }
  stages.erase(std::remove_if(stages.begin(), stages.end(),
                              [](const Stage& stage) { return stage.empty(); }),
               stages.end());
  return stages;
}

// Copying begins before all is hashed, unless host memory may run out: then what it takes is known
// before anything is touched. What is kept on the disk comes last and in one stage, so that its
// space is asked for at once.
std::vector<Operation::Stage> Operation::sleep_stages() {
  std::vector<OperationChunk*> host;
  Stage disk;
  for (OperationChunk& item : chunks_) {
    const bool to_disk =
        item.pool->options().info.backup == Backup::kDisk || item.chunk->disk_image != nullptr;
    to_disk ? disk.push_back(&item) : host.push_back(&item);
  }
  std::vector<Stage> stages;
  if (host_memory_surely_suffices()) {
    stages = split(host);
  } else if (!host.empty()) {
    stages.push_back(std::move(host));
  }
  if (!disk.empty()) stages.push_back(std::move(disk));
  return stages;
}

// Even if all of it changed and none of it is zero.
bool Operation::host_memory_surely_suffices() const {
  std::uint64_t most = 0;
  for (const OperationChunk& item : chunks_) {
    if (item.units.empty()) continue;
    most += round_up(item.chunk->bytes, HostImage::kUnitBytes);
    if (item.chunk->image != nullptr) most -= item.chunk->image->held_bytes();
  }
  return engine_.host_->fits(most);
}

// Stage by stage: what changed is found and given a place, and is copied while the next stage is
// looked at. Once only copies to host memory are left, chunks go as their copies end.
Status Operation::back_up() {
  plan_units();
  const std::vector<Stage> stages = sleep_stages();
  HostCopies copies(engine_, contexts_, Direction::kToHost, {});
  DiskPlans disk;
  Status status;
  for (const Stage& stage : stages) {
    hash_units(stage);
    for (OperationChunk* item : stage) find_changed(*item);
    status = make_images(stage);
    if (status.is_ok()) status = add_copies(stage, copies, disk);
    if (!status.is_ok() || copies.failed()) break;
    for (const OperationChunk* item : stage)
      engine_.progress_done_.fetch_add(item->unchanged_bytes, std::memory_order_relaxed);
  }
  const bool to_disk = std::any_of(chunks_.begin(), chunks_.end(),
                                   [](const OperationChunk& item) { return item.to_disk; });
  if (status.is_ok() && !to_disk && !copies.failed()) status = release_behind(copies);
  const Status copied = copies.finish();
  if (status.is_ok()) status = copied;
  return status.is_ok() ? run_disk(Direction::kToHost, disk) : status;
}

// What is left when a copy has failed stays awake, and finish() has the error.
Status Operation::release_behind(HostCopies& copies) {
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
void Operation::hash_units(const Stage& stage) {
  if (!engine_.options_.hash) return;
  const Clock::time_point began = Clock::now();
  for (const auto& [ordinal, context] : contexts_) {
    Ranges ranges;
    std::vector<ContentUnit*> units;
    for (OperationChunk* item : stage) {
      if (item->pool->options().ordinal != ordinal) continue;
      for (ContentUnit& unit : item->units) {
        ranges.push_back({item->chunk->address + unit.offset, unit.bytes});
        units.push_back(&unit);
      }
    }
    std::vector<ContentHash> hashes;
    const CUresult result = engine_.hasher_->hash(context, ranges, &hashes);
    if (result != CUDA_SUCCESS) {
      if (first_time("hash")) {
        log().warn("content on device {} cannot be hashed ({}): sleeps copy everything", ordinal,
                   error_name(driver_, result));
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
void Operation::find_changed(OperationChunk& item) {
  static const std::vector<ContentUnit> kNothing;
  Image* backup = item.chunk->backup();
  const auto& held = backup == nullptr ? kNothing : backup->content();
  auto old = held.begin();
  std::vector<ContentUnit> unchanged;
  unchanged.reserve(held.size());
  item.changed.clear();
  item.unchanged_bytes = 0;
  for (const ContentUnit& unit : item.units) {
    while (old != held.end() && old->offset < unit.offset) ++old;
    const bool same = old != held.end() && old->offset == unit.offset && old->bytes == unit.bytes &&
                      old->hashed && unit.hashed && old->hash == unit.hash;
    if (same) unchanged.push_back(unit);
    if (same || !unit.stored()) {
      item.unchanged_bytes += unit.bytes;
    } else {
      append({unit.offset, unit.bytes}, &item.changed);
    }
  }
  // From here on the backup is only trusted for what is not going to be overwritten.
  if (backup != nullptr) backup->content() = std::move(unchanged);
}

// A place for the backup of every chunk of the stage that keeps content.
Status Operation::make_images(const Stage& stage) {
  for (OperationChunk* item : stage) choose_tier(*item);
  Status status = make_host_images(stage);
  if (status.is_ok()) status = make_disk_images(stage);
  if (status.is_ok()) return status;
  return {status.code(), "nothing was put to sleep: " + status.message(), status.driver()};
}

// What overflowed to the disk stays there while that saves writing; else host memory is tried
// again.
void Operation::choose_tier(OperationChunk& item) {
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
Status Operation::make_host_images(const Stage& stage) {
  std::uint64_t missing = 0;
  std::vector<OperationChunk*> items;
  for (OperationChunk* item : stage) {
    if (item->units.empty() || item->to_disk) continue;
    std::unique_ptr<HostImage>& image = item->chunk->image;
    if (image == nullptr) {
      item->new_image = true;
      image = HostImage::reserve(driver_, *engine_.host_, context_on(item->pool->options().ordinal),
                                 item->chunk->bytes);
      if (image == nullptr) {
        return {Code::kOutOfHostMemory,
                "the system gave no address space for the backup (see ulimit -v)"};
      }
    }
    missing += image->missing_bytes(item->changed);
    items.push_back(item);
  }
  Status all = engine_.host_->admit(missing);
  // What is awake can do without its backup.
  if (!all.is_ok() && engine_.drop_idle_backups(drained_)) all = engine_.host_->admit(missing);
  if (!all.is_ok() && !engine_.disk_->configured()) return all;
  Admitted admitted(*engine_.host_, all.is_ok() ? missing : 0);
  for (OperationChunk* item : items) {
    HostImage& image = *item->chunk->image;
    if (all.is_ok()) {
      admitted.held(image.add_pieces(item->changed));
      continue;
    }
    const std::uint64_t bytes = image.missing_bytes(item->changed);
    if (engine_.host_->admit(bytes).is_ok()) {
      Admitted alone(*engine_.host_, bytes);
      alone.held(image.add_pieces(item->changed));
    } else {
      move_to_disk(*item);
    }
  }
  return Status::ok();
}

// An older image in host memory goes: the content is on the device, all of it.
void Operation::move_to_disk(OperationChunk& item) {
  item.chunk->drop_backup();
  item.new_image = false;
  item.to_disk = true;
  find_changed(item);
}

// An image in its pool's file for each chunk, and space for what has to be written. The files'
// indexes are void until they are sealed.
Status Operation::make_disk_images(const Stage& stage) {
  std::map<Pool*, std::vector<OperationChunk*>> by_pool;
  for (OperationChunk* item : stage) {
    if (item->to_disk) by_pool[item->pool].push_back(item);
  }
  for (auto& [pool, items] : by_pool) {
    const PoolOptions& options = pool->options();
    std::shared_ptr<DiskFile> file;
    Status status = engine_.disk_->file_for(options.tag, options.info.name, options.ordinal, &file);
    for (OperationChunk* item : items) {
      Chunk& chunk = *item->chunk;
      if (!status.is_ok() || chunk.disk_image != nullptr) continue;
      item->new_image = true;
      status = DiskImage::reserve(file, chunk.address, chunk.bytes, &chunk.disk_image);
    }
    if (status.is_ok()) status = get_disk_space(items);
    if (status.is_ok()) status = file->begin_writing();
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

// Of one pool. The file system is asked for all of it first, so that a refusal takes nothing.
Status Operation::get_disk_space(const std::vector<OperationChunk*>& items) {
  std::uint64_t missing = 0;
  for (OperationChunk* item : items)
    missing += item->chunk->disk_image->missing_bytes(item->changed);
  if (missing == 0) return Status::ok();
  std::uint64_t available = 0;
  Status status = items.front()->chunk->disk_image->file().available_bytes(&available);
  if (status.is_ok() && available < missing) {
    status = {Code::kIo,
              fmt::format("the backup needs {:.2f} GiB more on the disk, and the file system of "
                          "DORMOUSE_DISK_DIR has only {:.2f} GiB left: free some, or sleep fewer "
                          "tags",
                          gib(missing), gib(available))};
  }
  for (OperationChunk* item : items) {
    if (status.is_ok()) status = item->chunk->disk_image->get_space(item->changed);
  }
  return status;
}

// Sleeping: what changed goes to the backups. Waking: what they store comes back.
Status Operation::add_copies(const Stage& stage, HostCopies& host, DiskPlans& disk) {
  std::map<int, std::vector<PieceCopy>> plans;
  for (OperationChunk* item : stage) {
    const Image* backup = item->chunk->backup();
    if (backup == nullptr) continue;
    if (!sleeping_) {
      item->changed.clear();
      for (const ContentUnit& unit : backup->content()) {
        if (unit.stored()) append({unit.offset, unit.bytes}, &item->changed);
      }
    }
    const int ordinal = item->pool->options().ordinal;
    if (item->chunk->disk_image != nullptr) {
      Status status = item->chunk->disk_image->file().reopen_if_lost();
      if (!status.is_ok()) return status;
      plan_disk_copies(*item->chunk->disk_image, item->changed, &disk[ordinal]);
    } else {
      plan_copies(*item->chunk->image, item->chunk->address, item->changed,
                  &item->unfinished_copies, &plans[ordinal]);
    }
  }
  for (auto& [ordinal, plan] : plans) host.add(ordinal, std::move(plan));
  return Status::ok();
}

Status Operation::run_disk(Direction direction, const DiskPlans& disk) {
  const EngineOptions& options = engine_.options_;
  for (const auto& [ordinal, plan] : disk) {
    Status status = run_disk_copies(driver_, context_on(ordinal), direction, plan,
                                    options.threads(), options.huge_pages, &engine_.progress_done_);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

void Operation::remember_content(OperationChunk& item) {
  Image* backup = item.chunk->backup();
  if (backup != nullptr) backup->content() = std::move(item.units);
}

// When the program frees a block that sleeps in the file, the file's index is void again.
Status Operation::seal_file(DiskFile& file) {
  constexpr int kTries = 100;
  Status status;
  for (int i = 0; i < kTries; ++i) {
    status = file.seal();
    if (!status.is_ok() || !engine_.options_.verify) return status;
    status = file.check();
    if (status.is_ok() || file.is_sealed()) return status;
  }
  return status;
}

// What was written is on the disk, and each file can be checked by itself; with DORMOUSE_VERIFY it
// is, while the content is still on the device.
Status Operation::seal_files() {
  std::set<DiskFile*> files;
  for (OperationChunk& item : chunks_) {
    if (item.to_disk) files.insert(&item.chunk->disk_image->file());
  }
  for (DiskFile* file : files) {
    Status status = seal_file(*file);
    if (status.is_ok()) continue;
    for (OperationChunk& item : chunks_) {
      item.distrusted |= item.to_disk && &item.chunk->disk_image->file() == file;
    }
    return {status.code(), "nothing was put to sleep: " + status.message()};
  }
  return Status::ok();
}

// From here on content is safe in the images. If the driver refuses to unmap a chunk, it and those
// after it stay awake; those before it are asleep, and the engine wakes them again.
Status Operation::release() {
  plan_release();
  Status status;
  while (status.is_ok() && released_ < chunks_.size()) status = release_next();
  return status;
}

// Before the first chunk goes: what follows must not run out of memory.
void Operation::plan_release() {
  if (!half_slept_.empty()) return;
  std::set<const Chunk*> all;
  for (const OperationChunk& item : chunks_) all.insert(item.chunk);
  half_slept_.swap(all);
}

Status Operation::release_next() {
  const Clock::time_point began = Clock::now();
  OperationChunk& item = chunks_[released_];
  const CUresult result = item.pool->chunks().unmap(*item.chunk);
  releasing_ += Clock::now() - began;
  if (result == CUDA_SUCCESS) {
    ++released_;
    return Status::ok();
  }
  return {Code::kDriver, fmt::format("cuMemUnmap failed with {}", error_name(driver_, result)),
          result};
}

void Operation::finish_one_asleep(OperationChunk& item) noexcept {
  item.chunk->discarded = item.chunk->backup() == nullptr;
  item.chunk->slept_outside = outside_;
  item.pool->finish(*item.chunk, ChunkState::kAsleep);
}

void Operation::finish_sleep() noexcept {
  for (OperationChunk& item : chunks_) finish_one_asleep(item);
  chunks_.clear();
}

// --- Wake
// ------------------------------------------------------------------------------------------------------------

Status Operation::wake(const std::set<const Chunk*>* only, OperationStats* total) {
  begin_wake(only);
  if (chunks_.empty()) return Status::ok();
  Status status = create_all();
  step_done("create");
  if (status.is_ok()) status = restore();
  step_done("map and copy");
  if (status.is_ok()) status = zero();
  step_done("zero");
  if (!status.is_ok()) {
    return {status.code(), "everything stays asleep and intact, try again: " + status.message(),
            status.driver()};
  }
  if (engine_.options_.verify) verify();
  note(false, total);
  finish_wake();
  return Status::ok();
}

void Operation::begin_wake(const std::set<const Chunk*>* only) {
  for (Pool* pool : pools_) {
    const std::size_t first = chunks_.size();
    add_chunks(*pool, pool->begin_wake(only), ChunkState::kAsleep);
    for (std::size_t i = first; i < chunks_.size(); ++i) {
      // A chunk whose unmapping failed on the way back from an earlier wake has its memory still.
      chunks_[i].mapped = chunks_[i].chunk->handle != 0;
    }
  }
}

// All or nothing: memory for every chunk that has none, before anything is mapped or copied.
Status Operation::create_all() {
  for (OperationChunk& item : chunks_) {
    if (item.mapped) continue;
    Status status = create_one(item);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status Operation::create_one(OperationChunk& item) {
  const int ordinal = item.pool->options().ordinal;
  ScopedContext current(driver_, context_on(ordinal));
  CUresult result = item.pool->chunks().create(*item.chunk);
  if (result == CUDA_ERROR_OUT_OF_MEMORY && engine_.release_retained(ordinal)) {
    result = item.pool->chunks().create(*item.chunk);
  }
  if (result == CUDA_SUCCESS) return Status::ok();
  if (result != CUDA_ERROR_OUT_OF_MEMORY) {
    return {Code::kDriver, fmt::format("cuMemCreate failed with {}", error_name(driver_, result)),
            result};
  }
  return {Code::kOutOfDeviceMemory,
          fmt::format("device {} has too little free memory for the {:.2f} GiB to be woken: free "
                      "some, or put other memory to sleep first",
                      ordinal, gib(total_bytes())),
          result};
}

// Stage by stage: a stage is copied while the next is mapped.
Status Operation::restore() {
  std::vector<OperationChunk*> items;
  std::uint64_t bytes = 0;
  for (OperationChunk& item : chunks_) {
    items.push_back(&item);
    const Image* backup = item.chunk->backup();
    if (backup == nullptr) continue;
    for (const ContentUnit& unit : backup->content()) bytes += unit.stored() ? unit.bytes : 0;
  }
  expect_bytes(bytes);
  HostCopies copies(engine_, contexts_, Direction::kToDevice, bytes_by_device());
  DiskPlans disk;
  Status status;
  for (const Stage& stage : split(items)) {
    const Clock::time_point began = Clock::now();
    status = map(stage);
    if (status.is_ok()) status = set_access(stage);
    mapping_ += Clock::now() - began;
    if (status.is_ok()) status = add_copies(stage, copies, disk);
    if (!status.is_ok() || copies.failed()) break;
  }
  const Status copied = copies.finish();
  if (status.is_ok()) status = copied;
  return status.is_ok() ? run_disk(Direction::kToDevice, disk) : status;
}

Status Operation::map(const Stage& stage) {
  for (OperationChunk* item : stage) {
    if (item->mapped) continue;
    ScopedContext current(driver_, context_on(item->pool->options().ordinal));
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
Status Operation::set_access(const Stage& stage) {
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
Status Operation::zero() {
  for (const auto& [ordinal, context] : contexts_) {
    Ranges ranges;
    for (const OperationChunk& item : chunks_) {
      if (item.pool->options().ordinal != ordinal) continue;
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
    Status status = zero_ranges(ordinal, ranges);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status Operation::zero_ranges(int ordinal, const Ranges& ranges) {
  if (ranges.empty()) return Status::ok();
  ScopedContext current(driver_, context_on(ordinal));
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
void Operation::verify() {
  for (const auto& [ordinal, context] : contexts_) {
    Ranges ranges;
    std::vector<ContentHash> expected;
    std::vector<OperationChunk*> owners;
    for (OperationChunk& item : chunks_) {
      const Image* backup = item.chunk->backup();
      if (item.pool->options().ordinal != ordinal || backup == nullptr) continue;
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
    const CUresult result = engine_.hasher_->hash(context, ranges, &found);
    if (result != CUDA_SUCCESS) {
      log().error("DORMOUSE_VERIFY: woken memory on device {} could not be checked: {}", ordinal,
                  error_name(driver_, result));
      for (std::size_t i = 0; i < ranges.size(); ++i) {
        owners[i]->unchecked_bytes += ranges[i].bytes;
      }
      continue;
    }
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      if (found[i] == expected[i]) continue;
      owners[i]->differing_bytes += ranges[i].bytes;
      log().error("DORMOUSE_VERIFY: {} bytes at {:#x} differ from what fell asleep",
                  ranges[i].bytes, ranges[i].begin);
    }
  }
}

// Waking failed: the physical memory that this operation made goes back; the content is in the
// images still.
void Operation::undo_mapping() {
  for (OperationChunk& item : chunks_) {
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

void Operation::finish_wake() noexcept {
  const bool keep = engine_.options_.keep_backups;
  for (OperationChunk& item : chunks_) {
    if (!keep) item.chunk->drop_backup();
    item.pool->finish(*item.chunk, ChunkState::kAwake);
  }
  chunks_.clear();
}

// --- Figures
// ---------------------------------------------------------------------------------------------------------

void Operation::step_done(const char* name) noexcept {
  const Clock::time_point now = Clock::now();
  try {
    steps_ += fmt::format("{}{} {:.2f} ms", steps_.empty() ? "" : ", ", name,
                          milliseconds(now - step_began_));
  } catch (const std::bad_alloc&) {
    // One figure less in the log.
  }
  step_began_ = now;
}

// What has been done does not fail for want of figures about it.
void Operation::note(bool sleep, OperationStats* total) noexcept {
  try {
    count(sleep, total);
  } catch (const std::bad_alloc&) {
    if (first_time("figures")) log().warn("out of host memory: figures of operations are missing");
  }
}

void Operation::count(bool sleep, OperationStats* total) {
  const double seconds = std::chrono::duration<double>(Clock::now() - began_).count();
  OperationStats all;
  std::map<Pool*, OperationStats> by_pool;
  for (const OperationChunk& item : chunks_) {
    std::uint64_t copied = 0;
    for (const Range& range : item.changed) copied += range.bytes;
    for (OperationStats* stats : {&all, &by_pool[item.pool]}) {
      stats->bytes += item.chunk->bytes;
      stats->copied_bytes += copied;
      stats->unchanged_bytes += item.unchanged_bytes;
      stats->differing_bytes += item.differing_bytes;
      stats->unchecked_bytes += item.unchecked_bytes;
      ++stats->chunks;
    }
  }
  for (auto& [pool, stats] : by_pool) {
    stats.seconds = seconds;
    stats.unix_time = unix_now();
    sleep ? pool->note_sleep(stats) : pool->note_wake(stats);
  }
  all.seconds = seconds;
  all.unix_time = unix_now();
  const std::string beside = sleep ? fmt::format("hashing {:.2f} ms, releasing {:.2f} ms",
                                                 milliseconds(hashing_), milliseconds(releasing_))
                                   : fmt::format("mapping {:.2f} ms", milliseconds(mapping_));
  log().debug("{} of {:.2f} GiB in {} chunks: {}; of these, {}", sleep ? "sleep" : "wake",
              gib(all.bytes), all.chunks, steps_, beside);
  if (total != nullptr) *total = all;
}

}  // namespace dormouse
