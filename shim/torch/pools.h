// Isolation: while a thread is inside a tag, PyTorch serves it from a memory pool of that tag, so
// that no cached block crosses the region's border. The Python half is pools.py. For torch.cc
// alone; takes the GIL, where that can be had at once or nearly so (python::can_take_gil).
#pragma once

#include "core/memory/unused_memory.h"
#include "core/tags.h"

namespace dormouse::shim::isolation {

// The calling thread's innermost region is now one of this tag; kNoTag: one without a pool of ours.
// True if Python took note: then end() must follow. Does nothing, and returns false, in a process
// without a running Python and on a thread that cannot have the GIL. What goes wrong is logged
// once, and the region goes on without isolation.
bool begin(TagId tag) noexcept;
void end() noexcept;

// Whether begin() would not wait for the GIL.
bool can_begin_at_once() noexcept;

// The calling thread ends inside regions that begin() returned true for.
void thread_ended() noexcept;

// What is free in the pools. Waits for the GIL for a fraction of a second at most; where it is not
// to be had, nothing is free.
UnusedMemory& unused_memory() noexcept;

// In a forked child: nothing that was entered can be left.
void forget_after_fork() noexcept;

}  // namespace dormouse::shim::isolation
