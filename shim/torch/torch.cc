// See torch.h: puts together what a region changes for PyTorch on the calling thread, and undoes
// it.
#include "shim/torch/torch.h"

#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>

#include "core/log.h"
#include "core/region.h"
#include "shim/process/linker.h"
#include "shim/process/process.h"
#include "shim/torch/libc10.h"
#include "shim/torch/pools.h"
#include "shim/torch/settings_per_process.h"
#include "shim/torch/settings_per_thread.h"
#include "shim/torch/symbols.h"

namespace dormouse::shim::torch {
namespace {

// What one region changed, to be put back at its end.
struct Frame {
  View* view_before = nullptr;
  View* suspending =
      nullptr;          // what the setter counts this thread with, since this region or before
  TagId pool = kNoTag;  // whose pool the thread is in, since this region or before
  bool told_python = false;
};

// A thread's regions; made when it enters its first one.
class Thread {
 public:
  Thread() = default;
  ~Thread() { end_all(); }
  Thread(const Thread&) = delete;
  Thread& operator=(const Thread&) = delete;

  void begin(TagId tag, bool isolate) noexcept;
  void end() noexcept;
  void forget() noexcept { depth_ = 0; }

 private:
  void end_all() noexcept;
  View* suspending() const noexcept {
    return depth_ > 0 ? frames_[depth_ - 1].suspending : nullptr;
  }
  TagId pool() const noexcept { return depth_ > 0 ? frames_[depth_ - 1].pool : kNoTag; }

  std::size_t depth_ = 0;
  std::size_t beyond_ = 0;  // regions nested too deep to be followed
  std::array<Frame, region::kMaxDepth> frames_;
};

thread_local std::unique_ptr<Thread> this_thread;
thread_local unsigned caller_isolates = 0;

Thread* thread() noexcept {
  if (this_thread == nullptr) this_thread.reset(new (std::nothrow) Thread);
  return this_thread.get();
}

// The setter's count is of no use, and costs a look at all libraries, once the settings are known
// to be of the other generation.
void change_setter(View* from, View* to) noexcept {
  if (!accelerator_seen()) setter_change(from, to);
}

// Says once that a PyTorch is too old, or too new, for any of the ways to suspend.
void check_generation() noexcept {
  if (accelerator_seen()) return;
  static std::atomic<unsigned long long> libraries_seen{0};
  const unsigned long long libraries = libraries_loaded();
  if (libraries_seen.exchange(libraries) == libraries) return;
  if (!cuda_allocator_loaded() || setter_found() ||
      find_in_library("libc10.so", DORMOUSE_LIBC10_INSTANCE) != nullptr) {
    return;
  }
  if (first_time("torch generation")) {
    log().warn(
        "This PyTorch's allocator settings cannot be suspended for a region (2.4 and later "
        "can). Start the program with expandable_segments:False.");
  }
}

void Thread::begin(TagId tag, bool isolate) noexcept {
  if (depth_ == frames_.size()) {
    ++beyond_;
    return;
  }
  Frame frame;
  frame.view_before = thread_view();
  View* view = view_of(tag);
  set_thread_view(view);
  entered(view);
  frame.suspending = suspends(view) ? view : nullptr;
  if (frame.suspending != suspending()) change_setter(suspending(), frame.suspending);
  frame.pool = isolate ? tag : kNoTag;
  if (frame.pool != pool()) {
    frame.told_python = isolation::begin(frame.pool);
    if (!frame.told_python) frame.pool = kNoTag;
  }
  frames_[depth_++] = frame;
  check_generation();
}

void Thread::end() noexcept {
  if (beyond_ > 0) {
    --beyond_;
    return;
  }
  if (depth_ == 0) return;
  const Frame frame = frames_[--depth_];
  if (frame.told_python) isolation::end();
  set_thread_view(frame.view_before);
  if (frame.suspending != suspending()) change_setter(frame.suspending, suspending());
}

// The thread ends inside regions. Its view dies with it; what others can see is undone.
void Thread::end_all() noexcept {
  if (depth_ == 0 || exiting()) return;
  bool told_python = false;
  for (std::size_t i = 0; i < depth_; ++i) told_python = told_python || frames_[i].told_python;
  if (suspending() != nullptr) change_setter(suspending(), nullptr);
  if (told_python) isolation::thread_ended();
}

}  // namespace

void region_began(TagId tag) noexcept {
  if (!switched_on()) return;
  if (Thread* state = thread()) state->begin(tag, caller_isolates == 0);
}

void region_ended(TagId) noexcept {
  if (this_thread != nullptr) this_thread->end();
}

void process_region() noexcept {
  process_tag_changed();
  setter_look_again_if_made();
}

void driver_initialised() noexcept {
  if (!switched_on() || region::process_tag() == kNoTag) return;
  setter_look_again();
  if (View* view = process_view()) entered(view);
}

bool suspended() noexcept {
  return switched_on() && suspends(thread_view());
}

void engine_made(Engine& engine) noexcept {
  engine.set_unused_memory(&isolation::unused_memory());
}

bool can_isolate_at_once() noexcept {
  return isolation::can_begin_at_once();
}

CallerIsolates::CallerIsolates() noexcept {
  ++caller_isolates;
}

CallerIsolates::~CallerIsolates() {
  --caller_isolates;
}

void forget_after_fork() noexcept {
  if (this_thread != nullptr) this_thread->forget();
  isolation::forget_after_fork();
  forget_accelerator_after_fork();
  forget_setter_after_fork();
}

}  // namespace dormouse::shim::torch
