// The `dormouse` command: its command line. What the subcommands do is in the other files of this
// folder.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <optional>
#include <set>

#include "cli/command.h"
#include "cli/doctor.h"
#include "cli/operate.h"
#include "cli/run.h"
#include "cli/show.h"
#include "cli/text.h"
#include "config/options.h"
#include "config/presets.h"
#include "config/text.h"
#include "config/units.h"
#include "core/version.h"

extern char** environ;

namespace dormouse::cli {

namespace {

constexpr char kDescription[] =
    "Starts programs with tagged GPU memory and puts that memory to sleep and wakes it, from "
    "outside.";
constexpr char kFooter[] =
    "Exit codes: 0 done, 1 an operation failed, 2 the command line is wrong, 3 no such process.\n"
    "'dormouse run' exits as the program does; 126 or 127 if it cannot be started.";

int show_options(bool markdown) {
  if (markdown) {
    std::fputs((config::print_options_markdown() + "\n" + config::print_presets_markdown()).c_str(),
               stdout);
    return kOk;
  }
  std::vector<std::string> warnings;
  const config::ParsedOptions parsed = config::parse_options(&std::getenv, warnings);
  config::check_unknown_names(environ, warnings);
  std::fputs((config::print_options(parsed) + "\n" + config::print_presets()).c_str(), stdout);
  for (const std::string& warning : warnings) print_error(warning);
  return kOk;
}

/// CLI11's check for a size: empty if it is one.
std::string size_problem(const std::string& text) {
  const auto bytes = config::parse_size(text);
  if (!bytes) return bytes.error();
  return *bytes == 0 ? "must be more than 0" : "";
}

/// The same for a process number.
std::string pid_problem(const std::string& text) {
  pid_t pid = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, pid);
  if (error == std::errc() && end == last && pid > 0) return "";
  return "'" + clipped(text, 60) + "' is not a PID";
}

/// The items of lists with commas between; nothing if one of the lists is empty.
std::optional<std::vector<std::string>> split(const std::vector<std::string>& lists) {
  std::vector<std::string> items;
  for (const std::string& list : lists) {
    const std::vector<std::string> listed = config::list_items(list);
    if (listed.empty()) return std::nullopt;
    items.insert(items.end(), listed.begin(), listed.end());
  }
  return items;
}

/// Where the command's name stands: the first argument that is neither an option nor an option's
/// value.
int command_at(int argc, char** argv) {
  int at = 1;
  while (at < argc && argv[at][0] == '-') {
    at += std::string_view(argv[at]) == "--socket-dir" ? 2 : 1;
  }
  return std::min(at, argc);
}

class CommandLine {
 public:
  CommandLine() {
    app_.require_subcommand(1);
    app_.set_version_flag("--version", std::string("dormouse ") + kVersion);
    app_.footer(kFooter);
    app_.option_defaults()->always_capture_default(false);
    app_.add_option("--socket-dir", global_.socket_directory,
                    "Directory of the control sockets, in place of DORMOUSE_SOCKET_DIR");
    app_.fallthrough();
    add_run();
    add_views();
    add_operation("sleep", "Put a process's tagged memory to sleep", Operation::Kind::kSleep);
    add_operation("wake", "Wake a process's memory", Operation::Kind::kWake);
    add_operation("trim", "Give back memory that is held but unused", Operation::Kind::kTrim);
    add_others();
  }

  int run(int argc, char** argv) {
    argc = split_program(argc, argv);
    if (const std::string problem = mistake(argc, argv); !problem.empty()) {
      print_error(problem);
      return kUsage;
    }
    try {
      app_.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      return app_.exit(error) == 0 ? kOk : kUsage;
    }
    return action_();
  }

 private:
  /// Takes the program and its arguments off a `run` command line, since they may look like options
  /// of ours. Returns how many arguments are left.
  int split_program(int argc, char** argv) {
    const std::set<std::string> with_value = {"--regions", "--option", "--library", "--socket-dir"};
    const int command = command_at(argc, argv);
    if (command == argc || std::string_view(argv[command]) != "run") return argc;
    for (int i = command + 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument == "--" || !argument.starts_with('-')) {
        run_.command.assign(argv + i + (argument == "--" ? 1 : 0), argv + argc);
        return i;
      }
      if (with_value.count(argument) != 0) ++i;
    }
    return argc;
  }

  /// What the parser would not say clearly, or would take for something else; empty if nothing.
  std::string mistake(int argc, char** argv) const {
    std::vector<std::string> names;
    for (const CLI::App* each : app_.get_subcommands({})) names.push_back(each->get_name());
    const int command = command_at(argc, argv);
    if (command < argc && std::find(names.begin(), names.end(), argv[command]) == names.end()) {
      const std::string meant = config::nearest(argv[command], names);
      return "there is no command '" + clipped(argv[command], 60) + "'; " +
             (meant.empty() ? "'dormouse --help' lists them" : "did you mean " + meant + "?");
    }
    for (int i = 1; i < argc; ++i) {  // the parser would take the next argument as the value
      const std::string_view argument = argv[i];
      if (argument.starts_with("--") && argument.find('=') == argument.size() - 1) {
        return std::string(argument.substr(0, argument.size() - 1)) + " is empty";
      }
    }
    return "";
  }

  CLI::App* add(const char* name, const char* help, std::function<int()> action) {
    CLI::App* command = app_.add_subcommand(name, help);
    command->callback([this, action] { action_ = action; });
    return command;
  }

  void add_run() {
    CLI::App* command = add("run", "Start a program with the library preloaded",
                            [this] { return start_program(); });
    command->add_option("--regions", run_.regions,
                        "Which allocations get which tag (DORMOUSE_REGIONS)");
    command
        ->add_option("--option", run_.options,
                     "NAME=VALUE, an option as 'dormouse options' lists them; repeatable")
        ->allow_extra_args(false);
    command->add_option("--library", run_.library,
                        "Path of libdormouse.so, if it is not found automatically");
    command->footer(
        "Everything after the program's name is the program's: dormouse run [OPTIONS] [--] "
        "PROGRAM [ARGUMENTS]");
  }

  int start_program() {
    if (run_.command.empty()) {
      print_error("run: name a program; see 'dormouse run --help'");
      return kUsage;
    }
    return cli::run(global_, run_);
  }

  void add_views() {
    CLI::App* ps = add("ps", "List the processes that run under Dormouse",
                       [this] { return show_processes(global_, json_); });
    ps->add_flag("--json", json_, "Everything known about each, as JSON");
    CLI::App* status = add("status", "Show one process",
                           [this] { return show_status(global_, pid_, json_, verbose_); });
    status->add_option("PID", pid_)->required()->check(kIsPid);
    status->add_flag("--json", json_, "As JSON");
    status->add_flag("-v,--verbose", verbose_, "Also the options that differ from their defaults");
    CLI::App* top =
        add("top", "Show all processes repeatedly", [this] { return show_top(global_, top_); });
    top->add_option("--interval", top_.interval, "Seconds in between (1)")
        ->check(CLI::Range(0.05, 86400.0));
    top->add_option("--count", top_.count, "End after this many tables");
    CLI::App* metrics = add("metrics", "Print one process's figures in Prometheus's format",
                            [this] { return show_metrics(global_, pid_); });
    metrics->add_option("PID", pid_)->required()->check(kIsPid);
  }

  void add_operation(const char* name, const char* help, Operation::Kind kind) {
    CLI::App* command = add(name, help, [this, kind] {
      operation_.kind = kind;
      if (operation_.all == !operation_.pids.empty()) {
        print_error("name processes by PID, or all with --all");
        return static_cast<int>(kUsage);
      }
      const auto tags = split(tags_);
      if (!tags) {
        print_error("--tags is empty; leave it out to mean all");
        return static_cast<int>(kUsage);
      }
      operation_.tags = *tags;
      return operate(global_, operation_);
    });
    command->add_option("PID", operation_.pids, "Processes; all are asked at the same time")
        ->check(kIsPid);
    command->add_flag("--all", operation_.all, "All processes that 'dormouse ps' lists");
    if (kind == Operation::Kind::kTrim) {
      command->add_flag("--backups", operation_.backups,
                        "Also the host memory of backups kept after a wake");
      return;
    }
    command->add_option("--tags", tags_, "Only these tags, separated by commas")
        ->allow_extra_args(false);
    if (kind == Operation::Kind::kWake) return;
    command
        ->add_option("--bytes", operation_.bytes, "Stop when this much is released, such as 20GiB")
        ->check(CLI::Validator(size_problem, "SIZE"));
    command->add_flag("--discard", operation_.discard,
                      "Drop the content: it reads as zero after waking");
  }

  void add_others() {
    CLI::App* options = add("options", "List the options with their values here, and the presets",
                            [this] { return show_options(markdown_); });
    options->add_flag("--markdown", markdown_, "As a page of documentation");
    CLI::App* check = add("doctor", "Check what Dormouse needs on this machine",
                          [this] { return doctor(global_, run_.library); });
    check->add_option("--library", run_.library,
                      "Path of libdormouse.so, if it is not found automatically");
  }

  const CLI::Validator kIsPid{pid_problem, ""};

  CLI::App app_{kDescription, "dormouse"};
  std::function<int()> action_;
  Global global_;
  RunOptions run_;
  Operation operation_;
  std::vector<std::string> tags_;  // of the operation, as written
  TopOptions top_;
  pid_t pid_ = 0;
  bool json_ = false;
  bool verbose_ = false;
  bool markdown_ = false;
};

}  // namespace

}  // namespace dormouse::cli

int main(int argc, char** argv) {
  try {
    return dormouse::cli::CommandLine().run(argc, argv);
  } catch (const std::exception& error) {
    dormouse::cli::print_error(error.what());
    return dormouse::cli::kFailed;
  }
}
