// See api.h.
#include "core/control/api.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "config/text.h"
#include "config/units.h"
#include "core/control/metrics.h"
#include "core/process_identity.h"
#include "core/sleep/gate.h"

namespace dormouse::control {

namespace {

using nlohmann::json;

unsigned http_status(Code code) {
  switch (code) {
    case Code::kOk:
      return 200;
    case Code::kInvalidArgument:
      return 400;
    case Code::kNotFound:
      return 404;
    case Code::kBusy:
      return 409;
    case Code::kUnsupported:
      return 501;
    case Code::kOutOfDeviceMemory:
    case Code::kOutOfHostMemory:
      return 507;
    case Code::kDriver:
    case Code::kIo:
      return 500;
  }
  return 500;
}

Response error_of(const Status& status) {
  return error_response(http_status(status.code()), code_name(status.code()), status.message());
}

Response answer(const json& body) {
  // The command line may be in any encoding.
  return {200, body.dump(2, ' ', false, json::error_handler_t::replace) + "\n"};
}

/// The parameters of a request, each taken once by name; what is left over is an error.
class Parameters {
 public:
  explicit Parameters(const Target& target) : path_(target.path), left_(target.parameters) {}

  /// A list: the parameter may be repeated, and each value may be a list with commas. Empty if it
  /// is absent.
  std::vector<std::string> list(std::string_view name) {
    know(name);
    std::vector<std::string> items;
    while (const auto value = take(name)) {
      const std::vector<std::string> listed = config::list_items(*value);
      if (listed.empty()) fail(std::string(name) + " is empty; leave it out to mean all");
      for (const std::string& item : listed) {
        if (std::find(items.begin(), items.end(), item) == items.end()) items.push_back(item);
      }
    }
    return items;
  }

  std::optional<std::string> single(std::string_view name) {
    know(name);
    auto value = take(name);
    if (take(name)) fail(std::string(name) + " is given twice");
    return value;
  }

  bool boolean(std::string_view name) {
    const auto value = single(name);
    if (!value || *value == "false" || *value == "0") return false;
    if (*value != "true" && *value != "1") fail(std::string(name) + " must be true or false");
    return true;
  }

  /// In bytes; 0 if absent.
  std::uint64_t size(std::string_view name) {
    const auto value = single(name);
    if (!value) return 0;
    const auto bytes = config::parse_size(*value);
    if (!bytes) fail(std::string(name) + ": " + bytes.error());
    if (bytes && *bytes == 0) fail(std::string(name) + " must be more than 0");
    return bytes ? *bytes : 0;
  }

  /// To be called last: the first error, if any.
  std::optional<Response> error() {
    if (!left_.empty()) {
      fail("unknown parameter '" + left_.front().first + "'; " + path_ + " takes " +
           (known_.empty() ? "none" : known_));
    }
    if (message_.empty()) return std::nullopt;
    return error_of(Status(Code::kInvalidArgument, message_));
  }

  void fail(std::string message) {
    if (message_.empty()) message_ = std::move(message);
  }

 private:
  void know(std::string_view name) {
    if (!known_.empty()) known_ += ", ";
    known_ += name;
  }

  std::optional<std::string> take(std::string_view name) {
    const auto found = std::find_if(left_.begin(), left_.end(),
                                    [&](const auto& parameter) { return parameter.first == name; });
    if (found == left_.end()) return std::nullopt;
    std::string value = found->second;
    left_.erase(found);
    return value;
  }

  const std::string path_;
  std::vector<std::pair<std::string, std::string>> left_;
  std::string known_;  // all names that were asked for, with commas between
  std::string message_;
};

json to_json(const std::vector<HeldBytes>& held) {
  json list = json::array();
  for (const HeldBytes& each : held)
    list.push_back({{"by", holder_name(each.by)}, {"bytes", each.bytes}});
  return list;
}

json to_json(const OperationStats& operation) {
  return {{"bytes", operation.bytes},
          {"copied_bytes", operation.copied_bytes},
          {"unchanged_bytes", operation.unchanged_bytes},
          {"differing_bytes", operation.differing_bytes},
          {"unchecked_bytes", operation.unchecked_bytes},
          {"dropped_bytes", operation.dropped_bytes},
          {"held", to_json(operation.held)},
          {"chunks", operation.chunks},
          {"seconds", operation.seconds},
          {"unix_time", operation.unix_time}};
}

json to_json(const TagStats& tag) {
  return {{"tag", tag.tag},
          {"backup", backup_name(tag.backup)},
          {"device", tag.device},
          {"allocated", tag.allocated},
          {"mapped", tag.mapped},
          {"held", to_json(tag.held)},
          {"asleep", tag.asleep},
          {"backed_up", tag.backed_up},
          {"on_disk", tag.on_disk},
          {"peak_allocated", tag.peak_allocated},
          {"peak_mapped", tag.peak_mapped},
          {"blocks", tag.blocks},
          {"chunks", tag.chunks},
          {"allocations", tag.allocations},
          {"frees", tag.frees},
          {"sleeps", tag.sleeps},
          {"wakes", tag.wakes},
          {"last_sleep", to_json(tag.last_sleep)},
          {"last_wake", to_json(tag.last_wake)}};
}

json to_json(const OptionInForce& option) {
  return {{"name", option.name}, {"value", option.value}, {"variable", option.variable}};
}

json to_json(const Progress& progress) {
  return {{"active", progress.active},
          {"operation", progress.operation},
          {"done_bytes", progress.done_bytes},
          {"total_bytes", progress.total_bytes},
          {"seconds", progress.seconds}};
}

/// The tags' figures added up for each device.
json devices_json(const std::vector<TagStats>& tags, const Engine& engine) {
  struct Sum {
    std::uint64_t allocated = 0, mapped = 0, asleep = 0, backed_up = 0, on_disk = 0;
  };
  std::map<int, Sum> sums;
  for (const TagStats& tag : tags) {
    Sum& sum = sums[tag.device];
    sum.allocated += tag.allocated;
    sum.mapped += tag.mapped;
    sum.asleep += tag.asleep;
    sum.backed_up += tag.backed_up;
    sum.on_disk += tag.on_disk;
  }
  json devices = json::array();
  for (const auto& [device, sum] : sums) {
    devices.push_back({{"device", device},
                       {"allocated", sum.allocated},
                       {"mapped", sum.mapped},
                       {"asleep", sum.asleep},
                       {"backed_up", sum.backed_up},
                       {"on_disk", sum.on_disk},
                       {"retained", engine.retained_bytes(device)}});
  }
  return devices;
}

Response operation_answer(const char* name, const OperationStats& report) {
  json body = to_json(report);
  body["operation"] = name;
  return answer(body);
}

/// When this process started, as Unix time in seconds; 0 if /proc does not say.
double start_time() {
  const auto ticks = start_ticks_of("self");
  if (!ticks) return 0;
  std::ifstream boot("/proc/stat");
  for (std::string word; boot >> word;) {
    double seconds = 0;
    if (word == "btime" && boot >> seconds) {
      return seconds + static_cast<double>(*ticks) / static_cast<double>(sysconf(_SC_CLK_TCK));
    }
  }
  return 0;
}

std::string command_line() {
  constexpr std::size_t kLongest = 4096;
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::string text(kLongest, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  while (!text.empty() && text.back() == '\0') text.pop_back();
  std::replace(text.begin(), text.end(), '\0', ' ');
  return text;
}

}  // namespace

struct Api::Route {
  const char* path;
  const char* method;
  Response (Api::*handler)(const Target&, const Request&);
};

const Api::Route Api::kRoutes[] = {
    {"/sleep", "POST", &Api::sleep},
    {"/wake_up", "POST", &Api::wake},
    {"/wake", "POST", &Api::wake},
    {"/trim", "POST", &Api::trim},
    {"/is_sleeping", "GET", &Api::is_sleeping},
    {"/status", "GET", &Api::status},
    {"/metrics", "GET", &Api::metrics},
    {"/health", "GET", &Api::health},
};

ProcessInfo this_process() {
  ProcessInfo process;
  process.pid = getpid();
  process.command = command_line();
  process.start_time = start_time();
  return process;
}

Api::Api(Engine& engine, ProcessInfo process) : engine_(engine), process_(std::move(process)) {}

Response Api::handle(const Request& request) {
  const Target target = parse_target(request.target);
  if (!target.error.empty()) return error_of(Status(Code::kInvalidArgument, target.error));
  const auto route = std::find_if(std::begin(kRoutes), std::end(kRoutes),
                                  [&](const Route& known) { return target.path == known.path; });
  if (route == std::end(kRoutes)) {
    std::string known;
    for (const Route& each : kRoutes) known += std::string(known.empty() ? "" : ", ") + each.path;
    return error_of(Status(Code::kNotFound, "no such path; there are " + known));
  }
  if (request.method != route->method) {
    Response response = error_response(405, "method_not_allowed",
                                       std::string(route->path) + " wants " + route->method);
    response.allow = route->method;
    return response;
  }
  // A body is never read: tags in one would be ignored, and everything put to sleep.
  if (!request.body.empty()) {
    return error_of(Status(Code::kInvalidArgument,
                           "parameters go into the query, such as ?tags=weights; no body"));
  }
  return (this->*route->handler)(target, request);
}

template <typename Work>
Response Api::operate(const Request& request, Work work) {
  struct Count {
    std::atomic<int>& count;
    const int before = count.fetch_add(1);
    ~Count() { count.fetch_sub(1); }
  } const running{operations_};
  if (running.before >= kMaxOperations) {
    return error_of(Status(Code::kBusy, "other operations run; try again when they are done"));
  }
  const MutexLock turn(turn_mutex_);
  if (request.is_abandoned && request.is_abandoned()) {
    return error_of(Status(Code::kBusy, "the client went before its turn came; nothing was done"));
  }
  return work();
}

Response Api::sleep(const Target& target, const Request& request) {
  Parameters parameters(target);
  SleepRequest wanted;
  wanted.origin = Origin::kOutside;
  wanted.tags = parameters.list("tags");
  wanted.discard = parameters.boolean("discard");
  wanted.at_least_bytes = parameters.size("bytes");
  if (const auto level = parameters.single("level"); level == "2") {
    wanted.discard = true;
  } else if (level && *level != "1") {
    parameters.fail("level must be 1 (back up) or 2 (discard)");
  }
  if (auto error = parameters.error()) return *error;
  return operate(request, [&] {
    OperationStats report;
    const Status status = engine_.sleep(wanted, &report);
    return status.is_ok() ? operation_answer("sleep", report) : error_of(status);
  });
}

Response Api::wake(const Target& target, const Request& request) {
  Parameters parameters(target);
  WakeRequest wanted;
  wanted.tags = parameters.list("tags");
  if (auto error = parameters.error()) return *error;
  return operate(request, [&] {
    OperationStats report;
    const Status status = engine_.wake(wanted, &report);
    return status.is_ok() ? operation_answer("wake", report) : error_of(status);
  });
}

Response Api::trim(const Target& target, const Request& request) {
  Parameters parameters(target);
  const bool backups = parameters.boolean("backups");
  if (auto error = parameters.error()) return *error;
  return operate(request, [&] {
    const Status status = engine_.trim(backups);
    return status.is_ok() ? answer({{"operation", "trim"}}) : error_of(status);
  });
}

Response Api::is_sleeping(const Target& target, const Request&) {
  Parameters parameters(target);
  const auto tags = parameters.list("tags");
  if (auto error = parameters.error()) return *error;
  if (const Status status = engine_.check_tags(tags); !status.is_ok()) return error_of(status);
  return answer({{"is_sleeping", engine_.is_sleeping(tags)}});
}

Response Api::status(const Target& target, const Request&) {
  Parameters parameters(target);
  if (auto error = parameters.error()) return *error;
  json body = json::object();
  const auto tags = engine_.stats();
  body["pid"] = process_.pid;
  body["command"] = process_.command;
  body["start_time"] = process_.start_time;
  body["version"] = process_.version;
  body["options"] = json::array();
  for (const OptionInForce& option : process_.options) body["options"].push_back(to_json(option));
  body["tags"] = json::array();
  for (const TagStats& tag : tags) body["tags"].push_back(to_json(tag));
  body["devices"] = devices_json(tags, engine_);
  body["gate"] = {{"closed", gate::is_closed()}, {"waiting_threads", gate::waiting()}};
  body["progress"] = to_json(engine_.progress());
  return answer(body);
}

Response Api::metrics(const Target& target, const Request&) {
  Parameters parameters(target);
  if (auto error = parameters.error()) return *error;
  const GateFigures gate_now{gate::is_closed(), gate::waiting()};
  return {200,
          format_metrics(engine_.stats(), engine_.progress(), gate_now, process_.version,
                         process_.start_time),
          kMetricsContentType};
}

Response Api::health(const Target& target, const Request&) {
  Parameters parameters(target);
  if (auto error = parameters.error()) return *error;
  return answer({{"status", "ok"}});
}

}  // namespace dormouse::control
