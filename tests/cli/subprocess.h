// A child process with its standard streams in this test's hands.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace dormouse::cli {

struct Outcome {
  int exit_code = -1;  // 1000 + the signal if one ended it
  std::string out;
  std::string error;
};

using Variables = std::vector<std::pair<std::string, std::string>>;

/// Runs a command to its end, with these variables set beside the test's own ("" removes one).
/// `on_terminal`: its standard error is a terminal.
Outcome run_command(const std::vector<std::string>& command, const Variables& variables = {},
                    bool on_terminal = false);

/// A running child that reads and writes lines.
class Child {
 public:
  Child(const std::vector<std::string>& command, const Variables& variables);
  /// Closes its input and waits; kills it if it does not end by itself.
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  void write_line(const std::string& line);
  /// The next line of its standard output; empty, and a test failure, if none comes in time.
  std::string read_line(std::chrono::seconds time = std::chrono::seconds(60));
  /// True if a line is there within the time.
  bool has_line(std::chrono::milliseconds time);
  /// Closes its input and waits for its end; as Outcome's exit_code.
  int finish();

 private:
  bool fill(std::chrono::milliseconds time);

  pid_t pid_ = -1;
  int input_ = -1;
  int output_ = -1;
  std::string pending_;
};

}  // namespace dormouse::cli
