// The copy pipeline; see transfer.h. Many threads touch host memory and never call the driver; few
// register what is touched and copy. The driver registers memory for one caller at a time and has
// others wait meanwhile, for any call: whoever touches must not be among them. All threads touch
// the same piece, slice by slice, so that the first can be copied at once and pieces come in order.
#include "core/backup/transfer.h"

#include <algorithm>
#include <array>
#include <exception>
#include <utility>

#include "core/context.h"
#include "core/log.h"
#include "core/threads.h"

namespace dormouse {
namespace {

// Copies that a thread has under way: enough that none of its stream's time is lost.
constexpr std::size_t kDepth = 4;
// Threads that register and copy: while one waits for the driver, another issues copies.
constexpr unsigned kCopiers = 2;
// Of a run's threads one in so many leaves its processor to those who copy, and to the driver.
constexpr std::size_t kSparePart = 4;
// What a thread touches at a time.
constexpr std::size_t kSliceBytes = 2 * HostImage::kUnitBytes;
// As few as reach the rate that a kernel can have, so that the launch finds room at once.
constexpr unsigned kKernelBlocks = 16;
constexpr unsigned kKernelThreads = 512;
constexpr std::size_t kKernelWordBytes = 16;

}  // namespace

std::uint64_t PieceCopy::bytes() const noexcept {
  std::uint64_t sum = 0;
  for (const Range& range : ranges) sum += range.bytes;
  return sum;
}

// A thread's stream and the copies that are under way on it, which must have ended before it goes.
class CopyRun::Lane {
 public:
  explicit Lane(const Driver& driver) : driver_(driver) {}
  ~Lane() {
    for (CUevent event : events_) {
      if (event != nullptr) give_back([&] { return driver_.cuEventDestroy_v2(event); });
    }
    if (stream_ != nullptr) give_back([&] { return driver_.cuStreamDestroy_v2(stream_); });
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  CUresult open() {
    CUresult result = driver_.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING);
    for (std::size_t i = 0; i < kDepth && result == CUDA_SUCCESS; ++i) {
      result = driver_.cuEventCreate(&events_[i], CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC);
    }
    return result;
  }

  CUstream stream() const noexcept { return stream_; }
  bool empty() const noexcept { return count_ == 0; }
  bool full() const noexcept { return count_ == kDepth; }

  // `copy` has been issued.
  CUresult push(PieceCopy* copy) {
    const std::size_t at = (first_ + count_) % kDepth;
    const CUresult result = driver_.cuEventRecord(events_[at], stream_);
    if (result != CUDA_SUCCESS) return result;
    copies_[at] = copy;
    ++count_;
    return CUDA_SUCCESS;
  }

  // Waits for the oldest.
  CUresult pop(PieceCopy** copy) {
    const CUresult result = driver_.cuEventSynchronize(events_[first_]);
    if (result != CUDA_SUCCESS) return result;
    *copy = copies_[first_];
    first_ = (first_ + 1) % kDepth;
    --count_;
    return CUDA_SUCCESS;
  }

 private:
  const Driver& driver_;
  CUstream stream_ = nullptr;
  std::array<CUevent, kDepth> events_{};
  std::array<PieceCopy*, kDepth> copies_{};
  std::size_t first_ = 0;
  std::size_t count_ = 0;
};

void plan_copies(HostImage& image, CUdeviceptr chunk_address, const Ranges& ranges,
                 std::size_t* unfinished, std::vector<PieceCopy>* plan) {
  auto& pieces = image.pieces();
  auto piece = pieces.begin();
  PieceCopy* copy = nullptr;
  for (const Range& range : ranges) {
    std::size_t at = range.begin;
    const std::size_t end = range.end();
    while (at < end && piece != pieces.end()) {
      if (at >= piece->offset + piece->bytes) {
        ++piece;
        copy = nullptr;
        continue;
      }
      const std::size_t stop = std::min(end, piece->offset + piece->bytes);
      if (copy == nullptr) {
        plan->push_back({&image, &*piece, chunk_address, unfinished, {}});
        copy = &plan->back();
      }
      copy->ranges.push_back({at, stop - at});
      at = stop;
    }
  }
}

CopyRun::CopyRun(const Driver& driver, const CopyOptions& options, std::atomic<std::uint64_t>* done)
    : driver_(driver), options_(options), done_(done) {}

CopyRun::~CopyRun() {
  {
    MutexLock lock(run_mutex_);
    complete_ = true;
    left_out_ = true;
  }
  changed_.notify_all();
  join_threads();
}

void CopyRun::add(std::vector<PieceCopy> plan) {
  if (plan.empty()) return;
  std::size_t unready_bytes = 0;
  bool unregistered = false;
  for (const PieceCopy& copy : plan) {
    if (!copy.piece->ready) unready_bytes += copy.piece->bytes;
    unregistered = unregistered || (copy.piece->ready && !copy.piece->registered());
  }
  // With all memory ready one stream keeps the copy engine busy. Of two, the engine serves one for
  // as long as it has work, and copies of the other end last. Memory that is not registered is
  // copied by the processor.
  const std::size_t most = std::max<std::size_t>(options_.threads, 1);
  const std::size_t copying = unregistered ? most : unready_bytes == 0 ? 1 : kCopiers;
  const std::size_t slices = (unready_bytes + kSliceBytes - 1) / kSliceBytes;
  start_threads(static_cast<unsigned>(std::min(most - most / kSparePart, slices)),
                static_cast<unsigned>(std::min(copying, plan.size())));
  {
    MutexLock lock(run_mutex_);
    for (PieceCopy& copy : plan) {
      Item& item = plan_.emplace_back(Item{std::move(copy)});
      ++*item.copy.unfinished;
      ++untaken_;
      if (!item.copy.piece->ready) ++unready_;
      if (item.copy.piece->ready || touchers_.empty()) {
        item.claimed = item.copy.piece->bytes;
        can_be_copied(item);
      }
    }
  }
  changed_.notify_all();
}

void CopyRun::start_threads(unsigned touching, unsigned copying) {
  try {
    touchers_.reserve(touching);
    copiers_.reserve(copying);
    while (copiers_.size() < copying) {
      copiers_.push_back(start_thread("dormouse-copy", [this] { work(By::kEngine); }));
    }
    while (touchers_.size() < touching) {
      touchers_.push_back(start_thread("dormouse-touch", [this] { touch_slices(); }));
    }
    if (options_.kernel != nullptr && !kernel_thread_.joinable()) {
      kernel_thread_ = start_thread("dormouse-copy", [this] { work(By::kKernel); });
    }
  } catch (const std::exception&) {
    // No more threads can be started: those that run do all the work, or complete() does.
  }
}

void CopyRun::complete() {
  bool any = false;
  {
    MutexLock lock(run_mutex_);
    if (complete_) return;
    complete_ = true;
    any = !plan_.empty();
  }
  changed_.notify_all();
  if (any && copiers_.empty()) work(By::kEngine);
}

bool CopyRun::wait_until_ready() {
  MutexLock lock(run_mutex_);
  changed_.wait(lock.waiting(), [&]() REQUIRES(run_mutex_) { return unready_ == 0 || failed(); });
  return !failed();
}

bool CopyRun::wait_for(const std::size_t& unfinished) {
  MutexLock lock(run_mutex_);
  changed_.wait(lock.waiting(), [&] { return unfinished == 0 || failed(); });
  return unfinished == 0;
}

void CopyRun::join_threads() noexcept {
  if (kernel_thread_.joinable()) kernel_thread_.join();
  for (std::thread& thread : touchers_) thread.join();
  for (std::thread& thread : copiers_) thread.join();
  touchers_.clear();
  copiers_.clear();
}

Status CopyRun::finish() {
  complete();
  join_threads();
  MutexLock lock(run_mutex_);
  return status_;
}

// Memory that the driver refuses to register is copied by the processor: then all threads copy.
void CopyRun::touch_slices() noexcept {
  while (true) {
    const Slice slice = next_slice();
    if (slice.item == nullptr) break;
    Status status = slice.item->copy.image->touch(slice.offset, slice.bytes);
    if (!status.is_ok()) return fail(std::move(status));
    touched(slice);
  }
  bool help = false;
  {
    MutexLock lock(run_mutex_);
    const auto over = [&]() REQUIRES(run_mutex_) { return failed() || left_out_; };
    changed_.wait(lock.waiting(),
                  [&]() REQUIRES(run_mutex_) { return unready_ == 0 || unregistered_ || over(); });
    help = unregistered_ && untaken_ != 0 && !over();
  }
  if (help) work(By::kEngine);
}

// Waits for more. Without an item where there is nothing more to touch.
CopyRun::Slice CopyRun::next_slice() {
  MutexLock lock(run_mutex_);
  while (!failed() && !left_out_) {
    if (untouched_ == plan_.size()) {
      if (complete_) break;
      changed_.wait(lock.waiting());
      continue;
    }
    Item& item = plan_[untouched_];
    const HostImage::Piece& piece = *item.copy.piece;
    if (item.claimed == piece.bytes) {
      ++untouched_;
      continue;
    }
    const Slice slice{&item, piece.offset + item.claimed,
                      std::min(kSliceBytes, piece.bytes - item.claimed)};
    item.claimed += slice.bytes;
    return slice;
  }
  return {};
}

void CopyRun::touched(const Slice& slice) {
  MutexLock lock(run_mutex_);
  slice.item->touched += slice.bytes;
  if (slice.item->touched < slice.item->copy.piece->bytes) return;
  can_be_copied(*slice.item);
  changed_.notify_all();
}

void CopyRun::can_be_copied(Item& item) {
  (copyable_ == nullptr ? copyable_ : last_copyable_->after) = &item;
  last_copyable_ = &item;
}

void CopyRun::work(By by) noexcept {
  ScopedContext current(driver_, options_.context);
  if (!current.ok()) return fail("cuCtxPushCurrent", current.result());
  RelaxedCapture relaxed(driver_);
  Lane lane(driver_);
  CUresult result = lane.open();
  if (result != CUDA_SUCCESS) return fail("a stream or an event for copies", result);
  while (result == CUDA_SUCCESS) {
    PieceCopy* copy = lane.full() ? nullptr : next(by, lane.empty());
    if (copy != nullptr) {
      result = copy_piece(*copy, &by, lane.stream());
      if (result == CUDA_SUCCESS) result = lane.push(copy);
    } else if (lane.empty()) {
      break;  // there is nothing more to do
    } else {
      result = lane.pop(&copy);
      if (result == CUDA_SUCCESS) ended(*copy);
    }
  }
  if (result == CUDA_SUCCESS) return;
  fail("a copy", result);
  synchronize_stream(driver_, lane.stream());  // copies may be under way still
}

// Null when there is nothing to do: at this moment, or, if it may wait for it, at all.
PieceCopy* CopyRun::next(By by, bool wait) {
  MutexLock lock(run_mutex_);
  if (wait)
    changed_.wait(lock.waiting(),
                  [&]() REQUIRES(run_mutex_) { return copyable_ != nullptr || over(by); });
  if (copyable_ == nullptr || over(by)) return nullptr;
  PieceCopy& copy = copyable_->copy;
  copyable_ = copyable_->after;
  if (--untaken_ == 0) changed_.notify_all();
  begun_bytes_ += copy.bytes();
  return &copy;
}

// There is nothing for a thread of this kind to begin, now or later.
bool CopyRun::over(By by) const {
  if (failed() || left_out_ || (complete_ && untaken_ == 0)) return true;
  return by == By::kKernel && begun_bytes_ >= options_.kernel_bytes;
}

void CopyRun::ended(const PieceCopy& copy) noexcept {
  done_->fetch_add(copy.bytes(), std::memory_order_relaxed);
  MutexLock lock(run_mutex_);
  if (--*copy.unfinished == 0) changed_.notify_all();
}

// A kernel that cannot be launched is not tried again: the copy engine can do all.
CUresult CopyRun::copy_piece(PieceCopy& copy, By* by, CUstream stream) {
  if (!copy.piece->ready) {
    Status ready = copy.image->make_ready(*copy.piece, options_.context_id);
    if (!ready.is_ok()) {
      fail(std::move(ready));
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
    MutexLock lock(run_mutex_);
    --unready_;
    if (!copy.piece->registered()) unregistered_ = true;
    if (unready_ == 0 || unregistered_) changed_.notify_all();
  }
  if (!copy.piece->registered()) *by = By::kEngine;
  for (const Range& range : copy.ranges) {
    std::byte* host = copy.image->data() + range.begin;
    const CUdeviceptr device = copy.chunk_address + range.begin;
    if (*by == By::kKernel) {
      if (launch(device, host, range.bytes, stream) == CUDA_SUCCESS) continue;
      *by = By::kEngine;
    }
    const CUresult result = options_.direction == Direction::kToHost
                                ? driver_.cuMemcpyDtoHAsync_v2(host, device, range.bytes, stream)
                                : driver_.cuMemcpyHtoDAsync_v2(device, host, range.bytes, stream);
    if (result != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}

// Page-locked memory lies at the same address for the device: whoever hands in a kernel has asked.
CUresult CopyRun::launch(CUdeviceptr to, const std::byte* from, std::size_t bytes,
                         CUstream stream) {
  auto source = reinterpret_cast<CUdeviceptr>(from);
  if ((to | source | bytes) % kKernelWordBytes != 0) return CUDA_ERROR_INVALID_VALUE;
  auto length = static_cast<std::uint64_t>(bytes);
  void* parameters[] = {&to, &source, &length};
  const std::size_t words = bytes / kKernelWordBytes;
  const auto blocks = static_cast<unsigned>(
      std::min<std::size_t>(kKernelBlocks, (words + kKernelThreads - 1) / kKernelThreads));
  return driver_.cuLaunchKernel(options_.kernel, blocks, 1, 1, kKernelThreads, 1, 1, 0, stream,
                                parameters, nullptr);
}

void CopyRun::fail(const char* what, CUresult result) noexcept {
  try {
    fail(Status(Code::kDriver,
                fmt::format("{} between device and host memory failed: {}", what,
                            error_name(driver_, result)),
                result));
  } catch (...) {
    fail(Status(Code::kDriver, {}, result));
  }
}

void CopyRun::fail(Status status) noexcept {
  MutexLock lock(run_mutex_);
  failed_.store(true, std::memory_order_relaxed);
  changed_.notify_all();
  if (status_.is_ok()) status_ = std::move(status);  // the first error is the cause
}

}  // namespace dormouse
