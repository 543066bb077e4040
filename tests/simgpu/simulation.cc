#include "tests/simgpu/simulation.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/simgpu/kernels.h"
#include "tests/simgpu/settings.h"

namespace simgpu {
namespace {

uint64_t next_context_id() {
  static std::atomic<uint64_t> id{1};
  return id.fetch_add(1);
}

std::string expand(std::string path) {
  size_t at = path.find("%p");
  if (at != std::string::npos) path.replace(at, 2, std::to_string(getpid()));
  return path;
}

}  // namespace

Context::Context(int device, bool primary, unsigned given_flags, Context* green_of)
    : flags(given_flags),
      device_(device),
      primary_(primary),
      green_of_(green_of),
      id_(next_context_id()) {}

void Context::fail(CUresult result) {
  int none = CUDA_SUCCESS;
  error_.compare_exchange_strong(none, result);
}

ThreadState& this_thread() {
  thread_local ThreadState state;
  return state;
}

ThreadState::~ThreadState() {
  Simulation& simulation = Simulation::get();
  if (streams.empty() || simulation.state() != CUDA_SUCCESS) return;
  std::lock_guard lock(simulation.order_mutex_);
  for (auto& [id, stream] : streams) {
    // A context that ended has already forgotten its streams.
    for (Context* context : simulation.contexts_) {
      if (context->id() == id) context->streams.erase(stream);
    }
    stream->close();
  }
}

Simulation& Simulation::get() {
  static auto* instance = new Simulation;
  return *instance;
}

CUresult Simulation::initialize(unsigned flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (state() != CUDA_ERROR_NOT_INITIALIZED) return state();
  std::lock_guard lock(initialize_mutex_);
  if (state() != CUDA_ERROR_NOT_INITIALIZED) return state();
  if (memory_ != nullptr) return CUDA_ERROR_NOT_INITIALIZED;  // a forked child
  const Settings& given = settings();
  if (!given.error.empty() || !inject_failures(given.failures)) {
    std::fprintf(stderr, "simgpu: %s\n",
                 given.error.empty() ? "SIMGPU_FAIL is not understood" : given.error.c_str());
    return CUDA_ERROR_ILLEGAL_STATE;
  }
  if (!load_kernel_libraries(given.kernels)) {
    std::fprintf(stderr, "simgpu: SIMGPU_KERNELS=%s cannot be loaded\n", given.kernels.c_str());
    return CUDA_ERROR_ILLEGAL_STATE;
  }
  if (given.device_memory.empty()) return CUDA_ERROR_NO_DEVICE;
  memory_ = std::make_unique<Memory>(given.device_memory);
  for (int device = 0; device < memory_->device_count(); ++device) {
    auto* primary = new Context(device, true, 0);
    primary->alive = false;
    primaries_.push_back(primary);
    contexts_.insert(primary);
  }
  pthread_atfork(nullptr, nullptr, &in_forked_child);
  std::atexit(&at_exit);
  state_.store(CUDA_SUCCESS, std::memory_order_release);
  return CUDA_SUCCESS;
}

void Simulation::in_forked_child() {
  get().state_.store(CUDA_ERROR_NOT_INITIALIZED, std::memory_order_release);
}

void Simulation::at_exit() {
  Simulation& simulation = get();
  if (simulation.state() != CUDA_SUCCESS) return;
  simulation.report_leaks();
  simulation.state_.store(CUDA_ERROR_DEINITIALIZED, std::memory_order_release);
}

void Simulation::report_leaks() {
  const std::string& target = settings().leak_report;
  if (target.empty()) return;
  std::string text;
  std::string prefix = "simgpu " + std::to_string(getpid()) + ": leaked ";
  for (const std::string& line : memory_->describe_live()) text += prefix + line + "\n";
  int fd = target == "-"
               ? dup(STDERR_FILENO)
               : open(expand(target).c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0) return;
  size_t written = 0;
  while (written < text.size()) {
    ssize_t bytes = write(fd, text.data() + written, text.size() - written);
    if (bytes <= 0) break;
    written += static_cast<size_t>(bytes);
  }
  close(fd);
}

CUresult enter_early(CallSite& site) {
  return site.use();
}

CUresult enter(CallSite& site) {
  CUresult state = Simulation::get().state();
  if (state != CUDA_SUCCESS) return state;
  if (this_thread().in_host_function) return CUDA_ERROR_NOT_PERMITTED;
  return site.use();
}

// Contexts.

CUresult Simulation::current(Context** context) {
  std::vector<Context*>& stack = this_thread().contexts;
  if (stack.empty() || stack.back() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (!stack.back()->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  *context = stack.back()->green_of() != nullptr ? stack.back()->green_of() : stack.back();
  return (*context)->error();
}

Context* Simulation::find_any_context(CUcontext handle) {
  std::lock_guard lock(order_mutex_);
  auto* context = reinterpret_cast<Context*>(handle);
  return contexts_.contains(context) ? context : nullptr;
}

Context* Simulation::find_context(CUcontext handle) {
  std::lock_guard lock(order_mutex_);
  auto* context = reinterpret_cast<Context*>(handle);
  return contexts_.contains(context) && context->alive ? context : nullptr;
}

CUresult Simulation::create_context(CUdevice device, unsigned flags, Context** context) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::lock_guard lock(order_mutex_);
  *context = new Context(device, false, flags);
  (*context)->legacy = std::make_shared<Stream>(*context, Stream::Kind::kLegacy, 0, 0);
  (*context)->references = 1;
  contexts_.insert(*context);
  return CUDA_SUCCESS;
}

CUresult Simulation::create_green(CUdevice device, Context** context) {
  Context* primary = nullptr;
  SIMGPU_TRY(retain_primary(device, &primary));
  std::lock_guard lock(order_mutex_);
  *context = new Context(device, false, primary->flags, primary);
  contexts_.insert(*context);
  return CUDA_SUCCESS;
}

CUresult Simulation::attach(Context* context) {
  std::lock_guard lock(order_mutex_);
  ++context->references;
  return CUDA_SUCCESS;
}

CUresult Simulation::detach(Context* context) {
  {
    std::lock_guard lock(order_mutex_);
    if (--context->references > 0) return CUDA_SUCCESS;
  }
  return destroy_context(context);
}

// Ends everything that lives in a context. The object stays, so that stale handles are found dead
// and not dangling.
void Simulation::end_context(Context* context) {
  drain(context);
  {
    std::lock_guard lock(order_mutex_);
    context->alive = false;
    for (auto stream = streams_.begin(); stream != streams_.end();) {
      stream = stream->second->context() == context ? streams_.erase(stream) : std::next(stream);
    }
    for (auto event = events_.begin(); event != events_.end();) {
      event = event->second->context == context ? events_.erase(event) : std::next(event);
    }
    for (const StreamPtr& stream : context->streams) stream->close();
    context->streams.clear();
    if (context->legacy != nullptr) context->legacy->close();
    if (context->marker != nullptr) context->marker->close();
    context->legacy.reset();
    context->marker.reset();
    context->peers.clear();
    context->limits.clear();
    for (Context* other : contexts_) other->peers.erase(context);
  }
  memory_->free_all_of(context);
}

CUresult Simulation::destroy_context(Context* context) {
  if (context->primary()) return CUDA_ERROR_INVALID_CONTEXT;
  end_context(context);
  std::vector<Context*>& stack = this_thread().contexts;
  if (!stack.empty() && stack.back() == context) stack.pop_back();
  return context->green_of() == nullptr ? CUDA_SUCCESS : release_primary(context->device());
}

CUresult Simulation::retain_primary(CUdevice device, Context** context) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::lock_guard lock(order_mutex_);
  Context* primary = primaries_[device];
  if (!primary->alive) {
    primary->reset_error();
    primary->legacy = std::make_shared<Stream>(primary, Stream::Kind::kLegacy, 0, 0);
    primary->alive = true;
  }
  ++primary->references;
  *context = primary;
  return CUDA_SUCCESS;
}

CUresult Simulation::release_primary(CUdevice device) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  {
    std::lock_guard lock(order_mutex_);
    if (primaries_[device]->references == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (--primaries_[device]->references > 0 || !primaries_[device]->alive) return CUDA_SUCCESS;
  }
  end_context(primaries_[device]);
  return CUDA_SUCCESS;
}

CUresult Simulation::reset_primary(CUdevice device) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  {
    std::lock_guard lock(order_mutex_);
    // The references stay: each still has to be released.
    if (!primaries_[device]->alive) return CUDA_SUCCESS;
  }
  end_context(primaries_[device]);
  return CUDA_SUCCESS;
}

CUresult Simulation::primary_state(CUdevice device, unsigned* flags, int* active) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  *flags = primaries_[device]->flags;
  *active = primaries_[device]->alive;
  return CUDA_SUCCESS;
}

CUresult Simulation::set_primary_flags(CUdevice device, unsigned flags) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  if ((flags & ~static_cast<unsigned>(CU_CTX_FLAGS_MASK)) != 0) return CUDA_ERROR_INVALID_VALUE;
  primaries_[device]->flags = flags;
  return CUDA_SUCCESS;
}

CUresult Simulation::enable_peer(Context* context, Context* peer) {
  if (peer == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (context->device() == peer->device() || !settings().peers) {
    return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  }
  std::lock_guard lock(order_mutex_);
  bool added = context->peers.insert(peer).second;
  return added ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
}

CUresult Simulation::disable_peer(Context* context, Context* peer) {
  if (peer == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  std::lock_guard lock(order_mutex_);
  return context->peers.erase(peer) == 1 ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
}

bool Simulation::is_peer(Context* context, int device) {
  std::lock_guard lock(order_mutex_);
  return std::any_of(context->peers.begin(), context->peers.end(),
                     [device](const Context* peer) { return peer->device() == device; });
}

size_t Simulation::limit(Context* context, CUlimit limit, size_t otherwise) {
  std::lock_guard lock(order_mutex_);
  auto entry = context->limits.find(limit);
  return entry == context->limits.end() ? otherwise : entry->second;
}

void Simulation::set_limit(Context* context, CUlimit limit, size_t value) {
  std::lock_guard lock(order_mutex_);
  context->limits[limit] = value;
}

// Streams and their order.

CUresult Simulation::create_stream(Context* context, unsigned flags, int priority,
                                   CUstream* handle) {
  if ((flags & ~static_cast<unsigned>(CU_STREAM_NON_BLOCKING)) != 0)
    return CUDA_ERROR_INVALID_VALUE;
  auto stream = std::make_shared<Stream>(context, Stream::Kind::kCreated, flags, priority);
  std::lock_guard lock(order_mutex_);
  forget_finished(context);
  *handle = reinterpret_cast<CUstream>(stream.get());
  context->streams.insert(stream);
  streams_[*handle] = std::move(stream);
  return CUDA_SUCCESS;
}

CUresult Simulation::destroy_stream(CUstream handle) {
  std::lock_guard lock(order_mutex_);
  auto entry = streams_.find(handle);
  if (entry == streams_.end()) return CUDA_ERROR_INVALID_HANDLE;
  StreamPtr stream = entry->second;
  if (stream->capture != nullptr) {
    invalidate(*stream->capture);
    stream->capture->members.erase(stream.get());
    if (stream->capture->origin == stream.get()) captures_.erase(stream->capture);
  }
  streams_.erase(entry);
  // Work in the queue is still done, and others still wait for it: the context keeps the stream
  // until it is.
  stream->close();
  forget_finished(stream->context());
  return CUDA_SUCCESS;
}

void Simulation::forget_finished(Context* context) {
  std::erase_if(context->streams, [&](const StreamPtr& stream) {
    bool destroyed = stream->kind() == Stream::Kind::kCreated &&
                     !streams_.contains(reinterpret_cast<CUstream>(stream.get()));
    CompletionPtr tail = stream->tail();
    return destroyed && (tail == nullptr || tail->finished());
  });
}

CUresult Simulation::find_stream(CUstream handle, Context* current, StreamPtr* stream) {
  std::lock_guard lock(order_mutex_);
  if (handle == nullptr || handle == CU_STREAM_LEGACY) {
    *stream = current->legacy;
    return *stream == nullptr ? CUDA_ERROR_CONTEXT_IS_DESTROYED : CUDA_SUCCESS;
  }
  if (handle == CU_STREAM_PER_THREAD) {
    StreamPtr& own = this_thread().streams[current->id()];
    // A primary context that was reset keeps its id but not its streams.
    if (own == nullptr || !current->streams.contains(own)) {
      own = std::make_shared<Stream>(current, Stream::Kind::kPerThread, 0, 0);
      current->streams.insert(own);
    }
    *stream = own;
    return CUDA_SUCCESS;
  }
  auto entry = streams_.find(handle);
  if (entry == streams_.end()) return CUDA_ERROR_INVALID_HANDLE;
  *stream = entry->second;
  return (*stream)->context()->error();
}

size_t Simulation::stream_count() {
  std::lock_guard lock(order_mutex_);
  return streams_.size();
}

CUresult Simulation::submit(const StreamPtr& stream, Work work, CompletionPtr* done) {
  std::lock_guard lock(order_mutex_);
  if (done != nullptr) done->reset();
  if (stream->capture != nullptr) {
    Capture& capture = *stream->capture;
    if (capture.invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    Node* node = capture.graph->add(std::move(work), stream->capture_tail);
    stream->capture_tail = {node};
    return CUDA_SUCCESS;
  }
  std::vector<CompletionPtr> after;
  auto wait_for = [&](const StreamPtr& other) {
    CompletionPtr tail = other->tail();
    if (tail != nullptr && !tail->finished()) after.push_back(tail);
  };
  Context* context = stream->context();
  if (stream->kind() == Stream::Kind::kLegacy) {
    bool captured = false;
    for (const StreamPtr& other : context->streams) {
      if (!other->blocking()) continue;
      if (other->capture != nullptr) {
        invalidate(*other->capture);
        captured = true;
      }
      wait_for(other);
    }
    if (captured) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  } else if (stream->blocking() && context->legacy != nullptr) {
    wait_for(context->legacy);
  }
  CompletionPtr completion = stream->push(std::move(work.action), std::move(after));
  if (done != nullptr) *done = completion;
  return CUDA_SUCCESS;
}

std::vector<CompletionPtr> Simulation::tails(Context* context) {
  std::lock_guard lock(order_mutex_);
  std::vector<CompletionPtr> result;
  auto add = [&](const StreamPtr& stream) {
    CompletionPtr tail = stream == nullptr ? nullptr : stream->tail();
    if (tail != nullptr && !tail->finished()) result.push_back(tail);
  };
  add(context->legacy);
  add(context->marker);
  for (const StreamPtr& stream : context->streams) add(stream);
  return result;
}

void Simulation::drain(Context* context) {
  for (const CompletionPtr& tail : tails(context)) tail->wait();
}

bool Simulation::end_captures(Context* context) {
  std::lock_guard lock(order_mutex_);
  bool captured = false;
  for (const StreamPtr& stream : context->streams) {
    if (stream->capture == nullptr) continue;
    invalidate(*stream->capture);
    captured = true;
  }
  return captured;
}

CUresult Simulation::synchronize_context(Context* context) {
  if (end_captures(context)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  drain(context);
  return context->error();
}

CUresult Simulation::synchronize(const StreamPtr& stream) {
  std::vector<CompletionPtr> open;
  {
    std::lock_guard lock(order_mutex_);
    if (stream->capture != nullptr) {
      invalidate(*stream->capture);
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (CompletionPtr tail = stream->tail()) open.push_back(tail);
    // Waiting for the legacy stream waits for every stream that it orders itself after.
    if (stream->kind() == Stream::Kind::kLegacy) {
      for (const StreamPtr& other : stream->context()->streams) {
        if (!other->blocking()) continue;
        if (CompletionPtr tail = other->tail()) open.push_back(tail);
      }
    }
  }
  for (const CompletionPtr& completion : open) completion->wait();
  return stream->context()->error();
}

CUresult Simulation::query(const StreamPtr& stream) {
  std::lock_guard lock(order_mutex_);
  if (stream->capture != nullptr) {
    invalidate(*stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  auto open = [](const StreamPtr& other) {
    CompletionPtr tail = other->tail();
    return tail != nullptr && !tail->finished();
  };
  bool ready = !open(stream);
  if (stream->kind() == Stream::Kind::kLegacy) {
    for (const StreamPtr& other : stream->context()->streams) {
      if (other->blocking() && open(other)) ready = false;
    }
  }
  CUresult error = stream->context()->error();
  if (error != CUDA_SUCCESS) return error;
  return ready ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

// Events.

CUresult Simulation::create_event(Context* context, unsigned flags, CUevent* handle) {
  constexpr unsigned kKnown =
      CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
  if ((flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
  if ((flags & CU_EVENT_INTERPROCESS) != 0) {
    bool timed = (flags & CU_EVENT_DISABLE_TIMING) == 0;
    return timed ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_NOT_SUPPORTED;
  }
  auto event = std::make_shared<Event>(Event{flags, context, nullptr, nullptr, {}, nullptr});
  std::lock_guard lock(order_mutex_);
  *handle = reinterpret_cast<CUevent>(event.get());
  events_[*handle] = std::move(event);
  return CUDA_SUCCESS;
}

CUresult Simulation::destroy_event(CUevent handle) {
  std::lock_guard lock(order_mutex_);
  return events_.erase(handle) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EventPtr Simulation::find_event(CUevent handle) {
  std::lock_guard lock(order_mutex_);
  auto entry = events_.find(handle);
  return entry == events_.end() ? nullptr : entry->second;
}

size_t Simulation::event_count() {
  std::lock_guard lock(order_mutex_);
  return events_.size();
}

CUresult Simulation::record_event(const EventPtr& event, const StreamPtr& stream) {
  if (event->context != stream->context()) return CUDA_ERROR_INVALID_HANDLE;
  {
    std::lock_guard lock(order_mutex_);
    if (stream->capture != nullptr) {
      if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
      event->capture = stream->capture;
      event->capture_nodes = stream->capture_tail;
      return CUDA_SUCCESS;
    }
  }
  auto record = std::make_shared<Record>();
  Work work;
  work.action = [record] {
    record->when = std::chrono::steady_clock::now();
    return CUDA_SUCCESS;
  };
  SIMGPU_TRY(submit(stream, std::move(work), &record->done));
  std::lock_guard lock(order_mutex_);
  event->record = std::move(record);
  event->capture.reset();
  event->capture_nodes.clear();
  return CUDA_SUCCESS;
}

CUresult Simulation::record_context(const EventPtr& event, Context* context) {
  if (event->context != context) return CUDA_ERROR_INVALID_HANDLE;
  if (end_captures(context)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  auto record = std::make_shared<Record>();
  std::vector<CompletionPtr> open = tails(context);
  if (open.empty()) {
    record->when = std::chrono::steady_clock::now();
    record->done = std::make_shared<Completion>();
    record->done->finish();
  } else {
    std::lock_guard lock(order_mutex_);
    if (context->marker == nullptr) {
      context->marker =
          std::make_shared<Stream>(context, Stream::Kind::kCreated, CU_STREAM_NON_BLOCKING, 0);
    }
    record->done = context->marker->push(
        [record] {
          record->when = std::chrono::steady_clock::now();
          return CUDA_SUCCESS;
        },
        std::move(open));
  }
  std::lock_guard lock(order_mutex_);
  event->record = std::move(record);
  event->capture.reset();
  event->capture_nodes.clear();
  return CUDA_SUCCESS;
}

CUresult Simulation::wait_event(const StreamPtr& stream, const EventPtr& event, unsigned flags) {
  if ((flags & ~static_cast<unsigned>(CU_EVENT_WAIT_EXTERNAL)) != 0)
    return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(order_mutex_);
  if (event->capture != nullptr) {
    Capture& capture = *event->capture;
    if (capture.invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (stream->kind() == Stream::Kind::kLegacy) {
      invalidate(capture);
      return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    if (stream->capture != nullptr && stream->capture != event->capture) {
      invalidate(*stream->capture);
      invalidate(capture);
      return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (!captures_.contains(event->capture)) return CUDA_ERROR_CAPTURED_EVENT;
    if (stream->capture == nullptr) {
      stream->capture = event->capture;
      stream->capture_tail.clear();
      capture.members.insert(stream.get());
    }
    for (Node* node : event->capture_nodes) stream->capture_tail.push_back(node);
    return CUDA_SUCCESS;
  }
  if (stream->capture != nullptr) {
    if (event->record == nullptr) return CUDA_SUCCESS;
    invalidate(*stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  if (event->record == nullptr) return CUDA_SUCCESS;
  // The wait itself is a place in the stream's order like any other work.
  std::vector<CompletionPtr> after = {event->record->done};
  if (stream->kind() != Stream::Kind::kLegacy && stream->blocking()) {
    if (CompletionPtr tail = stream->context()->legacy->tail()) after.push_back(tail);
  }
  stream->push([] { return CUDA_SUCCESS; }, std::move(after));
  return CUDA_SUCCESS;
}

CUresult Simulation::host_record(const EventPtr& event, std::shared_ptr<Record>* record) {
  std::lock_guard lock(order_mutex_);
  if (event->capture != nullptr) {
    if (!captures_.contains(event->capture)) return CUDA_ERROR_INVALID_VALUE;
    invalidate(*event->capture);
    return CUDA_ERROR_CAPTURED_EVENT;
  }
  *record = event->record;
  return CUDA_SUCCESS;
}

// Captures and graphs.

void Simulation::invalidate(Capture& capture) {
  capture.invalidated = true;
}

CUresult Simulation::begin_capture(const StreamPtr& stream, CUstreamCaptureMode mode) {
  if (stream->kind() == Stream::Kind::kLegacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (mode < CU_STREAM_CAPTURE_MODE_GLOBAL || mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::lock_guard lock(order_mutex_);
  if (stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  auto capture = std::make_shared<Capture>();
  capture->id = next_capture_++;
  capture->mode = mode;
  capture->owner = std::this_thread::get_id();
  capture->origin = stream.get();
  capture->graph = std::make_unique<Graph>();
  capture->members.insert(stream.get());
  stream->capture = capture;
  stream->capture_tail.clear();
  captures_.insert(std::move(capture));
  return CUDA_SUCCESS;
}

CUresult Simulation::end_capture(const StreamPtr& stream, CUgraph* graph) {
  *graph = nullptr;
  std::lock_guard lock(order_mutex_);
  std::shared_ptr<Capture> capture = stream->capture;
  if (capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
      capture->owner != std::this_thread::get_id()) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  if (capture->origin != stream.get()) {
    invalidate(*capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  }
  bool joined = is_joined(*capture, stream->capture_tail);
  for (Stream* member : capture->members) {
    member->capture.reset();
    member->capture_tail.clear();
  }
  captures_.erase(capture);
  if (capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!joined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  *graph = reinterpret_cast<CUgraph>(capture->graph.get());
  graphs_[*graph] = std::move(capture->graph);
  return CUDA_SUCCESS;
}

bool Simulation::is_capturing(const StreamPtr& stream) {
  std::lock_guard lock(order_mutex_);
  return stream->capture != nullptr;
}

CUresult Simulation::capture_info(const StreamPtr& stream, CaptureInfo* info) {
  std::lock_guard lock(order_mutex_);
  if (stream->kind() == Stream::Kind::kLegacy) {
    for (const StreamPtr& other : stream->context()->streams) {
      if (other->blocking() && other->capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
  }
  if (stream->capture == nullptr) return CUDA_SUCCESS;
  const Capture& capture = *stream->capture;
  info->status =
      capture.invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  info->id = capture.id;
  info->graph = reinterpret_cast<CUgraph>(capture.graph.get());
  static_assert(sizeof(Node*) == sizeof(CUgraphNode));
  info->nodes = reinterpret_cast<const CUgraphNode*>(stream->capture_tail.data());
  info->node_count = stream->capture_tail.size();
  return CUDA_SUCCESS;
}

CUresult Simulation::check_unsafe_call() {
  CUstreamCaptureMode mode = this_thread().capture_mode;
  if (mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  std::lock_guard lock(order_mutex_);
  CUresult result = CUDA_SUCCESS;
  for (const auto& capture : captures_) {
    bool own = capture->owner == std::this_thread::get_id() &&
               capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    bool global =
        mode == CU_STREAM_CAPTURE_MODE_GLOBAL && capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    if (!own && !global) continue;
    invalidate(*capture);
    result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return result;
}

CUresult Simulation::create_graph(CUgraph* graph) {
  std::lock_guard lock(order_mutex_);
  auto made = std::make_unique<Graph>();
  *graph = reinterpret_cast<CUgraph>(made.get());
  graphs_[*graph] = std::move(made);
  return CUDA_SUCCESS;
}

CUresult Simulation::destroy_graph(CUgraph graph) {
  std::lock_guard lock(order_mutex_);
  return graphs_.erase(graph) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult Simulation::graph_nodes(CUgraph graph, CUgraphNode* nodes, size_t* count,
                                 bool roots_only) {
  std::lock_guard lock(order_mutex_);
  auto entry = graphs_.find(graph);
  if (entry == graphs_.end()) return CUDA_ERROR_INVALID_VALUE;
  std::vector<CUgraphNode> found;
  for (const auto& node : entry->second->nodes) {
    if (roots_only && !node->after.empty()) continue;
    found.push_back(reinterpret_cast<CUgraphNode>(node.get()));
  }
  if (nodes == nullptr) {
    *count = found.size();
    return CUDA_SUCCESS;
  }
  for (size_t i = 0; i < *count; ++i) nodes[i] = i < found.size() ? found[i] : nullptr;
  *count = std::min(*count, found.size());
  return CUDA_SUCCESS;
}

Node* Simulation::find_node(CUgraphNode handle) {
  for (const auto& [id, graph] : graphs_) {
    for (const auto& node : graph->nodes) {
      if (reinterpret_cast<CUgraphNode>(node.get()) == handle) return node.get();
    }
  }
  return nullptr;
}

CUresult Simulation::node(CUgraphNode handle, Work* work) {
  std::lock_guard lock(order_mutex_);
  const Node* found = find_node(handle);
  if (found == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *work = found->work;
  return CUDA_SUCCESS;
}

CUresult Simulation::add_node(CUgraph graph, const CUgraphNode* after, size_t count, Work work,
                              CUgraphNode* node) {
  std::lock_guard lock(order_mutex_);
  auto entry = graphs_.find(graph);
  if (entry == graphs_.end()) return CUDA_ERROR_INVALID_VALUE;
  std::vector<Node*> dependencies;
  for (size_t i = 0; i < count; ++i) {
    dependencies.push_back(find_node(after[i]));
    if (dependencies.back() == nullptr) return CUDA_ERROR_INVALID_VALUE;
  }
  *node = reinterpret_cast<CUgraphNode>(entry->second->add(std::move(work), dependencies));
  return CUDA_SUCCESS;
}

CUresult Simulation::set_node(CUgraphNode node, Work work) {
  std::lock_guard lock(order_mutex_);
  Node* found = find_node(node);
  if (found == nullptr || found->work.type != work.type) return CUDA_ERROR_INVALID_VALUE;
  found->work = std::move(work);
  return CUDA_SUCCESS;
}

CUresult Simulation::set_exec_node(CUgraphExec exec, CUgraphNode node, Work work) {
  std::lock_guard lock(order_mutex_);
  auto entry = execs_.find(exec);
  if (entry == execs_.end()) return CUDA_ERROR_INVALID_VALUE;
  GraphExec& graph = *entry->second;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (reinterpret_cast<CUgraphNode>(const_cast<Node*>(graph.nodes[i])) != node) continue;
    graph.actions[i] = std::move(work.action);
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_VALUE;
}

std::shared_ptr<GraphExec> Simulation::make_exec(CUgraph graph, CUresult* result) {
  *result = CUDA_ERROR_INVALID_VALUE;
  auto entry = graphs_.find(graph);
  if (entry == graphs_.end()) return nullptr;
  auto made = std::make_shared<GraphExec>();
  for (const auto& node : entry->second->nodes) {
    if (node->work.check && node->work.check() != CUDA_SUCCESS) return nullptr;
    made->actions.push_back(node->work.action);
    made->nodes.push_back(node.get());
  }
  *result = CUDA_SUCCESS;
  return made;
}

CUresult Simulation::instantiate(CUgraph graph, unsigned long long flags, CUgraphExec* exec) {
  std::lock_guard lock(order_mutex_);
  CUresult result = CUDA_SUCCESS;
  std::shared_ptr<GraphExec> made = make_exec(graph, &result);
  if (made == nullptr) return result;
  made->flags = flags;
  *exec = reinterpret_cast<CUgraphExec>(made.get());
  execs_[*exec] = std::move(made);
  return CUDA_SUCCESS;
}

CUresult Simulation::update_exec(CUgraphExec exec, CUgraph graph) {
  std::lock_guard lock(order_mutex_);
  CUresult result = CUDA_SUCCESS;
  std::shared_ptr<GraphExec> made = make_exec(graph, &result);
  if (made == nullptr) return result;
  auto entry = execs_.find(exec);
  if (entry == execs_.end()) return CUDA_ERROR_INVALID_VALUE;
  // The update keeps the nodes by which its parameters are set.
  if (made->actions.size() != entry->second->actions.size()) {
    return CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
  }
  entry->second->actions = std::move(made->actions);
  return CUDA_SUCCESS;
}

CUresult Simulation::destroy_exec(CUgraphExec exec) {
  std::lock_guard lock(order_mutex_);
  return execs_.erase(exec) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult Simulation::exec_flags(CUgraphExec exec, unsigned long long* flags) {
  std::lock_guard lock(order_mutex_);
  auto entry = execs_.find(exec);
  if (entry == execs_.end()) return CUDA_ERROR_INVALID_VALUE;
  *flags = entry->second->flags;
  return CUDA_SUCCESS;
}

CUresult Simulation::launch_graph(CUgraphExec exec, const StreamPtr& stream) {
  std::vector<Action> actions;
  {
    std::lock_guard lock(order_mutex_);
    auto entry = execs_.find(exec);
    if (entry == execs_.end()) return CUDA_ERROR_INVALID_VALUE;
    actions = entry->second->actions;
  }
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_GRAPH;
  work.action = [actions]() -> CUresult {
    for (const Action& action : actions) {
      if (action) SIMGPU_TRY(action());
    }
    return CUDA_SUCCESS;
  };
  return submit(stream, std::move(work), nullptr);
}

}  // namespace simgpu
