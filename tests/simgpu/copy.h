// Copies and fills of the simulation: checked when they are asked for and again when they run.
// For the simulated driver's sources only.
#pragma once

#include <cstdint>

#include "tests/simgpu/api_support.h"

namespace simgpu {

// One side of a copy: rows of `width` bytes, `pitch` bytes apart, in slices `slice` bytes apart.
struct Side {
  uintptr_t base = 0;
  size_t pitch = 0;
  size_t slice = 0;
  bool device = false;  // the call says that this is device memory (or pinned host memory)
  int on = -1;          // the device whose access rights count; -1: the stream's
};

struct Copy {
  Side to;
  Side from;
  size_t width = 0;  // bytes
  size_t height = 1;
  size_t depth = 1;
};

struct Fill {
  Side to;
  size_t element = 1;  // bytes: 1, 2 or 4
  uint32_t value = 0;
  size_t width = 0;  // elements
  size_t height = 1;
};

// What does the copy or the fill on the device; its check says whether the memory is there.
Work work_of(const Copy& copy, int device);
Work work_of(const Fill& fill, int device);

// The copy that the parameters describe. CUDA_ERROR_NOT_SUPPORTED for arrays.
CUresult volume_of(const CUDA_MEMCPY3D& params, Copy* copy);

// Gives the copy to a stream. `wait`: a function without Async in its name, which returns when host
// memory is done with. Copies from pageable memory are staged, copies to it waited for, as the real
// driver does.
CUresult issue(Copy copy, CUstream stream, bool wait);

// Gives the fill to a stream. Device memory is never waited for.
CUresult issue(const Fill& fill, CUstream stream, bool wait);

}  // namespace simgpu
