// See show.h.
#include "cli/show.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <future>
#include <nlohmann/json.hpp>
#include <thread>

#include "cli/text.h"

namespace dormouse::cli {

namespace {

using nlohmann::json;
using namespace std::chrono_literals;

constexpr auto kPatience = 3s;  // with a process that does not answer
constexpr std::size_t kCommandWidth = 60;

control::Reply get(const control::ControlClient& client, pid_t pid, const char* target) {
  return client.request(pid, {"GET", target, ""}, kPatience);
}

/// A member that is a number, or 0: what comes over the socket may be of another version.
std::uint64_t number(const json& object, const char* name) {
  const auto found = object.is_object() ? object.find(name) : object.end();
  return found != object.end() && found->is_number() ? found->get<std::uint64_t>() : 0;
}

double real(const json& object, const char* name) {
  const auto found = object.is_object() ? object.find(name) : object.end();
  return found != object.end() && found->is_number() ? found->get<double>() : 0;
}

std::string text(const json& object, const char* name) {
  const auto found = object.is_object() ? object.find(name) : object.end();
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

json member(const json& object, const char* name) {
  const auto found = object.is_object() ? object.find(name) : object.end();
  return found != object.end() ? *found : json();
}

struct Process {
  pid_t pid = 0;
  json status;        // null if it did not answer
  std::string error;  // then
};

/// All processes, asked at the same time.
std::vector<Process> ask_all(const control::ControlClient& client) {
  std::vector<std::string> problems;
  std::vector<std::future<Process>> asked;
  for (const control::SocketFile& file : client.processes(&problems)) {
    asked.push_back(std::async(std::launch::async, [&client, pid = file.pid] {
      Process process{pid, {}, {}};
      const control::Reply reply = get(client, pid, "/status");
      if (reply.is_ok()) process.status = json::parse(reply.response.body, nullptr, false);
      if (!process.status.is_object()) {
        process.status = json();
        process.error = reply.is_ok()           ? "its answer is not JSON"
                        : reply.message.empty() ? control::message_of(reply.response)
                                                : reply.message;
      }
      return process;
    }));
  }
  for (const std::string& problem : problems) print_error(problem);
  std::vector<Process> processes;
  for (auto& each : asked) processes.push_back(each.get());
  return processes;
}

/// "12.3 of 64.0 GiB asleep" while an operation runs, else what the process is.
std::string state_of(const json& status) {
  const json progress = member(status, "progress");
  if (progress.is_object() && progress.value("active", false)) {
    return text(progress, "operation") + " " + human_size(number(progress, "done_bytes")) + " of " +
           human_size(number(progress, "total_bytes"));
  }
  const json gate = member(status, "gate");
  const std::uint64_t waiting = number(gate, "waiting_threads");
  std::uint64_t asleep = 0, mapped = 0;
  for (const json& tag : member(status, "tags")) {
    asleep += number(tag, "asleep");
    mapped += number(tag, "mapped");
  }
  std::string state = asleep == 0 ? "awake" : mapped == 0 ? "asleep" : "partly asleep";
  if (waiting > 0) state += fmt::format(", {} waiting", waiting);
  return state;
}

std::string process_table(const std::vector<Process>& processes) {
  Table table({"PID", "TAGS", "AWAKE", "ASLEEP", "HOST", "DISK", "STATE", "COMMAND"},
              {true, false, true, true, true, true, false, false});
  for (const Process& process : processes) {
    if (process.status.is_null()) {
      table.add(
          {std::to_string(process.pid), "?", "?", "?", "?", "?", "?", clipped(process.error, 200)});
      continue;
    }
    std::vector<std::string> names;
    std::uint64_t mapped = 0, asleep = 0, host = 0, disk = 0;
    for (const json& tag : member(process.status, "tags")) {
      const std::string name = text(tag, "tag");
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
      mapped += number(tag, "mapped");
      asleep += number(tag, "asleep");
      host += number(tag, "backed_up");
      disk += number(tag, "on_disk");
    }
    table.add({std::to_string(process.pid),
               names.empty() ? "-" : fmt::format("{}", fmt::join(names, ",")), human_size(mapped),
               human_size(asleep), human_size(host), human_size(disk), state_of(process.status),
               clipped(text(process.status, "command"), kCommandWidth)});
  }
  return table.print();
}

std::string operation_line(const char* verb, const json& operation) {
  if (real(operation, "unix_time") == 0) return "";
  const double seconds = real(operation, "seconds");
  const std::uint64_t bytes = number(operation, "bytes");
  const double ago =
      std::max(0.0, static_cast<double>(std::time(nullptr)) - real(operation, "unix_time"));
  const std::uint64_t differing = number(operation, "differing_bytes");
  return fmt::format(
      "    {} {} in {} ({}; {} copied, {} unchanged), {}{}\n", verb, human_size(bytes),
      human_time(seconds), human_rate(bytes, seconds),
      human_size(number(operation, "copied_bytes")),
      human_size(number(operation, "unchanged_bytes")), human_ago(ago),
      differing == 0 ? "" : fmt::format("; {} bytes DIFFER from what fell asleep", differing));
}

std::string tag_lines(const json& tag) {
  std::string lines = fmt::format(
      "  {} on GPU {} (backup {})\n"
      "    awake {}, asleep {}, backups {} in host memory and {} on disk\n"
      "    {} in {} blocks, {} chunks; at most {} allocated, {} held; {} allocations, {} frees\n",
      clipped(text(tag, "tag"), 64), number(tag, "device"), text(tag, "backup"),
      human_size(number(tag, "mapped")), human_size(number(tag, "asleep")),
      human_size(number(tag, "backed_up")), human_size(number(tag, "on_disk")),
      human_size(number(tag, "allocated")), number(tag, "blocks"), number(tag, "chunks"),
      human_size(number(tag, "peak_allocated")), human_size(number(tag, "peak_mapped")),
      number(tag, "allocations"), number(tag, "frees"));
  if (const std::string held = held_text(member(tag, "held")); !held.empty())
    lines += "    " + held + ", which stays awake\n";
  lines += operation_line("last slept", member(tag, "last_sleep"));
  lines += operation_line("last woke", member(tag, "last_wake"));
  return lines;
}

std::string option_lines(const json& status) {
  const json options = member(status, "options");
  if (!options.is_array()) return "its library is too old to say its options\n";
  if (options.empty()) return "every option has its default\n";
  Table table({"OPTION", "VALUE", "FROM"}, {false, false, false});
  for (const json& option : options) {
    const std::string variable = text(option, "variable");
    table.add({clipped(text(option, "name"), 64), clipped(text(option, "value"), 2000),
               variable == text(option, "name") ? "the environment" : clipped(variable, 64)});
  }
  return "options that differ from their defaults:\n" + table.print();
}

std::string status_text(const json& status) {
  const double age =
      std::max(0.0, static_cast<double>(std::time(nullptr)) - real(status, "start_time"));
  std::string result = fmt::format("process {}, started {}, Dormouse {}\n{}\n{}; the gate is {}\n",
                                   number(status, "pid"), human_ago(age), text(status, "version"),
                                   clipped(text(status, "command"), 2000), state_of(status),
                                   member(status, "gate").value("closed", false)
                                       ? "closed: calls that may touch sleeping memory wait"
                                       : "open");
  const json tags = member(status, "tags");
  if (tags.empty()) result += "no memory has a tag yet\n";
  for (const json& tag : tags) result += tag_lines(tag);
  return result;
}

}  // namespace

int show_processes(const Global& global, bool as_json) {
  const control::ControlClient client = make_client(global);
  const std::vector<Process> processes = ask_all(client);
  if (!as_json) {
    std::fputs(process_table(processes).c_str(), stdout);
    return kOk;
  }
  json list = json::array();
  for (const Process& process : processes) {
    if (process.status.is_null()) {
      list.push_back({{"pid", process.pid}, {"error", process.error}});
    } else {
      list.push_back(process.status);
    }
  }
  std::puts(list.dump(2, ' ', false, json::error_handler_t::replace).c_str());
  return kOk;
}

int show_status(const Global& global, pid_t pid, bool as_json, bool verbose) {
  const control::Reply reply = get(make_client(global), pid, "/status");
  if (!reply.is_ok()) return report_failure(pid, reply);
  if (as_json) {
    std::fputs(reply.response.body.c_str(), stdout);
    return kOk;
  }
  const json status = json::parse(reply.response.body, nullptr, false);
  if (!status.is_object()) {
    print_error("process " + std::to_string(pid) + ": its answer is not JSON");
    return kFailed;
  }
  std::fputs(status_text(status).c_str(), stdout);
  if (verbose) std::fputs(option_lines(status).c_str(), stdout);
  return kOk;
}

int show_top(const Global& global, const TopOptions& options) {
  const control::ControlClient client = make_client(global);
  const bool terminal = isatty(STDOUT_FILENO) == 1;
  for (unsigned printed = 0;;) {
    const std::string table = process_table(ask_all(client));
    // Home and clear to the end: no flicker as from clearing first.
    if (terminal) std::fputs("\033[H\033[J", stdout);
    std::fputs(table.c_str(), stdout);
    if (std::fflush(stdout) != 0) return kFailed;
    if (++printed == options.count) return kOk;
    std::this_thread::sleep_for(std::chrono::duration<double>(options.interval));
  }
}

int show_metrics(const Global& global, pid_t pid) {
  const control::Reply reply = get(make_client(global), pid, "/metrics");
  if (!reply.is_ok()) return report_failure(pid, reply);
  std::fputs(reply.response.body.c_str(), stdout);
  return kOk;
}

}  // namespace dormouse::cli
