// The subcommands that change something: sleep, wake, trim. For cli/main.cc.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "cli/command.h"

namespace dormouse::cli {

struct Operation {
  enum class Kind { kSleep, kWake, kTrim };
  Kind kind = Kind::kSleep;
  std::vector<pid_t> pids;
  bool all = false;               // every process that listens, instead of `pids`
  std::vector<std::string> tags;  // empty: all
  std::string bytes;              // sleep: at least this much; empty: all
  bool discard = false;           // sleep: drop the content
  bool backups = false;           // trim: kept backups too
};

/// Asks the processes, all at the same time, and waits for them, on a terminal with a line of
/// progress. Nothing is done if one of the PIDs does not exist or does not answer; with `all` the
/// others go on. A sleep of several PIDs that one of them refuses is taken back. Returns the exit
/// code.
int operate(const Global& global, const Operation& operation);

}  // namespace dormouse::cli
