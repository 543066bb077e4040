// Unix sockets as the control protocol uses them: owned descriptors, a listener that appears under
// its name only when it accepts, connections with deadlines, and who is at the other end. For the
// other control_* files.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>

#include "core/descriptor.h"

namespace dormouse::control {

/// A moment that ends waiting; kForever never comes.
using Deadline = std::chrono::steady_clock::time_point;
inline constexpr Deadline kForever = Deadline::max();
Deadline after(std::chrono::milliseconds time);

/// "Permission denied" and the like for an errno value. Thread-safe.
std::string error_text(int error);

/// Which process is at the other end of a connection, as the kernel saw it when the connection (for
/// a client: the listener) was made. {-1, -1} if the kernel does not say.
struct Peer {
  pid_t pid = -1;
  uid_t uid = static_cast<uid_t>(-1);
};
Peer peer_of(int fd) noexcept;

/// Listens at `path` (at most 107 bytes), close-on-exec and non-blocking, mode 0600. The name
/// appears only when connections are accepted, so that whoever finds it refused may remove it; a
/// refused name in its place is replaced. Fails if a live listener has the name; `error` then says
/// what to do.
UniqueFd listen_at(const std::string& path, std::string& error);

enum class Presence {
  kListening,  // somebody accepts, or is too busy to at the moment
  kStale,      // the name is left over: nobody listens
  kUnknown,    // it cannot be told, for instance for lack of permission
};
Presence presence_of(const std::string& path) noexcept;

/// Connects to `path`, close-on-exec and non-blocking. On failure `error` is the errno value
/// (ETIMEDOUT: the listener's queue stayed full until the deadline).
UniqueFd connect_to(const std::string& path, Deadline deadline, int& error) noexcept;

/// What a transfer came to. On kError errno has the reason.
enum class Io { kDone, kClosed, kTimeout, kError };

/// Receives what there is, at least one byte; `received` is 0 unless the result is kDone.
Io receive_some(const UniqueFd& fd, char* buffer, std::size_t size, Deadline deadline,
                std::size_t& received) noexcept;

/// Whether the peer has closed its end: nobody waits for an answer.
bool peer_is_gone(const UniqueFd& fd) noexcept;

/// Sends all of it. Never raises SIGPIPE.
Io send_all(const UniqueFd& fd, std::string_view data, Deadline deadline) noexcept;

}  // namespace dormouse::control
