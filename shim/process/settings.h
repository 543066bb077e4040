// What the process was started with: options, rules, tags, and whether this copy of the library
// acts at all. Below everything else in the shim but linker.h. Created lazily, so that a process
// without CUDA pays for nothing; never destroyed, so that what runs at exit finds it.
#pragma once

#include <string>
#include <vector>

#include "config/options.h"
#include "config/regions.h"
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

// False for a second copy of the library in one process, and with DORMOUSE=off: then every hook
// passes through. No lock, no allocation; may be called from inside dlsym.
bool active() noexcept;

// Reads whether the library is switched off; until then it counts as on. When the library is
// loaded.
void find_out_whether_active() noexcept;

// The tags of the process. Usable before CUDA is.
TagTable& tags() noexcept;

// Where torch_memory_saver's environment wants backups on disk, for want of DORMOUSE_DISK_DIR:
// TMS_DISK_BACKUP_DIR, which programs may set until CUDA is used, or empty.
std::string tms_disk_directory();

// Where the log goes and how much of it, as the settings say.
void configure_log_from_settings() noexcept;

// Writes the warnings about the configuration to the log, the first time it is called.
void say_warnings() noexcept;

// fork(): before it, no lock of the settings may be held by another thread.
void lock_settings_for_fork() noexcept;
void unlock_settings_in_parent() noexcept;
void unlock_settings_in_child() noexcept;

}  // namespace dormouse::shim
