// Copies between chunks and their images on disk, through a small ring of page-locked memory:
// several threads with two buffers each, so that the bus and the disk work at the same time. Used
// by Operation.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/backup/disk_file.h"
#include "core/backup/transfer.h"
#include "core/contexts.h"
#include "core/driver.h"
#include "core/range.h"
#include "core/status.h"

namespace dormouse {

// One transfer of the disk: whole blocks [begin, end) of an image, around the ranges of the chunk
// that are wanted. What lies beside them in their blocks is copied along to the disk, and read from
// it but not copied to the device.
struct DiskCopy {
  DiskImage* image = nullptr;
  std::size_t begin = 0;
  std::size_t end = 0;
  Ranges ranges;
};

// Splits `ranges` (sorted) of a chunk into transfers of at most one buffer's size that share no
// block.
void plan_disk_copies(DiskImage& image, const Ranges& ranges, std::vector<DiskCopy>* plan);

// Runs the plan in the pinned context, on up to `threads` threads (8 MiB of host memory each), and
// returns when all copies are complete. `done` grows by the bytes that were copied. On error what
// was copied is undefined, all copies have ended.
Status run_disk_copies(const Driver& driver, Contexts& contexts, const ContextPin& pin,
                       Direction direction, const std::vector<DiskCopy>& plan, unsigned threads,
                       bool huge_pages, std::atomic<std::uint64_t>* done);

}  // namespace dormouse
