// Threads that accept connections on a Unix socket and answer HTTP requests by calling a handler.
// Knows nothing of what is asked; the control server gives it the handler.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "core/control/http.h"

namespace dormouse::control {

class Listener {
 public:
  /// Called by several threads at once. What it throws becomes an answer with status 500.
  using Handler = std::function<Response(const Request&)>;

  /// How many requests are handled at once, and how many connections are held, further ones being
  /// refused with 503.
  static constexpr unsigned kMaxWorkers = 8;
  static constexpr std::size_t kMaxConnections = 64;

  Listener() = default;
  ~Listener() { stop(); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  /// Listens at directory/PID.sock for processes of the calling thread's effective user and root.
  /// The directory is made if need be, and both again, within seconds, if they are removed; the log
  /// says so once. Its threads run with all signals blocked but those that a
  /// fault raises. Returns why it could not, or nothing. Not twice without stop().
  std::optional<std::string> start(const std::string& directory, Handler handler);

  /// Removes the socket, ends all threads and waits for requests that are being handled.
  /// Idempotent. Not from a handler.
  void stop() noexcept;

  /// Removes the socket and takes no more requests; waits for nothing. For process exit.
  void remove_socket() noexcept;

  /// In a forked child: closes what it inherited and forgets the rest; the parent's socket stays.
  /// Takes no lock.
  void forget_after_fork() noexcept;

  /// Where it listens; empty when it does not.
  std::string path() const;

 private:
  struct State;  // shared with the threads, which may outlive a Listener that is never destroyed
  std::shared_ptr<State> state_;
};

}  // namespace dormouse::control
