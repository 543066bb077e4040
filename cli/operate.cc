// See operate.h.
#include "cli/operate.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <future>
#include <nlohmann/json.hpp>
#include <span>

#include "cli/text.h"
#include "config/units.h"

namespace dormouse::cli {

namespace {

using control::ControlClient;
using control::Reply;
using nlohmann::json;
using namespace std::chrono_literals;

constexpr auto kPatience = 3s;         // for short questions
constexpr auto kProgressTime = 200ms;  // between two looks

const char* name_of(Operation::Kind kind) {
  switch (kind) {
    case Operation::Kind::kSleep:
      return "sleep";
    case Operation::Kind::kWake:
      return "wake";
    case Operation::Kind::kTrim:
      return "trim";
  }
  return "";
}

std::string target_of(const Operation& operation) {
  std::string target = operation.kind == Operation::Kind::kWake
                           ? "/wake_up"
                           : std::string("/") + name_of(operation.kind);
  char separator = '?';
  const auto add = [&](const char* name, const std::string& value) {
    target += separator + std::string(name) + "=" + control::encode(value);
    separator = '&';
  };
  for (const std::string& tag : operation.tags) add("tags", tag);
  if (!operation.bytes.empty()) add("bytes", operation.bytes);
  if (operation.discard) add("discard", "true");
  if (operation.backups) add("backups", "true");
  return target;
}

struct Job {
  pid_t pid = 0;
  std::future<Reply> reply;
};

bool ready(const Job& job) {
  return job.reply.wait_for(0s) == std::future_status::ready;
}

/// The sum of what the unfinished processes say of their progress, on one line that overwrites the
/// last.
class ProgressLine {
 public:
  ProgressLine(const ControlClient& client, const char* name) : client_(client), name_(name) {}
  ~ProgressLine() {
    if (shown_) std::fputs("\r\033[K", stderr);
  }

  void update(const std::vector<Job>& jobs) {
    std::uint64_t done = 0, total = 0;
    double seconds = 0;
    bool active = false;
    for (const Job& job : jobs) {
      if (ready(job)) continue;
      const Reply reply = client_.request(job.pid, {"GET", "/status", ""}, kPatience);
      if (!reply.is_ok()) continue;
      const json status = json::parse(reply.response.body, nullptr, false);
      const json progress = status.is_object() ? status.value("progress", json::object()) : json();
      if (!progress.is_object() || !progress.value("active", false)) continue;
      active = true;
      done += progress.value("done_bytes", std::uint64_t{0});
      total += progress.value("total_bytes", std::uint64_t{0});
      seconds = std::max(seconds, progress.value("seconds", 0.0));
    }
    if (!active) return;
    // Before it copies, an operation waits for the device and finds out what changed.
    const std::string text = total == 0 ? "preparing"
                                        : fmt::format("{} of {}, {}", human_size(done),
                                                      human_size(total), human_rate(done, seconds));
    std::fprintf(stderr, "\r\033[K%s: %s", name_, text.c_str());
    std::fflush(stderr);
    shown_ = true;
  }

 private:
  const ControlClient& client_;
  const char* name_;
  bool shown_ = false;
};

void wait_for(const ControlClient& client, const std::vector<Job>& jobs, const char* name) {
  if (isatty(STDERR_FILENO) != 1) {
    for (const Job& job : jobs) job.reply.wait();
    return;
  }
  ProgressLine line(client, name);
  for (;;) {
    const auto open = std::find_if_not(jobs.begin(), jobs.end(), ready);
    if (open == jobs.end()) return;
    if (open->reply.wait_for(kProgressTime) != std::future_status::ready) line.update(jobs);
  }
}

/// "1.2 GiB asleep in 80.7 ms (...)", and what else there is to say of a sleep or a wake.
std::string success_text(const Operation& operation, const json& report) {
  const auto number = [&](const char* name) { return report.value(name, std::uint64_t{0}); };
  const bool sleeping = operation.kind == Operation::Kind::kSleep;
  const char* verb = sleeping ? "asleep" : "awake";
  const std::uint64_t bytes = number("bytes");
  const double seconds = report.value("seconds", 0.0);
  const auto wanted = config::parse_size(operation.bytes);
  std::string asked;
  if (wanted && *wanted > bytes) asked = " (" + human_size(*wanted) + " asked)";
  const std::uint64_t dropped = number("dropped_bytes");
  const std::string drop = dropped == 0 ? "" : human_size(dropped) + " of kept content dropped";
  if (bytes == 0) {
    return drop.empty() ? fmt::format("nothing to do, all of it is {}{}", verb, asked) : drop;
  }
  return fmt::format("{} {}{} in {} ({}; {} copied, {} unchanged){}", human_size(bytes), verb,
                     asked.empty() ? "" : ", all there was" + asked + ",", human_time(seconds),
                     human_rate(bytes, seconds), human_size(number("copied_bytes")),
                     human_size(number("unchanged_bytes")), drop.empty() ? "" : "; " + drop);
}

/// Prints what a process did. Returns the exit code: memory that is not what fell asleep, or not
/// known to be, is no success.
int report_success(const Operation& operation, pid_t pid, const json& report) {
  fmt::print(
      "process {}: {}\n", pid,
      operation.kind == Operation::Kind::kTrim ? "trimmed" : success_text(operation, report));
  std::fflush(stdout);
  const std::uint64_t differing = report.value("differing_bytes", std::uint64_t{0});
  const std::uint64_t unchecked = report.value("unchecked_bytes", std::uint64_t{0});
  if (unchecked != 0) {
    print_error(fmt::format(
        "process {}: {} bytes could not be checked (DORMOUSE_VERIFY); the process's log says why",
        pid, unchecked));
  }
  if (differing == 0) return unchecked == 0 ? kOk : kFailed;
  print_error(fmt::format(
      "process {}: {} bytes differ from what fell asleep: their content is not to be trusted; the "
      "process's log has their addresses",
      pid, differing));
  return kFailed;
}

/// The processes to ask, or an exit code.
int choose(const ControlClient& client, const Operation& operation, std::vector<pid_t>& pids) {
  if (operation.all) {
    std::vector<std::string> problems;
    for (const auto& file : client.processes(&problems)) pids.push_back(file.pid);
    for (const std::string& problem : problems) print_error(problem);
    if (pids.empty()) print_error("no process runs under Dormouse and uses CUDA");
    return pids.empty() ? kNoSuchProcess : kOk;
  }
  for (const pid_t pid : operation.pids) {
    if (std::find(pids.begin(), pids.end(), pid) == pids.end()) pids.push_back(pid);
  }
  for (const pid_t pid : pids) {
    const Reply reply = client.request(pid, {"GET", "/health", ""}, kPatience);
    if (reply.is_ok()) continue;
    const int code = report_failure(pid, reply);
    if (pids.size() > 1) print_error("nothing was done to the others");
    return code;
  }
  return kOk;
}

/// Asks these processes at the same time and reports. Returns kOk or kFailed; `without_tag` counts
/// those of all processes that do not have the tags, which is a failure only if none has.
int ask(const ControlClient& client, const Operation& operation, std::span<const pid_t> pids,
        std::size_t all, std::size_t& without_tag) {
  const std::string target = target_of(operation);
  std::vector<Job> jobs;
  for (const pid_t pid : pids) {
    jobs.push_back({pid, std::async(std::launch::async, [&client, &target, pid] {
                      return client.request(pid, {"POST", target, ""}, 0ms);
                    })});
  }
  wait_for(client, jobs, name_of(operation.kind));
  int code = kOk;
  for (Job& job : jobs) {
    const Reply reply = job.reply.get();
    if (reply.is_ok()) {
      const json report = json::parse(reply.response.body, nullptr, false);
      const int each =
          report_success(operation, job.pid, report.is_object() ? report : json::object());
      if (each != kOk) code = each;
    } else if (operation.all && all > 1 && !operation.tags.empty() &&
               reply.response.status == 404 && ++without_tag < all) {
      fmt::print("process {}: {}\n", job.pid, control::message_of(reply.response));
    } else {
      report_failure(job.pid, reply);
      code = kFailed;
    }
  }
  return code;
}

}  // namespace

int operate(const Global& global, const Operation& operation) {
  const ControlClient client = make_client(global);
  std::vector<pid_t> pids;
  if (const int code = choose(client, operation, pids); code != kOk) return code;
  const std::size_t at_once = operation.kind == Operation::Kind::kSleep ? 1 : pids.size();
  int code = kOk;
  std::size_t without_tag = 0;
  for (std::size_t i = 0; i < pids.size(); i += at_once) {
    const auto next = std::span(pids).subspan(i, at_once);
    if (ask(client, operation, next, pids.size(), without_tag) != kOk) code = kFailed;
  }
  return code;
}

}  // namespace dormouse::cli
