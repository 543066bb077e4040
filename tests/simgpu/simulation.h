// The simulated machine: its state over the process's life, contexts, streams, events and the order
// of their work. For the simulated driver's sources only.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "tests/simgpu/call_sites.h"
#include "tests/simgpu/driver_headers.h"
#include "tests/simgpu/graph.h"
#include "tests/simgpu/memory.h"
#include "tests/simgpu/stream.h"

namespace simgpu {

class Context {
 public:
  // `green_of` (may be null): the primary context that does the work of this green context.
  Context(int device, bool primary, unsigned flags, Context* green_of = nullptr);

  int device() const { return device_; }
  bool primary() const { return primary_; }
  Context* green_of() const { return green_of_; }
  uint64_t id() const { return id_; }
  CUcontext handle() { return reinterpret_cast<CUcontext>(this); }

  // The error that a piece of work ended with; it lasts until the context is destroyed.
  CUresult error() const { return static_cast<CUresult>(error_.load()); }
  void fail(CUresult result);

  std::atomic<bool> alive{true};
  std::atomic<unsigned> flags;

  // The order lock of the simulation protects what follows.
  StreamPtr legacy;
  StreamPtr marker;             // reaches what cuCtxRecordEvent recorded; null at first
  std::set<StreamPtr> streams;  // created and per-thread ones
  std::set<Context*> peers;     // contexts whose memory this one may use
  std::map<CUlimit, size_t> limits;
  int references = 0;  // of a primary context; the attachments of another
  void reset_error() { error_.store(CUDA_SUCCESS); }

 private:
  const int device_;
  const bool primary_;
  Context* const green_of_;
  const uint64_t id_;
  std::atomic<int> error_{CUDA_SUCCESS};
};

// When an event was last recorded.
struct Record {
  CompletionPtr done;
  std::chrono::steady_clock::time_point when;
};

struct Event {
  unsigned flags;
  Context* context;
  std::shared_ptr<Record> record;    // null: never recorded
  std::shared_ptr<Capture> capture;  // recorded in a capture: the one
  std::vector<Node*> capture_nodes;
  std::shared_ptr<Record> captured_record;
};
using EventPtr = std::shared_ptr<Event>;

// What a thread has: its contexts, the mode of captures, its default streams.
struct ThreadState {
  std::vector<Context*> contexts;  // the last one is current
  std::set<Context*> pushed_dead;  // pushed after their end: a pop of them ends the process
  CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::map<uint64_t, StreamPtr> streams;  // by context id
  bool in_host_function = false;
  ~ThreadState();
};
ThreadState& this_thread();

// Thread-safe but where said otherwise. Lives for ever.
class Simulation {
 public:
  static Simulation& get();

  CUresult initialize(unsigned flags);
  // CUDA_SUCCESS when calls may go on; CUDA_ERROR_NOT_INITIALIZED before cuInit and in a forked
  // child, CUDA_ERROR_DEINITIALIZED at the process's exit.
  CUresult state() const { return static_cast<CUresult>(state_.load(std::memory_order_acquire)); }

  Memory& memory() { return *memory_; }
  int device_count() const { return memory_->device_count(); }
  bool valid(CUdevice device) const { return device >= 0 && device < device_count(); }

  // The context that the thread's calls use, or the reason why there is none.
  CUresult current(Context** context);
  // A context from its handle, alive; null if it is none.
  Context* find_context(CUcontext handle);
  // The same, alive or not: it may be made current all the same.
  Context* find_any_context(CUcontext handle);
  CUresult create_context(CUdevice device, unsigned flags, Context** context);
  // With a reference of the primary context, which goes with it.
  CUresult create_green(CUdevice device, Context** context);
  CUresult attach(Context* context);
  CUresult detach(Context* context);
  CUresult destroy_context(Context* context);
  CUresult retain_primary(CUdevice device, Context** context);
  CUresult release_primary(CUdevice device);
  CUresult reset_primary(CUdevice device);
  CUresult primary_state(CUdevice device, unsigned* flags, int* active);
  CUresult set_primary_flags(CUdevice device, unsigned flags);
  CUresult enable_peer(Context* context, Context* peer);
  CUresult disable_peer(Context* context, Context* peer);
  // Whether the context may use the memory of the device by cuCtxEnablePeerAccess.
  bool is_peer(Context* context, int device);
  size_t limit(Context* context, CUlimit limit, size_t otherwise);
  void set_limit(Context* context, CUlimit limit, size_t value);

  CUresult create_stream(Context* context, unsigned flags, int priority, CUstream* handle);
  CUresult destroy_stream(CUstream handle);
  // A stream from its handle, the default streams' included.
  CUresult find_stream(CUstream handle, Context* current, StreamPtr* stream);
  size_t stream_count();

  // Appends work to a stream, or to the graph that the stream is captured into; `done` (may be
  // null) becomes the completion, null in a capture. Order with other streams is the driver's.
  CUresult submit(const StreamPtr& stream, Work work, CompletionPtr* done);
  // Waits for all work of a stream. CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED if it is captured.
  CUresult synchronize(const StreamPtr& stream);
  CUresult query(const StreamPtr& stream);
  // Waits for all work of a context, whether anything is captured or not.
  void drain(Context* context);
  CUresult synchronize_context(Context* context);

  CUresult create_event(Context* context, unsigned flags, CUevent* handle);
  CUresult destroy_event(CUevent handle);
  EventPtr find_event(CUevent handle);
  CUresult record_event(const EventPtr& event, const StreamPtr& stream);
  // Records behind all work that the context has now.
  CUresult record_context(const EventPtr& event, Context* context);
  CUresult wait_event(const StreamPtr& stream, const EventPtr& event, unsigned flags);
  // The last record of an event for a host call; null if there is none. CUDA_ERROR_CAPTURED_EVENT
  // in a capture.
  CUresult host_record(const EventPtr& event, std::shared_ptr<Record>* record);
  size_t event_count();

  // Captures and graphs.
  CUresult begin_capture(const StreamPtr& stream, CUstreamCaptureMode mode);
  CUresult end_capture(const StreamPtr& stream, CUgraph* graph);
  struct CaptureInfo {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    uint64_t id = 0;
    CUgraph graph = nullptr;
    const CUgraphNode* nodes = nullptr;
    size_t node_count = 0;
  };
  bool is_capturing(const StreamPtr& stream);
  CUresult capture_info(const StreamPtr& stream, CaptureInfo* info);
  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, with the captures invalidated, for a call that captures
  // in progress forbid.
  CUresult check_unsafe_call();
  CUresult create_graph(CUgraph* graph);
  CUresult destroy_graph(CUgraph graph);
  CUresult graph_nodes(CUgraph graph, CUgraphNode* nodes, size_t* count, bool roots_only);
  CUresult node(CUgraphNode handle, Work* work);
  CUresult add_node(CUgraph graph, const CUgraphNode* after, size_t count, Work work,
                    CUgraphNode* node);
  CUresult set_node(CUgraphNode node, Work work);
  CUresult set_exec_node(CUgraphExec exec, CUgraphNode node, Work work);
  CUresult update_exec(CUgraphExec exec, CUgraph graph);
  CUresult instantiate(CUgraph graph, unsigned long long flags, CUgraphExec* exec);
  CUresult destroy_exec(CUgraphExec exec);
  CUresult exec_flags(CUgraphExec exec, unsigned long long* flags);
  CUresult launch_graph(CUgraphExec exec, const StreamPtr& stream);

  // Writes what is alive to the file of SIMGPU_LEAK_REPORT.
  void report_leaks();

 private:
  friend ThreadState;
  Simulation() = default;
  // Functions from here to the next comment need order_mutex_, except end_context and tails, which
  // take it.
  void end_context(Context* context);
  // Ends the captures of the context's streams with an error. True if there were any.
  bool end_captures(Context* context);
  std::vector<CompletionPtr> tails(Context* context);
  void invalidate(Capture& capture);
  Node* find_node(CUgraphNode handle);
  std::shared_ptr<GraphExec> make_exec(CUgraph graph, CUresult* result);
  void forget_finished(Context* context);
  // Handlers of the process.
  static void at_exit();
  static void in_forked_child();

  std::atomic<int> state_{CUDA_ERROR_NOT_INITIALIZED};
  std::mutex initialize_mutex_;  // held while cuInit does its work once
  std::unique_ptr<Memory> memory_;

  std::mutex order_mutex_;  // protects what follows and all that says so elsewhere
  std::vector<Context*> primaries_;
  std::set<Context*> contexts_;
  std::map<CUstream, StreamPtr> streams_;
  std::map<CUevent, EventPtr> events_;
  std::set<std::shared_ptr<Capture>> captures_;
  std::map<CUgraph, std::unique_ptr<Graph>> graphs_;
  std::map<CUgraphExec, std::shared_ptr<GraphExec>> execs_;
  uint64_t next_capture_ = 1;
};

// Counts the use of a function and says whether it may go on; what every exported function begins
// with.
CUresult enter(CallSite& site);
// The same for functions that work before cuInit.
CUresult enter_early(CallSite& site);

}  // namespace simgpu

// First line of an exported function: counts the use, returns an injected failure or the reason not
// to go on.
#define SIMGPU_ENTER(function)                                            \
  static ::simgpu::CallSite& call_site_ = ::simgpu::call_site(#function); \
  if (CUresult entered_ = ::simgpu::enter(call_site_); entered_ != CUDA_SUCCESS) return entered_

#define SIMGPU_ENTER_EARLY(function)                                                   \
  static ::simgpu::CallSite& call_site_ = ::simgpu::call_site(#function);              \
  if (CUresult entered_ = ::simgpu::enter_early(call_site_); entered_ != CUDA_SUCCESS) \
  return entered_

// Returns from the function unless `expression` is CUDA_SUCCESS.
#define SIMGPU_TRY(expression) \
  if (CUresult tried_ = (expression); tried_ != CUDA_SUCCESS) return tried_

#define SIMGPU_REQUIRE(condition) \
  if (!(condition)) return CUDA_ERROR_INVALID_VALUE
