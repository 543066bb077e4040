// What the subcommands of `dormouse` share: exit codes, and where the processes are. For cli/
// alone.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "core/control/client.h"

namespace dormouse::cli {

/// What `dormouse` exits with. `dormouse run` becomes the program, whose exit code then counts.
enum ExitCode : int {
  kOk = 0,
  kFailed = 1,           // an operation failed, or `doctor` found something that does not work
  kUsage = 2,            // the command line is wrong; nothing was done
  kNoSuchProcess = 3,    // no such process runs under Dormouse; nothing was done
  kNotExecutable = 126,  // `run`: the program is there but cannot be executed
  kNotFound = 127,       // `run`: there is no such program
};

/// Options of every subcommand.
struct Global {
  std::string socket_directory;  // --socket-dir, else $DORMOUSE_SOCKET_DIR; empty: the usual places
};

/// The value of an environment variable; empty if it is not set.
std::string environment(const char* name);

/// Where to look for sockets.
std::vector<std::string> socket_directories(const Global& global);

control::ControlClient make_client(const Global& global);

/// Prints "dormouse: ..." to standard error.
void print_error(const std::string& message);

/// Prints why a process did not do what it was asked for, and returns the exit code for it.
int report_failure(pid_t pid, const control::Reply& reply);

}  // namespace dormouse::cli
