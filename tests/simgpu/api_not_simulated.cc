// Exported functions of the simulated driver that programs look up and hooks stand in for, but
// whose work is not simulated: arrays (none can be made), batches of volumes, decompression,
// captures into a graph that exists. They say so, as the real driver does for features of other
// hardware.
#include "tests/simgpu/api_support.h"

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

#define NOT_SIMULATED(function, counted, ...)         \
  SIMGPU_API CUresult CUDAAPI function(__VA_ARGS__) { \
    SIMGPU_ENTER(counted);                            \
    return CUDA_ERROR_NOT_SUPPORTED;                  \
  }

NOT_SIMULATED(cuMemcpyDtoA_v2, cuMemcpyDtoA, CUarray, size_t, CUdeviceptr, size_t)
NOT_SIMULATED(cuMemcpyDtoA_v2_ptds, cuMemcpyDtoA, CUarray, size_t, CUdeviceptr, size_t)
NOT_SIMULATED(cuMemcpyAtoD_v2, cuMemcpyAtoD, CUdeviceptr, CUarray, size_t, size_t)
NOT_SIMULATED(cuMemcpyAtoD_v2_ptds, cuMemcpyAtoD, CUdeviceptr, CUarray, size_t, size_t)
NOT_SIMULATED(cuMemcpyHtoA_v2, cuMemcpyHtoA, CUarray, size_t, const void*, size_t)
NOT_SIMULATED(cuMemcpyHtoA_v2_ptds, cuMemcpyHtoA, CUarray, size_t, const void*, size_t)
NOT_SIMULATED(cuMemcpyAtoH_v2, cuMemcpyAtoH, void*, CUarray, size_t, size_t)
NOT_SIMULATED(cuMemcpyAtoH_v2_ptds, cuMemcpyAtoH, void*, CUarray, size_t, size_t)
NOT_SIMULATED(cuMemcpyAtoA_v2, cuMemcpyAtoA, CUarray, size_t, CUarray, size_t, size_t)
NOT_SIMULATED(cuMemcpyAtoA_v2_ptds, cuMemcpyAtoA, CUarray, size_t, CUarray, size_t, size_t)
NOT_SIMULATED(cuMemcpyHtoAAsync_v2, cuMemcpyHtoAAsync, CUarray, size_t, const void*, size_t,
              CUstream)
NOT_SIMULATED(cuMemcpyHtoAAsync_v2_ptsz, cuMemcpyHtoAAsync, CUarray, size_t, const void*, size_t,
              CUstream)
NOT_SIMULATED(cuMemcpyAtoHAsync_v2, cuMemcpyAtoHAsync, void*, CUarray, size_t, size_t, CUstream)
NOT_SIMULATED(cuMemcpyAtoHAsync_v2_ptsz, cuMemcpyAtoHAsync, void*, CUarray, size_t, size_t,
              CUstream)
NOT_SIMULATED(cuMemcpy3DBatchAsync, cuMemcpy3DBatchAsync, size_t, CUDA_MEMCPY3D_BATCH_OP*, size_t*,
              unsigned long long, CUstream)
NOT_SIMULATED(cuMemcpy3DBatchAsync_ptsz, cuMemcpy3DBatchAsync, size_t, CUDA_MEMCPY3D_BATCH_OP*,
              size_t*, unsigned long long, CUstream)
NOT_SIMULATED(cuMemBatchDecompressAsync, cuMemBatchDecompressAsync, CUmemDecompressParams*, size_t,
              unsigned int, size_t*, CUstream)
NOT_SIMULATED(cuMemBatchDecompressAsync_ptsz, cuMemBatchDecompressAsync, CUmemDecompressParams*,
              size_t, unsigned int, size_t*, CUstream)
NOT_SIMULATED(cuStreamBeginCaptureToGraph, cuStreamBeginCaptureToGraph, CUstream, CUgraph,
              const CUgraphNode*, const CUgraphEdgeData*, size_t, CUstreamCaptureMode)
NOT_SIMULATED(cuStreamBeginCaptureToGraph_ptsz, cuStreamBeginCaptureToGraph, CUstream, CUgraph,
              const CUgraphNode*, const CUgraphEdgeData*, size_t, CUstreamCaptureMode)
NOT_SIMULATED(cuMemMapArrayAsync, cuMemMapArrayAsync, CUarrayMapInfo*, unsigned int, CUstream)
NOT_SIMULATED(cuMemMapArrayAsync_ptsz, cuMemMapArrayAsync, CUarrayMapInfo*, unsigned int, CUstream)
NOT_SIMULATED(cuLaunchCooperativeKernelMultiDevice, cuLaunchCooperativeKernelMultiDevice,
              CUDA_LAUNCH_PARAMS*, unsigned int, unsigned int)
NOT_SIMULATED(cuLaunch, cuLaunch, CUfunction)
NOT_SIMULATED(cuLaunchGrid, cuLaunchGrid, CUfunction, int, int)
NOT_SIMULATED(cuLaunchGridAsync, cuLaunchGridAsync, CUfunction, int, int, CUstream)
#if CUDA_VERSION >= 13000
NOT_SIMULATED(cuMemcpy3DBatchAsync_v2, cuMemcpy3DBatchAsync, size_t, CUDA_MEMCPY3D_BATCH_OP*,
              unsigned long long, CUstream)
NOT_SIMULATED(cuMemcpy3DBatchAsync_v2_ptsz, cuMemcpy3DBatchAsync, size_t, CUDA_MEMCPY3D_BATCH_OP*,
              unsigned long long, CUstream)
#endif
