// What the library holds for its process: the options, the tags, the engine once CUDA is in use. Created lazily, so
// that a process without CUDA pays for nothing; never destroyed, so that what runs at exit finds it. For the shim only.
#pragma once

#include "config/options.h"
#include "config/regions.h"
#include "core/engine.h"
#include "core/tags.h"

namespace dormouse::shim {

// The configuration of this process, read from the environment at first use: options parsed, warnings logged once,
// region rules compiled, tags interned.
struct Settings {
  config::Options options;
  config::RegionConfig regions;  // presets expanded
  bool enabled = true;           // DORMOUSE
};

// Read at first use, then constant. Thread-safe. Never throws; a failure inside gives the defaults and a log line.
const Settings& settings() noexcept;

// The tags of the process. Usable before CUDA is.
TagTable& tags() noexcept;

// The engine; created when the driver is first used (cuInit succeeded). Null before, when libcuda lacks what the
// engine needs (logged once, with what to do), and in a forked child that has not initialised CUDA itself.
// Lock-free once created.
Engine* engine() noexcept;

// Called by the hooks when the driver was initialised: creates the engine, starts the control server. Idempotent.
void driver_initialised() noexcept;

// In a forked child: no engine, no server, no regions.
void forget_after_fork() noexcept;

// True once the process has begun to exit: nothing may touch the driver.
bool exiting() noexcept;

}  // namespace dormouse::shim
