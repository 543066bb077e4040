// Copies between chunks and their images: getting host memory ready and copying overlap, on several
// threads and streams. Used by Operation.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
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

// Runs the plan in `context`, on up to `threads` threads, and returns when all copies are complete.
// Pieces that are not ready are made so. `done` grows by the bytes whose copies have been issued.
// On error what was copied is undefined, all copies have ended.
Status run_copies(const Driver& driver, CUcontext context, Direction direction,
                  std::vector<PieceCopy>& plan, unsigned threads, std::atomic<std::uint64_t>* done);

}  // namespace dormouse
