// The copy pipeline; see transfer.h. Each thread has its own stream, so that one thread's page
// faults never hold up another's copies.
#include "core/transfer.h"

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
// As few as reach the rate that a kernel can have, so that the launch finds room at once.
constexpr unsigned kKernelBlocks = 16;
constexpr unsigned kKernelThreads = 512;
constexpr std::size_t kKernelWordBytes = 16;

}  // namespace

std::uint64_t PieceCopy::bytes() const noexcept {
  std::uint64_t sum = 0;
  for (const LiveRange& range : ranges) sum += range.bytes;
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

void plan_copies(HostImage& image, CUdeviceptr chunk_address, const std::vector<LiveRange>& ranges,
                 std::size_t* unfinished, std::vector<PieceCopy>* plan) {
  auto& pieces = image.pieces();
  auto piece = pieces.begin();
  PieceCopy* copy = nullptr;
  for (const LiveRange& range : ranges) {
    std::size_t at = range.offset;
    const std::size_t end = range.offset + range.bytes;
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
    std::lock_guard lock(run_mutex_);
    complete_ = true;
    next_ = plan_.size();
  }
  changed_.notify_all();
  if (kernel_thread_.joinable()) kernel_thread_.join();
  for (std::thread& thread : threads_) thread.join();
}

void CopyRun::add(std::vector<PieceCopy> plan) {
  if (plan.empty()) return;
  const bool ready = std::all_of(plan.begin(), plan.end(), [](const PieceCopy& copy) {
    return copy.piece->ready && copy.piece->registered;
  });
  std::size_t waiting = 0;
  {
    std::lock_guard lock(run_mutex_);
    for (PieceCopy& copy : plan) {
      plan_.push_back(std::move(copy));
      ++*plan_.back().unfinished;
      if (!plan_.back().piece->ready) ++unready_;
    }
    waiting = plan_.size() - next_;
  }
  changed_.notify_all();
  // With all memory ready one stream keeps the copy engine busy. Of two, the engine serves one for
  // as long as it has work, and copies of the other end last.
  const unsigned wanted = ready ? 1 : std::max(options_.threads, 1u);
  start_threads(static_cast<unsigned>(std::min<std::size_t>(wanted, waiting)));
}

void CopyRun::start_threads(unsigned wanted) {
  try {
    threads_.reserve(wanted);
    while (threads_.size() < wanted) {
      threads_.push_back(start_thread("dormouse-copy", [this] { work(By::kEngine); }));
    }
    if (options_.kernel != nullptr && !kernel_thread_.joinable()) {
      kernel_thread_ = start_thread("dormouse-copy", [this] { work(By::kKernel); });
    }
  } catch (const std::exception&) {
    // No more threads to be had: those that run do all the work, or complete() does.
  }
}

void CopyRun::complete() {
  {
    std::lock_guard lock(run_mutex_);
    if (complete_) return;
    complete_ = true;
  }
  changed_.notify_all();
  if (threads_.empty() && !plan_.empty()) work(By::kEngine);
}

bool CopyRun::wait_until_ready() {
  std::unique_lock lock(run_mutex_);
  changed_.wait(lock, [&] { return unready_ == 0 || failed(); });
  return !failed();
}

bool CopyRun::wait_for(const std::size_t& unfinished) {
  std::unique_lock lock(run_mutex_);
  changed_.wait(lock, [&] { return unfinished == 0 || failed(); });
  return unfinished == 0;
}

Status CopyRun::finish() {
  complete();
  if (kernel_thread_.joinable()) kernel_thread_.join();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  return status_;
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
  std::unique_lock lock(run_mutex_);
  if (wait) changed_.wait(lock, [&] { return next_ < plan_.size() || over(by); });
  if (next_ == plan_.size() || over(by)) return nullptr;
  PieceCopy& copy = plan_[next_++];
  begun_bytes_ += copy.bytes();
  return &copy;
}

// With run_mutex_ held: there is nothing for a thread of this kind to begin, now or later.
bool CopyRun::over(By by) const {
  if (failed() || (complete_ && next_ == plan_.size())) return true;
  return by == By::kKernel && begun_bytes_ >= options_.kernel_bytes;
}

void CopyRun::ended(const PieceCopy& copy) noexcept {
  done_->fetch_add(copy.bytes(), std::memory_order_relaxed);
  std::lock_guard lock(run_mutex_);
  if (--*copy.unfinished == 0) changed_.notify_all();
}

// A kernel that cannot be launched is not tried again: the copy engine can do all.
CUresult CopyRun::copy_piece(PieceCopy& copy, By* by, CUstream stream) {
  if (!copy.piece->ready) {
    Status ready = copy.image->make_ready(*copy.piece);
    if (!ready.is_ok()) {
      fail(std::move(ready));
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
    std::lock_guard lock(run_mutex_);
    if (--unready_ == 0) changed_.notify_all();
  }
  if (!copy.piece->registered) *by = By::kEngine;
  for (const LiveRange& range : copy.ranges) {
    std::byte* host = copy.image->data() + range.offset;
    const CUdeviceptr device = copy.chunk_address + range.offset;
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
  std::lock_guard lock(run_mutex_);
  failed_.store(true, std::memory_order_relaxed);
  changed_.notify_all();
  if (status_.is_ok()) status_ = std::move(status);  // the first error is the cause
}

}  // namespace dormouse
