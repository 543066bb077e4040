// Exported functions of the simulated driver that programs look up and hooks stand in for, but
// whose work is not simulated: arrays (none can be made), textures, decompression, captures into a
// graph that exists, most kinds of graph nodes, and what is newer than the simulated driver. They
// say so, as the real driver does for features of other hardware.
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
NOT_SIMULATED(cuMemBatchDecompressAsync, cuMemBatchDecompressAsync, CUmemDecompressParams*, size_t,
              unsigned int, size_t*, CUstream)
NOT_SIMULATED(cuMemBatchDecompressAsync_ptsz, cuMemBatchDecompressAsync, CUmemDecompressParams*,
              size_t, unsigned int, size_t*, CUstream)
NOT_SIMULATED(cuStreamBeginCaptureToGraph, cuStreamBeginCaptureToGraph, CUstream, CUgraph,
              const CUgraphNode*, const CUgraphEdgeData*, size_t, CUstreamCaptureMode)
NOT_SIMULATED(cuStreamBeginCaptureToGraph_ptsz, cuStreamBeginCaptureToGraph, CUstream, CUgraph,
              const CUgraphNode*, const CUgraphEdgeData*, size_t, CUstreamCaptureMode)
NOT_SIMULATED(cuArrayCreate_v2, cuArrayCreate, CUarray*, const CUDA_ARRAY_DESCRIPTOR*)
NOT_SIMULATED(cuArray3DCreate_v2, cuArray3DCreate, CUarray*, const CUDA_ARRAY3D_DESCRIPTOR*)
NOT_SIMULATED(cuMipmappedArrayCreate, cuMipmappedArrayCreate, CUmipmappedArray*,
              const CUDA_ARRAY3D_DESCRIPTOR*, unsigned int)
NOT_SIMULATED(cuLibraryLoadFromFile, cuLibraryLoadFromFile, CUlibrary*, const char*, CUjit_option*,
              void**, unsigned int, CUlibraryOption*, void**, unsigned int)
NOT_SIMULATED(cuFuncLoad, cuFuncLoad, CUfunction)
NOT_SIMULATED(cuMemMapArrayAsync, cuMemMapArrayAsync, CUarrayMapInfo*, unsigned int, CUstream)
NOT_SIMULATED(cuMemMapArrayAsync_ptsz, cuMemMapArrayAsync, CUarrayMapInfo*, unsigned int, CUstream)
NOT_SIMULATED(cuLaunchCooperativeKernelMultiDevice, cuLaunchCooperativeKernelMultiDevice,
              CUDA_LAUNCH_PARAMS*, unsigned int, unsigned int)
NOT_SIMULATED(cuLaunch, cuLaunch, CUfunction)
NOT_SIMULATED(cuLaunchGrid, cuLaunchGrid, CUfunction, int, int)
NOT_SIMULATED(cuLaunchGridAsync, cuLaunchGridAsync, CUfunction, int, int, CUstream)

// What looks up addresses or binds memory.
NOT_SIMULATED(cuStreamBeginRecaptureToGraph, cuStreamBeginRecaptureToGraph, CUstream,
              CUstreamCaptureMode, CUgraph, CUgraphRecaptureCallback, void*)
NOT_SIMULATED(cuStreamBeginRecaptureToGraph_ptsz, cuStreamBeginRecaptureToGraph, CUstream,
              CUstreamCaptureMode, CUgraph, CUgraphRecaptureCallback, void*)
NOT_SIMULATED(cuStreamBeginCaptureToCig, cuStreamBeginCaptureToCig, CUstream,
              CUstreamCigCaptureParams*)
NOT_SIMULATED(cuStreamBeginCaptureToCig_ptsz, cuStreamBeginCaptureToCig, CUstream,
              CUstreamCigCaptureParams*)
NOT_SIMULATED(cuStreamEndCaptureToCig, cuStreamEndCaptureToCig, CUstream)
NOT_SIMULATED(cuStreamEndCaptureToCig_ptsz, cuStreamEndCaptureToCig, CUstream)
NOT_SIMULATED(cuMulticastBindMem_v2, cuMulticastBindMem, CUmemGenericAllocationHandle, CUdevice,
              size_t, CUmemGenericAllocationHandle, size_t, size_t, unsigned long long)
NOT_SIMULATED(cuMulticastBindAddr_v2, cuMulticastBindAddr, CUmemGenericAllocationHandle, CUdevice,
              size_t, CUdeviceptr, size_t, unsigned long long)
NOT_SIMULATED(cuLogicalEndpointBindMem, cuLogicalEndpointBindMem, CUlogicalEndpointId, CUdevice,
              cuuint64_t, CUmemGenericAllocationHandle, cuuint64_t, cuuint64_t, unsigned long long)
NOT_SIMULATED(cuLogicalEndpointBindAddr, cuLogicalEndpointBindAddr, CUlogicalEndpointId, CUdevice,
              cuuint64_t, void*, cuuint64_t, unsigned long long)
NOT_SIMULATED(cuMemcpyWithAttributesAsync, cuMemcpyWithAttributesAsync, CUdeviceptr, CUdeviceptr,
              size_t, CUmemcpyAttributes*, CUstream)
NOT_SIMULATED(cuMemcpyWithAttributesAsync_ptsz, cuMemcpyWithAttributesAsync, CUdeviceptr,
              CUdeviceptr, size_t, CUmemcpyAttributes*, CUstream)
NOT_SIMULATED(cuMemcpy3DWithAttributesAsync, cuMemcpy3DWithAttributesAsync, CUDA_MEMCPY3D_BATCH_OP*,
              unsigned long long, CUstream)
NOT_SIMULATED(cuMemcpy3DWithAttributesAsync_ptsz, cuMemcpy3DWithAttributesAsync,
              CUDA_MEMCPY3D_BATCH_OP*, unsigned long long, CUstream)
NOT_SIMULATED(cuFabricCpyBatchAsync, cuFabricCpyBatchAsync, size_t, CUDA_FABRIC_COPY_BATCH_OP*,
              unsigned long long, CUstream)
NOT_SIMULATED(cuFabricCpyBatchAsync_ptsz, cuFabricCpyBatchAsync, size_t, CUDA_FABRIC_COPY_BATCH_OP*,
              unsigned long long, CUstream)
NOT_SIMULATED(cuGraphAddNode, cuGraphAddNode, CUgraphNode*, CUgraph, const CUgraphNode*, size_t,
              CUgraphNodeParams*)
NOT_SIMULATED(cuGraphAddNode_v2, cuGraphAddNode, CUgraphNode*, CUgraph, const CUgraphNode*,
              const CUgraphEdgeData*, size_t, CUgraphNodeParams*)
NOT_SIMULATED(cuGraphAddNode_v3, cuGraphAddNode, CUgraphNode*, CUgraph, const CUgraphNode*,
              const CUgraphEdgeData*, size_t, CUgraphNodeParams*)
NOT_SIMULATED(cuGraphAddBatchMemOpNode, cuGraphAddBatchMemOpNode, CUgraphNode*, CUgraph,
              const CUgraphNode*, size_t, const CUDA_BATCH_MEM_OP_NODE_PARAMS*)
NOT_SIMULATED(cuGraphAddChildGraphNode, cuGraphAddChildGraphNode, CUgraphNode*, CUgraph,
              const CUgraphNode*, size_t, CUgraph)
NOT_SIMULATED(cuGraphClone, cuGraphClone, CUgraph*, CUgraph)
NOT_SIMULATED(cuGraphNodeSetParams, cuGraphNodeSetParams, CUgraphNode, CUgraphNodeParams*)
NOT_SIMULATED(cuGraphNodeSetParams_v2, cuGraphNodeSetParams, CUgraphNode, CUgraphNodeParams*)
NOT_SIMULATED(cuGraphBatchMemOpNodeSetParams, cuGraphBatchMemOpNodeSetParams, CUgraphNode,
              const CUDA_BATCH_MEM_OP_NODE_PARAMS*)
NOT_SIMULATED(cuGraphExecNodeSetParams, cuGraphExecNodeSetParams, CUgraphExec, CUgraphNode,
              CUgraphNodeParams*)
NOT_SIMULATED(cuGraphExecBatchMemOpNodeSetParams, cuGraphExecBatchMemOpNodeSetParams, CUgraphExec,
              CUgraphNode, const CUDA_BATCH_MEM_OP_NODE_PARAMS*)
NOT_SIMULATED(cuGraphExecChildGraphNodeSetParams, cuGraphExecChildGraphNodeSetParams, CUgraphExec,
              CUgraphNode, CUgraph)
NOT_SIMULATED(cuGraphInstantiate, cuGraphInstantiate, CUgraphExec*, CUgraph, CUgraphNode*, char*,
              size_t)
NOT_SIMULATED(cuGraphExecUpdate, cuGraphExecUpdate, CUgraphExec, CUgraph, CUgraphNode*,
              CUgraphExecUpdateResult*)
NOT_SIMULATED(cuTexObjectCreate, cuTexObjectCreate, CUtexObject*, const CUDA_RESOURCE_DESC*,
              const CUDA_TEXTURE_DESC*, const CUDA_RESOURCE_VIEW_DESC*)
NOT_SIMULATED(cuTexRefSetAddress_v2, cuTexRefSetAddress, size_t*, CUtexref, CUdeviceptr, size_t)
NOT_SIMULATED(cuTexRefSetAddress2D_v2, cuTexRefSetAddress2D, CUtexref, const CUDA_ARRAY_DESCRIPTOR*,
              CUdeviceptr, size_t)
NOT_SIMULATED(cuTexRefSetAddress2D_v3, cuTexRefSetAddress2D, CUtexref, const CUDA_ARRAY_DESCRIPTOR*,
              CUdeviceptr, size_t)
NOT_SIMULATED(cuMemGetLocationInfo, cuMemGetLocationInfo, CUdeviceptr, size_t, size_t, size_t,
              CUmemLocation*)

// Stands for a function of a driver that is newer than the library under test.
extern "C" CUresult cuMemCompactAsync(CUdeviceptr, size_t, CUstream);
NOT_SIMULATED(cuMemCompactAsync, cuMemCompactAsync, CUdeviceptr, size_t, CUstream)
