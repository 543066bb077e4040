// Types of functions in hooks.def that the toolkit's headers may be too old to have, so that the
// hooks are the same whatever toolkit they are built with. The hooks pass these on by pointer and
// never look inside. A repeated typedef of the same type is not an error, so most need no
// condition.
#pragma once

#include <cuda.h>

extern "C" {

typedef struct CUgraphEdgeData_st CUgraphEdgeData;                      // 12.3
typedef struct CUgraphNodeParams_st CUgraphNodeParams;                  // 12.2
typedef struct CUctxCreateParams_st CUctxCreateParams;                  // 12.5
typedef struct CUmemDecompressParams_st CUmemDecompressParams;          // 12.6
typedef struct CUmemcpyAttributes_st CUmemcpyAttributes;                // 12.8
typedef struct CUDA_MEMCPY3D_BATCH_OP_st CUDA_MEMCPY3D_BATCH_OP;        // 12.8
typedef struct CUstreamCigCaptureParams_st CUstreamCigCaptureParams;    // 13.2
typedef struct CUDA_FABRIC_COPY_BATCH_OP_st CUDA_FABRIC_COPY_BATCH_OP;  // 13.5
typedef cuuint32_t CUlogicalEndpointId;                                 // 13.3

#if CUDA_VERSION < 13030
enum CUgraphRecaptureStatus_enum : int;
typedef enum CUgraphRecaptureStatus_enum CUgraphRecaptureStatus;
typedef CUresult(CUDA_CB* CUgraphRecaptureCallback)(void* data, CUgraphNode node,
                                                    const CUgraphNodeParams* original,
                                                    const CUgraphNodeParams* recaptured,
                                                    CUgraphRecaptureStatus status);
#endif

}  // extern "C"
