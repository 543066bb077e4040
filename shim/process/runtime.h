// What the library holds for its process: the options, the tags, the engine once CUDA is in use.
// Created lazily, so that a process without CUDA pays for nothing; never destroyed, so that what
// runs at exit finds it. For the shim only.
#pragma once

#include <string>
#include <vector>

#include "config/options.h"
#include "config/regions.h"
#include "core/sleep/engine.h"
#include "core/tags.h"

namespace dormouse::shim {

// The configuration of this process, read from the environment at first use: options parsed, region
// rules read, tags interned.
struct Settings {
  config::Options options;
  std::vector<config::OptionValue> option_values;  // of config::option_table(), same order
  config::Regions regions;
  std::vector<TagId> region_tags;  // of regions.items, same order; kNoTag for items without a tag
  std::vector<std::string> warnings;      // said once CUDA is used: other programs stay quiet
  bool enabled = true;                    // DORMOUSE
  std::vector<std::string> item_presets;  // of regions.items: the preset that each is from, or ""
};

// Read at first use, then constant. Thread-safe. Never throws; a failure inside gives the defaults
// and a log line.
const Settings& settings() noexcept;

// The tags of the process. Usable before CUDA is.
TagTable& tags() noexcept;

// The engine; created when the driver is first used (cuInit succeeded). Null before, when libcuda
// lacks what the engine needs (logged once, with what to do), and in a forked child that has not
// initialised CUDA itself. Lock-free once created.
Engine* engine() noexcept;

// Called by the hooks when the driver was initialised: creates the engine, starts the control
// server. Idempotent, and cheap once done.
void driver_initialised() noexcept;

// Writes the warnings about the configuration to the log, the first time it is called.
void say_warnings() noexcept;

// True once the process has begun to exit: nothing may touch the driver.
bool exiting() noexcept;

// fork(): before it, no lock of the runtime may be held by another thread; the child has no engine
// and no server.
void lock_for_fork() noexcept;
void unlock_in_parent() noexcept;
void forget_after_fork() noexcept;

}  // namespace dormouse::shim
