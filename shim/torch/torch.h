// The view of PyTorch: suspension of its expandable segments and isolation of its cached blocks for
// the calling thread. regions.cc tells it of every begin and end, the runtime of the process's own
// tag; all of it does nothing in a process without PyTorch or with DORMOUSE_TORCH=off.
#pragma once

#include "core/sleep/engine.h"
#include "core/tags.h"

namespace dormouse::shim::torch {

// The calling thread entered or left a region (kNoTag: one that excludes memory): suspend
// expandable segments, enter the tag's private pool, or undo the same. In matched pairs per thread,
// innermost out first. Never throws, and takes Python's GIL where the thread may have it: not to be
// called from inside an allocation.
void region_began(TagId tag) noexcept;
void region_ended(TagId tag) noexcept;

// Allocations outside all regions get region::process_tag() from now on, on all threads. May be
// called while the options are being read.
void process_region() noexcept;

// CUDA is in use: a PyTorch that is loaded by now follows the process's own tag. PyTorch reads its
// settings no later than that.
void driver_initialised() noexcept;

// True while the calling thread's view of PyTorch's settings has expandable segments off.
bool suspended() noexcept;

// The engine's sleeps ask what PyTorch holds free of tagged memory.
void engine_made(Engine& engine) noexcept;

// Whether a region that begins now on this thread is isolated without waiting: the thread holds the
// GIL, or there is no Python.
bool can_isolate_at_once() noexcept;

// While one of these is alive on a thread, regions that begin there are suspended but not isolated:
// the caller has entered a pool of its own, as torch_memory_saver's Python package does.
class CallerIsolates {
 public:
  CallerIsolates() noexcept;
  ~CallerIsolates();
  CallerIsolates(const CallerIsolates&) = delete;
  CallerIsolates& operator=(const CallerIsolates&) = delete;
};

// In a forked child: the one thread that is left is in no region, and no lock is held.
void forget_after_fork() noexcept;

}  // namespace dormouse::shim::torch
