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
#include <utility>

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

/// What one process was asked.
struct Job {
  pid_t pid = 0;
  bool slept_before = false;  // some of it was asleep already
  std::future<Reply> pending;
  bool answered = false;
  Reply reply;
  std::uint64_t bytes = 0;  // that the operation moved
};

/// The body's object; an empty one if it is none.
json object_of(const Reply& reply) {
  json body = json::parse(reply.response.body, nullptr, false);
  return body.is_object() ? body : json::object();
}

/// The sum of what the unfinished processes say of their progress, on one line that overwrites the
/// last.
class ProgressLine {
 public:
  ProgressLine(const ControlClient& client, const char* name)
      : client_(client), name_(name), terminal_(isatty(STDERR_FILENO) == 1) {}
  ~ProgressLine() { clear(); }

  void clear() {
    if (std::exchange(shown_, false)) std::fputs("\r\033[K", stderr);
  }

  void update(std::span<const Job> jobs) {
    if (!terminal_) return;
    std::uint64_t done = 0, total = 0;
    double seconds = 0;
    bool active = false;
    for (const Job& job : jobs) {
      if (job.answered) continue;
      const Reply reply = client_.request(job.pid, {"GET", "/status", ""}, kPatience);
      if (!reply.is_ok()) continue;
      const json progress = object_of(reply).value("progress", json::object());
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
  const bool terminal_;
  bool shown_ = false;
};

/// Why an operation of a process moved nothing.
std::string nothing_text(const ControlClient& client, const Operation& operation, pid_t pid) {
  const bool sleeping = operation.kind == Operation::Kind::kSleep;
  std::uint64_t mapped = 0, asleep = 0;
  const Reply reply = client.request(pid, {"GET", "/status", ""}, kPatience);
  const json tags = object_of(reply).value("tags", json::array());
  for (const json& tag : tags) {
    const auto& wanted = operation.tags;
    if (!wanted.empty() &&
        std::find(wanted.begin(), wanted.end(), tag.value("tag", "")) == wanted.end()) {
      continue;
    }
    mapped += tag.value("mapped", std::uint64_t{0});
    asleep += tag.value("asleep", std::uint64_t{0});
  }
  if (!reply.is_ok()) return "nothing to do";
  if (tags.empty()) return "nothing to do: none of its memory has a tag";
  if (mapped == 0 && asleep == 0) return "nothing to do: its tags hold no memory";
  if (sleeping && mapped != 0) {
    return fmt::format("nothing was released: {} stay awake; the process's status says why",
                       human_size(mapped));
  }
  return sleeping ? "nothing to do, all of it is asleep" : "nothing to do, all of it is awake";
}

/// "1.2 GiB asleep in 80.7 ms (...)", and what else there is to say of a sleep or a wake.
std::string success_text(const ControlClient& client, const Operation& operation, pid_t pid,
                         const json& report) {
  const auto number = [&](const char* name) { return report.value(name, std::uint64_t{0}); };
  const bool sleeping = operation.kind == Operation::Kind::kSleep;
  const std::uint64_t bytes = number("bytes");
  const double seconds = report.value("seconds", 0.0);
  const auto wanted = config::parse_size(operation.bytes);
  std::string asked;
  if (wanted && *wanted > bytes) asked = " (" + human_size(*wanted) + " asked)";
  const std::uint64_t dropped = number("dropped_bytes");
  std::string rest = dropped == 0 ? "" : human_size(dropped) + " of kept content dropped";
  const std::string held = held_text(report.value("held", json::array()));
  if (!held.empty()) rest += (rest.empty() ? "" : "; ") + held;
  if (bytes == 0 && !held.empty() && dropped == 0)
    return fmt::format("nothing more falls asleep{}; {}", asked, held);
  if (bytes == 0) return rest.empty() ? nothing_text(client, operation, pid) + asked : rest;
  return fmt::format("{} {}{} in {} ({}; {} copied, {} unchanged){}", human_size(bytes),
                     sleeping ? "asleep" : "awake",
                     asked.empty() ? "" : ", all there was" + asked + ",", human_time(seconds),
                     human_rate(bytes, seconds), human_size(number("copied_bytes")),
                     human_size(number("unchanged_bytes")), rest.empty() ? "" : "; " + rest);
}

/// Prints what a process did. Returns the exit code: memory that is not what fell asleep, or not
/// known to be, is not a success.
int report_success(const ControlClient& client, const Operation& operation, pid_t pid,
                   const json& report) {
  const bool trim = operation.kind == Operation::Kind::kTrim;
  fmt::print("process {}: {}\n", pid,
             trim ? "trimmed" : success_text(client, operation, pid, report));
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
      "process {}: {} bytes differ from what fell asleep: do not trust their content; the "
      "process's log has their addresses",
      pid, differing));
  return kFailed;
}

/// All processes at the same time. A stopped one answers none of these requests.
template <typename Each>
void at_once(const std::vector<pid_t>& pids, Each each) {
  std::vector<std::future<void>> running;
  for (std::size_t i = 0; i < pids.size(); ++i) {
    running.push_back(std::async(std::launch::async, [&each, i] { each(i); }));
  }
  for (std::future<void>& one : running) one.get();
}

/// The processes to ask; returns an exit code. Of those that were named one that does not answer
/// ends it all (`pids` is empty then); of all that there are it is passed over.
int choose(const ControlClient& client, const Operation& operation, std::vector<pid_t>& pids) {
  std::vector<pid_t> candidates;
  if (operation.all) {
    std::vector<std::string> problems;
    for (const auto& file : client.processes(&problems)) candidates.push_back(file.pid);
    for (const std::string& problem : problems) print_error(problem);
    if (candidates.empty()) print_error("no process runs under Dormouse and uses CUDA");
    if (candidates.empty()) return kNoSuchProcess;
  }
  for (const pid_t pid : operation.pids) {
    if (std::find(candidates.begin(), candidates.end(), pid) == candidates.end()) {
      candidates.push_back(pid);
    }
  }
  std::vector<Reply> replies(candidates.size());
  at_once(candidates, [&](std::size_t i) {
    replies[i] = client.request(candidates[i], {"GET", "/health", ""}, kPatience);
  });
  int code = kOk;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    if (replies[i].is_ok()) {
      pids.push_back(candidates[i]);
      continue;
    }
    // One of all that has ended since it was found is none that failed.
    const bool ended = replies[i].kind == Reply::Kind::kNoSuchProcess;
    if (operation.all && ended) continue;
    code = std::max(code, report_failure(candidates[i], replies[i]));
  }
  if (code == kOk || operation.all) return code;
  if (candidates.size() > 1) print_error("nothing was done to the others");
  pids.clear();
  return code;
}

/// Asks these processes at the same time and reports of each when it has answered. Returns kOk or
/// kFailed. `quiet` says of a refusal that it is reported later.
template <typename Quiet>
int ask(const ControlClient& client, const Operation& operation, std::span<Job> jobs, Quiet quiet) {
  const std::string target = target_of(operation);
  for (Job& job : jobs) {
    job.answered = false;
    job.pending = std::async(std::launch::async, [&client, &target, pid = job.pid] {
      return client.request(pid, {"POST", target, ""}, 0ms);
    });
  }
  int code = kOk;
  ProgressLine line(client, name_of(operation.kind));
  for (std::size_t open = jobs.size(); open != 0;) {
    for (Job& job : jobs) {
      if (job.answered || job.pending.wait_for(0s) != std::future_status::ready) continue;
      job.reply = job.pending.get();
      job.answered = true;
      --open;
      if (!job.reply.is_ok() && quiet(job)) continue;
      line.clear();
      if (!job.reply.is_ok()) {
        report_failure(job.pid, job.reply);
        code = kFailed;
        continue;
      }
      const json report = object_of(job.reply);
      job.bytes = report.value("bytes", std::uint64_t{0});
      const int each = report_success(client, operation, job.pid, report);
      if (each != kOk) code = each;
    }
    const auto next =
        std::find_if_not(jobs.begin(), jobs.end(), [](const Job& job) { return job.answered; });
    if (next == jobs.end()) break;
    if (next->pending.wait_for(kProgressTime) != std::future_status::ready) line.update(jobs);
  }
  return code;
}

/// One of several processes refused: what the command put to sleep is woken again, since processes
/// that are named together wait for each other more often than not. What slept before stays as it
/// is, and so does what was dropped.
void take_back(const ControlClient& client, const Operation& operation, std::span<Job> jobs) {
  Operation wake{.kind = Operation::Kind::kWake, .tags = operation.tags};
  for (Job& job : jobs) {
    if (!job.reply.is_ok() || job.bytes == 0) continue;
    if (operation.discard || job.slept_before) {
      print_error(fmt::format(
          "process {} stays asleep: {}", job.pid,
          operation.discard ? "its content was dropped" : "some of it was asleep already"));
      continue;
    }
    print_error(fmt::format("process {} is woken again, since not all could sleep", job.pid));
    ask(client, wake, {&job, 1}, [](const Job&) { return false; });
  }
}

bool slept_before(const ControlClient& client, const Operation& operation, pid_t pid) {
  std::string target = "/is_sleeping";
  for (const std::string& tag : operation.tags) {
    target += (tag == operation.tags.front() ? "?tags=" : "&tags=") + control::encode(tag);
  }
  const Reply reply = client.request(pid, {"GET", target, ""}, kPatience);
  return reply.is_ok() && object_of(reply).value("is_sleeping", false);
}

}  // namespace

int operate(const Global& global, const Operation& operation) {
  const ControlClient client = make_client(global);
  std::vector<pid_t> pids;
  int code = choose(client, operation, pids);
  std::vector<Job> jobs(pids.size());
  const bool sleeping = operation.kind == Operation::Kind::kSleep;
  const bool several = jobs.size() > 1;
  for (std::size_t i = 0; i < jobs.size(); ++i) jobs[i].pid = pids[i];
  if (sleeping && several && !operation.all) {
    at_once(pids, [&](std::size_t i) {
      jobs[i].slept_before = slept_before(client, operation, pids[i]);
    });
  }
  // Host memory that others took at the same moment, and gave back when they failed, may be there
  // for one alone.
  const auto tried_alone = [&](const Job& job) {
    return sleeping && several && job.reply.response.status == 507;
  };
  // Of all processes some need not know a tag, but one must.
  std::size_t without_tag = 0;
  const auto passed_over = [&](const Job& job) {
    const bool unknown_tag = !operation.tags.empty() && job.reply.response.status == 404;
    if (!operation.all || !unknown_tag || ++without_tag == jobs.size()) return false;
    fmt::print("process {}: {}\n", job.pid, control::message_of(job.reply.response));
    return true;
  };
  const auto quiet = [&](const Job& job) { return tried_alone(job) || passed_over(job); };
  code = std::max(code, ask(client, operation, jobs, quiet));
  for (Job& job : jobs) {
    if (tried_alone(job)) code = std::max(code, ask(client, operation, {&job, 1}, passed_over));
  }
  const auto refused = [](const Job& job) { return !job.reply.is_ok(); };
  if (sleeping && !operation.all && std::any_of(jobs.begin(), jobs.end(), refused)) {
    take_back(client, operation, jobs);
  }
  return code;
}

}  // namespace dormouse::cli
