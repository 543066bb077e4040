// The engine: pools by (tag, device), the lock-free table of their address ranges, and operations
// over them.
#include "core/sleep/engine.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "core/backup/device_kernels.h"
#include "core/backup/disk_store.h"
#include "core/backup/host_image.h"
#include "core/log.h"
#include "core/memory/mapped_memory.h"
#include "core/memory/pool.h"
#include "core/sleep/background.h"
#include "core/sleep/gate.h"
#include "core/sleep/sleep.h"
#include "core/sleep/wake.h"
#include "core/threads.h"

namespace dormouse {
namespace {

constexpr const char* kStaysAsleep = "everything stays asleep and intact, try again: ";

// `what` has not happened, for want of host memory (as a rule).
Status failed(Code code, const char* what, const std::exception& error) noexcept {
  try {
    return {code, fmt::format("{}{}", what, error.what())};
  } catch (...) {
    return {code, {}};
  }
}

}  // namespace

unsigned EngineOptions::threads() const noexcept {
  return copy_threads != 0 ? copy_threads : default_threads();
}

Engine::Engine(const Driver& driver, TagTable& tags, EngineOptions options,
               const DiskCalls& disk_calls)
    : driver_(driver),
      tags_(tags),
      options_(std::move(options)),
      contexts_(driver),
      host_(std::make_unique<HostMemory>(options_.host_limit_bytes, options_.huge_pages,
                                         options_.piece_bytes)),
      disk_(std::make_unique<DiskStore>(disk_calls, options_.disk_directory,
                                        options_.disk_directory_option)),
      kernels_(std::make_unique<DeviceKernels>(driver)),
      hasher_(std::make_unique<ContentHasher>(driver, *kernels_)),
      mapped_(std::make_unique<MappedMemory>(static_cast<PoolsOwner&>(*this), driver)),
      reservations_(std::make_unique<std::array<Reservation, kMaxReservations>>()),
      env_{
          .driver = driver_,
          .options = options_,
          .tags = tags_,
          .contexts = contexts_,
          .waits = waits_,
          .host = *host_,
          .reaper = reaper_,
          .disk = *disk_,
          .kernels = *kernels_,
          .hasher = *hasher_,
          .progress = progress_,
          .gate_closed = gate_closed_,
          .reached_from = [this](const std::set<int>& devices) { return reached_from(devices); },
          .release_retained = [this](int device) { return release_retained(device); },
          .drop_idle_backups = [this](const std::set<int>& devices) { drop_idle_backups(devices); },
          .unused_ranges = [this] { return unused_ranges(); }},
      background_(std::make_unique<Background>(env_, operation_lock_, transition_lock_,
                                               [this] { return all_pools(); })),
      waits_(driver, contexts_, captures_, options_.capture_timeout) {
  contexts_.when_gone([this](CUcontext context, bool primary) { context_lost(context, primary); });
  host_->set_limit_option(options_.host_limit_option);
  disk_->remove_leftovers();
}

Engine::~Engine() {
  stop_background();
}

// --- Allocation
// ------------------------------------------------------------------------------------------------------

Pool* Engine::pool_for(TagId tag, CUdevice device, CUresult* error) {
  MutexLock lock(pools_mutex_);
  for (const auto& pool : pools_) {
    if (pool->options().tag == tag && pool->options().device == device) return pool.get();
  }
  PoolOptions options;
  options.tag = tag;
  options.info = tags_.get(tag);
  options.device = device;
  options.ordinal = device;  // the driver's handle of a device is its ordinal
  options.next_sequence = &next_sequence_;
  options.waits = &waits_;
  options.work = this;
  options.drain_timeout = options_.drain_timeout;
  options.max_chunk_bytes = options_.max_chunk_bytes;
  options.retain_bytes = options_.retain_bytes;
  if (options.info.name.empty()) {
    *error = CUDA_ERROR_INVALID_VALUE;
    return nullptr;
  }
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  int supported = 1;
  if (driver_.cuDeviceGetAttribute(&supported,
                                   CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                                   device) == CUDA_SUCCESS &&
      supported == 0) {
    *error = CUDA_ERROR_NOT_SUPPORTED;
    return nullptr;
  }
  std::size_t total = 0;
  *error = driver_.cuMemGetAllocationGranularity(&options.granularity, &properties,
                                                 CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  if (*error == CUDA_SUCCESS) *error = driver_.cuDeviceTotalMem_v2(&total, device);
  if (*error != CUDA_SUCCESS) return nullptr;
  options.device_bytes = total;
  int integrated = 0;
  options.unified_memory = driver_.cuDeviceGetAttribute(&integrated, CU_DEVICE_ATTRIBUTE_INTEGRATED,
                                                        device) == CUDA_SUCCESS &&
                           integrated != 0;
  if (options.unified_memory && options.info.backup == Backup::kHost && first_time("unified")) {
    log().warn(
        "GPU {} shares the host's memory: memory that sleeps with a backup in host memory frees "
        "next to nothing, and its backup is dropped when it wakes. Give tags the backup disk or "
        "none to free memory",
        device);
  }
  int rdma = 0;
  if (driver_.cuDeviceGetAttribute(&rdma,
                                   CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
                                   device) == CUDA_SUCCESS) {
    options.gpu_direct_rdma = rdma != 0;
  }
  for (const auto& [pair, reaches] : reaches_) {
    if (pair.second == device && has_access(reaches)) options.peers.push_back(pair.first);
  }
  pools_.push_back(std::make_unique<Pool>(
      driver_, std::move(options),
      [this](Pool* pool, const Range& range) { return add_reservation(pool, range); }));
  return pools_.back().get();
}

CUresult Engine::add_reservation(Pool* pool, const Range& range) noexcept {
  MutexLock lock(reservations_mutex_);
  const std::size_t count = reservation_count_.load(std::memory_order_relaxed);
  if (count == kMaxReservations) return CUDA_ERROR_OUT_OF_MEMORY;
  (*reservations_)[count] = {range, pool};
  reservation_count_.store(count + 1, std::memory_order_release);
  return CUDA_SUCCESS;
}

Pool* Engine::pool_at(CUdeviceptr address) const noexcept {
  const std::size_t count = reservation_count_.load(std::memory_order_acquire);
  for (std::size_t i = 0; i < count; ++i) {
    const Reservation& each = (*reservations_)[i];
    if (each.range.contains(address)) return each.pool;
  }
  return nullptr;
}

bool Engine::owns(CUdeviceptr address) const noexcept {
  return pool_at(address) != nullptr;
}

bool Engine::find(CUdeviceptr address, BlockInfo* out) const noexcept {
  const Pool* pool = pool_at(address);
  Block block;
  if (pool == nullptr || !pool->find(address, &out->address, &block, &out->asleep)) return false;
  out->bytes = block.bytes;
  out->tag = pool->options().tag;
  out->device = pool->options().ordinal;
  out->context = block.context;
  out->sync_memops = block.sync_memops;
  out->buffer_id = block.buffer_id;
  return true;
}

std::vector<BlockInfo> Engine::blocks_of(TagId tag) const {
  std::vector<BlockInfo> blocks;
  for (const Pool* pool : all_pools()) {
    if (pool->options().tag != tag) continue;
    for (const CUdeviceptr address : pool->block_addresses()) {
      BlockInfo block;
      if (find(address, &block)) blocks.push_back(block);
    }
  }
  return blocks;
}

void Engine::set_sync_memops(CUdeviceptr address, bool on) noexcept {
  if (Pool* pool = pool_at(address)) pool->set_sync_memops(address, on);
}

const void* Engine::host_backup(CUdeviceptr address, std::size_t bytes) const noexcept {
  const Pool* pool = pool_at(address);
  return pool == nullptr ? nullptr : pool->host_backup(address, bytes);
}

std::uint64_t Engine::retained_bytes(int device) const noexcept {
  MutexLock lock(pools_mutex_);
  std::uint64_t bytes = 0;
  for (const auto& pool : pools_) {
    if (pool->options().ordinal == device) bytes += pool->empty_bytes();
  }
  return bytes;
}

std::vector<Pool*> Engine::pools_on(int device) const {
  MutexLock lock(pools_mutex_);
  std::vector<Pool*> pools;
  for (const auto& pool : pools_) {
    if (pool->options().ordinal == device) pools.push_back(pool.get());
  }
  return pools;
}

std::vector<Pool*> Engine::all_pools() const {
  MutexLock lock(pools_mutex_);
  std::vector<Pool*> pools;
  for (const auto& pool : pools_) pools.push_back(pool.get());
  return pools;
}

// --- Sleep and wake
// --------------------------------------------------------------------------------------------------

Status Engine::check_tags(const std::vector<std::string>& tags) const {
  for (const std::string& tag : tags) {
    if (tags_.known(tag)) continue;
    std::string known;
    for (const std::string& name : tags_.names()) known += (known.empty() ? "" : ", ") + name;
    return {Code::kNotFound, fmt::format("there is no tag '{}'; the tags here are: {}", tag,
                                         known.empty() ? "none" : known)};
  }
  return Status::ok();
}

// In the order in which the tags are named; without names, by priority, lowest first, then by first
// use.
std::vector<Pool*> Engine::select(const std::vector<std::string>& tags) const {
  std::vector<Pool*> pools = all_pools();
  if (tags.empty()) {
    std::stable_sort(pools.begin(), pools.end(), [&](const Pool* a, const Pool* b) {
      return tags_.get(a->options().tag).priority < tags_.get(b->options().tag).priority;
    });
    return pools;
  }
  std::vector<Pool*> selected;
  for (const std::string& tag : tags) {
    for (Pool* pool : pools) {
      if (pool->options().info.name == tag &&
          std::find(selected.begin(), selected.end(), pool) == selected.end()) {
        selected.push_back(pool);
      }
    }
  }
  return selected;
}

Status Engine::sleep(const SleepRequest& request, OperationStats* report) {
  const CancellationOff cancellation;
  std::lock_guard operation(operation_lock_);
  Status status;
  try {
    status = sleep_locked(request, report);
  } catch (const std::exception& error) {
    status = failed(Code::kOutOfHostMemory, "", error);
  }
  update_gate(Transition(transition_lock_));
  return status;
}

Status Engine::sleep_locked(const SleepRequest& request, OperationStats* report) {
  if (report != nullptr) *report = {};
  Status status = check_tags(request.tags);
  if (!status.is_ok()) return status;
  const std::vector<Pool*> pools = select(request.tags);
  look_for_unused(request, pools);
  const Transition transition(transition_lock_);
  status = close_gate(transition, request.origin);
  if (!status.is_ok()) return status;
  mapped_->adopt_rest(transition);
  std::set<const Chunk*> half_slept;
  try {
    const ProgressBoard::Running running(progress_, "sleep");
    SleepOperation run(env_, transition, pools, request);
    try {
      status = run.run(report);
    } catch (const std::exception& error) {
      status = failed(Code::kOutOfHostMemory, "", error);
    }
    half_slept = run.take_half_slept();
  } catch (const std::exception& error) {
    status = failed(Code::kOutOfHostMemory, "", error);
  }
  if (status.is_ok() && request.discards_sleeping()) {
    const std::uint64_t dropped = mapped_->discard_unmapped(request.tags);
    if (report != nullptr) report->dropped_bytes += dropped;
  }
  if (status.is_ok() && report != nullptr) {
    try {
      for (const TagStats& stats : stats_of(pools)) {
        for (const HeldBytes& each : stats.held) add_held(&report->held, each.by, each.bytes);
      }
    } catch (const std::bad_alloc&) {
      report->held.clear();  // the sleep stands all the same; only these figures are missing
    }
  }
  if (status.is_ok()) return status;
  if (!half_slept.empty()) {
    const Status back = wake_chunks(transition, pools, half_slept);
    if (!back.is_ok()) {
      return {status.code(),
              fmt::format("some memory sleeps and some is awake, all of it intact: {}; bringing it "
                          "back failed too: {}. Wake it to use it",
                          status.message(), back.message()),
              status.driver()};
    }
    if (request.discard) {
      return {status.code(),
              fmt::format("nothing sleeps, but part of what was to be discarded reads as zero now: "
                          "{}",
                          status.message()),
              status.driver()};
    }
  }
  return {status.code(), "nothing was put to sleep: " + status.message(), status.driver()};
}

// For whom the gate closes, captures too: none runs when it is closed, since its thread's launches
// would wait there. With a running one it is opened again, within the limit.
Status Engine::close_gate(const Transition&, Origin origin) {
  const auto deadline = std::chrono::steady_clock::now() + options_.capture_timeout;
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (!captures_.wait_for_none(std::max(left, std::chrono::milliseconds(0))))
      return {Code::kBusy, kCapturing};
    if (origin == Origin::kProgram || gate_closed_) return Status::ok();
    if (!gate::close(options_.drain_timeout)) {
      return {Code::kBusy,
              fmt::format(
                  "a call of the program into the driver did not return within {} ms: try again",
                  options_.drain_timeout.count())};
    }
    gate_closed_ = true;
    if (!captures_.any()) return Status::ok();
    gate_closed_ = false;
    gate::open();
  }
}

// Before the gate closes: whoever is asked may need a thread of the program that would wait there.
void Engine::look_for_unused(const SleepRequest& request,
                             const std::vector<Pool*>& pools) noexcept {
  looked_at_.clear();
  UnusedMemory* source = unused_memory_.load();
  const bool from_outside = request.origin == Origin::kOutside;
  if (source == nullptr || (request.discard && !from_outside)) return;
  try {
    for (const Pool* pool : pools) {
      if (pool->any_awake()) looked_at_.emplace(pool, pool->next_number());
    }
  } catch (const std::bad_alloc&) {
    looked_at_.clear();  // all of it is backed up
  }
  if (!looked_at_.empty()) source->look(from_outside);
}

// Of blocks that are still those which were looked at: a freed one may be in use again.
Ranges Engine::unused_ranges() const {
  UnusedMemory* source = unused_memory_.load();
  if (source == nullptr || looked_at_.empty()) return {};
  Ranges ranges;
  for (const Range& each : source->unused()) {
    const Pool* pool = pool_at(each.begin);
    const auto before = looked_at_.find(pool);
    if (before == looked_at_.end()) continue;
    const Range inside = pool->in_block(each, before->second);
    if (inside.bytes != 0) ranges.push_back(inside);
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return ranges;
}

Status Engine::wake_chunks(const Transition& transition, std::vector<Pool*> pools,
                           const std::set<const Chunk*>& chunks) {
  try {
    WakeOperation run(env_, transition, std::move(pools));
    return run.run([&](const Chunk& chunk) { return chunks.count(&chunk) != 0; }, nullptr);
  } catch (const std::exception& error) {
    return failed(Code::kOutOfHostMemory, "", error);
  }
}

Status Engine::wake_chunk(const Transition& transition, Pool& pool, const Chunk& chunk) {
  Status status = wake_chunks(transition, {&pool}, {&chunk});
  update_gate(transition);
  background_->woke();
  return status;
}

Status Engine::wake(const WakeRequest& request, OperationStats* report) {
  const CancellationOff cancellation;
  std::lock_guard operation(operation_lock_);
  Status status;
  try {
    status = wake_locked(request, report);
  } catch (const std::exception& error) {
    status = failed(Code::kOutOfHostMemory, kStaysAsleep, error);
  }
  update_gate(Transition(transition_lock_));
  if (status.is_ok()) background_->woke();
  return status;
}

Status Engine::wake_locked(const WakeRequest& request, OperationStats* report) {
  if (report != nullptr) *report = {};
  Status status = check_tags(request.tags);
  if (!status.is_ok()) return status;
  const Transition transition(transition_lock_);
  const ProgressBoard::Running running(progress_, "wake");
  std::vector<Pool*> pools = select(request.tags);
  if (request.tags.empty())
    std::reverse(pools.begin(), pools.end());  // what matters most comes first
  WakeOperation run(env_, transition, std::move(pools));
  status = run.run(
      [&](const Chunk& chunk) { return !request.only_slept_outside || chunk.slept_outside; },
      report);
  if (status.is_ok()) return status;
  return {status.code(), kStaysAsleep + status.message(), status.driver()};
}

// The gate is closed while anything sleeps that the program did not put to sleep itself.
void Engine::update_gate(const Transition&) noexcept {
  if (!gate_closed_ || any_slept_outside()) return;
  gate_closed_ = false;
  gate::open();
}

bool Engine::any_slept_outside() const noexcept {
  MutexLock lock(pools_mutex_);
  return std::any_of(pools_.begin(), pools_.end(),
                     [](const auto& pool) { return pool->any_slept_outside(); });
}

bool Engine::is_sleeping(const std::vector<std::string>& tags) const {
  const std::vector<Pool*> pools = select(tags);
  return std::any_of(pools.begin(), pools.end(),
                     [](const Pool* pool) { return pool->any_asleep(); });
}

// What waits for running work does so with a limit, and holds no lock that others need longer.
Status Engine::trim(bool backups) {
  const CancellationOff cancellation;
  try {
    std::lock_guard operation(operation_lock_);
    std::set<int> devices;
    for (const Pool* pool : all_pools()) devices.insert(pool->options().ordinal);
    const WaitResult waited = waits_.wait_for(devices, options_.drain_timeout);
    if (waited.captured) return {Code::kBusy, kCapturing};
    if (waited.timed_out) {
      return {Code::kBusy,
              fmt::format("nothing was given back: work that the program gave to the device is "
                          "still running after {} ms: try again when it has ended",
                          options_.drain_timeout.count())};
    }
    for (Pool* pool : all_pools()) {
      pool->release_empty(0, options_.drain_timeout);
      if (backups) pool->drop_backups(false);
    }
  } catch (const std::exception& error) {
    return failed(Code::kOutOfHostMemory, "not all was given back: ", error);
  }
  reaper_.wait(options_.drain_timeout);
  return Status::ok();
}

// For an operation that found too little host memory: backups of what is awake and not part of it
// go, on devices whose work has been waited for.
void Engine::drop_idle_backups(const std::set<int>& devices) {
  for (Pool* pool : all_pools()) {
    if (devices.count(pool->options().ordinal) != 0) pool->drop_backups(false);
  }
  reaper_.wait(options_.drain_timeout);
}

// --- Background work
// -------------------------------------------------------------------------------------------------

void Engine::region_ended(TagId tag) noexcept {
  if (options_.prepare && tags_.get(tag).backup == Backup::kHost) background_->prepare();
}

void Engine::set_disk_directory(const std::string& directory) {
  const CancellationOff cancellation;
  disk_->set_directory(directory);
  disk_->remove_leftovers();
}

void Engine::remove_files() noexcept {
  disk_->remove_files();
}

void Engine::stop_background(std::chrono::milliseconds at_most) noexcept {
  background_->stop(at_most);
  reaper_.stop(at_most);
}

// --- Figures
// ---------------------------------------------------------------------------------------------------------

std::vector<TagStats> Engine::stats() const {
  return stats_of(all_pools());
}

std::vector<TagStats> Engine::stats_of(const std::vector<Pool*>& pools) const {
  std::vector<TagStats> stats;
  for (const Pool* pool : pools) {
    stats.push_back(pool->stats());
    mapped_->add_figures(&stats.back());
  }
  return stats;
}

}  // namespace dormouse
