// `dormouse run`: starts a program with the library preloaded. For cli/main.cc.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/command.h"

namespace dormouse::cli {

struct RunOptions {
  std::string regions;               // --regions; empty: what DORMOUSE_REGIONS says
  std::vector<std::string> options;  // --option NAME=VALUE, each
  std::string library;               // --library; empty: find_library()
  std::vector<std::string> command;  // the program and its arguments
};

/// Becomes the program. Returns, with the exit code, only if it cannot.
int run(const Global& global, const RunOptions& options);

/// libdormouse.so: `given` if not empty, else $DORMOUSE_LIBRARY, else beside this executable, in
/// ../lib or in .. of it. Absolute. Nothing if there is none; `looked_at` then says where it was
/// looked for.
std::optional<std::string> find_library(const std::string& given, std::string& looked_at);

/// The variable and value that --option NAME=VALUE stands for; NAME is as in `dormouse options`, or
/// its end in any spelling: log-level is DORMOUSE_LOG_LEVEL. Nothing, with `error`, if there is no
/// such option or the value is bad.
std::optional<std::pair<std::string, std::string>> read_option(const std::string& text,
                                                               std::string& error);

/// Why DORMOUSE_REGIONS should not be this, one line each; warnings are not a reason and go to
/// `warnings`.
std::vector<std::string> check_regions(const std::string& regions,
                                       std::vector<std::string>& warnings);

/// LD_PRELOAD with the library in front, once.
std::string preload_with(const std::string& before, const std::string& library);

}  // namespace dormouse::cli
