// The copy pipeline; see transfer.h. Each thread has its own stream, so that one thread's page
// faults never hold up another's copies.
#include "core/transfer.h"

#include <algorithm>
#include <mutex>

#include "core/context.h"
#include "core/log.h"
#include "core/threads.h"

namespace dormouse {
namespace {

// With all memory ready, issuing copies is cheap: two streams keep the copy engine busy.
constexpr unsigned kThreadsWhenReady = 2;

class CopyRun {
 public:
  CopyRun(const Driver& driver, CUcontext context, Direction direction,
          std::vector<PieceCopy>& plan, std::atomic<std::uint64_t>* done)
      : driver_(driver), context_(context), direction_(direction), plan_(plan), done_(done) {}

  void work() noexcept {
    ScopedContext current(driver_, context_);
    if (!current.ok()) return fail("cuCtxPushCurrent", current.result());
    RelaxedCapture relaxed(driver_);
    CUstream stream = nullptr;
    CUresult result = driver_.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
    if (result != CUDA_SUCCESS) return fail("cuStreamCreate", result);
    while (!failed_.load(std::memory_order_relaxed)) {
      const std::size_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= plan_.size()) break;
      copy_piece(plan_[index], stream);
    }
    result = synchronize_stream(driver_, stream);
    if (result != CUDA_SUCCESS) fail("a copy", result);
    give_back([&] { return driver_.cuStreamDestroy_v2(stream); });
  }

  Status status() {
    std::lock_guard lock(status_mutex_);
    return status_;
  }

 private:
  void copy_piece(PieceCopy& copy, CUstream stream) {
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

  void fail(const char* what, CUresult result) noexcept {
    failed_.store(true, std::memory_order_relaxed);
    std::lock_guard lock(status_mutex_);
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

  const Driver& driver_;
  const CUcontext context_;
  const Direction direction_;
  std::vector<PieceCopy>& plan_;
  std::atomic<std::uint64_t>* const done_;
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex status_mutex_;  // protects status_
  Status status_;
};

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

Status run_copies(const Driver& driver, CUcontext context, Direction direction,
                  std::vector<PieceCopy>& plan, unsigned threads,
                  std::atomic<std::uint64_t>* done) {
  if (plan.empty()) return Status::ok();
  const bool all_ready = std::all_of(plan.begin(), plan.end(), [](const PieceCopy& copy) {
    return copy.piece->ready && copy.piece->registered;
  });
  if (all_ready) threads = std::min(threads, kThreadsWhenReady);
  threads = static_cast<unsigned>(std::min<std::size_t>(std::max(threads, 1u), plan.size()));
  CopyRun run(driver, context, direction, plan, done);
  run_on_threads(threads, [&] { run.work(); });
  return run.status();
}

}  // namespace dormouse
