// Exported functions of the simulated driver: streams, events, host functions, captures.
#include <cstring>

#include "tests/simgpu/api_support.h"

namespace simgpu {
namespace {

// Runs a function of the program on a stream's thread, where CUDA must not be called.
template <typename Function>
Action host_action(Function function) {
  return [function] {
    this_thread().in_host_function = true;
    function();
    this_thread().in_host_function = false;
    return CUDA_SUCCESS;
  };
}

CUresult record(CUevent hEvent, CUstream hStream, unsigned flags) {
  SIMGPU_REQUIRE((flags & ~static_cast<unsigned>(CU_EVENT_RECORD_EXTERNAL)) == 0);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  EventPtr event = simulation().find_event(hEvent);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return simulation().record_event(event, stream);
}

CUresult elapsed(float* milliseconds, CUevent hStart, CUevent hEnd) {
  SIMGPU_REQUIRE(milliseconds != nullptr);
  EventPtr start = simulation().find_event(hStart);
  EventPtr end = simulation().find_event(hEnd);
  if (start == nullptr || end == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) != 0)
    return CUDA_ERROR_INVALID_HANDLE;
  std::shared_ptr<Record> first, last;
  SIMGPU_TRY(simulation().host_record(start, &first));
  SIMGPU_TRY(simulation().host_record(end, &last));
  if (first == nullptr || last == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (!first->done->finished() || !last->done->finished()) return CUDA_ERROR_NOT_READY;
  *milliseconds = std::chrono::duration<float, std::milli>(last->when - first->when).count();
  return CUDA_SUCCESS;
}

CUresult capture_info(CUstream hStream, CUstreamCaptureStatus* status,
                      Simulation::CaptureInfo* info) {
  SIMGPU_REQUIRE(status != nullptr);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  SIMGPU_TRY(simulation().capture_info(stream, info));
  *status = info->status;
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

// Streams.

SIMGPU_API CUresult CUDAAPI cuStreamCreateWithPriority(CUstream* phStream, unsigned int flags,
                                                       int priority) {
  SIMGPU_ENTER(cuStreamCreateWithPriority);
  SIMGPU_REQUIRE(phStream != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  return simulation().create_stream(context, flags, priority, phStream);
}

SIMGPU_API CUresult CUDAAPI cuStreamCreate(CUstream* phStream, unsigned int Flags) {
  SIMGPU_ENTER(cuStreamCreate);
  SIMGPU_REQUIRE(phStream != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  return simulation().create_stream(context, Flags, 0, phStream);
}

SIMGPU_API CUresult CUDAAPI cuStreamDestroy_v2(CUstream hStream) {
  SIMGPU_ENTER(cuStreamDestroy);
  return simulation().destroy_stream(hStream);
}

SIMGPU_API CUresult CUDAAPI cuStreamSynchronize(CUstream hStream) {
  SIMGPU_ENTER(cuStreamSynchronize);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  SIMGPU_TRY(simulation().check_unsafe_call());
  return simulation().synchronize(stream);
}

SIMGPU_API CUresult CUDAAPI cuStreamQuery(CUstream hStream) {
  SIMGPU_ENTER(cuStreamQuery);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  SIMGPU_TRY(simulation().check_unsafe_call());
  return simulation().query(stream);
}

SIMGPU_API CUresult CUDAAPI cuStreamWaitEvent(CUstream hStream, CUevent hEvent,
                                              unsigned int Flags) {
  SIMGPU_ENTER(cuStreamWaitEvent);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  EventPtr event = simulation().find_event(hEvent);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return simulation().wait_event(stream, event, Flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamAddCallback(CUstream hStream, CUstreamCallback callback,
                                                void* userData, unsigned int flags) {
  SIMGPU_ENTER(cuStreamAddCallback);
  SIMGPU_REQUIRE(callback != nullptr && flags == 0);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  if (simulation().is_capturing(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_HOST;
  work.action = host_action([=] { callback(hStream, CUDA_SUCCESS, userData); });
  return simulation().submit(stream, std::move(work), nullptr);
}

SIMGPU_API CUresult CUDAAPI cuLaunchHostFunc(CUstream hStream, CUhostFn fn, void* userData) {
  SIMGPU_ENTER(cuLaunchHostFunc);
  SIMGPU_REQUIRE(fn != nullptr);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_HOST;
  work.action = host_action([=] { fn(userData); });
  return simulation().submit(stream, std::move(work), nullptr);
}

SIMGPU_API CUresult CUDAAPI cuStreamGetCtx(CUstream hStream, CUcontext* pctx) {
  SIMGPU_ENTER(cuStreamGetCtx);
  SIMGPU_REQUIRE(pctx != nullptr);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  *pctx = stream->context()->handle();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuStreamGetDevice(CUstream hStream, CUdevice* device) {
  SIMGPU_ENTER(cuStreamGetDevice);
  SIMGPU_REQUIRE(device != nullptr);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  *device = stream->context()->device();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuStreamGetPriority(CUstream hStream, int* priority) {
  SIMGPU_ENTER(cuStreamGetPriority);
  SIMGPU_REQUIRE(priority != nullptr);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  *priority = stream->priority();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuStreamGetFlags(CUstream hStream, unsigned int* flags) {
  SIMGPU_ENTER(cuStreamGetFlags);
  SIMGPU_REQUIRE(flags != nullptr);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  *flags = stream->flags();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuStreamGetId(CUstream hStream, unsigned long long* streamId) {
  SIMGPU_ENTER(cuStreamGetId);
  SIMGPU_REQUIRE(streamId != nullptr);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  *streamId = stream->id();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuStreamSynchronize_ptsz(CUstream hStream) {
  return cuStreamSynchronize(per_thread(hStream));
}
SIMGPU_API CUresult CUDAAPI cuStreamQuery_ptsz(CUstream hStream) {
  return cuStreamQuery(per_thread(hStream));
}
SIMGPU_API CUresult CUDAAPI cuStreamWaitEvent_ptsz(CUstream hStream, CUevent hEvent,
                                                   unsigned int Flags) {
  return cuStreamWaitEvent(per_thread(hStream), hEvent, Flags);
}
SIMGPU_API CUresult CUDAAPI cuStreamAddCallback_ptsz(CUstream hStream, CUstreamCallback callback,
                                                     void* userData, unsigned int flags) {
  return cuStreamAddCallback(per_thread(hStream), callback, userData, flags);
}
SIMGPU_API CUresult CUDAAPI cuLaunchHostFunc_ptsz(CUstream hStream, CUhostFn fn, void* userData) {
  return cuLaunchHostFunc(per_thread(hStream), fn, userData);
}
SIMGPU_API CUresult CUDAAPI cuStreamGetCtx_ptsz(CUstream hStream, CUcontext* pctx) {
  return cuStreamGetCtx(per_thread(hStream), pctx);
}
SIMGPU_API CUresult CUDAAPI cuStreamGetDevice_ptsz(CUstream hStream, CUdevice* device) {
  return cuStreamGetDevice(per_thread(hStream), device);
}
SIMGPU_API CUresult CUDAAPI cuStreamGetPriority_ptsz(CUstream hStream, int* priority) {
  return cuStreamGetPriority(per_thread(hStream), priority);
}
SIMGPU_API CUresult CUDAAPI cuStreamGetFlags_ptsz(CUstream hStream, unsigned int* flags) {
  return cuStreamGetFlags(per_thread(hStream), flags);
}
SIMGPU_API CUresult CUDAAPI cuStreamGetId_ptsz(CUstream hStream, unsigned long long* streamId) {
  return cuStreamGetId(per_thread(hStream), streamId);
}

// Events.

SIMGPU_API CUresult CUDAAPI cuEventCreate(CUevent* phEvent, unsigned int Flags) {
  SIMGPU_ENTER(cuEventCreate);
  SIMGPU_REQUIRE(phEvent != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  return simulation().create_event(context, Flags, phEvent);
}

SIMGPU_API CUresult CUDAAPI cuEventDestroy_v2(CUevent hEvent) {
  SIMGPU_ENTER(cuEventDestroy);
  return simulation().destroy_event(hEvent);
}

SIMGPU_API CUresult CUDAAPI cuEventRecord(CUevent hEvent, CUstream hStream) {
  SIMGPU_ENTER(cuEventRecord);
  return record(hEvent, hStream, 0);
}

SIMGPU_API CUresult CUDAAPI cuCtxRecordEvent(CUcontext hCtx, CUevent hEvent) {
  SIMGPU_ENTER(cuCtxRecordEvent);
  EventPtr event = simulation().find_event(hEvent);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  Context* context = simulation().find_context(hCtx);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return simulation().record_context(event, context);
}

SIMGPU_API CUresult CUDAAPI cuEventRecordWithFlags(CUevent hEvent, CUstream hStream,
                                                   unsigned int flags) {
  SIMGPU_ENTER(cuEventRecordWithFlags);
  return record(hEvent, hStream, flags);
}

SIMGPU_API CUresult CUDAAPI cuEventRecord_ptsz(CUevent hEvent, CUstream hStream) {
  return cuEventRecord(hEvent, per_thread(hStream));
}

SIMGPU_API CUresult CUDAAPI cuEventRecordWithFlags_ptsz(CUevent hEvent, CUstream hStream,
                                                        unsigned int flags) {
  return cuEventRecordWithFlags(hEvent, per_thread(hStream), flags);
}

SIMGPU_API CUresult CUDAAPI cuEventQuery(CUevent hEvent) {
  SIMGPU_ENTER(cuEventQuery);
  EventPtr event = simulation().find_event(hEvent);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  SIMGPU_TRY(simulation().check_unsafe_call());
  std::shared_ptr<Record> record;
  SIMGPU_TRY(simulation().host_record(event, &record));
  SIMGPU_TRY(event->context->error());
  return record == nullptr || record->done->finished() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

SIMGPU_API CUresult CUDAAPI cuEventSynchronize(CUevent hEvent) {
  SIMGPU_ENTER(cuEventSynchronize);
  EventPtr event = simulation().find_event(hEvent);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  SIMGPU_TRY(simulation().check_unsafe_call());
  std::shared_ptr<Record> record;
  SIMGPU_TRY(simulation().host_record(event, &record));
  if (record != nullptr) record->done->wait();
  return event->context->error();
}

SIMGPU_API CUresult CUDAAPI cuEventElapsedTime(float* pMilliseconds, CUevent hStart, CUevent hEnd) {
  SIMGPU_ENTER(cuEventElapsedTime);
  return elapsed(pMilliseconds, hStart, hEnd);
}

SIMGPU_API CUresult CUDAAPI cuEventElapsedTime_v2(float* pMilliseconds, CUevent hStart,
                                                  CUevent hEnd) {
  SIMGPU_ENTER(cuEventElapsedTime);
  return elapsed(pMilliseconds, hStart, hEnd);
}

// Captures.

SIMGPU_API CUresult CUDAAPI cuStreamBeginCapture_v2(CUstream hStream, CUstreamCaptureMode mode) {
  SIMGPU_ENTER(cuStreamBeginCapture);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  return simulation().begin_capture(stream, mode);
}

SIMGPU_API CUresult CUDAAPI cuStreamBeginCapture(CUstream hStream) {
  return cuStreamBeginCapture_v2(hStream, CU_STREAM_CAPTURE_MODE_GLOBAL);
}

SIMGPU_API CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  SIMGPU_ENTER(cuThreadExchangeStreamCaptureMode);
  SIMGPU_REQUIRE(mode != nullptr && *mode >= CU_STREAM_CAPTURE_MODE_GLOBAL &&
                 *mode <= CU_STREAM_CAPTURE_MODE_RELAXED);
  std::swap(*mode, this_thread().capture_mode);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuStreamEndCapture(CUstream hStream, CUgraph* phGraph) {
  SIMGPU_ENTER(cuStreamEndCapture);
  SIMGPU_REQUIRE(phGraph != nullptr);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  return simulation().end_capture(stream, phGraph);
}

SIMGPU_API CUresult CUDAAPI cuStreamIsCapturing(CUstream hStream,
                                                CUstreamCaptureStatus* captureStatus) {
  SIMGPU_ENTER(cuStreamIsCapturing);
  Simulation::CaptureInfo info;
  return capture_info(hStream, captureStatus, &info);
}

SIMGPU_API CUresult CUDAAPI cuStreamGetCaptureInfo(CUstream hStream,
                                                   CUstreamCaptureStatus* captureStatus_out,
                                                   cuuint64_t* id_out) {
  SIMGPU_ENTER(cuStreamGetCaptureInfo);
  Simulation::CaptureInfo info;
  SIMGPU_TRY(capture_info(hStream, captureStatus_out, &info));
  if (id_out != nullptr) *id_out = info.id;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuStreamGetCaptureInfo_v2(CUstream hStream,
                                                      CUstreamCaptureStatus* captureStatus_out,
                                                      cuuint64_t* id_out, CUgraph* graph_out,
                                                      const CUgraphNode** dependencies_out,
                                                      size_t* numDependencies_out) {
  SIMGPU_ENTER(cuStreamGetCaptureInfo);
  Simulation::CaptureInfo info;
  SIMGPU_TRY(capture_info(hStream, captureStatus_out, &info));
  if (id_out != nullptr) *id_out = info.id;
  if (graph_out != nullptr) *graph_out = info.graph;
  if (dependencies_out != nullptr) *dependencies_out = info.nodes;
  if (numDependencies_out != nullptr) *numDependencies_out = info.node_count;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuStreamGetCaptureInfo_v3(CUstream hStream,
                                                      CUstreamCaptureStatus* captureStatus_out,
                                                      cuuint64_t* id_out, CUgraph* graph_out,
                                                      const CUgraphNode** dependencies_out,
                                                      const CUgraphEdgeData** edgeData_out,
                                                      size_t* numDependencies_out) {
  if (edgeData_out != nullptr) *edgeData_out = nullptr;  // all edges are plain
  return cuStreamGetCaptureInfo_v2(hStream, captureStatus_out, id_out, graph_out, dependencies_out,
                                   numDependencies_out);
}

SIMGPU_API CUresult CUDAAPI cuStreamBeginCapture_ptsz(CUstream hStream) {
  return cuStreamBeginCapture(per_thread(hStream));
}
SIMGPU_API CUresult CUDAAPI cuStreamBeginCapture_v2_ptsz(CUstream hStream,
                                                         CUstreamCaptureMode mode) {
  return cuStreamBeginCapture_v2(per_thread(hStream), mode);
}
SIMGPU_API CUresult CUDAAPI cuStreamEndCapture_ptsz(CUstream hStream, CUgraph* phGraph) {
  return cuStreamEndCapture(per_thread(hStream), phGraph);
}
SIMGPU_API CUresult CUDAAPI cuStreamIsCapturing_ptsz(CUstream hStream,
                                                     CUstreamCaptureStatus* captureStatus) {
  return cuStreamIsCapturing(per_thread(hStream), captureStatus);
}
SIMGPU_API CUresult CUDAAPI cuStreamGetCaptureInfo_ptsz(CUstream hStream,
                                                        CUstreamCaptureStatus* captureStatus_out,
                                                        cuuint64_t* id_out) {
  return cuStreamGetCaptureInfo(per_thread(hStream), captureStatus_out, id_out);
}
SIMGPU_API CUresult CUDAAPI cuStreamGetCaptureInfo_v2_ptsz(CUstream hStream,
                                                           CUstreamCaptureStatus* captureStatus_out,
                                                           cuuint64_t* id_out, CUgraph* graph_out,
                                                           const CUgraphNode** dependencies_out,
                                                           size_t* numDependencies_out) {
  return cuStreamGetCaptureInfo_v2(per_thread(hStream), captureStatus_out, id_out, graph_out,
                                   dependencies_out, numDependencies_out);
}
SIMGPU_API CUresult CUDAAPI cuStreamGetCaptureInfo_v3_ptsz(CUstream hStream,
                                                           CUstreamCaptureStatus* captureStatus_out,
                                                           cuuint64_t* id_out, CUgraph* graph_out,
                                                           const CUgraphNode** dependencies_out,
                                                           const CUgraphEdgeData** edgeData_out,
                                                           size_t* numDependencies_out) {
  return cuStreamGetCaptureInfo_v3(per_thread(hStream), captureStatus_out, id_out, graph_out,
                                   dependencies_out, edgeData_out, numDependencies_out);
}
