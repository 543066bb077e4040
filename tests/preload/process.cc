// See process.h.
#include "tests/preload/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>

namespace preload {
namespace {

constexpr auto kLongest = std::chrono::minutes(2);

std::vector<std::string> merged_environment(const Command& command) {
  std::map<std::string, std::string> merged;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    // What tests are told is nothing that a program under the library would have.
    if (std::string_view(*entry).starts_with("DORMOUSE_TEST_")) continue;
    const std::string text = *entry;
    const std::size_t equals = text.find('=');
    if (equals != std::string::npos) merged[text.substr(0, equals)] = text.substr(equals + 1);
  }
  for (const auto& [name, value] : command.environment) {
    if (value.empty()) {
      merged.erase(name);
    } else {
      merged[name] = value;
    }
  }
  std::string preloaded;
  for (const std::string& path : command.preload) {
    preloaded += (preloaded.empty() ? "" : ":") + path;
  }
  if (!preloaded.empty()) merged["LD_PRELOAD"] = preloaded;
  std::vector<std::string> result;
  for (const auto& [name, value] : merged) result.push_back(name + "=" + value);
  return result;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (std::string& text : texts) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

struct Pipe {
  int read = -1;
  int write = -1;
  Pipe() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
    read = ends[0];
    write = ends[1];
  }
};

// Reads both until they are closed or the time is over. True if they were closed.
bool read_all(std::array<std::pair<int, std::string*>, 2> streams) {
  const auto deadline = std::chrono::steady_clock::now() + kLongest;
  int open = 2;
  while (open > 0) {
    std::array<pollfd, 2> waiting{};
    for (std::size_t i = 0; i < 2; ++i) waiting[i] = {streams[i].first, POLLIN, 0};
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0 || poll(waiting.data(), 2, static_cast<int>(left.count())) <= 0) {
      return false;
    }
    for (std::size_t i = 0; i < 2; ++i) {
      if (waiting[i].revents == 0) continue;
      char buffer[4096];
      const ssize_t count = read(streams[i].first, buffer, sizeof(buffer));
      if (count > 0) {
        streams[i].second->append(buffer, static_cast<std::size_t>(count));
      } else {
        streams[i].first = -1;
        --open;
      }
    }
  }
  return true;
}

}  // namespace

Result run(const Command& command) {
  std::vector<std::string> arguments = command.arguments;
  std::vector<std::string> environment = merged_environment(command);
  std::vector<char*> argv = pointers(arguments);
  std::vector<char*> envp = pointers(environment);
  Pipe out;
  Pipe err;
  const pid_t child = fork();
  if (child == 0) {
    setpgid(0, 0);
    dup2(open("/dev/null", O_RDONLY), 0);
    dup2(out.write, 1);
    dup2(err.write, 2);
    execvpe(argv[0], argv.data(), envp.data());
    _exit(127);
  }
  close(out.write);
  close(err.write);
  Result result;
  result.timed_out = !read_all({{{out.read, &result.out}, {err.read, &result.err}}});
  if (result.timed_out) kill(-child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
  close(out.read);
  close(err.read);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

std::string built(const std::string& path) {
  const char* root = std::getenv("DORMOUSE_TEST_ROOT");
  return std::filesystem::absolute(std::filesystem::path(root == nullptr ? "." : root) / path);
}

std::string library() {
  const char* given = std::getenv("DORMOUSE_TEST_LIBRARY");
  return given != nullptr ? given : built("shim/libdormouse.so");
}

bool real_driver() {
  const char* driver = std::getenv("DORMOUSE_TEST_DRIVER");
  return driver != nullptr && std::string(driver) == "real";
}

std::map<std::string, std::string> driver_environment() {
  std::map<std::string, std::string> environment = {{"DORMOUSE_CONTROL", "off"}};
  if (!real_driver()) {
    environment["LD_LIBRARY_PATH"] = built("tests/simgpu");
    environment["SIMGPU_MEMORY"] = "256MiB";
  }
  return environment;
}

Result run_with_library(std::vector<std::string> arguments,
                        std::map<std::string, std::string> environment) {
  environment.merge(driver_environment());
  return run({std::move(arguments), std::move(environment), {library()}});
}

Result run_plain(std::vector<std::string> arguments,
                 std::map<std::string, std::string> environment) {
  environment.merge(driver_environment());
  return run({std::move(arguments), std::move(environment), {}});
}

}  // namespace preload
