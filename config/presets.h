// Presets: one word in DORMOUSE_REGIONS for what a known program needs. Each is a file of
// shim/presets, and their tables are put together in the build. For the shim, which follows them,
// and the command line, which prints the table.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "config/regions.h"

namespace dormouse::config {

/// An item of a list of regions, taken as if it had been typed.
struct PresetRule {
  std::string_view item;
  std::string_view help;  // what it catches
  bool of_some_versions;  // no message where the program does not have it
};

/// What rules cannot say: a Python module, the function of the preset's file that is called when it
/// has been imported, and what that does.
struct PresetTrigger {
  std::string_view module;
  std::string_view function;
  std::string_view help;
};

/// Content that the program cannot lose: a tag of the preset's that is never discarded, and why.
struct PresetKept {
  std::string_view tag;
  std::string_view why;
};

/// A row of the table.
struct Preset {
  std::string_view name;  // as written after the @
  std::string_view program;
  std::string_view versions;
  std::string_view help;  // what it is for
  std::vector<PresetRule> rules;
  std::vector<PresetTrigger> triggers;
  std::vector<PresetKept> kept;
  std::string_view file;  // of shim/presets, without its ending
};

/// Where an item of a list is from.
struct ItemOrigin {
  std::string preset;  // "" for the list's own
  bool of_some_versions = false;
};

/// The table, in its order.
const std::vector<Preset>& preset_table();

/// Their names, for parse_regions.
std::vector<std::string> preset_names();

/// Null if there is none of this name.
const Preset* find_preset(std::string_view name);

/// The table for a terminal, and as a section of a page of documentation.
std::string print_presets();
std::string print_presets_markdown();

/// Reads a list like parse_regions, with the items of its presets behind its own. Where the list's
/// own items give a tag another policy or priority, theirs holds; but content that a program cannot
/// lose is kept, with a warning, also where the list's own rules name a preset's functions.
/// `origins`, if not null, gets for each item where it is from.
Regions parse_with_presets(std::string_view text, std::vector<ItemOrigin>* origins = nullptr);

}  // namespace dormouse::config
