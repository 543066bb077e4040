// PyTorch 2.4 to 2.9: its allocator settings are one object for the process, written through the
// function setAllocatorSettings of libc10_cuda. While any thread is inside a region, expandable
// segments are off for all, and the settings of the region that began last hold for all. For
// torch.cc alone.
#pragma once

#include "shim/torch/settings_per_thread.h"

namespace dormouse::shim::torch {

// The calling thread leaves a region that suspends with the view `from` (null: it was in none) and
// is inside one with `to`. The first writes the settings with expandable segments off, the last
// those that the user or the program wants by then. Does nothing where PyTorch is not loaded or is
// of another generation. Thread-safe; does not throw.
void setter_change(View* from, View* to) noexcept;

// PyTorch may have been loaded since, or the process's own tag has changed: writes what could not
// be written. The second one in a process that has read its options already; the first may be
// called while they are read.
void setter_look_again_if_made() noexcept;
void setter_look_again() noexcept;

// Whether a loaded libc10_cuda has the function.
bool setter_found() noexcept;

void forget_setter_after_fork() noexcept;

}  // namespace dormouse::shim::torch
