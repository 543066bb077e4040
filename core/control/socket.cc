// See socket.h.
#include "core/control/socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <system_error>
#include <thread>

namespace dormouse::control {

namespace {

using namespace std::chrono_literals;

constexpr int kBacklog = 64;

bool fill_address(const std::string& path, sockaddr_un& address) noexcept {
  address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) return false;
  std::memcpy(address.sun_path, path.data(), path.size());
  return true;
}

int new_socket() noexcept {
  return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

/// Waits until the descriptor is ready for `events`.
Io wait_for(const UniqueFd& fd, short events, Deadline deadline) noexcept {
  for (;;) {
    int timeout = -1;
    if (deadline != kForever) {
      const auto left =
          std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
      if (left.count() <= 0) return Io::kTimeout;
      timeout = static_cast<int>(std::min<std::chrono::milliseconds::rep>(left.count(), INT_MAX));
    }
    pollfd entry{fd.get(), events, 0};
    if (entry.fd < 0) {
      errno = EBADF;
      return Io::kError;
    }
    const int ready = poll(&entry, 1, timeout);
    if (ready > 0) return Io::kDone;
    if (ready < 0 && errno != EINTR) return Io::kError;
  }
}

std::string failed(const std::string& what, const std::string& path, int error) {
  return what + " " + path + ": " + error_text(error);
}

}  // namespace

Deadline after(std::chrono::milliseconds time) {
  return std::chrono::steady_clock::now() + time;
}

std::string error_text(int error) {
  return std::generic_category().message(error);
}

Peer peer_of(int fd) noexcept {
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return {};
  return {credentials.pid, credentials.uid};
}

UniqueFd listen_at(const std::string& path, std::string& error) {
  // Made under another name and linked when it listens; link() also never replaces a name in use.
  const std::string unfinished = path + ".new";
  sockaddr_un address;
  if (!fill_address(unfinished, address)) {
    error = "the path " + path + " is too long for a socket (at most " +
            std::to_string(sizeof(address.sun_path) - 5) + " bytes); choose a shorter directory";
    return {};
  }
  UniqueFd fd(new_socket());
  unlink(unfinished.c_str());
  if (!fd.is_open() ||
      bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    error = failed("cannot make the socket", unfinished, errno);
    return {};
  }
  int problem = 0;
  if (chmod(unfinished.c_str(), 0600) != 0 || listen(fd.get(), kBacklog) != 0) {
    problem = errno;
  } else if (link(unfinished.c_str(), path.c_str()) != 0) {
    problem = errno;
    if (problem == EEXIST && presence_of(path) == Presence::kStale) {
      unlink(path.c_str());
      problem = link(unfinished.c_str(), path.c_str()) == 0 ? 0 : errno;
    }
  }
  unlink(unfinished.c_str());
  if (problem == 0) return fd;
  error = problem == EEXIST
              ? "another process already listens at " + path +
                    " (one with the same number in another container?); choose another directory"
              : failed("cannot listen at", path, problem);
  return {};
}

Presence presence_of(const std::string& path) noexcept {
  // A file that is not a socket refuses connections too, and must not be taken for a left-over one.
  struct stat info;
  if (lstat(path.c_str(), &info) != 0 || !S_ISSOCK(info.st_mode)) return Presence::kUnknown;
  sockaddr_un address;
  const UniqueFd fd(new_socket());
  if (!fd.is_open() || !fill_address(path, address)) return Presence::kUnknown;
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    return Presence::kListening;
  }
  // A non-blocking connect to a listener whose queue is full says EAGAIN.
  if (errno == EAGAIN) return Presence::kListening;
  return errno == ECONNREFUSED ? Presence::kStale : Presence::kUnknown;
}

UniqueFd connect_to(const std::string& path, Deadline deadline, int& error) noexcept {
  sockaddr_un address;
  if (!fill_address(path, address)) {
    error = ENAMETOOLONG;
    return {};
  }
  for (;;) {
    UniqueFd fd(new_socket());
    if (fd.is_open() &&
        connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
      error = 0;
      return fd;
    }
    error = errno;
    if (error != EAGAIN && error != EINTR) return {};
    if (std::chrono::steady_clock::now() >= deadline) {
      error = ETIMEDOUT;
      return {};
    }
    std::this_thread::sleep_for(10ms);  // poll() cannot wait for room in a listener's queue
  }
}

Io receive_some(const UniqueFd& fd, char* buffer, std::size_t size, Deadline deadline,
                std::size_t& received) noexcept {
  received = 0;
  for (;;) {
    const ssize_t count = recv(fd.get(), buffer, size, MSG_DONTWAIT);
    if (count > 0) {
      received = static_cast<std::size_t>(count);
      return Io::kDone;
    }
    if (count == 0) return Io::kClosed;
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return errno == ECONNRESET ? Io::kClosed : Io::kError;
    const Io waited = wait_for(fd, POLLIN, deadline);
    if (waited != Io::kDone) return waited;
  }
}

bool peer_is_gone(const UniqueFd& fd) noexcept {
  pollfd entry{fd.get(), 0, 0};  // POLLHUP is always told
  return entry.fd < 0 || (poll(&entry, 1, 0) > 0 && (entry.revents & (POLLHUP | POLLERR)) != 0);
}

Io send_all(const UniqueFd& fd, std::string_view data, Deadline deadline) noexcept {
  while (!data.empty()) {
    const ssize_t count = send(fd.get(), data.data(), data.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count >= 0) {
      data.remove_prefix(static_cast<std::size_t>(count));
      continue;
    }
    if (errno == EINTR) continue;
    if (errno == EPIPE || errno == ECONNRESET) return Io::kClosed;
    if (errno != EAGAIN) return Io::kError;
    const Io waited = wait_for(fd, POLLOUT, deadline);
    if (waited != Io::kDone) return waited;
  }
  return Io::kDone;
}

}  // namespace dormouse::control
