// Copies between chunks and their images: touching host memory, registering it and copying overlap,
// on several threads and streams, while more copies are being planned. Used by Operation.
#pragma once

#include <cuda.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#include "core/backup/host_image.h"
#include "core/driver.h"
#include "core/range.h"
#include "core/status.h"
#include "core/thread_annotations.h"

namespace dormouse {

enum class Direction : std::uint8_t { kToHost, kToDevice };

// What is copied through one piece of an image: ranges of the chunk that lie inside the piece.
struct PieceCopy {
  HostImage* image = nullptr;
  HostImage::Piece* piece = nullptr;
  CUdeviceptr chunk_address = 0;
  std::size_t* unfinished = nullptr;  // counts the chunk's copies that have not ended
  Ranges ranges;

  std::uint64_t bytes() const noexcept;
};

// Splits `ranges` of a chunk at the borders of its image's pieces, which must cover them.
// `unfinished` is the run's from add() to finish().
void plan_copies(HostImage& image, CUdeviceptr chunk_address, const Ranges& ranges,
                 std::size_t* unfinished, std::vector<PieceCopy>* plan);

// How a run copies.
struct CopyOptions {
  CUcontext context = nullptr;  // copies run in it
  ContextId context_id = 0;
  Direction direction = Direction::kToHost;
  unsigned threads = 1;  // about; they start when they are needed
  // To the device: a kernel (see device_kernels_ptx.h) that copies beside the copy engine until
  // `kernel_bytes` of the run have been begun. Null: none. No work may be on the device or come to
  // it that the kernel would have to wait for.
  CUfunction kernel = nullptr;
  std::uint64_t kernel_bytes = 0;
};

// Copies of one device that run while they are planned: add() as often as there is more, finish()
// once. The images, the memory and the counters must stay until finish() has returned or the run is
// destroyed. All but failed() belongs to one thread.
class CopyRun {
 public:
  // `done` grows by the bytes whose copies have ended.
  CopyRun(const Driver& driver, const CopyOptions& options, std::atomic<std::uint64_t>* done);
  // Without finish(): what has not begun is left out, and what runs is waited for.
  ~CopyRun();
  CopyRun(const CopyRun&) = delete;
  CopyRun& operator=(const CopyRun&) = delete;

  // Pieces that are not ready are made so by the run's threads.
  void add(std::vector<PieceCopy> plan);
  // Nothing more will be added.
  void complete();
  // After complete(): returns when all host memory of the run is ready; false if a copy has failed.
  bool wait_until_ready();
  // After complete(): returns when the copies that `unfinished` counts have ended; false if a copy
  // of the run has failed before.
  bool wait_for(const std::size_t& unfinished);
  // True once a copy has failed: more need not be planned.
  bool failed() const noexcept { return failed_.load(std::memory_order_relaxed); }
  // Returns when all copies have ended. On error what was copied is undefined.
  Status finish();

 private:
  class Lane;
  enum class By : std::uint8_t { kEngine, kKernel };

  // A copy and how far its host memory is touched.
  struct Item {
    PieceCopy copy;
    std::size_t claimed = 0;  // bytes of the piece that threads have taken to touch
    std::size_t touched = 0;
    Item* after = nullptr;  // among those that can be copied
  };
  struct Slice {
    Item* item = nullptr;
    std::size_t offset = 0;  // in the image
    std::size_t bytes = 0;
  };

  void start_threads(unsigned touching, unsigned copying);
  void join_threads() noexcept;
  void touch_slices() noexcept;
  Slice next_slice();
  void touched(const Slice& slice);
  void can_be_copied(Item& item) REQUIRES(run_mutex_);
  void work(By by) noexcept;
  PieceCopy* next(By by, bool wait);
  bool over(By by) const REQUIRES(run_mutex_);
  void ended(const PieceCopy& copy) noexcept;
  CUresult copy_piece(PieceCopy& copy, By* by, CUstream stream);
  CUresult launch(CUdeviceptr to, const std::byte* from, std::size_t bytes, CUstream stream);
  void fail(const char* what, CUresult result) noexcept;
  void fail(Status status) noexcept;

  const Driver& driver_;
  const CopyOptions options_;
  std::atomic<std::uint64_t>* const done_;
  std::vector<std::thread> touchers_;
  std::vector<std::thread> copiers_;
  std::thread kernel_thread_;
  std::atomic<bool> failed_{false};
  Mutex run_mutex_;  // protects what PieceCopy::unfinished points to, too
  std::condition_variable changed_;
  std::deque<Item> plan_
      GUARDED_BY(run_mutex_);  // grows at its end only: items stay where they are
  std::size_t untouched_ GUARDED_BY(run_mutex_) =
      0;  // of plan_: the first of which there is something left to touch
  // Touched, or to be touched by who copies, and not yet taken: a list through the items, since the
  // threads that add to it must not run out of memory.
  Item* copyable_ GUARDED_BY(run_mutex_) = nullptr;
  Item* last_copyable_ GUARDED_BY(run_mutex_) = nullptr;
  std::size_t untaken_ GUARDED_BY(run_mutex_) = 0;  // items that no thread has taken to copy
  std::size_t unready_ GUARDED_BY(run_mutex_) =
      0;  // pieces of the plan whose host memory is not ready
  bool unregistered_ GUARDED_BY(run_mutex_) = false;  // the driver has refused to register a piece
  std::uint64_t begun_bytes_ GUARDED_BY(run_mutex_) = 0;
  bool complete_ GUARDED_BY(run_mutex_) = false;  // nothing more will be added
  bool left_out_ GUARDED_BY(run_mutex_) = false;  // what has not begun is not wanted any more
  Status status_ GUARDED_BY(run_mutex_);
};

}  // namespace dormouse
