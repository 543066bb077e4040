// See operate.h.
#include "cli/operate.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <future>
#include <nlohmann/json.hpp>

#include "cli/text.h"

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

void print_success(Operation::Kind kind, pid_t pid, const json& report) {
  if (kind == Operation::Kind::kTrim) {
    fmt::print("process {}: trimmed\n", pid);
    return;
  }
  const std::uint64_t bytes = report.value("bytes", std::uint64_t{0});
  const double seconds = report.value("seconds", 0.0);
  const char* verb = kind == Operation::Kind::kSleep ? "asleep" : "awake";
  if (bytes == 0) {
    fmt::print("process {}: nothing to do, all of it is {}\n", pid, verb);
    return;
  }
  fmt::print("process {}: {} {} in {} ({}; {} copied, {} unchanged)\n", pid, human_size(bytes),
             verb, human_time(seconds), human_rate(bytes, seconds),
             human_size(report.value("copied_bytes", std::uint64_t{0})),
             human_size(report.value("unchanged_bytes", std::uint64_t{0})));
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
    if (!reply.is_ok()) return report_failure(pid, reply);
  }
  return kOk;
}

}  // namespace

int operate(const Global& global, const Operation& operation) {
  const ControlClient client = make_client(global);
  std::vector<pid_t> pids;
  if (const int code = choose(client, operation, pids); code != kOk) return code;
  const std::string target = target_of(operation);
  std::vector<Job> jobs;
  for (const pid_t pid : pids) {
    jobs.push_back({pid, std::async(std::launch::async, [&client, &target, pid] {
                      return client.request(pid, {"POST", target, ""}, 0ms);
                    })});
  }
  wait_for(client, jobs, name_of(operation.kind));
  int code = kOk;
  std::size_t without_tag = 0;
  for (Job& job : jobs) {
    const Reply reply = job.reply.get();
    if (reply.is_ok()) {
      const json report = json::parse(reply.response.body, nullptr, false);
      print_success(operation.kind, job.pid, report.is_object() ? report : json::object());
    } else if (operation.all && jobs.size() > 1 && !operation.tags.empty() &&
               reply.response.status == 404 && ++without_tag < jobs.size()) {
      fmt::print("process {}: {}\n", job.pid, control::message_of(reply.response));
    } else {
      report_failure(job.pid, reply);
      code = kFailed;
    }
  }
  return code;
}

}  // namespace dormouse::cli
