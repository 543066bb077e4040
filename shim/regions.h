// Every way into a region ends here: the C API, the peers' ABI, NVTX, Python triggers. Adds to core's thread stack
// what a process with PyTorch needs: suspension of expandable segments, isolation of cached blocks.
#pragma once

#include "core/tags.h"

namespace dormouse::shim {

// Begins a region on the calling thread (kNoTag: one that excludes memory). Never fails; a problem is logged once.
void region_begin(TagId tag) noexcept;

// Ends the innermost region of the calling thread. False, and logged once, if there is none.
bool region_end() noexcept;

}  // namespace dormouse::shim
