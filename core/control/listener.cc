// See listener.h.
#include "core/control/listener.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "core/control/paths.h"
#include "core/log.h"
#include "core/thread_annotations.h"
#include "core/threads.h"

namespace dormouse::control {

namespace {

using namespace std::chrono_literals;

constexpr auto kReadTime = 5s;        // for a client to send its request
constexpr auto kWriteTime = 10s;      // for a client to take its answer
constexpr auto kRefusalTime = 100ms;  // for the same, when the acceptor itself answers
constexpr auto kCheckTime = 5s;       // between looks whether the socket is still there
constexpr auto kIdleTime = 10s;       // after which a worker without work ends

bool start_detached(std::function<void()> body) noexcept {
  try {
    start_thread("dormouse-ctl", std::move(body)).detach();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

/// Of the file at a path, which is another than the socket's.
FileIdentity identity_at(const std::string& path) noexcept {
  struct stat info;
  return lstat(path.c_str(), &info) == 0 ? FileIdentity{info.st_dev, info.st_ino} : FileIdentity{};
}

Response call(const Listener::Handler& handler, const Request& request) {
  try {
    return handler(request);
  } catch (const std::exception& error) {
    return error_response(500, "internal", error.what());
  } catch (...) {
    return error_response(500, "internal", "an unknown exception");
  }
}

void answer(const UniqueFd& fd, const Listener::Handler& handler) noexcept {
  try {
    auto received = read_request(fd, after(kReadTime));
    if (const auto* error = std::get_if<MessageError>(&received)) {
      if (error->status == 0) return;
      const char* name = error->status == 408   ? "timeout"
                         : error->status == 400 ? "invalid_argument"
                                                : "too_large";
      write_response(fd, error_response(error->status, name, error->message), after(kWriteTime));
      return;
    }
    const auto& request = std::get<Request>(received);
    // A client that was killed while this process was stopped, say, no longer wants it.
    if (request.is_abandoned()) return;
    const Response response = call(handler, request);
    write_response(fd, response, after(kWriteTime));
  } catch (...) {
    // No memory for an answer: the client sees the connection end.
  }
}

void refuse(const UniqueFd& fd, unsigned status, const char* error, const char* message) noexcept {
  try {
    write_response(fd, error_response(status, error, message), after(kRefusalTime));
  } catch (...) {
    // As above.
  }
}

}  // namespace

struct Listener::State {
  State() { waiting.reserve(kMaxConnections); }  // the acceptor must not fail for lack of memory

  std::string directory;
  std::string path;  // in the directory
  uid_t uid = 0;
  Handler handler;
  // The acceptor's, after the start.
  FileIdentity file;                  // at the path
  bool told_gone = false;             // the log has said that it is gone, and
  bool told_restored = false;         // that it has been made again
  std::atomic<bool> stopping{false};  // no more requests

  // Protects what follows. A forked child closes the descriptors without it.
  Mutex mutex;
  UniqueFd listening;                                 // changed by the acceptor alone
  std::array<UniqueFd, kMaxConnections> connections;  // a worker reads the one that it serves
  std::condition_variable changed;
  std::array<bool, kMaxConnections> taken GUARDED_BY(mutex){};  // slots, until they are closed
  std::vector<std::size_t> waiting
      GUARDED_BY(mutex);  // connections that no worker has taken, in their order
  unsigned workers GUARDED_BY(mutex) = 0;
  unsigned idle GUARDED_BY(mutex) = 0;
  bool accepting GUARDED_BY(mutex) = false;  // the acceptor's thread runs

  static void accept_all(const std::shared_ptr<State>& state) noexcept;
  static void work(const std::shared_ptr<State>& state) noexcept;
  bool wait_for_connection() noexcept;
  void restore_socket() noexcept;
  std::size_t hold(UniqueFd& fd) noexcept REQUIRES(mutex);
  void close_connection(std::size_t slot) noexcept REQUIRES(mutex);
  void admit(const std::shared_ptr<State>& self, UniqueFd fd) noexcept;
};

/// Puts the descriptor into a slot; kMaxConnections, and it stays, if all are taken.
std::size_t Listener::State::hold(UniqueFd& fd) noexcept {
  for (std::size_t i = 0; i < connections.size(); ++i) {
    if (std::exchange(taken[i], true)) continue;
    connections[i] = std::move(fd);
    return i;
  }
  return kMaxConnections;
}

void Listener::State::close_connection(std::size_t slot) noexcept {
  // A forked child may hold a copy, and the client waits for the end.
  shutdown(connections[slot].get(), SHUT_RDWR);
  connections[slot].reset();
  taken[slot] = false;
}

/// Waits until a connection may be there to be accepted. False: no more. A poll goes on on a socket
/// whose descriptor was closed, so it must end now and then.
bool Listener::State::wait_for_connection() noexcept {
  pollfd entry{listening.get(), POLLIN, 0};
  if (entry.fd < 0) return false;
  const int ready =
      poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(kCheckTime).count()));
  if (stopping.load()) return false;
  if (ready < 0) return errno == EINTR || errno == ENOMEM || errno == EAGAIN;
  if ((entry.revents & (POLLNVAL | POLLERR | POLLHUP)) != 0 || !listening.is_open()) return false;
  if (ready == 0) restore_socket();
  return true;
}

/// What cleans up temporary files may remove the socket or its directory, and nobody could reach
/// the process any more: both are made again, with the checks of the first time.
void Listener::State::restore_socket() noexcept {
  try {
    if (identity_at(path) == file) return;
    std::string error = make_directory(directory, uid).value_or("");
    UniqueFd made = error.empty() ? listen_at(path, error) : UniqueFd();
    if (!made.is_open()) {
      if (!std::exchange(told_gone, true)) {
        log().warn(
            "the control socket {} is gone, so the dormouse command cannot reach this process; "
            "retrying every few seconds: {}",
            path, error);
      }
      return;
    }
    const MutexLock lock(mutex);
    if (stopping.load()) {
      unlink(path.c_str());
      return;
    }
    file = identity_at(path);
    listening = std::move(made);
    if (!std::exchange(told_restored, true)) {
      log().warn("the control socket {} was removed and has been created again", path);
    }
  } catch (...) {
    // No memory: it is tried again.
  }
}

void Listener::State::accept_all(const std::shared_ptr<State>& state) noexcept {
  while (state->wait_for_connection()) {
    UniqueFd fd(accept4(state->listening.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd.is_open()) {
      state->admit(state, std::move(fd));
    } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
      std::this_thread::sleep_for(
          100ms);  // no descriptors left, say: the program's next close() helps
    }
  }
  if (!state->stopping.load()) unlink(state->path.c_str());  // the program closed the socket
  const MutexLock lock(state->mutex);
  state->listening.reset();
  state->accepting = false;
  state->changed.notify_all();
}

/// Hands a new connection to a worker, or refuses it.
void Listener::State::admit(const std::shared_ptr<State>& self, UniqueFd fd) noexcept {
  const Peer peer = peer_of(fd.get());
  if (peer.uid != uid && peer.uid != 0) {
    refuse(fd, 403, "forbidden", "this process belongs to another user");
    return;
  }
  {
    const MutexLock lock(mutex);
    if (waiting.size() >= idle && workers < kMaxWorkers) {
      ++workers;
      if (!start_detached([self] { work(self); })) --workers;
    }
    const std::size_t slot = workers > 0 ? hold(fd) : kMaxConnections;
    if (slot != kMaxConnections) {
      waiting.push_back(slot);
      changed.notify_all();
      return;
    }
  }
  refuse(fd, 503, "busy", "too many connections; try again");
}

void Listener::State::work(const std::shared_ptr<State>& state) noexcept {
  MutexLock lock(state->mutex);
  for (;;) {
    ++state->idle;
    state->changed.wait_for(lock.waiting(), kIdleTime, [&]() REQUIRES(state->mutex) {
      return !state->waiting.empty() || state->stopping.load();
    });
    --state->idle;
    if (state->waiting.empty()) break;
    const std::size_t slot = state->waiting.front();
    state->waiting.erase(state->waiting.begin());
    lock.unlock();
    if (!state->stopping.load()) answer(state->connections[slot], state->handler);
    lock.lock();
    state->close_connection(slot);
  }
  --state->workers;
  state->changed.notify_all();
}

std::optional<std::string> Listener::start(const std::string& directory, Handler handler) {
  auto state = std::make_shared<State>();
  state->uid = geteuid();
  state->directory = directory;
  state->path = socket_path(directory, getpid());
  state->handler = std::move(handler);
  if (auto problem = make_directory(directory, state->uid)) return problem;
  live_sockets(directory);  // removes what dead processes left
  std::string error;
  state->listening = listen_at(state->path, error);
  if (!state->listening.is_open()) return error;
  state->file = identity_at(state->path);
  {
    const MutexLock lock(state->mutex);
    state->accepting = true;
  }
  if (!start_detached([state] { State::accept_all(state); })) {
    unlink(state->path.c_str());
    return "cannot start a thread for " + state->path;
  }
  state_ = std::move(state);
  return std::nullopt;
}

void Listener::remove_socket() noexcept {
  if (state_ == nullptr || state_->stopping.exchange(true)) return;
  unlink(state_->path.c_str());
}

void Listener::stop() noexcept {
  if (state_ == nullptr) return;
  remove_socket();
  MutexLock lock(state_->mutex);
  shutdown(state_->listening.get(), SHUT_RDWR);       // wakes the acceptor
  for (const UniqueFd& held : state_->connections) {  // a slow client must not hold this up
    shutdown(held.get(), SHUT_RD);
  }
  state_->changed.notify_all();
  state_->changed.wait(lock.waiting(), [&]() REQUIRES(state_->mutex) {
    return !state_->accepting && state_->workers == 0;
  });
  lock.unlock();
  state_.reset();
}

void Listener::forget_after_fork() noexcept {
  if (state_ == nullptr) return;
  for (UniqueFd& held : state_->connections) held.reset();
  state_->listening.reset();
  // The parent's threads do not exist here, but their references to the state do: a lock that one
  // of them held is never destroyed.
  state_.reset();
}

std::string Listener::path() const {
  return state_ != nullptr && !state_->stopping.load() ? state_->path : std::string();
}

}  // namespace dormouse::control
