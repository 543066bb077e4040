// The pipeline to and from the disk; see disk_transfer.h.
#include "core/backup/disk_transfer.h"

#include <algorithm>
#include <array>

#include "core/backup/host_image.h"
#include "core/context.h"
#include "core/log.h"
#include "core/thread_annotations.h"
#include "core/threads.h"

namespace dormouse {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{4} << 20;
// What a wake leaves of the host's memory: less than a backup does, since it is what makes room.
constexpr std::uint64_t kWakeMarginBytes = std::uint64_t{32} << 20;
constexpr unsigned kBuffersPerThread = 2;
constexpr unsigned kMostThreads = 8;  // deep enough a queue for a fast disk

// A buffer of the ring with its stream, and the transfer that is under way in it.
struct Lane {
  std::byte* buffer = nullptr;
  CUstream stream = nullptr;
  const DiskCopy* copy = nullptr;
};

class DiskRun {
 public:
  DiskRun(const Driver& driver, const ContextPin& pin, Direction direction,
          const std::vector<DiskCopy>& plan, HostImage& ring, std::atomic<std::uint64_t>* done)
      : driver_(driver), pin_(pin), direction_(direction), plan_(plan), ring_(ring), done_(done) {}

  void work() noexcept {
    ScopedContext current(driver_, pin_.context());
    if (!current.ok()) return fail(driver_status("cuCtxPushCurrent", current.result()));
    RelaxedCapture relaxed(driver_);
    std::array<Lane, kBuffersPerThread> lanes;
    const std::size_t first = next_lane_.fetch_add(kBuffersPerThread, std::memory_order_relaxed);
    std::size_t opened = 0;
    while (opened < lanes.size() && open(lanes[opened], first + opened)) ++opened;
    if (opened != 0) used_.store(true, std::memory_order_relaxed);
    for (std::size_t turn = 0; opened != 0 && !failed(); turn = (turn + 1) % opened) {
      finish(lanes[turn]);
      const std::size_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= plan_.size()) break;
      if (!failed()) start(lanes[turn], plan_[index]);
    }
    for (Lane& lane : lanes) close(lane);
  }

  // After all threads have ended.
  Status status() {
    MutexLock lock(status_mutex_);
    return status_.is_ok() && !used_.load() ? no_memory_ : status_;
  }

 private:
  bool failed() const noexcept { return failed_.load(std::memory_order_relaxed); }

  // False if the lane cannot be used. For want of host memory that is no failure: another lane may
  // have its buffer, and does the work.
  bool open(Lane& lane, std::size_t index) {
    HostImage::Piece& piece = ring_.pieces()[index];
    Status ready = ring_.make_ready(piece, pin_.id());
    if (!ready.is_ok()) {
      MutexLock lock(status_mutex_);
      no_memory_ = std::move(ready);
      return false;
    }
    lane.buffer = ring_.data() + piece.offset;
    const CUresult result = driver_.cuStreamCreate(&lane.stream, CU_STREAM_NON_BLOCKING);
    if (result == CUDA_SUCCESS) return true;
    lane.stream = nullptr;
    fail(driver_status("cuStreamCreate", result));
    return false;
  }

  void close(Lane& lane) {
    if (lane.stream == nullptr) return;
    finish(lane);
    give_back([&] { return driver_.cuStreamDestroy_v2(lane.stream); });
  }

  // The lane's buffer is free. To the disk: the copy out of the device begins. From the disk: the
  // blocks are read, and the copy to the device begins.
  void start(Lane& lane, const DiskCopy& copy) {
    lane.copy = &copy;
    const CUdeviceptr chunk = copy.image->chunk_address();
    if (direction_ == Direction::kToHost) {
      const CUresult result = driver_.cuMemcpyDtoHAsync_v2(lane.buffer, chunk + copy.begin,
                                                           copy.end - copy.begin, lane.stream);
      if (result != CUDA_SUCCESS) fail(driver_status("a copy", result));
      return;
    }
    Status status = copy.image->file().read(lane.buffer, copy.end - copy.begin,
                                            copy.image->offset() + copy.begin);
    if (!status.is_ok()) return fail(std::move(status));
    for (const Range& range : copy.ranges) {
      const CUresult result = driver_.cuMemcpyHtoDAsync_v2(
          chunk + range.begin, lane.buffer + (range.begin - copy.begin), range.bytes, lane.stream);
      if (result != CUDA_SUCCESS) return fail(driver_status("a copy", result));
    }
  }

  // Waits for the lane's copy, also after an error: the buffer must not go while it runs.
  void finish(Lane& lane) {
    if (lane.copy == nullptr) return;
    const DiskCopy& copy = *std::exchange(lane.copy, nullptr);
    const CUresult result = synchronize_stream(driver_, lane.stream);
    if (result != CUDA_SUCCESS) return fail(driver_status("a copy", result));
    if (failed()) return;
    if (direction_ == Direction::kToHost) {
      Status status = copy.image->file().write(lane.buffer, copy.end - copy.begin,
                                               copy.image->offset() + copy.begin);
      if (!status.is_ok()) return fail(std::move(status));
    }
    for (const Range& range : copy.ranges) done_->fetch_add(range.bytes, std::memory_order_relaxed);
  }

  Status driver_status(const char* what, CUresult result) const noexcept {
    try {
      return {
          Code::kDriver,
          fmt::format("{} between device and disk failed: {}", what, error_name(driver_, result)),
          result};
    } catch (...) {
      return {Code::kDriver, {}, result};
    }
  }

  void fail(Status status) noexcept {
    failed_.store(true, std::memory_order_relaxed);
    MutexLock lock(status_mutex_);
    if (status_.is_ok()) status_ = std::move(status);  // the first error is the cause
  }

  const Driver& driver_;
  const ContextPin& pin_;
  const Direction direction_;
  const std::vector<DiskCopy>& plan_;
  HostImage& ring_;
  std::atomic<std::uint64_t>* const done_;
  std::atomic<std::size_t> next_{0};
  std::atomic<std::size_t> next_lane_{0};
  std::atomic<bool> failed_{false};
  std::atomic<bool> used_{false};  // some lane was opened
  Mutex status_mutex_;
  Status status_ GUARDED_BY(status_mutex_);
  Status no_memory_ GUARDED_BY(status_mutex_);
};

std::size_t block_down(std::size_t offset) {
  return offset / DiskFile::kBlockBytes * DiskFile::kBlockBytes;
}

std::size_t block_up(std::size_t offset) {
  return block_down(offset + DiskFile::kBlockBytes - 1);
}

}  // namespace

// Cut at multiples of the buffer's size, which are block borders too: two transfers share a block
// only if they are neighbours in the same stretch, and those are joined.
void plan_disk_copies(DiskImage& image, const Ranges& ranges, std::vector<DiskCopy>* plan) {
  DiskCopy* last = nullptr;
  for (const Range& range : ranges) {
    const std::size_t range_end = range.end();
    for (std::size_t at = range.begin; at < range_end;) {
      const std::size_t stretch = at / kBufferBytes;
      const std::size_t stop = std::min(range_end, (stretch + 1) * kBufferBytes);
      if (last == nullptr || last->begin / kBufferBytes != stretch || block_down(at) > last->end) {
        plan->push_back({&image, block_down(at), 0, {}});
        last = &plan->back();
      }
      last->end = block_up(stop);
      last->ranges.push_back({at, stop - at});
      at = stop;
    }
  }
}

Status run_disk_copies(const Driver& driver, Contexts& contexts, const ContextPin& pin,
                       Direction direction, const std::vector<DiskCopy>& plan, unsigned threads,
                       bool huge_pages, std::atomic<std::uint64_t>* done) {
  if (plan.empty()) return Status::ok();
  threads = static_cast<unsigned>(
      std::min<std::size_t>(std::clamp(threads, 1u, kMostThreads), plan.size()));
  const std::size_t ring_bytes = kBufferBytes * kBuffersPerThread * threads;
  // The ring counts against no limit: it is small, and gone when the operation is over. The machine
  // is asked before it is touched.
  const std::uint64_t margin =
      direction == Direction::kToDevice ? kWakeMarginBytes : HostMemory::kTouchMarginBytes;
  HostMemory ring_memory(0, huge_pages, kBufferBytes, margin);
  ring_memory.take(ring_bytes);
  const std::unique_ptr<HostImage> ring =
      HostImage::reserve(driver, contexts, ring_memory, pin.device(), ring_bytes);
  if (ring == nullptr) {
    return {Code::kOutOfHostMemory,
            "the system gave no memory to copy to and from the disk with (see ulimit -v)"};
  }
  ring->add_pieces({{0, ring_bytes}});
  DiskRun run(driver, pin, direction, plan, *ring, done);
  run_on_threads(threads, [&] { run.work(); });
  return run.status();
}

}  // namespace dormouse
