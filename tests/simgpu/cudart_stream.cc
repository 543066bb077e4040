// Exported functions of the simulated CUDA runtime: streams, events, host functions, captures,
// graphs; with the per-thread default stream varieties.
#include "tests/simgpu/cudart_driver.h"

using namespace simgpu::cudart;  // NOLINT: the functions below carry the real runtime's names

// Streams.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamCreate(cudaStream_t* pStream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamCreate(pStream, CU_STREAM_DEFAULT));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamCreateWithFlags(cudaStream_t* pStream,
                                                               unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamCreate(pStream, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamCreateWithPriority(cudaStream_t* pStream,
                                                                  unsigned int flags,
                                                                  int priority) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamCreateWithPriority(pStream, flags, priority));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamDestroy(cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamDestroy(stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamSynchronize(stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamSynchronize_ptsz(cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamSynchronize_per_thread(stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamQuery(cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamQuery(stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamQuery_ptsz(cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamQuery_per_thread(stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event,
                                                         unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamWaitEvent(stream, event, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamWaitEvent_ptsz(cudaStream_t stream,
                                                              cudaEvent_t event,
                                                              unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamWaitEvent_per_thread(stream, event, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamAddCallback(cudaStream_t stream,
                                                           cudaStreamCallback_t callback,
                                                           void* userData, unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamAddCallback(stream, reinterpret_cast<CUstreamCallback>(callback),
                                             userData, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamAddCallback_ptsz(cudaStream_t stream,
                                                                cudaStreamCallback_t callback,
                                                                void* userData,
                                                                unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamAddCallback_per_thread(
      stream, reinterpret_cast<CUstreamCallback>(callback), userData, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetFlags(cudaStream_t hStream, unsigned int* flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamGetFlags(hStream, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetFlags_ptsz(cudaStream_t hStream,
                                                             unsigned int* flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamGetFlags_per_thread(hStream, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetPriority(cudaStream_t hStream, int* priority) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamGetPriority(hStream, priority));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetPriority_ptsz(cudaStream_t hStream,
                                                                int* priority) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamGetPriority_per_thread(hStream, priority));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetId(cudaStream_t hStream,
                                                     unsigned long long* streamId) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamGetId(hStream, streamId));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetId_ptsz(cudaStream_t hStream,
                                                          unsigned long long* streamId) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamGetId_per_thread(hStream, streamId));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetDevice(cudaStream_t hStream, int* device) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamGetDevice(hStream, device));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetDevice_ptsz(cudaStream_t hStream, int* device) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamGetDevice_per_thread(hStream, device));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn,
                                                        void* userData) {
  SIMGPU_CONTEXT();
  return finish(driver().cuLaunchHostFunc(stream, fn, userData));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaLaunchHostFunc_ptsz(cudaStream_t stream, cudaHostFn_t fn,
                                                             void* userData) {
  SIMGPU_CONTEXT();
  return finish(driver().cuLaunchHostFunc_per_thread(stream, fn, userData));
}

// Events.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventCreate(cudaEvent_t* event) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventCreate(event, CU_EVENT_DEFAULT));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventCreateWithFlags(cudaEvent_t* event,
                                                              unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventCreate(event, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventDestroy(cudaEvent_t event) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventDestroy(event));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventQuery(cudaEvent_t event) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventQuery(event));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventSynchronize(cudaEvent_t event) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventSynchronize(event));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventElapsedTime(float* ms, cudaEvent_t start,
                                                          cudaEvent_t end) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventElapsedTime(ms, start, end));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventRecord(event, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventRecord_ptsz(cudaEvent_t event, cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventRecord_per_thread(event, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventRecordWithFlags(cudaEvent_t event,
                                                              cudaStream_t stream,
                                                              unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventRecordWithFlags(event, stream, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaEventRecordWithFlags_ptsz(cudaEvent_t event,
                                                                   cudaStream_t stream,
                                                                   unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuEventRecordWithFlags_per_thread(event, stream, flags));
}

// Captures and graphs.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamBeginCapture(cudaStream_t stream,
                                                            cudaStreamCaptureMode mode) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamBeginCapture(stream, static_cast<CUstreamCaptureMode>(mode)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamBeginCapture_ptsz(cudaStream_t stream,
                                                                 cudaStreamCaptureMode mode) {
  SIMGPU_CONTEXT();
  return finish(
      driver().cuStreamBeginCapture_per_thread(stream, static_cast<CUstreamCaptureMode>(mode)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamEndCapture(cudaStream_t stream,
                                                          cudaGraph_t* pGraph) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamEndCapture(stream, pGraph));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamEndCapture_ptsz(cudaStream_t stream,
                                                               cudaGraph_t* pGraph) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamEndCapture_per_thread(stream, pGraph));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI
cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* pCaptureStatus) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamIsCapturing(
      stream, reinterpret_cast<CUstreamCaptureStatus*>(pCaptureStatus)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI
cudaStreamIsCapturing_ptsz(cudaStream_t stream, cudaStreamCaptureStatus* pCaptureStatus) {
  SIMGPU_CONTEXT();
  return finish(driver().cuStreamIsCapturing_per_thread(
      stream, reinterpret_cast<CUstreamCaptureStatus*>(pCaptureStatus)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI
cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  SIMGPU_CONTEXT();
  return finish(
      driver().cuThreadExchangeStreamCaptureMode(reinterpret_cast<CUstreamCaptureMode*>(mode)));
}

#if SIMGPU_FORMS_13
// CUDA 12's forms are in cudart_12.cc.

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* captureStatus_out, unsigned long long* id_out,
    cudaGraph_t* graph_out, const cudaGraphNode_t** dependencies_out,
    const cudaGraphEdgeData** edgeData_out, size_t* numDependencies_out) {
  SIMGPU_CONTEXT();
  if (edgeData_out != nullptr) *edgeData_out = nullptr;  // all edges are plain
  cuuint64_t id = 0;
  CUresult result = driver().cuStreamGetCaptureInfo(
      stream, reinterpret_cast<CUstreamCaptureStatus*>(captureStatus_out), &id, graph_out,
      dependencies_out, numDependencies_out);
  if (id_out != nullptr) *id_out = id;
  return finish(result);
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaStreamGetCaptureInfo_ptsz(
    cudaStream_t stream, cudaStreamCaptureStatus* captureStatus_out, unsigned long long* id_out,
    cudaGraph_t* graph_out, const cudaGraphNode_t** dependencies_out,
    const cudaGraphEdgeData** edgeData_out, size_t* numDependencies_out) {
  SIMGPU_CONTEXT();
  if (edgeData_out != nullptr) *edgeData_out = nullptr;  // all edges are plain
  cuuint64_t id = 0;
  CUresult result = driver().cuStreamGetCaptureInfo_per_thread(
      stream, reinterpret_cast<CUstreamCaptureStatus*>(captureStatus_out), &id, graph_out,
      dependencies_out, numDependencies_out);
  if (id_out != nullptr) *id_out = id;
  return finish(result);
}

#endif

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphCreate(cudaGraph_t* pGraph, unsigned int flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphCreate(pGraph, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphDestroy(cudaGraph_t graph) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphDestroy(graph));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes,
                                                       size_t* numNodes) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphGetNodes(graph, nodes, numNodes));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphGetRootNodes(cudaGraph_t graph,
                                                           cudaGraphNode_t* pRootNodes,
                                                           size_t* pNumRootNodes) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphGetRootNodes(graph, pRootNodes, pNumRootNodes));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphNodeGetType(cudaGraphNode_t node,
                                                          cudaGraphNodeType* pType) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphNodeGetType(node, reinterpret_cast<CUgraphNodeType*>(pType)));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphInstantiate(cudaGraphExec_t* pGraphExec,
                                                          cudaGraph_t graph,
                                                          unsigned long long flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphInstantiateWithFlags(pGraphExec, graph, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphInstantiateWithFlags(cudaGraphExec_t* pGraphExec,
                                                                   cudaGraph_t graph,
                                                                   unsigned long long flags) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphInstantiateWithFlags(pGraphExec, graph, flags));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphExecDestroy(cudaGraphExec_t graphExec) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphExecDestroy(graphExec));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphUpload(cudaGraphExec_t graphExec,
                                                     cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphUpload(graphExec, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphUpload_ptsz(cudaGraphExec_t graphExec,
                                                          cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphUpload_per_thread(graphExec, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphLaunch(cudaGraphExec_t graphExec,
                                                     cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphLaunch(graphExec, stream));
}

SIMGPU_RUNTIME cudaError_t CUDARTAPI cudaGraphLaunch_ptsz(cudaGraphExec_t graphExec,
                                                          cudaStream_t stream) {
  SIMGPU_CONTEXT();
  return finish(driver().cuGraphLaunch_per_thread(graphExec, stream));
}
