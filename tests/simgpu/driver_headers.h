// The CUDA driver's declarations with every versioned and per-thread name spelled out
// (cuMemAlloc_v2, cuMemcpyAsync_ptsz, ...), so that the compiler checks each simulated function
// against the toolkit's header, and of newer functions the types. For the simulated driver's
// sources only.
#pragma once

#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <cudaTypedefs.h>

#include "shim/hooks/newer_types.h"

// Marks a function that the simulated library exports under the real driver's name.
#define SIMGPU_API extern "C" __attribute__((visibility("default")))
