// The other end of the control protocol: finds the processes of a user and asks them. For the
// command line and tests.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

#include "core/control/http.h"
#include "core/control/paths.h"

namespace dormouse::control {

/// What a request came to.
struct Reply {
  enum class Kind {
    kAnswered,       // `response` is the process's, whatever its status
    kNoSuchProcess,  // no process of this number has a socket, or it has ended meanwhile
    kNotAllowed,     // the directory or the process belongs to another user
    kTimedOut,       // it did not answer in time; what was asked may still happen
    kFailed,         // anything else
  };
  Kind kind = Kind::kFailed;
  Response response;
  std::string message;  // when not answered: what happened and what to do

  bool is_ok() const { return kind == Kind::kAnswered && response.status / 100 == 2; }
};

class ControlClient {
 public:
  /// Looks into these directories, in this order, for sockets of processes of `uid` (root: of
  /// anyone).
  ControlClient(std::vector<std::string> directories, uid_t uid);

  /// The processes that listen, by PID. Left-over sockets are removed. `problems` gets a line for
  /// each directory that exists and cannot be trusted. Thread-safe, as are the other functions.
  std::vector<SocketFile> processes(std::vector<std::string>* problems = nullptr) const;

  /// Asks one process. No `timeout` (zero): as long as the process lives.
  Reply request(pid_t pid, const Request& request, std::chrono::milliseconds timeout) const;

 private:
  std::vector<std::string> directories_;
  uid_t uid_;
};

/// {"message": ...} of an error response, else its body, else its status as text.
std::string message_of(const Response& response);

}  // namespace dormouse::control
