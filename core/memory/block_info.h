// What is told of a block.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "core/tags.h"

namespace dormouse {

struct BlockInfo {
  CUdeviceptr address = 0;
  std::size_t bytes = 0;  // as asked for
  TagId tag = kNoTag;
  int device = 0;
  CUcontext context = nullptr;  // current when it was allocated
  bool asleep = false;
  bool sync_memops = false;     // as the program set it
  std::uint64_t buffer_id = 0;  // 0: the driver's
};

}  // namespace dormouse
