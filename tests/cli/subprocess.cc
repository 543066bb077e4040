// See subprocess.h.
#include "tests/cli/subprocess.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>

extern char** environ;

namespace dormouse::cli {

namespace {

std::vector<std::string> with_variables(const Variables& variables) {
  std::vector<std::string> result;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const std::string name = text.substr(0, text.find('='));
    const bool replaced = std::any_of(variables.begin(), variables.end(),
                                      [&](const auto& each) { return each.first == name; });
    if (!replaced) result.push_back(text);
  }
  for (const auto& [name, value] : variables) {
    if (!value.empty()) result.push_back(name + "=" + value);
  }
  return result;
}

/// Starts a command with these as its standard streams (-1: inherited).
pid_t start(std::vector<std::string> command, const Variables& variables, int input, int output,
            int error) {
  std::vector<std::string> texts = with_variables(variables);
  std::vector<char*> arguments, environment;
  for (std::string& each : command) arguments.push_back(each.data());
  for (std::string& each : texts) environment.push_back(each.data());
  arguments.push_back(nullptr);
  environment.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  if (input >= 0) posix_spawn_file_actions_adddup2(&actions, input, STDIN_FILENO);
  if (output >= 0) posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
  if (error >= 0) posix_spawn_file_actions_adddup2(&actions, error, STDERR_FILENO);
  pid_t pid = -1;
  const int problem =
      posix_spawnp(&pid, arguments[0], &actions, nullptr, arguments.data(), environment.data());
  posix_spawn_file_actions_destroy(&actions);
  EXPECT_EQ(problem, 0) << command[0] << ": " << std::strerror(problem);
  return pid;
}

int exit_code_of(int status) {
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

std::array<int, 2> make_pipe() {
  std::array<int, 2> ends{-1, -1};
  EXPECT_EQ(pipe2(ends.data(), O_CLOEXEC), 0);
  return ends;
}

/// Reads from both until both end.
void drain(int out, int error, Outcome& outcome) {
  std::array<pollfd, 2> entries = {{{out, POLLIN, 0}, {error, POLLIN, 0}}};
  std::array<char, 4096> buffer;
  while (entries[0].fd >= 0 || entries[1].fd >= 0) {
    if (poll(entries.data(), entries.size(), -1) < 0) continue;
    for (pollfd& entry : entries) {
      if (entry.fd < 0 || entry.revents == 0) continue;
      const ssize_t count = read(entry.fd, buffer.data(), buffer.size());
      if (count <= 0) {  // a terminal whose other side has closed gives an error
        entry.fd = -1;
      } else {
        (&entry == &entries[0] ? outcome.out : outcome.error)
            .append(buffer.data(), static_cast<std::size_t>(count));
      }
    }
  }
}

}  // namespace

Outcome run_command(const std::vector<std::string>& command, const Variables& variables,
                    bool on_terminal) {
  const auto out = make_pipe();
  std::array<int, 2> error{-1, -1};
  if (on_terminal) {
    error[0] = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    EXPECT_TRUE(error[0] >= 0 && grantpt(error[0]) == 0 && unlockpt(error[0]) == 0);
    error[1] = open(ptsname(error[0]), O_RDWR | O_NOCTTY | O_CLOEXEC);
  } else {
    error = make_pipe();
  }
  const pid_t pid = start(command, variables, -1, out[1], error[1]);
  close(out[1]);
  close(error[1]);
  Outcome outcome;
  drain(out[0], error[0], outcome);
  close(out[0]);
  close(error[0]);
  int status = 0;
  if (pid > 0 && waitpid(pid, &status, 0) == pid) outcome.exit_code = exit_code_of(status);
  return outcome;
}

Child::Child(const std::vector<std::string>& command, const Variables& variables) {
  const auto input = make_pipe();
  const auto output = make_pipe();
  pid_ = start(command, variables, input[0], output[1], -1);
  close(input[0]);
  close(output[1]);
  input_ = input[1];
  output_ = output[0];
}

Child::~Child() {
  finish();
  if (output_ >= 0) close(output_);
}

void Child::write_line(const std::string& line) {
  const std::string text = line + "\n";
  EXPECT_EQ(write(input_, text.data(), text.size()), static_cast<ssize_t>(text.size()));
}

bool Child::fill(std::chrono::milliseconds time) {
  pollfd entry{output_, POLLIN, 0};
  if (poll(&entry, 1, static_cast<int>(time.count())) != 1) return false;
  std::array<char, 4096> buffer;
  const ssize_t count = read(output_, buffer.data(), buffer.size());
  if (count <= 0) return false;
  pending_.append(buffer.data(), static_cast<std::size_t>(count));
  return true;
}

bool Child::has_line(std::chrono::milliseconds time) {
  while (pending_.find('\n') == pending_.npos) {
    if (!fill(time)) return false;
  }
  return true;
}

std::string Child::read_line(std::chrono::seconds time) {
  if (!has_line(time)) {
    ADD_FAILURE() << "no line from the child; so far: '" << pending_ << "'";
    return {};
  }
  const std::string line = pending_.substr(0, pending_.find('\n'));
  pending_.erase(0, line.size() + 1);
  return line;
}

int Child::finish() {
  if (pid_ <= 0) return -1;
  if (input_ >= 0) close(std::exchange(input_, -1));
  int status = 0;
  for (int i = 0; i < 3000; ++i) {
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      pid_ = -1;
      return exit_code_of(status);
    }
    usleep(10000);
  }
  ADD_FAILURE() << "the child did not end";
  kill(pid_, SIGKILL);
  waitpid(std::exchange(pid_, -1), &status, 0);
  return exit_code_of(status);
}

}  // namespace dormouse::cli
