// PyTorch 2.4 to 2.9: the settings are one object of the process, changed through the exported
// function setAllocatorSettings of libc10_cuda. While any thread is inside a region, expandable
// segments are off for all. For torch.cc alone.
#pragma once

namespace dormouse::shim::torch {

// One more thread, or one less, is inside a region that suspends. The first writes the settings
// with expandable segments off, the last those that the user or the program wants by then. Do
// nothing where PyTorch is not loaded or is of another generation. Thread-safe; do not throw.
void setter_suspend() noexcept;
void setter_resume() noexcept;

// PyTorch may have been loaded since: writes what setter_suspend could not.
void setter_look_again() noexcept;

// Whether a loaded libc10_cuda has the function.
bool setter_found() noexcept;

void forget_setter_after_fork() noexcept;

}  // namespace dormouse::shim::torch
