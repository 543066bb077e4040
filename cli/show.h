// The subcommands that only look: ps, status, top, metrics. For cli/main.cc.
#pragma once

#include <sys/types.h>

#include "cli/command.h"

namespace dormouse::cli {

struct TopOptions {
  double interval = 1;  // seconds
  unsigned count = 0;   // tables to print; 0: until interrupted
};

/// Each returns the exit code.
int show_processes(const Global& global, bool json);
int show_status(const Global& global, pid_t pid, bool json, bool verbose);
int show_top(const Global& global, const TopOptions& options);
int show_metrics(const Global& global, pid_t pid);

}  // namespace dormouse::cli
