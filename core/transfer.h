// Copies between chunks and their images: getting host memory ready and copying overlap, on several
// threads and streams, while more copies are being planned. Used by Operation.
#pragma once

#include <cuda.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "core/driver.h"
#include "core/host_image.h"
#include "core/pool.h"
#include "core/status.h"

namespace dormouse {

enum class Direction : std::uint8_t { kToHost, kToDevice };

// What is copied through one piece of an image: ranges of the chunk that lie inside the piece.
struct PieceCopy {
  HostImage* image = nullptr;
  HostImage::Piece* piece = nullptr;
  CUdeviceptr chunk_address = 0;
  std::vector<LiveRange> ranges;
};

// Splits `ranges` of a chunk at the borders of its image's pieces, which must cover them.
void plan_copies(HostImage& image, CUdeviceptr chunk_address, const std::vector<LiveRange>& ranges,
                 std::vector<PieceCopy>* plan);

// Copies of one device that run while they are planned: add() as often as there is more, finish()
// once. The images and the memory must stay until finish() has returned or the run is destroyed.
// add() and finish() belong to one thread.
class CopyRun {
 public:
  // Copies run in `context`, on up to `threads` threads that start when they are needed. `done`
  // grows by the bytes whose copies have been issued.
  CopyRun(const Driver& driver, CUcontext context, Direction direction, unsigned threads,
          std::atomic<std::uint64_t>* done);
  // Without finish(): what has not begun is left out, and what runs is waited for.
  ~CopyRun();
  CopyRun(const CopyRun&) = delete;
  CopyRun& operator=(const CopyRun&) = delete;

  // Pieces that are not ready are made so by the threads.
  void add(std::vector<PieceCopy> plan);
  // True once a copy has failed: more need not be planned.
  bool failed() const noexcept { return failed_.load(std::memory_order_relaxed); }
  // Returns when all copies have ended. On error what was copied is undefined.
  Status finish();

 private:
  void start_threads(unsigned wanted);
  void work() noexcept;
  PieceCopy* next();
  void copy_piece(PieceCopy& copy, CUstream stream);
  void fail(const char* what, CUresult result) noexcept;

  const Driver& driver_;
  const CUcontext context_;
  const Direction direction_;
  const unsigned most_threads_;
  std::atomic<std::uint64_t>* const done_;
  std::vector<std::thread> threads_;
  std::atomic<bool> failed_{false};
  std::mutex run_mutex_;  // protects all below
  std::condition_variable changed_;
  std::deque<PieceCopy> plan_;  // grows at its end only: those taken stay where they are
  std::size_t next_ = 0;
  bool complete_ = false;  // nothing more will be added
  Status status_;
};

}  // namespace dormouse
