// The hooks of functions that begin and end stream captures. A beginning passes the gate as a
// launch does, so that none begins while a sleep is under way; an end never waits: a sleep waits
// for it.
#include "shim/hooks/captures.h"

#include <atomic>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "core/sleep/engine.h"
#include "core/sleep/gate.h"
#include "shim/hooks/hooks.h"
#include "shim/hooks/support.h"
#include "shim/process/process.h"

namespace {

using namespace dormouse;
using namespace dormouse::shim;

// A capture is known by the stream that it began on, on which alone it can be ended.
struct Capture {
  CUstream stream;
  std::thread::id thread;  // of the per-thread default stream, which is another one in each thread
  CUcontext context;
  Engine* told;  // of the beginning; null: there was no engine yet

  bool began_on(const Capture& other) const noexcept {
    return stream == other.stream && thread == other.thread &&
           (stream != CU_STREAM_PER_THREAD || context == other.context);
  }
};

struct CaptureList {
  std::mutex mutex;  // protects all
  std::vector<Capture> all;
  std::atomic<std::size_t> count{0};  // of all, for who need not take the lock when it is 0
};

CaptureList& under_way() noexcept {
  static CaptureList* const instance = new CaptureList;
  return *instance;
}

Capture of_stream(CUstream stream) noexcept {
  Capture capture{stream, {}, nullptr, engine()};
  if (stream == CU_STREAM_PER_THREAD) capture.thread = std::this_thread::get_id();
  if (is_default_stream(stream) || real::cuStreamGetCtx(stream, &capture.context) != CUDA_SUCCESS) {
    real::cuCtxGetCurrent(&capture.context);
  }
  return capture;
}

// Removes those for which `is_over` holds.
template <typename IsOver>
void remove(IsOver is_over) noexcept {
  CaptureList& captures = under_way();
  std::lock_guard lock(captures.mutex);
  std::erase_if(captures.all, [&](const Capture& capture) {
    if (!is_over(capture)) return false;
    if (capture.told != nullptr) capture.told->capture_ended();
    return true;
  });
  captures.count.store(captures.all.size(), std::memory_order_relaxed);
}

void add(const Capture& began) noexcept {
  // One that ended unseen, else none could have begun on its stream.
  remove([&](const Capture& capture) { return capture.began_on(began); });
  CaptureList& captures = under_way();
  std::lock_guard lock(captures.mutex);
  try {
    captures.all.push_back(began);
  } catch (const std::bad_alloc&) {
    if (began.told != nullptr) began.told->capture_ended();
    return;  // as if it had not been seen
  }
  captures.count.store(captures.all.size(), std::memory_order_relaxed);
}

template <typename Call>
CUresult beginning(CUstream stream, Call call) {
  const CUresult closed = gate::enter();
  if (closed != CUDA_SUCCESS) return closed;
  const Capture capture = of_stream(stream);
  if (capture.told != nullptr) capture.told->capture_begins();
  const CUresult result = call();
  // Inside the gate: who has closed it sees the capture.
  if (result == CUDA_SUCCESS) {
    add(capture);
  } else if (capture.told != nullptr) {
    capture.told->capture_ended();
  }
  gate::leave();
  return result;
}

// A call that can end the capture that began on `stream`. Whether it did shows in the stream's
// state, not in the result: the end of an invalidated capture is an error.
template <typename Call>
CUresult ending(CUstream stream, Call call) noexcept {
  if (under_way().count.load(std::memory_order_relaxed) == 0) return call();
  const Capture capture = of_stream(stream);
  const CUresult result = call();
  if (result == CUDA_SUCCESS || !is_capturing(stream)) {
    remove([&](const Capture& other) { return other.began_on(capture); });
  }
  return result;
}

}  // namespace

namespace dormouse::shim::captures {

void context_destroyed(CUcontext context) noexcept {
  if (under_way().count.load(std::memory_order_relaxed) == 0) return;
  remove([&](const Capture& capture) { return capture.context == context; });
}

void forget_after_fork() noexcept {
  CaptureList& captures = under_way();
  new (&captures.mutex) std::mutex;
  // Another thread may have been changing it: what it holds is left behind.
  new (&captures.all) std::vector<Capture>;
  captures.count.store(0, std::memory_order_relaxed);
}

}  // namespace dormouse::shim::captures

CUresult cuStreamBeginCapture(CUstream stream) {
  return beginning(stream, [&] { return real::cuStreamBeginCapture(stream); });
}

CUresult cuStreamBeginCapture_ptsz(CUstream stream) {
  return beginning(per_thread(stream), [&] { return real::cuStreamBeginCapture_ptsz(stream); });
}

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
  return beginning(stream, [&] { return real::cuStreamBeginCapture_v2(stream, mode); });
}

CUresult cuStreamBeginCapture_v2_ptsz(CUstream stream, CUstreamCaptureMode mode) {
  return beginning(per_thread(stream),
                   [&] { return real::cuStreamBeginCapture_v2_ptsz(stream, mode); });
}

CUresult cuStreamBeginCaptureToGraph(CUstream stream, CUgraph graph,
                                     const CUgraphNode* dependencies,
                                     const CUgraphEdgeData* dependency_data,
                                     size_t num_dependencies, CUstreamCaptureMode mode) {
  return beginning(stream, [&] {
    return real::cuStreamBeginCaptureToGraph(stream, graph, dependencies, dependency_data,
                                             num_dependencies, mode);
  });
}

CUresult cuStreamBeginCaptureToGraph_ptsz(CUstream stream, CUgraph graph,
                                          const CUgraphNode* dependencies,
                                          const CUgraphEdgeData* dependency_data,
                                          size_t num_dependencies, CUstreamCaptureMode mode) {
  return beginning(per_thread(stream), [&] {
    return real::cuStreamBeginCaptureToGraph_ptsz(stream, graph, dependencies, dependency_data,
                                                  num_dependencies, mode);
  });
}

CUresult cuStreamBeginRecaptureToGraph(CUstream stream, CUstreamCaptureMode mode, CUgraph graph,
                                       CUgraphRecaptureCallback callback, void* data) {
  return beginning(stream, [&] {
    return real::cuStreamBeginRecaptureToGraph(stream, mode, graph, callback, data);
  });
}

CUresult cuStreamBeginRecaptureToGraph_ptsz(CUstream stream, CUstreamCaptureMode mode,
                                            CUgraph graph, CUgraphRecaptureCallback callback,
                                            void* data) {
  return beginning(per_thread(stream), [&] {
    return real::cuStreamBeginRecaptureToGraph_ptsz(stream, mode, graph, callback, data);
  });
}

CUresult cuStreamBeginCaptureToCig(CUstream stream, CUstreamCigCaptureParams* params) {
  return beginning(stream, [&] { return real::cuStreamBeginCaptureToCig(stream, params); });
}

CUresult cuStreamBeginCaptureToCig_ptsz(CUstream stream, CUstreamCigCaptureParams* params) {
  return beginning(per_thread(stream),
                   [&] { return real::cuStreamBeginCaptureToCig_ptsz(stream, params); });
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  return ending(stream, [&] { return real::cuStreamEndCapture(stream, graph); });
}

CUresult cuStreamEndCapture_ptsz(CUstream stream, CUgraph* graph) {
  return ending(per_thread(stream), [&] { return real::cuStreamEndCapture_ptsz(stream, graph); });
}

CUresult cuStreamEndCaptureToCig(CUstream stream) {
  return ending(stream, [&] { return real::cuStreamEndCaptureToCig(stream); });
}

CUresult cuStreamEndCaptureToCig_ptsz(CUstream stream) {
  return ending(per_thread(stream), [&] { return real::cuStreamEndCaptureToCig_ptsz(stream); });
}

CUresult cuStreamDestroy_v2(CUstream stream) {
  return ending(stream, [&] { return real::cuStreamDestroy_v2(stream); });
}
