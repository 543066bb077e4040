// `dormouse doctor`: whether this machine, user and environment let Dormouse work, a line for each
// check. For cli/main.cc.
#pragma once

#include <string>

#include "cli/command.h"

namespace dormouse::cli {

/// `library` as for find_library(). Returns kFailed if any check failed, kOk if there are warnings
/// at most.
int doctor(const Global& global, const std::string& library);

}  // namespace dormouse::cli
