// What can be asked of a process through its control socket, as a function from request to
// response: the paths, their parameters, JSON and metrics. Called by the control server's threads
// and by tests.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <string>
#include <vector>

#include "core/control/http.h"
#include "core/sleep/engine.h"
#include "core/thread_annotations.h"

namespace dormouse::control {

/// An option of the process, as the status shows it.
struct OptionInForce {
  std::string name;
  std::string value;
  std::string variable;  // the environment variable that it was read from
};

/// What the status says of the process beside its memory.
struct ProcessInfo {
  pid_t pid = 0;
  std::string command;                 // the command line
  double start_time = 0;               // Unix time in seconds
  std::string version;                 // of the library
  std::vector<OptionInForce> options;  // those that differ from their defaults
};

/// The calling process's, from /proc; what cannot be read stays empty.
ProcessInfo this_process();

/// Paths (parameters in brackets are optional, others are refused, so that a mistyped one never
/// means "everything"):
///
///   POST /sleep[?tags=a,b][&discard=true|false][&bytes=20GiB][&level=1|2]   level 2 discards
///   POST /wake_up[?tags=a,b], also as /wake
///   POST /trim[?backups=true|false]
///   GET /is_sleeping[?tags=a,b]   {"is_sleeping": true}
///   GET /status, /metrics (Prometheus), /health
///
/// docs/control.md has every parameter and field, which a test holds it to.
///
/// `tags` may be repeated and its values may be lists. An operation answers with its figures
/// (bytes, seconds). An error is {"error": "not_found", "message": "..."}; 400 malformed, 403
/// another user, 404 unknown path or tag, 405 wrong method, 409 busy, 507 out of device or host
/// memory, 501 not possible on this machine, 500 anything else.
class Api {
 public:
  /// The engine must outlive the Api.
  Api(Engine& engine, ProcessInfo process);

  /// Thread-safe. An operation takes as long as it takes; the other paths do not wait for it.
  Response handle(const Request& request);

 private:
  /// Operations that run or wait for one another. More are refused, so that they never take all
  /// workers.
  static constexpr int kMaxOperations = 4;

  Response sleep(const Target& target, const Request& request);
  Response wake(const Target& target, const Request& request);
  Response trim(const Target& target, const Request& request);
  Response is_sleeping(const Target& target, const Request& request);
  Response status(const Target& target, const Request& request);
  Response metrics(const Target& target, const Request& request);
  Response health(const Target& target, const Request& request);

  template <typename Work>
  Response operate(const Request& request, Work work);

  struct Route;
  static const Route kRoutes[];

  Engine& engine_;
  const ProcessInfo process_;
  std::atomic<int> operations_{0};
  Mutex turn_mutex_;  // of operations: they wait here, where they can still be dropped
};

}  // namespace dormouse::control
