// See listener.h.
#include "core/control/listener.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/control/paths.h"
#include "core/log.h"

namespace dormouse::control {

namespace {

using namespace std::chrono_literals;

constexpr auto kReadTime = 5s;        // for a client to send its request
constexpr auto kWriteTime = 10s;      // for a client to take its answer
constexpr auto kRefusalTime = 100ms;  // for the same, when the acceptor itself answers
constexpr auto kCheckTime = 5s;       // between looks whether the socket is still there
constexpr auto kIdleTime = 10s;       // after which a worker without work ends

/// Blocks every signal of the calling thread, but those that a fault raises in it, while it lives:
/// threads made meanwhile inherit that, so that the program's handlers run on the program's threads
/// alone.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) {
      sigdelset(&blocked, fault);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  sigset_t before_;
};

template <typename Body>
bool start_thread(Body body) noexcept {
  const BlockedSignals blocked;
  try {
    std::thread(std::move(body)).detach();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

/// The identity of the file behind a descriptor: a program may close descriptors that it did not
/// open and get the same numbers for its own.
struct Identity {
  dev_t device = 0;
  ino_t inode = 0;
  bool operator==(const Identity&) const = default;
};

Identity identity_of(int fd) noexcept {
  struct stat info;
  return fstat(fd, &info) == 0 ? Identity{info.st_dev, info.st_ino} : Identity{};
}

/// The same of the file at a path, which is another than the socket's.
Identity identity_at(const std::string& path) noexcept {
  struct stat info;
  return lstat(path.c_str(), &info) == 0 ? Identity{info.st_dev, info.st_ino} : Identity{};
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

void answer(int fd, const Listener::Handler& handler) noexcept {
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
    const Response response = call(handler, std::get<Request>(received));
    write_response(fd, response, after(kWriteTime));
  } catch (...) {
    // No memory for an answer: the client sees the connection end.
  }
}

void refuse(int fd, unsigned status, const char* error, const char* message) noexcept {
  try {
    write_response(fd, error_response(status, error, message), after(kRefusalTime));
  } catch (...) {
    // As above.
  }
}

}  // namespace

struct Listener::State {
  State() {
    for (auto& slot : connections) slot.store(-1, std::memory_order_relaxed);
    waiting.reserve(kMaxConnections);  // the acceptor must not fail for lack of memory
  }

  std::string directory;
  std::string path;  // in the directory
  uid_t uid = 0;
  Handler handler;
  // The acceptor's, after the start.
  Identity file;                      // at the path
  bool told_gone = false;             // the log has said that it is gone, and
  bool told_restored = false;         // that it has been made again
  Identity identity;                  // of the listening socket; changed under the mutex
  std::atomic<int> listening{-1};     // its descriptor
  std::atomic<bool> stopping{false};  // no more requests
  // Descriptors of connections, -1 where none: without a lock, so that a forked child can close
  // them. Written under the mutex all the same.
  std::array<std::atomic<int>, kMaxConnections> connections;

  // Protects what follows, and that a descriptor above means what it did when it was looked up.
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::size_t> waiting;  // connections that no worker has taken, in their order
  unsigned workers = 0;
  unsigned idle = 0;
  bool accepting = false;  // the acceptor's thread runs

  static void accept_all(const std::shared_ptr<State>& state) noexcept;
  static void work(const std::shared_ptr<State>& state) noexcept;
  bool wait_for_connection() noexcept;
  void restore_socket() noexcept;
  std::size_t hold(int fd) noexcept;
  void close_connection(std::size_t slot) noexcept;
  void admit(const std::shared_ptr<State>& self, UniqueFd fd) noexcept;
  void close_listening() noexcept;
};

/// A slot for the descriptor, or kMaxConnections if all are taken.
std::size_t Listener::State::hold(int fd) noexcept {
  for (std::size_t i = 0; i < connections.size(); ++i) {
    int none = -1;
    if (connections[i].compare_exchange_strong(none, fd)) return i;
  }
  return kMaxConnections;
}

void Listener::State::close_connection(std::size_t slot) noexcept {
  // The slot first: a child forked in between must not close a number that the program has got
  // again.
  const int fd = connections[slot].exchange(-1);
  if (fd < 0) return;
  shutdown(fd, SHUT_RDWR);  // a forked child may hold a copy, and the client waits for the end
  close(fd);
}

void Listener::State::close_listening() noexcept {
  const int fd = listening.exchange(-1);
  if (fd >= 0 && identity_of(fd) == identity) close(fd);
}

/// Waits until a connection may be there to be accepted. False: no more. A poll goes on on a socket
/// whose descriptor was closed, so it must end now and then.
bool Listener::State::wait_for_connection() noexcept {
  const int fd = listening.load();
  pollfd entry{fd, POLLIN, 0};
  const int ready =
      poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(kCheckTime).count()));
  if (stopping.load()) return false;
  if (ready < 0) return errno == EINTR || errno == ENOMEM || errno == EAGAIN;
  if ((entry.revents & (POLLNVAL | POLLERR | POLLHUP)) != 0 || identity_of(fd) != identity) {
    return false;
  }
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
            "the control socket {} is gone, so the dormouse command cannot reach this process; it "
            "is tried again every few seconds: {}",
            path, error);
      }
      return;
    }
    const std::lock_guard lock(mutex);
    if (stopping.load()) {
      unlink(path.c_str());
      return;
    }
    close_listening();
    file = identity_at(path);
    identity = identity_of(made.get());
    listening = made.release();
    if (!std::exchange(told_restored, true)) {
      log().warn("the control socket {} was removed and has been made again", path);
    }
  } catch (...) {
    // No memory: it is tried again.
  }
}

void Listener::State::accept_all(const std::shared_ptr<State>& state) noexcept {
  pthread_setname_np(pthread_self(), "dormouse-ctl");
  while (state->wait_for_connection()) {
    UniqueFd fd(accept4(state->listening.load(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd.is_open()) {
      state->admit(state, std::move(fd));
    } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
      std::this_thread::sleep_for(
          100ms);  // no descriptors left, say: the program's next close() helps
    }
  }
  if (!state->stopping.load()) unlink(state->path.c_str());  // the program closed the socket
  const std::lock_guard lock(state->mutex);
  state->close_listening();
  state->accepting = false;
  state->changed.notify_all();
}

/// Hands a new connection to a worker, or refuses it.
void Listener::State::admit(const std::shared_ptr<State>& self, UniqueFd fd) noexcept {
  const Peer peer = peer_of(fd.get());
  if (peer.uid != uid && peer.uid != 0) {
    refuse(fd.get(), 403, "forbidden", "this process belongs to another user");
    return;
  }
  {
    const std::lock_guard lock(mutex);
    if (waiting.size() >= idle && workers < kMaxWorkers) {
      ++workers;
      if (!start_thread([self] { work(self); })) --workers;
    }
    const std::size_t slot = workers > 0 ? hold(fd.get()) : kMaxConnections;
    if (slot != kMaxConnections) {
      fd.release();
      waiting.push_back(slot);
      changed.notify_all();
      return;
    }
  }
  refuse(fd.get(), 503, "busy", "too many connections; try again");
}

void Listener::State::work(const std::shared_ptr<State>& state) noexcept {
  pthread_setname_np(pthread_self(), "dormouse-ctl");
  std::unique_lock lock(state->mutex);
  for (;;) {
    ++state->idle;
    state->changed.wait_for(lock, kIdleTime,
                            [&] { return !state->waiting.empty() || state->stopping.load(); });
    --state->idle;
    if (state->waiting.empty()) break;
    const std::size_t slot = state->waiting.front();
    state->waiting.erase(state->waiting.begin());
    lock.unlock();
    if (!state->stopping.load()) answer(state->connections[slot].load(), state->handler);
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
  UniqueFd listening = listen_at(state->path, error);
  if (!listening.is_open()) return error;
  state->file = identity_at(state->path);
  state->identity = identity_of(listening.get());
  state->listening = listening.get();
  state->accepting = true;
  if (!start_thread([state] { State::accept_all(state); })) {
    unlink(state->path.c_str());
    return "cannot start a thread for " + state->path;
  }
  listening.release();
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
  std::unique_lock lock(state_->mutex);
  const int fd = state_->listening.load();
  if (fd >= 0 && identity_of(fd) == state_->identity) {
    shutdown(fd, SHUT_RDWR);  // wakes the acceptor
  }
  for (auto& connection : state_->connections) {  // a slow client must not hold this up
    if (const int held = connection.load(); held >= 0) shutdown(held, SHUT_RD);
  }
  state_->changed.notify_all();
  state_->changed.wait(lock, [&] { return !state_->accepting && state_->workers == 0; });
  lock.unlock();
  state_.reset();
}

void Listener::forget_after_fork() noexcept {
  if (state_ == nullptr) return;
  for (auto& connection : state_->connections) {
    if (const int fd = connection.exchange(-1); fd >= 0) close(fd);
  }
  state_->close_listening();
  // The parent's threads do not exist here, but their references to the state do: a lock that one
  // of them held is never destroyed.
  state_.reset();
}

std::string Listener::path() const {
  return state_ != nullptr && !state_->stopping.load() ? state_->path : std::string();
}

}  // namespace dormouse::control
