// What is told of a block.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "core/tags.h"

namespace dormouse {

struct BlockInfo {
  CUdeviceptr address = 0;
  std::size_t bytes = 0;  // as asked for
  TagId tag = kNoTag;
  int device = 0;
  CUcontext context = nullptr;  // current when it was allocated
  bool asleep = false;
};

}  // namespace dormouse
