// See run.h.
#include "cli/run.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "cli/text.h"
#include "config/options.h"
#include "config/presets.h"
#include "config/regions.h"

namespace dormouse::cli {

namespace {

constexpr char kLibraryName[] = "libdormouse.so";

bool is_file(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(path, ignored);
}

/// The loader splits LD_PRELOAD at these, and $ begins one of its substitutions.
bool loader_can_read(const std::string& path) {
  return path.find_first_of(" :$\t\n") == path.npos;
}

bool set_environment(const RunOptions& options, const Global& global, std::string& error) {
  const auto set = [](const std::string& name, const std::string& value) {
    setenv(name.c_str(), value.c_str(), 1);
  };
  for (const std::string& option : options.options) {
    const auto variable = read_option(option, error);
    if (!variable) return false;
    set(variable->first, variable->second);
  }
  if (!options.regions.empty()) set("DORMOUSE_REGIONS", options.regions);
  if (!global.socket_directory.empty()) set("DORMOUSE_SOCKET_DIR", global.socket_directory);
  return true;
}

}  // namespace

std::optional<std::string> find_library(const std::string& given, std::string& looked_at) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<fs::path> candidates;
  if (!given.empty()) {
    candidates = {given};
  } else if (const std::string variable = environment("DORMOUSE_LIBRARY"); !variable.empty()) {
    candidates = {variable};
  } else {
    const fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
    candidates = {folder / kLibraryName, folder.parent_path() / "lib" / kLibraryName,
                  folder.parent_path() / kLibraryName};
  }
  looked_at.clear();
  for (const fs::path& candidate : candidates) {
    if (is_file(candidate)) return fs::absolute(candidate, error).lexically_normal().string();
    looked_at += (looked_at.empty() ? "" : ", ") + candidate.string();
  }
  return std::nullopt;
}

std::optional<std::pair<std::string, std::string>> read_option(const std::string& text,
                                                               std::string& error) {
  const std::size_t equals = text.find('=');
  std::string name = text.substr(0, equals);
  if (equals == text.npos || name.empty()) {
    error = "'" + clipped(text, 60) + "' is not NAME=VALUE";
    return std::nullopt;
  }
  std::transform(name.begin(), name.end(), name.begin(), [](char c) {
    return c == '-' ? '_' : c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
  });
  std::vector<std::string> names;
  for (const config::OptionInfo& option : config::option_table()) {
    names.push_back(option.environment);
  }
  const auto known = [&](const std::string& each) {
    return std::find(names.begin(), names.end(), each) != names.end();
  };
  if (!known(name)) name = "DORMOUSE_" + name;
  if (!known(name)) {
    error = "there is no option '" + clipped(text.substr(0, equals), 60) +
            "'; 'dormouse options' lists them";
    return std::nullopt;
  }
  const std::string value = text.substr(equals + 1);
  std::vector<std::string> warnings;  // they say that the default holds, but nothing runs with it
  const config::ParsedOptions parsed = config::parse_options(
      [&](const char* asked) { return name == asked ? value.c_str() : nullptr; }, warnings);
  for (const config::OptionValue& each : parsed.values) {
    if (each.problem.empty()) continue;
    error = each.problem;
    return std::nullopt;
  }
  return std::pair(name, value);
}

std::vector<std::string> check_regions(const std::string& regions,
                                       std::vector<std::string>& warnings) {
  const config::Regions parsed = config::parse_with_presets(regions);
  std::vector<std::string> errors;
  for (const config::Diagnostic& error : parsed.errors) errors.push_back(error.text());
  for (const config::Diagnostic& warning : parsed.warnings) warnings.push_back(warning.text());
  return errors;
}

std::string preload_with(const std::string& before, const std::string& library) {
  std::string result = library;
  for (std::size_t begin = 0; begin <= before.size();) {
    const std::size_t end = std::min(before.find_first_of(" :", begin), before.size());
    const std::string each = before.substr(begin, end - begin);
    if (!each.empty() && each != library) result += ":" + each;
    begin = end + 1;
  }
  return result;
}

int run(const Global& global, const RunOptions& options) {
  std::string problem;
  if (!set_environment(options, global, problem)) {
    print_error("--option: " + problem);
    return kUsage;
  }
  // Whether it came from --regions, from --option or from the environment.
  std::vector<std::string> warnings;
  const auto errors = check_regions(environment("DORMOUSE_REGIONS"), warnings);
  for (const std::string& warning : warnings) print_error("warning: " + warning);
  for (const std::string& error : errors) print_error(error);
  if (!errors.empty()) return kUsage;

  const auto library = find_library(options.library, problem);
  if (!library) {
    print_error("none of " + problem +
                " is there; name the library with --library or DORMOUSE_LIBRARY");
    return kFailed;
  }
  if (!loader_can_read(*library)) {
    print_error(*library + ": the dynamic loader cannot preload a path with spaces, colons or $");
    return kFailed;
  }
  const std::string preload = preload_with(environment("LD_PRELOAD"), *library);
  if (preload != *library) {
    print_error("note: LD_PRELOAD has other libraries too: " + preload.substr(library->size() + 1));
  }
  setenv("LD_PRELOAD", preload.c_str(), 1);

  std::vector<char*> arguments;
  for (const std::string& argument : options.command) {
    arguments.push_back(const_cast<char*>(argument.c_str()));
  }
  arguments.push_back(nullptr);
  execvp(arguments[0], arguments.data());
  const int error = errno;
  print_error(options.command[0] + ": " + std::generic_category().message(error));
  return error == ENOENT ? kNotFound : kNotExecutable;
}

}  // namespace dormouse::cli
