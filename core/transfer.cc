// The copy pipeline; see transfer.h. Each thread has its own stream, so that one thread's page
// faults never hold up another's copies.
#include "core/transfer.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "core/context.h"
#include "core/log.h"
#include "core/threads.h"

namespace dormouse {
namespace {

// With all memory ready, issuing copies is cheap: two streams keep the copy engine busy.
constexpr unsigned kThreadsWhenReady = 2;

}  // namespace

void plan_copies(HostImage& image, CUdeviceptr chunk_address, const std::vector<LiveRange>& ranges,
                 std::vector<PieceCopy>* plan) {
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
        plan->push_back({&image, &*piece, chunk_address, {}});
        copy = &plan->back();
      }
      copy->ranges.push_back({at, stop - at});
      at = stop;
    }
  }
}

CopyRun::CopyRun(const Driver& driver, CUcontext context, Direction direction, unsigned threads,
                 std::atomic<std::uint64_t>* done)
    : driver_(driver),
      context_(context),
      direction_(direction),
      most_threads_(std::max(threads, 1u)),
      done_(done) {}

CopyRun::~CopyRun() {
  {
    std::lock_guard lock(run_mutex_);
    complete_ = true;
    next_ = plan_.size();
  }
  changed_.notify_all();
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
    for (PieceCopy& copy : plan) plan_.push_back(std::move(copy));
    waiting = plan_.size() - next_;
  }
  changed_.notify_all();
  const unsigned wanted = ready ? std::min(most_threads_, kThreadsWhenReady) : most_threads_;
  start_threads(static_cast<unsigned>(std::min<std::size_t>(wanted, waiting)));
}

void CopyRun::start_threads(unsigned wanted) {
  try {
    threads_.reserve(wanted);
    while (threads_.size() < wanted) {
      threads_.push_back(start_thread("dormouse-copy", [this] { work(); }));
    }
  } catch (const std::exception&) {
    // No more threads to be had: those that run do all the work, or finish() does.
  }
}

Status CopyRun::finish() {
  {
    std::lock_guard lock(run_mutex_);
    complete_ = true;
  }
  changed_.notify_all();
  if (threads_.empty() && !plan_.empty()) work();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  return status_;
}

void CopyRun::work() noexcept {
  ScopedContext current(driver_, context_);
  if (!current.ok()) return fail("cuCtxPushCurrent", current.result());
  RelaxedCapture relaxed(driver_);
  CUstream stream = nullptr;
  CUresult result = driver_.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
  if (result != CUDA_SUCCESS) return fail("cuStreamCreate", result);
  while (PieceCopy* copy = next()) copy_piece(*copy, stream);
  result = synchronize_stream(driver_, stream);
  if (result != CUDA_SUCCESS) fail("a copy", result);
  give_back([&] { return driver_.cuStreamDestroy_v2(stream); });
}

// Null when there is nothing more to do.
PieceCopy* CopyRun::next() {
  std::unique_lock lock(run_mutex_);
  changed_.wait(lock, [this] { return next_ < plan_.size() || complete_ || failed(); });
  if (failed() || next_ == plan_.size()) return nullptr;
  return &plan_[next_++];
}

void CopyRun::copy_piece(PieceCopy& copy, CUstream stream) {
  copy.image->make_ready(*copy.piece);
  for (const LiveRange& range : copy.ranges) {
    std::byte* host = copy.image->data() + range.offset;
    const CUdeviceptr device = copy.chunk_address + range.offset;
    const CUresult result = direction_ == Direction::kToHost
                                ? driver_.cuMemcpyDtoHAsync_v2(host, device, range.bytes, stream)
                                : driver_.cuMemcpyHtoDAsync_v2(device, host, range.bytes, stream);
    if (result != CUDA_SUCCESS) return fail("a copy", result);
    done_->fetch_add(range.bytes, std::memory_order_relaxed);
  }
}

void CopyRun::fail(const char* what, CUresult result) noexcept {
  std::lock_guard lock(run_mutex_);
  failed_.store(true, std::memory_order_relaxed);
  changed_.notify_all();
  if (!status_.is_ok()) return;  // the first error is the cause
  try {
    status_ = Status(Code::kDriver,
                     fmt::format("{} between device and host memory failed: {}", what,
                                 error_name(driver_, result)),
                     result);
  } catch (...) {
    status_ = Status(Code::kDriver, {}, result);
  }
}

}  // namespace dormouse
