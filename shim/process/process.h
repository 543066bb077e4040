// The life of the process: the engine and the control server once CUDA is in use, fork and exit.
// Those above who must know of it stand in listeners.h.
#pragma once

#include "core/sleep/engine.h"

namespace dormouse::shim {

// The engine; created when the driver is first used (cuInit succeeded). Null before, when libcuda
// lacks what the engine needs (logged once, with what to do), and in a forked child that has not
// initialised CUDA itself. Lock-free once created.
Engine* engine() noexcept;

// Called by the hooks when the driver was initialised: creates the engine, starts the control
// server. Idempotent, and cheap once done.
void driver_initialised() noexcept;

// The program's calls of the driver come to the hooks.
void hooks_are_called() noexcept;

// A region has ended. Says once if CUDA is in use all the same where no call has come to the hooks.
void look_for_calls_past_the_hooks() noexcept;

// True once the process has begun to exit: nothing may touch the driver.
bool exiting() noexcept;

}  // namespace dormouse::shim
