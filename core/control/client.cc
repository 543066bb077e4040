// See client.h.
#include "core/control/client.h"

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>

#include "core/control/socket.h"

namespace dormouse::control {

namespace {

Reply failed(Reply::Kind kind, std::string message) {
  return {kind, {}, std::move(message)};
}

Reply exchange(const UniqueFd& fd, pid_t pid, const Request& request, Deadline deadline) {
  // A server may answer before it has read all, and close: what it said is there to be read.
  write_request(fd, request, deadline);
  auto received = read_response(fd, deadline);
  if (auto* response = std::get_if<Response>(&received)) {
    return {Reply::Kind::kAnswered, std::move(*response), {}};
  }
  const std::string process = "process " + std::to_string(pid);
  const auto& error = std::get<MessageError>(received);
  if (error.status == 408) {
    return failed(Reply::Kind::kTimedOut,
                  process + " did not answer in time; it may be stopped, or busy");
  }
  if (error.closed) {
    return failed(Reply::Kind::kNoSuchProcess, process + " ended before it answered");
  }
  return failed(Reply::Kind::kFailed, process + ": " + error.message);
}

}  // namespace

ControlClient::ControlClient(std::vector<std::string> directories, uid_t uid)
    : directories_(std::move(directories)), uid_(uid) {}

std::vector<SocketFile> ControlClient::processes(std::vector<std::string>* problems) const {
  std::vector<SocketFile> all;
  for (const std::string& directory : directories_) {
    bool missing = false;
    if (const auto problem = directory_problem(directory, uid_, &missing)) {
      if (!missing && problems != nullptr) problems->push_back(*problem);
      continue;
    }
    for (SocketFile& file : live_sockets(directory)) all.push_back(std::move(file));
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const SocketFile& a, const SocketFile& b) { return a.pid < b.pid; });
  return all;
}

Reply ControlClient::request(pid_t pid, const Request& request,
                             std::chrono::milliseconds timeout) const {
  const Deadline deadline = timeout.count() > 0 ? after(timeout) : kForever;
  std::string refusal;
  for (const std::string& directory : directories_) {
    bool missing = false;
    if (const auto problem = directory_problem(directory, uid_, &missing)) {
      if (!missing) refusal = *problem;
      continue;
    }
    int error = 0;
    const UniqueFd fd = connect_to(socket_path(directory, pid), deadline, error);
    if (!fd.is_open()) {
      if (error == EACCES) refusal = socket_path(directory, pid) + ": " + error_text(error);
      if (error == ETIMEDOUT) {
        return failed(
            Reply::Kind::kTimedOut,
            "process " + std::to_string(pid) + " does not accept connections; it may be stopped");
      }
      continue;
    }
    const uid_t owner = peer_of(fd.get()).uid;
    if (owner != uid_ && uid_ != 0) {
      return failed(Reply::Kind::kNotAllowed,
                    "process " + std::to_string(pid) + " belongs to user " + std::to_string(owner));
    }
    return exchange(fd, pid, request, deadline);
  }
  if (!refusal.empty()) return failed(Reply::Kind::kNotAllowed, refusal);
  return failed(Reply::Kind::kNoSuchProcess,
                "no process " + std::to_string(pid) +
                    " runs under Dormouse and uses CUDA; 'dormouse ps' lists those that do");
}

std::string message_of(const Response& response) {
  const auto body = nlohmann::json::parse(response.body, nullptr, false);
  if (body.is_object() && body.contains("message") && body["message"].is_string()) {
    return body["message"].get<std::string>();
  }
  return response.body.empty() ? "HTTP status " + std::to_string(response.status) : response.body;
}

}  // namespace dormouse::control
