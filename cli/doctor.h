// `dormouse doctor`: whether this machine, user and environment let Dormouse work, a line for each
// check. For cli/main.cc.
#pragma once

#include <string>

#include "cli/command.h"

namespace dormouse::cli {

/// `library` as for find_library(). Returns kFailed if any check failed, kOk if there are warnings
/// at most.
int doctor(const Global& global, const std::string& library);

/// What it says of the host's memory. `root` is where /proc and /sys are found (tests hand in a
/// made-up tree).
std::string host_memory_text(const std::string& root);

}  // namespace dormouse::cli
