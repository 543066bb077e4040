// Starting a program under the library, one process per case, and reading what it said. For the
// tests in this folder.
//
// Where things are: below DORMOUSE_TEST_ROOT, or the folder that Bazel starts tests in. On which
// driver: the simulated one, or with DORMOUSE_TEST_DRIVER=real whatever the loader finds.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace preload {

struct Result {
  int exit_code = -1;  // 128 + number for a signal, as shells say it
  bool timed_out = false;
  std::string out;
  std::string err;
};

struct Command {
  std::vector<std::string> arguments;              // the program first
  std::map<std::string, std::string> environment;  // beside the test's own; "" removes
  std::vector<std::string> preload;                // for LD_PRELOAD, in order
};

/// Runs it to its end, at most two minutes, with empty standard input.
Result run(const Command& command);

/// The path of something that the build made, such as "tests/programs/serve".
std::string built(const std::string& path);

/// The library under test.
std::string library();

bool real_driver();

/// The environment that makes CUDA programs run: LD_LIBRARY_PATH for the simulated driver, unless
/// on the real one.
std::map<std::string, std::string> driver_environment();

/// A CUDA program under the library, with more variables.
Result run_with_library(std::vector<std::string> arguments,
                        std::map<std::string, std::string> environment = {});

/// The same without the library.
Result run_plain(std::vector<std::string> arguments,
                 std::map<std::string, std::string> environment = {});

}  // namespace preload
