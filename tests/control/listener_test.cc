// The listener's threads under everything that clients, the program and the kernel do to them.
#include "core/control/listener.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <thread>

#include "core/control/client.h"
#include "core/log.h"
#include "tests/control/scratch.h"

namespace dormouse::control {
namespace {

using namespace std::chrono_literals;
using testing::HasSubstr;

constexpr auto kTime = 20s;  // for what is expected to work: generous on a busy machine

Response echo(const Request& request) {
  return {200, request.method + " " + request.target + " " + request.body, "text/plain", {}};
}

/// A latch that a handler waits at.
class Barrier {
 public:
  void wait() {
    arrived_.fetch_add(1);
    future_.wait();
  }
  void open() { promise_.set_value(); }
  int arrived() const { return arrived_.load(); }
  bool wait_for_arrivals(int count) const {
    const Deadline deadline = after(kTime);
    while (arrived() < count) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::sleep_for(1ms);
    }
    return true;
  }

 private:
  std::atomic<int> arrived_{0};
  std::promise<void> promise_;
  std::shared_future<void> future_ = promise_.get_future().share();
};

class ListenerTest : public testing::Test {
 protected:
  void start(Listener::Handler handler = echo) {
    ASSERT_EQ(listener_.start(directory_, std::move(handler)), std::nullopt);
  }

  Reply ask(const std::string& target, const std::string& body = "",
            std::chrono::milliseconds time = kTime) const {
    return client_.request(getpid(), {"GET", target, body}, time);
  }

  // While connections that have ended are still being closed, a new one may be refused.
  Reply ask_until_answered(const std::string& target) const {
    const Deadline deadline = after(kTime);
    Reply reply;
    do {
      reply = ask(target);
      if (!reply.is_ok()) std::this_thread::sleep_for(1ms);
    } while (!reply.is_ok() && std::chrono::steady_clock::now() < deadline);
    return reply;
  }

  UniqueFd connect() const {
    int error = 0;
    UniqueFd fd = connect_to(socket_path(directory_, getpid()), after(kTime), error);
    EXPECT_EQ(error, 0);
    return fd;
  }

  Scratch scratch_;
  const std::string directory_ = scratch_ / "run";
  const ControlClient client_{{directory_}, geteuid()};
  Listener listener_;
};

/// The descriptors of this process that are sockets.
std::vector<int> socket_descriptors() {
  std::vector<int> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code ignored;
    const auto target = std::filesystem::read_symlink(entry.path(), ignored);
    if (target.string().starts_with("socket:")) found.push_back(std::stoi(entry.path().filename()));
  }
  return found;
}

std::string content_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// How the child ended: its exit code, or 1000 + the signal.
int wait_for(pid_t child) {
  int status = 0;
  if (waitpid(child, &status, 0) != child) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

TEST_F(ListenerTest, AnswersWithWhatTheHandlerSays) {
  start();
  EXPECT_EQ(listener_.path(), directory_ + "/" + std::to_string(getpid()) + ".sock");
  const Reply reply = ask("/x?y=1", "body");
  ASSERT_TRUE(reply.is_ok()) << reply.message;
  EXPECT_EQ(reply.response.body, "GET /x?y=1 body");
}

TEST_F(ListenerTest, AnswersManyClientsAtOnce) {
  start();
  std::atomic<int> right{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 24; ++i) {
    clients.emplace_back([&, i] {
      for (int j = 0; j < 50; ++j) {
        const std::string target = "/" + std::to_string(i * 1000 + j);
        if (ask(target).response.body == "GET " + target + " ") right.fetch_add(1);
      }
    });
  }
  for (std::thread& thread : clients) thread.join();
  EXPECT_EQ(right.load(), 24 * 50);
}

TEST_F(ListenerTest, AnswersWhileOtherRequestsTakeLong) {
  Barrier barrier;
  start([&](const Request& request) {
    if (request.target == "/long") barrier.wait();
    return echo(request);
  });
  std::vector<std::future<Reply>> slow;
  for (unsigned i = 0; i + 1 < Listener::kMaxWorkers; ++i) {
    slow.push_back(std::async(std::launch::async, [&] { return ask("/long"); }));
  }
  ASSERT_TRUE(barrier.wait_for_arrivals(Listener::kMaxWorkers - 1));
  EXPECT_TRUE(ask("/quick").is_ok());
  barrier.open();
  for (auto& reply : slow) EXPECT_TRUE(reply.get().is_ok());
}

TEST_F(ListenerTest, HandlesNoMoreRequestsAtOnceThanItsWorkers) {
  Barrier barrier;
  std::atomic<int> inside{0}, most{0};
  start([&](const Request& request) {
    most = std::max(most.load(), inside.fetch_add(1) + 1);
    barrier.wait();
    inside.fetch_sub(1);
    return echo(request);
  });
  std::vector<std::future<Reply>> replies;
  for (unsigned i = 0; i < 3 * Listener::kMaxWorkers; ++i) {
    replies.push_back(std::async(std::launch::async, [&] { return ask("/"); }));
  }
  ASSERT_TRUE(barrier.wait_for_arrivals(Listener::kMaxWorkers));
  std::this_thread::sleep_for(50ms);
  EXPECT_EQ(barrier.arrived(), static_cast<int>(Listener::kMaxWorkers));
  barrier.open();
  for (auto& reply : replies) EXPECT_TRUE(reply.get().is_ok());
}

TEST_F(ListenerTest, RefusesConnectionsBeyondItsLimit) {
  start();
  std::vector<UniqueFd> silent;
  for (std::size_t i = 0; i < Listener::kMaxConnections; ++i) silent.push_back(connect());
  const Reply refused = ask("/");
  EXPECT_EQ(refused.response.status, 503u) << refused.message;
  silent.clear();
  EXPECT_TRUE(ask_until_answered("/").is_ok()) << "it goes on when clients leave";
}

TEST_F(ListenerTest, EndsASlowClientAndServesOthersMeanwhile) {
  start();
  const UniqueFd slow = connect();
  ASSERT_EQ(send_all(slow, "GET / HTTP/1.1\r\nX: ", after(kTime)), Io::kDone);
  EXPECT_TRUE(ask("/").is_ok());
  const auto result = read_response(slow, after(kTime));
  ASSERT_TRUE(std::holds_alternative<Response>(result)) << std::get<MessageError>(result).message;
  EXPECT_EQ(std::get<Response>(result).status, 408u);
}

TEST_F(ListenerTest, RefusesAnOversizeBody) {
  start();
  EXPECT_TRUE(ask("/", std::string(kMaxRequestBody, 'x')).is_ok());
  const Reply refused = ask("/", std::string(16 * kMaxRequestBody, 'x'));
  EXPECT_EQ(refused.kind, Reply::Kind::kAnswered) << refused.message;
  EXPECT_EQ(refused.response.status, 413u);
}

TEST_F(ListenerTest, SurvivesGarbageAndClientsThatLeave) {
  start();
  for (int i = 0; i < 100; ++i) {
    const UniqueFd client = connect();
    const std::string garbage(static_cast<std::size_t>(i * 37), static_cast<char>(i * 7));
    EXPECT_NE(send_all(client, garbage, after(kTime)), Io::kTimeout);
  }
  for (int i = 0; i < 100; ++i) {
    const UniqueFd client = connect();
    EXPECT_TRUE(write_request(client, {"GET", "/", ""}, after(kTime)));
  }
  EXPECT_TRUE(ask_until_answered("/").is_ok());
}

TEST_F(ListenerTest, AnswersAHandlersExceptionWithStatus500) {
  start([](const Request& request) -> Response {
    if (request.target == "/int") throw 1;
    throw std::runtime_error("broken inside");
  });
  const Reply reply = ask("/");
  EXPECT_EQ(reply.response.status, 500u);
  EXPECT_EQ(message_of(reply.response), "broken inside");
  EXPECT_EQ(ask("/int").response.status, 500u);
}

TEST_F(ListenerTest, StopRemovesTheSocketAndWaitsForTheHandler) {
  std::atomic<bool> inside{false}, done{false};
  start([&](const Request& request) {
    inside = true;
    std::this_thread::sleep_for(200ms);
    done = true;
    return echo(request);
  });
  auto reply = std::async(std::launch::async, [&] { return ask("/"); });
  while (!inside) std::this_thread::sleep_for(1ms);
  listener_.stop();
  EXPECT_TRUE(done.load());
  EXPECT_EQ(listener_.path(), "");
  EXPECT_NE(access(socket_path(directory_, getpid()).c_str(), F_OK), 0);
  EXPECT_EQ(ask("/").kind, Reply::Kind::kNoSuchProcess);
  listener_.stop();  // again
  reply.get();
}

TEST_F(ListenerTest, StopDoesNotWaitForSlowClients) {
  start();
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 20; ++i) silent.push_back(connect());
  const auto began = std::chrono::steady_clock::now();
  listener_.stop();
  EXPECT_LT(std::chrono::steady_clock::now() - began, 4s);
}

TEST_F(ListenerTest, RemoveSocketWaitsForNothing) {
  Barrier barrier;
  start([&](const Request& request) {
    barrier.wait();
    return echo(request);
  });
  auto reply = std::async(std::launch::async, [&] { return ask("/"); });
  ASSERT_TRUE(barrier.wait_for_arrivals(1));
  const std::string path = listener_.path();
  listener_.remove_socket();
  EXPECT_NE(access(path.c_str(), F_OK), 0);
  EXPECT_EQ(barrier.arrived(), 1) << "the request still runs";
  barrier.open();
  EXPECT_TRUE(reply.get().is_ok());
}

TEST_F(ListenerTest, StartsAgainAfterStop) {
  for (int i = 0; i < 20; ++i) {
    start();
    EXPECT_TRUE(ask("/").is_ok());
    listener_.stop();
  }
}

TEST_F(ListenerTest, SaysWhyItCannotStart) {
  ASSERT_EQ(mkdir(directory_.c_str(), 0777), 0);
  ASSERT_EQ(chmod(directory_.c_str(), 0777), 0);
  const auto problem = listener_.start(directory_, echo);
  ASSERT_TRUE(problem.has_value());
  EXPECT_THAT(*problem, HasSubstr("chmod 700"));
  EXPECT_EQ(listener_.path(), "");
  listener_.stop();
}

TEST_F(ListenerTest, RemovesLeftOverSocketsOfOthersOnStart) {
  ASSERT_EQ(mkdir(directory_.c_str(), 0700), 0);
  std::string error;
  ASSERT_TRUE(listen_at(directory_ + "/1.sock", error).is_open()) << error;
  ASSERT_TRUE(listen_at(socket_path(directory_, getpid()), error).is_open()) << error;
  start();
  EXPECT_NE(access((directory_ + "/1.sock").c_str(), F_OK), 0);
  EXPECT_TRUE(ask("/").is_ok());
}

TEST_F(ListenerTest, MakesItsSocketAgainWhenItWasRemoved) {
  const std::string log = scratch_ / "log";
  configure_log("warn", log);
  start();
  const std::string path = listener_.path();
  std::filesystem::remove_all(directory_);
  EXPECT_EQ(ask("/").kind, Reply::Kind::kNoSuchProcess);
  EXPECT_TRUE(ask_until_answered("/").is_ok());
  struct stat info;
  ASSERT_EQ(stat(directory_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  std::filesystem::remove(path);
  EXPECT_TRUE(ask_until_answered("/").is_ok()) << "again, and the socket alone";
  listener_.stop();
  EXPECT_NE(access(path.c_str(), F_OK), 0);
  const std::string said = content_of(log);
  EXPECT_THAT(said, HasSubstr(path + " was removed and has been created again"));
  EXPECT_EQ(said.find("made again"), said.rfind("made again")) << "said once";
  configure_log("warn", "");
}

TEST_F(ListenerTest, MakesItsSocketAgainOnlyInADirectoryThatNobodyElseCanEnter) {
  const std::string log = scratch_ / "log";
  configure_log("warn", log);
  start();
  std::filesystem::remove_all(directory_);
  ASSERT_EQ(mkdir(directory_.c_str(), 0700), 0);
  ASSERT_EQ(chmod(directory_.c_str(), 0755), 0);
  const Deadline deadline = after(kTime);
  while (content_of(log).empty() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_THAT(content_of(log), HasSubstr("run: chmod 700 " + directory_));
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
  ASSERT_EQ(chmod(directory_.c_str(), 0700), 0);
  EXPECT_TRUE(ask_until_answered("/").is_ok()) << "it is tried again";
  configure_log("warn", "");
}

constexpr int kNoOtherUser = 77;

/// A child that became another user was refused, or it could not become one.
void expect_refusal(int exit_code) {
  if (exit_code == kNoOtherUser) GTEST_SKIP() << "this user may not become another one";
  EXPECT_EQ(exit_code, 0);
}

TEST_F(ListenerTest, RefusesAnotherUser) {
  start();
  // Opened for everyone, as they are not, so that only the check of the peer stands in the way.
  ASSERT_EQ(chmod(scratch_.path().c_str(), 0755), 0);
  ASSERT_EQ(chmod(directory_.c_str(), 0755), 0);
  ASSERT_EQ(chmod(listener_.path().c_str(), 0666), 0);
  const std::string path = listener_.path();
  const pid_t child = fork();
  if (child == 0) {
    if (setgid(65534) != 0 || setuid(65534) != 0) _exit(kNoOtherUser);
    int error = 0;
    const UniqueFd fd = connect_to(path, after(kTime), error);
    if (!fd.is_open()) _exit(3);
    write_request(fd, {"GET", "/", ""}, after(kTime));
    const auto result = read_response(fd, after(kTime));
    const auto* response = std::get_if<Response>(&result);
    _exit(response == nullptr ? 4 : response->status == 403 ? 0 : 5);
  }
  expect_refusal(wait_for(child));
}

TEST_F(ListenerTest, KeepsAnotherUserOutOfItsDirectory) {
  start();
  ASSERT_EQ(chmod(scratch_.path().c_str(), 0755), 0);
  const pid_t child = fork();
  if (child == 0) {
    if (setgid(65534) != 0 || setuid(65534) != 0) _exit(kNoOtherUser);
    const ControlClient stranger({directory_}, 65534);
    std::vector<std::string> problems;
    if (!stranger.processes(&problems).empty() || problems.size() != 1) _exit(3);
    _exit(stranger.request(getppid(), {"GET", "/", ""}, kTime).kind == Reply::Kind::kNotAllowed
              ? 0
              : 4);
  }
  expect_refusal(wait_for(child));
}

TEST_F(ListenerTest, AForkedChildClosesWhatItInheritedAndTheParentGoesOn) {
  start();
  const UniqueFd held = connect();  // a connection that a worker serves
  ASSERT_EQ(send_all(held, "GET / HTTP/1.1\r\n", after(kTime)), Io::kDone);
  ASSERT_TRUE(ask("/").is_ok());
  const std::string path = listener_.path();
  const std::size_t sockets = socket_descriptors().size();
  const pid_t child = fork();
  if (child == 0) {
    listener_.forget_after_fork();
    if (!listener_.path().empty()) _exit(2);
    // All but this test's own end of the connection.
    if (socket_descriptors().size() != 1) _exit(3);
    if (access(path.c_str(), F_OK) != 0) _exit(4);
    if (listener_.start(directory_, echo)) _exit(5);  // a server of its own
    if (!client_.request(getpid(), {"GET", "/child", ""}, kTime).is_ok()) _exit(6);
    listener_.stop();
    _exit(access(path.c_str(), F_OK) == 0 ? 0 : 7);
  }
  EXPECT_EQ(wait_for(child), 0);
  EXPECT_GE(sockets, 3u);
  EXPECT_TRUE(ask("/").is_ok());
}

TEST_F(ListenerTest, SurvivesForksUnderLoad) {
  start();
  std::atomic<bool> done{false};
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i) {
    clients.emplace_back([&] {
      while (!done) EXPECT_TRUE(ask("/").is_ok());
    });
  }
  for (int i = 0; i < 50; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      listener_.forget_after_fork();
      _exit(0);
    }
    EXPECT_EQ(wait_for(child), 0);
  }
  done = true;
  for (std::thread& thread : clients) thread.join();
}

TEST_F(ListenerTest, NothingIsInheritedByAProgramThatIsExecuted) {
  start();
  const UniqueFd held = connect();
  ASSERT_TRUE(ask("/").is_ok());
  for (const int fd : socket_descriptors()) {
    EXPECT_NE(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0) << fd;
  }
}

TEST_F(ListenerTest, ItsThreadsTakeNoSignals) {
  start();
  ASSERT_TRUE(ask("/").is_ok());
  int threads = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::ifstream file(task.path() / "status");
    std::string line, name;
    while (std::getline(file, line)) {
      if (line.starts_with("Name:")) name = line.substr(6);
      if (name != "dormouse-ctl" || !line.starts_with("SigBlk:")) continue;
      ++threads;
      const auto blocked = std::stoull(line.substr(8), nullptr, 16);
      for (const int signal : {SIGTERM, SIGINT, SIGCHLD, SIGALRM, SIGUSR1, SIGPROF, SIGPIPE}) {
        EXPECT_NE(blocked & (1ull << (signal - 1)), 0u) << signal;
      }
      EXPECT_EQ(blocked & (1ull << (SIGSEGV - 1)), 0u) << "a fault must reach its handler";
    }
  }
  EXPECT_GE(threads, 2);
  sigset_t mine;
  pthread_sigmask(SIG_SETMASK, nullptr, &mine);
  EXPECT_FALSE(sigismember(&mine, SIGTERM)) << "the starting thread is as it was";
}

TEST_F(ListenerTest, LeavesAProgramsOwnSocketAloneThatTookItsDescriptor) {
  const auto before = socket_descriptors();
  start();
  ASSERT_TRUE(ask("/").is_ok());
  int listening = -1;
  for (const int fd : socket_descriptors()) {
    int accepts = 0;
    socklen_t size = sizeof(accepts);
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &accepts, &size) == 0 && accepts) listening = fd;
  }
  ASSERT_GE(listening, 0);
  // As a program does that closes all descriptors it does not know, and then listens itself.
  std::string error;
  UniqueFd own = listen_at(scratch_ / "own.sock", error);
  ASSERT_EQ(dup2(own.get(), listening), listening);
  own.reset();
  int connect_error = 0;
  const UniqueFd client = connect_to(scratch_ / "own.sock", after(kTime), connect_error);
  ASSERT_TRUE(client.is_open());
  std::this_thread::sleep_for(100ms);
  EXPECT_GE(accept4(listening, nullptr, nullptr, SOCK_NONBLOCK), 0) << "the program's connection";
  listener_.stop();
  EXPECT_NE(fcntl(listening, F_GETFD), -1) << "the program's descriptor";
  close(listening);
}

TEST_F(ListenerTest, LeavesAProgramsOwnFilesAloneThatTookAConnectionsDescriptor) {
  start();
  const UniqueFd client = connect();
  ASSERT_EQ(send_all(client, "GET / HTTP/1.1\r\n", after(kTime)), Io::kDone);
  int connection = -1;
  int unread = 1;
  const Deadline deadline = after(kTime);
  while ((connection < 0 || unread != 0) && std::chrono::steady_clock::now() < deadline) {
    for (const int fd : socket_descriptors()) {
      int accepts = 0;
      socklen_t size = sizeof(accepts);
      getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &accepts, &size);
      if (accepts == 0 && fd != client.get()) connection = fd;
    }
    ioctl(connection, FIONREAD, &unread);
  }
  ASSERT_EQ(unread, 0) << "a worker serves it";
  // As a program does that closes all descriptors it does not know, and then makes its own.
  int own[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, own), 0);
  ASSERT_EQ(dup2(own[0], connection), connection);
  const pid_t child = fork();
  if (child == 0) {
    listener_.forget_after_fork();
    _exit(fcntl(connection, F_GETFD) != -1 ? 0 : 1);
  }
  EXPECT_EQ(wait_for(child), 0) << "a forked child closed it";
  send_all(client, "\r\n", after(kTime));
  listener_.stop();
  char byte = 0;
  EXPECT_EQ(recv(own[1], &byte, 1, MSG_DONTWAIT), -1) << "an answer was written into it";
  EXPECT_EQ(errno, EAGAIN) << "it was shut down";
  EXPECT_NE(fcntl(connection, F_GETFD), -1) << "it was closed";
  for (const int fd : {own[0], own[1], connection}) close(fd);
}

TEST_F(ListenerTest, DropsTheRequestOfAClientThatHasGone) {
  Barrier barrier;
  std::atomic<bool> wanted{false};
  start([&](const Request& request) {
    if (request.target == "/gone") wanted = true;
    if (request.target == "/long") barrier.wait();
    return echo(request);
  });
  std::vector<std::future<Reply>> slow;
  for (unsigned i = 0; i < Listener::kMaxWorkers; ++i) {
    slow.push_back(std::async(std::launch::async, [&] { return ask("/long"); }));
  }
  ASSERT_TRUE(barrier.wait_for_arrivals(Listener::kMaxWorkers));
  ASSERT_TRUE(write_request(connect(), {"POST", "/gone", ""}, after(kTime)));  // and it is killed
  barrier.open();
  for (auto& reply : slow) EXPECT_TRUE(reply.get().is_ok());
  listener_.stop();
  EXPECT_FALSE(wanted);
}

TEST_F(ListenerTest, AClientGivesUpOnAStoppedProcess) {
  std::string error;
  ASSERT_EQ(mkdir(directory_.c_str(), 0700), 0);
  const UniqueFd deaf = listen_at(socket_path(directory_, 12345), error);
  const Reply reply = client_.request(12345, {"GET", "/status", ""}, 100ms);
  EXPECT_EQ(reply.kind, Reply::Kind::kTimedOut);
  EXPECT_THAT(reply.message, HasSubstr("12345 did not answer in time"));
}

TEST_F(ListenerTest, AClientTellsAProcessThatEndedMeanwhile) {
  ASSERT_EQ(mkdir(directory_.c_str(), 0700), 0);
  std::string error;
  UniqueFd brief = listen_at(socket_path(directory_, 12345), error);
  auto reply = std::async(std::launch::async, [&] {
    return client_.request(12345, {"GET", "/status", ""}, std::chrono::milliseconds(0));
  });
  std::this_thread::sleep_for(50ms);
  brief.reset();
  EXPECT_EQ(reply.get().kind, Reply::Kind::kNoSuchProcess);
}

TEST_F(ListenerTest, AClientListsProcessesOfAllDirectories) {
  start();
  Scratch second;
  std::string error;
  const UniqueFd other = listen_at(socket_path(second.path(), 1), error);
  const ControlClient both({directory_, scratch_ / "none", second.path()}, geteuid());
  std::vector<std::string> problems;
  const auto found = both.processes(&problems);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].pid, 1);
  EXPECT_EQ(found[1].pid, getpid());
  EXPECT_TRUE(problems.empty()) << "a missing directory is none";
}

}  // namespace
}  // namespace dormouse::control
