// The engine: pools by (tag, device), the lock-free table of their address ranges, and operations
// over them.
#include "core/sleep/engine.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <map>
#include <utility>

#include "core/backup/device_kernels.h"
#include "core/backup/disk_store.h"
#include "core/backup/host_image.h"
#include "core/context.h"
#include "core/log.h"
#include "core/memory/mapped_memory.h"
#include "core/memory/pool.h"
#include "core/sleep/drain.h"
#include "core/sleep/gate.h"
#include "core/sleep/operation.h"
#include "core/threads.h"

namespace dormouse {
namespace {

// Shows the running operation to those who wait for it.
class ScopedProgress {
 public:
  ScopedProgress(std::mutex& mutex, Progress& progress,
                 std::chrono::steady_clock::time_point& began, std::atomic<std::uint64_t>& done,
                 const char* operation)
      : mutex_(mutex), progress_(progress) {
    std::lock_guard lock(mutex_);
    done.store(0, std::memory_order_relaxed);
    progress_ = Progress{true, operation, 0, 0, 0};
    began = std::chrono::steady_clock::now();
  }
  ~ScopedProgress() {
    std::lock_guard lock(mutex_);
    progress_ = Progress{};
  }
  ScopedProgress(const ScopedProgress&) = delete;
  ScopedProgress& operator=(const ScopedProgress&) = delete;

 private:
  std::mutex& mutex_;
  Progress& progress_;
};

// Background preparation looks again after this time whether those who asked have gone.
constexpr std::chrono::milliseconds kGivingWay{1};
// Between looks at what the device has passed; twice as long each time.
constexpr std::chrono::milliseconds kFirstPause{1};
constexpr std::chrono::milliseconds kLongestPause{100};
// And whether backups that an operation was using can go.
constexpr std::chrono::milliseconds kLookAgain{100};

// `what` has not happened, for want of host memory (as a rule).
Status failed(Code code, const char* what, const std::exception& error) noexcept {
  try {
    return {code, fmt::format("{}{}", what, error.what())};
  } catch (...) {
    return {code, {}};
  }
}

}  // namespace

AskingLock::AskingLock(std::mutex& mutex, std::atomic<int>& asking)
    : lock_(mutex, std::defer_lock) {
  asking.fetch_add(1);
  lock_.lock();
  asking.fetch_sub(1);
}

unsigned EngineOptions::threads() const noexcept {
  return copy_threads != 0 ? copy_threads : default_threads();
}

Engine::Engine(const Driver& driver, TagTable& tags, EngineOptions options,
               const DiskCalls& disk_calls)
    : driver_(driver),
      tags_(tags),
      options_(std::move(options)),
      host_(std::make_unique<HostMemory>(options_.host_limit_bytes, options_.huge_pages,
                                         options_.piece_bytes)),
      disk_(std::make_unique<DiskStore>(disk_calls, options_.disk_directory)),
      kernels_(std::make_unique<DeviceKernels>(driver)),
      hasher_(std::make_unique<ContentHasher>(driver, *kernels_)),
      mapped_(std::make_unique<MappedMemory>(*this, driver)),
      reservations_(std::make_unique<std::array<Reservation, kMaxReservations>>()) {
  disk_->remove_leftovers();
}

Engine::~Engine() {
  stop_background();
}

// --- Allocation
// ------------------------------------------------------------------------------------------------------

CUresult Engine::allocate(TagId tag, std::size_t bytes, const CUstream* stream,
                          CUdeviceptr* out) noexcept {
  if (out == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  try {
    CUcontext context = nullptr;
    CUresult result = driver_.cuCtxGetCurrent(&context);
    if (result != CUDA_SUCCESS) return result;
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    CUdevice device = 0;
    result = driver_.cuCtxGetDevice(&device);
    if (result != CUDA_SUCCESS) return result;
    Pool* pool = pool_for(tag, device, &result);
    if (pool == nullptr) return result;
    StreamName name;
    const StreamName* const named = name_stream(stream, &name) ? &name : nullptr;
    const auto served = [&] {
      result = pool->allocate(bytes, context, named, out);
      return result != CUDA_ERROR_OUT_OF_MEMORY;
    };
    if (served() || (release_retained_now(device) && served())) return result;
    retry_while_freed_memory_waits(device, [&] {
      release_retained_now(device);
      return served();
    });
    return result;
  } catch (const std::exception& error) {
    log().error("an allocation of {} bytes failed inside Dormouse: {}", bytes, error.what());
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
}

// Without a number of its own a stream cannot be told from a later one at the same address.
bool Engine::name_stream(const CUstream* stream, StreamName* out) const noexcept {
  unsigned long long id = 0;
  if (stream == nullptr || driver_.cuStreamGetId == nullptr ||
      driver_.cuStreamGetId(*stream, &id) != CUDA_SUCCESS || id == 0) {
    return false;
  }
  *out = {*stream, id};
  return true;
}

// For a full device: freed memory comes back when the device has passed the free, which the program
// would have waited for in its cudaFree. True if `again` came to something.
template <typename Try>
bool Engine::retry_while_freed_memory_waits(int device, Try again) {
  const auto deadline = std::chrono::steady_clock::now() + options_.drain_timeout;
  std::chrono::milliseconds pause{1};
  while (captures_.load() == 0 && std::chrono::steady_clock::now() < deadline) {
    bool waiting = false;
    for (const Pool* pool : pools_on(device)) waiting = pool->is_waiting() || waiting;
    if (!waiting) return false;
    for (Pool* pool : pools_on(device)) pool->wait(pause);
    if (again()) return true;
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, kLongestPause);
  }
  return false;
}

bool Engine::outside_captures(const std::function<bool()>& call) {
  return captures_.load() == 0 && call();
}

std::optional<std::uint64_t> Engine::calls() noexcept {
  return gate::quiet_passes();
}

Pool* Engine::pool_for(TagId tag, CUdevice device, CUresult* error) {
  std::lock_guard lock(pools_mutex_);
  for (const auto& pool : pools_) {
    if (pool->options().tag == tag && pool->options().device == device) return pool.get();
  }
  PoolOptions options;
  options.tag = tag;
  options.info = tags_.get(tag);
  options.device = device;
  options.ordinal = device;  // the driver's handle of a device is its ordinal
  options.next_sequence = &next_sequence_;
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
  int rdma = 0;
  if (driver_.cuDeviceGetAttribute(&rdma,
                                   CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
                                   device) == CUDA_SUCCESS) {
    options.gpu_direct_rdma = rdma != 0;
  }
  for (const PeerAccess& each : peer_access_) {
    const auto& peers = options.peers;
    if (each.to_device == device &&
        std::find(peers.begin(), peers.end(), each.from_device) == peers.end())
      options.peers.push_back(each.from_device);
  }
  pools_.push_back(std::make_unique<Pool>(
      driver_, std::move(options),
      [this](Pool* pool, const Range& range) { return add_reservation(pool, range); }));
  return pools_.back().get();
}

CUresult Engine::add_reservation(Pool* pool, const Range& range) noexcept {
  std::lock_guard lock(reservations_mutex_);
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

CUresult Engine::free(CUdeviceptr address, const CUstream* stream) noexcept {
  Pool* pool = pool_at(address);
  if (pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
  try {
    StreamName name;
    CUcontext context = nullptr;
    if (!name_stream(stream, &name) || driver_.cuCtxGetCurrent(&context) != CUDA_SUCCESS)
      return pool->free(address, nullptr, nullptr);
    return pool->free(address, context, &name);
  } catch (const std::exception& error) {
    log().error("a free failed inside Dormouse: {}", error.what());
    return CUDA_ERROR_UNKNOWN;
  }
}

bool Engine::find(CUdeviceptr address, BlockInfo* out) const noexcept {
  const Pool* pool = pool_at(address);
  Block block;
  if (pool == nullptr || !pool->find(address, &out->address, &block, &out->asleep)) return false;
  out->bytes = block.bytes;
  out->tag = pool->options().tag;
  out->device = pool->options().ordinal;
  out->context = block.context;
  return true;
}

const void* Engine::host_backup(CUdeviceptr address, std::size_t bytes) const noexcept {
  const Pool* pool = pool_at(address);
  return pool == nullptr ? nullptr : pool->host_backup(address, bytes);
}

std::uint64_t Engine::retained_bytes(int device) const noexcept {
  std::lock_guard lock(pools_mutex_);
  std::uint64_t bytes = 0;
  for (const auto& pool : pools_) {
    if (pool->options().ordinal == device) bytes += pool->empty_bytes();
  }
  return bytes;
}

bool Engine::release_retained(int device) noexcept {
  try {
    return release_retained_now(device) ||
           retry_while_freed_memory_waits(device, [&] { return release_retained_now(device); });
  } catch (const std::exception& error) {
    log().error("releasing unused memory failed inside Dormouse: {}", error.what());
    return false;
  }
}

bool Engine::release_retained_now(int device) {
  std::uint64_t released = 0;
  for (Pool* pool : pools_on(device)) released += pool->release_empty(0, {});
  return released != 0;
}

std::vector<Pool*> Engine::pools_on(int device) const {
  std::lock_guard lock(pools_mutex_);
  std::vector<Pool*> pools;
  for (const auto& pool : pools_) {
    if (pool->options().ordinal == device) pools.push_back(pool.get());
  }
  return pools;
}

std::vector<Pool*> Engine::all_pools() const {
  std::lock_guard lock(pools_mutex_);
  std::vector<Pool*> pools;
  for (const auto& pool : pools_) pools.push_back(pool.get());
  return pools;
}

CUresult Engine::set_peer_access(CUcontext from, int from_device, CUcontext to, int to_device,
                                 bool enabled) noexcept {
  try {
    std::vector<Pool*> changed;
    std::lock_guard lock(pools_mutex_);
    peer_access_.reserve(peer_access_.size() + 1);
    changed.reserve(pools_.size());
    std::vector<PeerAccess> after = peer_access_;
    std::erase_if(after, [&](const auto& each) { return each.from == from && each.to == to; });
    if (enabled) after.push_back({from, from_device, to, to_device});
    const bool before = has_peer_access(from_device, to_device);
    peer_access_.swap(after);
    const bool now = has_peer_access(from_device, to_device);
    if (before == now) return CUDA_SUCCESS;
    for (const auto& pool : pools_) {
      if (pool->options().ordinal != to_device) continue;
      const CUresult result = pool->set_peer_access(from_device, now);
      if (result == CUDA_SUCCESS) {
        changed.push_back(pool.get());
        continue;
      }
      for (Pool* each : changed) (void)each->set_peer_access(from_device, before);
      peer_access_.swap(after);
      return result;
    }
    return CUDA_SUCCESS;
  } catch (const std::exception&) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
}

// With pools_mutex_ held.
bool Engine::has_peer_access(int from_device, int to_device) const noexcept {
  return std::any_of(peer_access_.begin(), peer_access_.end(), [&](const PeerAccess& each) {
    return each.from_device == from_device && each.to_device == to_device;
  });
}

void Engine::context_created(CUcontext context, int device) noexcept {
  try {
    std::lock_guard lock(contexts_mutex_);
    made_contexts_.emplace(context, device);
  } catch (const std::bad_alloc&) {
    // Its work is waited for if it allocates.
  }
}

// All contexts whose running work may use memory that these devices have access to.
CUresult Engine::contexts_on(const std::set<int>& devices, std::set<CUcontext>* out) {
  for (const Pool* pool : all_pools()) {
    if (devices.count(pool->options().ordinal) != 0) out->merge(pool->contexts());
  }
  {
    std::lock_guard lock(contexts_mutex_);
    for (const auto& [context, device] : made_contexts_) {
      if (devices.count(device) != 0) out->insert(context);
    }
  }
  for (const int device : devices) {
    unsigned flags = 0;
    int active = 0;
    CUcontext primary = nullptr;
    CUresult result = driver_.cuDevicePrimaryCtxGetState(device, &flags, &active);
    if (result == CUDA_SUCCESS && active == 0) continue;
    if (result == CUDA_SUCCESS) result = driver_.cuDevicePrimaryCtxRetain(&primary, device);
    if (result != CUDA_SUCCESS) return result;
    give_back([&] { return driver_.cuDevicePrimaryCtxRelease_v2(device); });
    out->insert(primary);
  }
  return CUDA_SUCCESS;
}

// With no lock that the program may need for its running work to end: the driver waits for that.
void Engine::drop(std::vector<std::unique_ptr<Image>> backups) noexcept {
  for (std::unique_ptr<Image>& backup : backups) {
    const CUcontext context = backup->context();
    std::multiset<CUcontext>::iterator entry;
    try {
      std::lock_guard lock(contexts_mutex_);
      entry = dropping_.insert(context);
    } catch (const std::bad_alloc&) {
      continue;  // dropped with the list
    }
    backup.reset();
    std::lock_guard lock(contexts_mutex_);
    dropping_.erase(entry);
    dropped_.notify_all();
  }
}

void Engine::context_destroyed(CUcontext context) noexcept {
  try {
    {  // What is just being dropped is given back in its context.
      std::unique_lock lock(contexts_mutex_);
      made_contexts_.erase(context);
      dropped_.wait(lock, [&] { return dropping_.count(context) == 0; });
    }
    {
      std::lock_guard lock(pools_mutex_);
      std::erase_if(peer_access_, [&](const PeerAccess& each) {
        return each.from == context || each.to == context;
      });
    }
    hasher_->forget(context);
    kernels_->forget(context);
    for (Pool* pool : all_pools()) pool->drop_context(context);
  } catch (const std::exception& error) {
    log().error("forgetting a destroyed context failed inside Dormouse: {}", error.what());
  }
}

void Engine::capture_began() noexcept {
  captures_.fetch_add(1);
}

void Engine::capture_ended() noexcept {
  captures_.fetch_sub(1);
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
  AskingLock operation(operation_mutex_, asking_);
  Status status;
  try {
    status = sleep_locked(request, report);
  } catch (const std::exception& error) {
    status = failed(Code::kOutOfHostMemory, "", error);
  }
  std::lock_guard transition(transition_mutex_);
  update_gate();
  return status;
}

Status Engine::sleep_locked(const SleepRequest& request, OperationStats* report) {
  if (report != nullptr) *report = {};
  Status status = check_tags(request.tags);
  if (!status.is_ok()) return status;
  if (captures_.load() != 0) {
    return {
        Code::kBusy,
        "a stream of the program is capturing a CUDA graph: try again when the capture has ended"};
  }
  const std::vector<Pool*> pools = select(request.tags);
  look_for_unused(request, pools);
  std::lock_guard transition(transition_mutex_);
  if (request.origin == Origin::kOutside && !gate_closed_) {
    if (!gate::close(options_.drain_timeout)) {
      return {Code::kBusy,
              fmt::format(
                  "a call of the program into the driver did not return within {} ms: try again",
                  options_.drain_timeout.count())};
    }
    gate_closed_ = true;
  }
  mapped_->adopt_rest();
  std::set<const Chunk*> half_slept;
  try {
    ScopedProgress progress(progress_mutex_, progress_, progress_began_, progress_done_, "sleep");
    Operation run(*this, pools);
    try {
      status = run.sleep(request, report);
    } catch (const std::exception& error) {
      status = failed(Code::kOutOfHostMemory, "nothing was put to sleep: ", error);
    }
    half_slept = run.take_half_slept();
  } catch (const std::exception& error) {
    status = failed(Code::kOutOfHostMemory, "nothing was put to sleep: ", error);
  }
  if (status.is_ok() && request.discard && !request.only_awake && request.at_least_bytes == 0) {
    const std::uint64_t dropped = mapped_->discard_unmapped(request.tags);
    if (report != nullptr) report->dropped_bytes += dropped;
  }
  if (status.is_ok() && report != nullptr) {
    for (const TagStats& stats : stats_of(pools)) {
      for (const HeldBytes& each : stats.held) add_held(&report->held, each.by, each.bytes);
    }
  }
  if (half_slept.empty()) return status;
  return wake_half_slept(pools, half_slept, status, request.discard);
}

// Before the gate closes: whoever is asked may need a thread of the program that would wait there.
void Engine::look_for_unused(const SleepRequest& request,
                             const std::vector<Pool*>& pools) noexcept {
  looked_at_.clear();
  UnusedMemory* source = unused_memory_.load();
  if (source == nullptr || request.discard) return;
  try {
    for (const Pool* pool : pools) {
      if (pool->any_awake()) looked_at_.emplace(pool, pool->next_number());
    }
  } catch (const std::bad_alloc&) {
    looked_at_.clear();  // all of it is backed up
  }
  if (!looked_at_.empty()) source->look();
}

Status Engine::wake_half_slept(const std::vector<Pool*>& pools,
                               const std::set<const Chunk*>& chunks, const Status& cause,
                               bool discarded) {
  Status back;
  try {
    Operation run(*this, pools);
    back = run.wake(&chunks, nullptr);
  } catch (const std::exception& error) {
    back = failed(Code::kOutOfHostMemory, "", error);
  }
  if (back.is_ok() && discarded) {
    return {
        cause.code(),
        fmt::format("nothing sleeps, but part of what was to be discarded reads as zero now: {}",
                    cause.message()),
        cause.driver()};
  }
  if (back.is_ok())
    return {cause.code(), "nothing was put to sleep: " + cause.message(), cause.driver()};
  return {cause.code(),
          fmt::format("some memory sleeps and some is awake, all of it intact: {}; bringing it "
                      "back failed too: {}. "
                      "Wake it to use it",
                      cause.message(), back.message()),
          cause.driver()};
}

Status Engine::wake(const WakeRequest& request, OperationStats* report) {
  AskingLock operation(operation_mutex_, asking_);
  Status status;
  try {
    status = wake_locked(request, report);
  } catch (const std::exception& error) {
    status =
        failed(Code::kOutOfHostMemory, "everything stays asleep and intact, try again: ", error);
  }
  {
    std::lock_guard transition(transition_mutex_);
    update_gate();
  }
  if (status.is_ok()) woke();
  return status;
}

// The time of kept backups begins.
void Engine::woke() noexcept {
  if (options_.keep_backups && options_.keep_backups_for.count() != 0) notify_background(false);
}

Status Engine::wake_locked(const WakeRequest& request, OperationStats* report) {
  if (report != nullptr) *report = {};
  Status status = check_tags(request.tags);
  if (!status.is_ok()) return status;
  std::lock_guard transition(transition_mutex_);
  ScopedProgress progress(progress_mutex_, progress_, progress_began_, progress_done_, "wake");
  std::vector<Pool*> pools = select(request.tags);
  if (request.tags.empty())
    std::reverse(pools.begin(), pools.end());  // what matters most comes first
  Operation run(*this, std::move(pools));
  return run.wake(nullptr, report);
}

// The gate is closed while anything sleeps that the program did not put to sleep itself.
void Engine::update_gate() noexcept {
  if (!gate_closed_ || any_slept_outside()) return;
  gate_closed_ = false;
  gate::open();
}

bool Engine::any_slept_outside() const noexcept {
  std::lock_guard lock(pools_mutex_);
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
  try {
    Pool::Backups taken;
    {
      AskingLock operation(operation_mutex_, asking_);
      std::set<CUcontext> contexts;
      for (const Pool* pool : all_pools()) contexts.merge(pool->contexts());
      if (!contexts.empty() &&
          wait_for_device(driver_, contexts, options_.drain_timeout).timed_out) {
        return {Code::kBusy,
                fmt::format("nothing was given back: work that the program gave to the device is "
                            "still running after {} ms: try again when it has ended",
                            options_.drain_timeout.count())};
      }
      for (Pool* pool : all_pools()) {
        pool->release_empty(0, options_.drain_timeout);
        if (!backups) continue;
        Pool::Backups more = pool->take_backups(false);
        taken.insert(taken.end(), std::make_move_iterator(more.begin()),
                     std::make_move_iterator(more.end()));
      }
    }
    drop(std::move(taken));
  } catch (const std::exception& error) {
    return failed(Code::kOutOfHostMemory, "not all was given back: ", error);
  }
  return Status::ok();
}

// For an operation that found too little host memory: backups of what is awake and not part of it
// go, where the work of their context has been waited for. True if there were any.
bool Engine::drop_idle_backups(const std::set<CUcontext>& drained) {
  bool any = false;
  for (Pool* pool : all_pools()) any = !pool->take_backups(false, &drained).empty() || any;
  return any;
}

// --- Background work
// -------------------------------------------------------------------------------------------------

void Engine::region_ended(TagId tag) noexcept {
  if (options_.prepare && tags_.get(tag).backup == Backup::kHost) notify_background(true);
}

// At first need: most processes never have one. With background_mutex_ held.
bool Engine::start_background() {
  if (background_stop_) return false;
  if (!background_thread_.joinable()) {
    background_ended_ = false;
    background_thread_ = start_background_thread("dormouse-bg", [this] { background(); });
  }
  return true;
}

// For a call of the program: what the device runs may wait for what the program does next.
void Engine::drop_later(std::unique_ptr<Image> backup) noexcept {
  if (backup == nullptr) return;
  try {
    std::lock_guard lock(background_mutex_);
    if (start_background()) {
      to_drop_.push_back(std::move(backup));
      background_wanted_.notify_one();
    }
  } catch (const std::exception&) {
    // Dropped here.
  }
}

void Engine::notify_background(bool prepare) noexcept {
  try {
    std::lock_guard lock(background_mutex_);
    if (background_stop_) return;
    if (prepare) {
      prepare_wanted_ = true;
    } else {
      drop_backups_at_ =
          std::min(drop_backups_at_, std::chrono::steady_clock::now() + options_.keep_backups_for);
    }
    start_background();
    background_wanted_.notify_one();
  } catch (const std::exception& error) {
    if (first_time("background")) log().warn("no thread for background work: {}", error.what());
  }
}

void Engine::background() {
  std::unique_lock lock(background_mutex_);
  while (!background_stop_) {
    if (!to_drop_.empty()) {
      std::vector<std::unique_ptr<Image>> backups = std::exchange(to_drop_, {});
      lock.unlock();
      drop(std::move(backups));
      lock.lock();
    } else if (std::chrono::steady_clock::now() >= collect_at_) {
      lock.unlock();
      const bool more = collect();
      lock.lock();
      collect_pause_ = more ? std::min(2 * collect_pause_, kLongestPause) : kFirstPause;
      collect_at_ = more ? std::chrono::steady_clock::now() + collect_pause_
                         : std::chrono::steady_clock::time_point::max();
    } else if (prepare_wanted_ && give_way()) {
      background_wanted_.wait_for(lock, kGivingWay);
    } else if (prepare_wanted_) {
      prepare_wanted_ = false;
      lock.unlock();
      bool more = false;
      try {
        more = prepare_one();
      } catch (const std::exception& error) {
        log().info("host memory is not prepared further: {}", error.what());
      }
      lock.lock();
      prepare_wanted_ = prepare_wanted_ || more;
    } else if (std::chrono::steady_clock::now() >= drop_backups_at_) {
      drop_backups_at_ = std::chrono::steady_clock::time_point::max();
      lock.unlock();
      const auto next = drop_old_backups();
      lock.lock();
      drop_backups_at_ = std::min(drop_backups_at_, next);
    } else if (const auto next = std::min(drop_backups_at_, collect_at_);
               next == std::chrono::steady_clock::time_point::max()) {
      background_wanted_.wait(lock);
    } else {
      background_wanted_.wait_until(lock, next);
    }
  }
  background_ended_ = true;
  background_wanted_.notify_all();
}

void Engine::collect_later() noexcept {
  try {
    std::lock_guard lock(background_mutex_);
    if (collect_at_ != std::chrono::steady_clock::time_point::max() || !start_background()) return;
    collect_at_ = std::chrono::steady_clock::now() + collect_pause_;
    background_wanted_.notify_one();
  } catch (const std::exception&) {
    // Another free finds out.
  }
}

// True if a pool still has memory to give back when the device has passed its free.
bool Engine::collect() noexcept {
  bool more = false;
  try {
    for (Pool* pool : all_pools()) more = pool->collect() || more;
  } catch (const std::exception&) {
    more = true;
  }
  return more;
}

bool Engine::give_way() const noexcept {
  return asking_.load() != 0 || background_stop_.load();
}

// Of pools that woke long enough ago. Returns when the next is due.
std::chrono::steady_clock::time_point Engine::drop_old_backups() {
  auto next = std::chrono::steady_clock::time_point::max();
  try {
    for (Pool* pool : all_pools()) {
      const auto woke_at = pool->woke_at();
      if (!woke_at) continue;
      const auto due = *woke_at + options_.keep_backups_for;
      if (due > std::chrono::steady_clock::now()) {
        next = std::min(next, due);
        continue;
      }
      drop(pool->take_backups(true));
      if (pool->woke_at()) next = std::min(next, std::chrono::steady_clock::now() + kLookAgain);
    }
  } catch (const std::bad_alloc&) {
    return std::chrono::steady_clock::now() + options_.keep_backups_for;
  }
  return next;
}

// Gets host memory ready for one chunk. An operation that the program or its owner asks for comes
// first: the lock is held for one chunk only. True if there may be more to do.
bool Engine::prepare_one() {
  std::lock_guard operation(operation_mutex_);
  std::lock_guard transition(transition_mutex_);
  std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
  if (const std::uint64_t limit = options_.prepare_limit_bytes; limit != 0)
    most = limit - std::min(limit, host_->held_bytes());
  for (Pool* pool : all_pools()) {
    if (pool->options().info.backup != Backup::kHost) continue;
    Ranges ranges;
    Chunk* chunk = pool->begin_prepare(most, &ranges);
    if (chunk == nullptr) continue;
    std::unique_ptr<HostImage> made;
    Status status;
    try {
      status = prepare_chunk(*pool, *chunk, ranges, &made);
    } catch (const std::exception& error) {
      status = failed(Code::kOutOfHostMemory, "", error);
    }
    pool->end_prepare(*chunk, status.is_ok() ? std::move(made) : nullptr);
    if (status.is_ok()) return true;
    log().info("host memory is not prepared further: {}", status.message());
    return false;
  }
  return false;
}

// `made` is the chunk's new image, if it had none.
Status Engine::prepare_chunk(const Pool& pool, Chunk& chunk, const Ranges& ranges,
                             std::unique_ptr<HostImage>* made) {
  const std::set<CUcontext> contexts = pool.contexts();
  if (contexts.empty()) return {Code::kBusy, "the program destroyed the context"};
  if (chunk.image == nullptr) {
    *made = HostImage::reserve(driver_, *host_, *contexts.begin(), chunk.bytes);
    if (*made == nullptr) return {Code::kOutOfHostMemory, "no address space"};
  }
  HostImage& image = *made != nullptr ? **made : *chunk.image;
  const std::uint64_t missing = image.missing_bytes(ranges);
  Status status = host_->admit(missing);
  if (!status.is_ok()) return status;
  Admitted(*host_, missing).held(image.add_pieces(ranges));
  ScopedContext current(driver_, *contexts.begin());
  RelaxedCapture relaxed(driver_);
  for (HostImage::Piece& piece : image.pieces()) {
    if (give_way()) return Status::ok();  // the rest is prepared later
    status = image.make_ready(piece);
    if (!status.is_ok()) return status;
  }
  // The driver compiles the kernel when it loads it; a sleep that fails to hash copies everything.
  if (options_.hash) (void)hasher_->prepare(*contexts.begin());
  return Status::ok();
}

void Engine::set_disk_directory(const std::string& directory) {
  disk_->set_directory(directory);
  disk_->remove_leftovers();
}

void Engine::remove_files() noexcept {
  disk_->remove_files();
}

void Engine::stop_background(std::chrono::milliseconds at_most) noexcept {
  std::thread thread;
  bool ended = true;
  {
    std::unique_lock lock(background_mutex_);
    background_stop_ = true;
    background_wanted_.notify_all();
    thread = std::move(background_thread_);
    if (at_most != std::chrono::milliseconds::max()) {
      ended = background_wanted_.wait_for(lock, at_most, [this] { return background_ended_; });
    }
  }
  if (thread.joinable()) ended ? thread.join() : thread.detach();
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

Progress Engine::progress() const {
  std::lock_guard lock(progress_mutex_);
  Progress progress = progress_;
  if (progress.active) {
    progress.done_bytes = progress_done_.load(std::memory_order_relaxed);
    progress.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - progress_began_).count();
  }
  return progress;
}

}  // namespace dormouse
