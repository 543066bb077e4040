// The control server: lets the owning user's other processes ask this one for its status and for
// sleep and wake, over HTTP on a Unix socket (api.h has the paths). Started by whoever owns
// the engine, when CUDA is first used.
#pragma once

#include <string>
#include <vector>

#include "core/control/api.h"
#include "core/control/listener.h"
#include "core/sleep/engine.h"

namespace dormouse {

struct ControlOptions {
  std::string directory;  // of the socket: control::socket_directory() gives it
  std::string version;    // of the library, for the status
  std::string command;    // for the status; empty: this process's command line
  std::vector<control::OptionInForce> options;  // for the status: those that are not the default
  std::string directory_option;  // what messages call the setting of the directory; may be empty
};

class ControlServer {
 public:
  /// Stops. A server that lives until the process exits should never be destroyed: see
  /// remove_socket().
  ~ControlServer() = default;

  /// Starts the server's threads. If it cannot, one warning is logged that says what to do, and
  /// false is returned; the process goes on without. The engine must outlive the server, or the
  /// process must exit. Not thread-safe, as are the other functions.
  bool start(Engine& engine, ControlOptions options) noexcept;

  /// Removes the socket and waits for the threads, an operation in progress included. Idempotent.
  void stop() noexcept { listener_.stop(); }

  /// At process exit: removes the socket, takes no more requests and waits for nothing.
  void remove_socket() noexcept { listener_.remove_socket(); }

  /// In a forked child: gives up what it inherited. The parent's socket stays, and the child can
  /// start() its own.
  void forget_after_fork() noexcept { listener_.forget_after_fork(); }

  /// The socket; empty when the server does not run.
  std::string path() const { return listener_.path(); }

 private:
  control::Listener listener_;
};

}  // namespace dormouse
