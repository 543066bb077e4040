// Where sockets live: the choice of the directory, what is refused, and left-over sockets.
#include "core/control/paths.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "core/control/socket.h"
#include "tests/control/scratch.h"

namespace dormouse::control {
namespace {

using testing::HasSubstr;

mode_t mode_of(const std::string& path) {
  struct stat info {};
  EXPECT_EQ(lstat(path.c_str(), &info), 0) << path;
  return info.st_mode & 07777;
}

TEST(SocketDirectory, PrefersWhatIsGiven) {
  EXPECT_EQ(socket_directory("/given", "/tmp", 7), "/given");
}

TEST(SocketDirectory, UsesTheRuntimeDirectoryOfTheSameUser) {
  const Scratch scratch;
  EXPECT_EQ(socket_directory("", scratch.path(), geteuid()), scratch / "dormouse");
  EXPECT_EQ(socket_directory("", scratch.path(), geteuid() + 1),
            "/tmp/dormouse-" + std::to_string(geteuid() + 1));
}

TEST(SocketDirectory, FallsBackToTmp) {
  EXPECT_EQ(socket_directory("", "", 7), "/tmp/dormouse-7");
  EXPECT_EQ(socket_directory("", "/does/not/exist", 7), "/tmp/dormouse-7");
  EXPECT_EQ(socket_directory("", "relative", 7), "/tmp/dormouse-7");
}

TEST(SearchDirectories, HoldsEveryChoiceOfAServer) {
  const Scratch scratch;
  const std::string uid = std::to_string(geteuid());
  EXPECT_THAT(search_directories("", scratch.path(), geteuid()),
              testing::ElementsAre(scratch / "dormouse", "/run/user/" + uid + "/dormouse",
                                   "/tmp/dormouse-" + uid));
  EXPECT_THAT(search_directories("/given", scratch.path(), geteuid()),
              testing::ElementsAre("/given"));
}

TEST(MakeDirectory, MakesItForTheOwnerAloneWhateverTheUmask) {
  const Scratch scratch;
  for (const mode_t mask : {0, 022, 0777}) {
    const std::string path = scratch / ("mask" + std::to_string(mask));
    const mode_t before = umask(mask);
    const auto problem = make_directory(path, geteuid());
    umask(before);
    EXPECT_EQ(problem, std::nullopt);
    EXPECT_EQ(mode_of(path), 0700u);
    EXPECT_EQ(make_directory(path, geteuid()), std::nullopt) << "again";
  }
}

TEST(MakeDirectory, RefusesWiderPermissions) {
  const Scratch scratch;
  for (const mode_t mode : {0710, 0701, 0755, 0777}) {
    const std::string path = scratch / std::to_string(mode);
    ASSERT_EQ(mkdir(path.c_str(), 0700), 0);
    ASSERT_EQ(chmod(path.c_str(), mode), 0);
    const auto problem = make_directory(path, geteuid());
    ASSERT_TRUE(problem.has_value());
    EXPECT_THAT(*problem, HasSubstr("chmod 700"));
    EXPECT_EQ(mode_of(path), mode) << "left as it was";
    EXPECT_TRUE(directory_problem(path, geteuid()).has_value());
  }
}

TEST(MakeDirectory, RefusesASymbolicLink) {
  const Scratch scratch;
  ASSERT_EQ(mkdir((scratch / "real").c_str(), 0700), 0);
  ASSERT_EQ(symlink("real", (scratch / "link").c_str()), 0);
  const auto problem = make_directory(scratch / "link", geteuid());
  ASSERT_TRUE(problem.has_value());
  EXPECT_THAT(*problem, HasSubstr("symbolic link"));
  EXPECT_TRUE(directory_problem(scratch / "link", geteuid()).has_value());
}

TEST(MakeDirectory, RefusesAnotherOwner) {
  const Scratch scratch;
  ASSERT_EQ(mkdir((scratch / "mine").c_str(), 0700), 0);
  const auto problem = make_directory(scratch / "mine", geteuid() + 1);
  ASSERT_TRUE(problem.has_value());
  EXPECT_THAT(*problem, HasSubstr("belongs to user " + std::to_string(geteuid())));
}

TEST(MakeDirectory, RefusesAFileAndAMissingParent) {
  const Scratch scratch;
  std::ofstream(scratch / "file") << "x";
  EXPECT_THAT(make_directory(scratch / "file", geteuid()).value(), HasSubstr("not a directory"));
  EXPECT_THAT(make_directory(scratch / "no/where", geteuid()).value(),
              HasSubstr("No such file or directory; create its parent, or choose a directory"));
}

TEST(DirectoryProblem, TellsAMissingDirectory) {
  const Scratch scratch;
  bool missing = false;
  EXPECT_TRUE(directory_problem(scratch / "none", geteuid(), &missing).has_value());
  EXPECT_TRUE(missing);
  EXPECT_EQ(directory_problem(scratch.path(), geteuid(), &missing), std::nullopt);
  EXPECT_FALSE(missing);
}

TEST(LiveSockets, FindsListenersAndRemovesWhatDeadOnesLeft) {
  const Scratch scratch;
  std::string error;
  const UniqueFd live = listen_at(socket_path(scratch.path(), 20), error);
  const UniqueFd other = listen_at(socket_path(scratch.path(), 3), error);
  ASSERT_TRUE(live.is_open() && other.is_open()) << error;
  ASSERT_TRUE(listen_at(socket_path(scratch.path(), 10), error).is_open());  // closed at once
  std::ofstream(scratch / "notes.sock") << "not a socket's name";
  std::ofstream(scratch / "-1.sock") << "neither";

  const auto found = live_sockets(scratch.path());
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].pid, 3);
  EXPECT_EQ(found[1].pid, 20);
  EXPECT_EQ(found[1].path, scratch / "20.sock");
  EXPECT_NE(access((scratch / "10.sock").c_str(), F_OK), 0);
  EXPECT_EQ(access((scratch / "notes.sock").c_str(), F_OK), 0);
}

TEST(LiveSockets, IsEmptyForAMissingDirectory) {
  EXPECT_TRUE(live_sockets("/does/not/exist").empty());
}

TEST(ListenAt, ReplacesAStaleSocketButNeverALiveOne) {
  const Scratch scratch;
  const std::string path = scratch / "1.sock";
  std::string error;
  ASSERT_TRUE(listen_at(path, error).is_open()) << error;  // closed at once: stale
  EXPECT_EQ(presence_of(path), Presence::kStale);
  const UniqueFd first = listen_at(path, error);
  ASSERT_TRUE(first.is_open()) << error;
  EXPECT_EQ(mode_of(path), 0600u);
  EXPECT_EQ(presence_of(path), Presence::kListening);
  EXPECT_FALSE(listen_at(path, error).is_open());
  EXPECT_THAT(error, HasSubstr("already listens"));
  int connect_error = 0;
  EXPECT_TRUE(connect_to(path, after(std::chrono::seconds(1)), connect_error).is_open());
  EXPECT_NE(access((path + ".new").c_str(), F_OK), 0);
}

TEST(ListenAt, KeepsAFileThatIsNoSocket) {
  const Scratch scratch;
  std::ofstream(scratch / "1.sock") << "precious";
  std::string error;
  EXPECT_FALSE(listen_at(scratch / "1.sock", error).is_open());
  std::string content;
  std::ifstream(scratch / "1.sock") >> content;
  EXPECT_EQ(content, "precious");
}

TEST(ListenAt, RefusesAPathTooLongForASocket) {
  std::string error;
  EXPECT_FALSE(listen_at("/tmp/" + std::string(120, 'x'), error).is_open());
  EXPECT_THAT(error, HasSubstr("too long"));
}

TEST(PresenceOf, TakesAFullQueueForALiveListener) {
  const Scratch scratch;
  std::string error;
  const UniqueFd listener = listen_at(scratch / "1.sock", error);
  std::vector<UniqueFd> clients;
  int connect_error = 0;
  while (connect_error == 0) {
    clients.push_back(
        connect_to(scratch / "1.sock", after(std::chrono::milliseconds(0)), connect_error));
    ASSERT_LT(clients.size(), 1000u);
  }
  EXPECT_EQ(connect_error, ETIMEDOUT);
  EXPECT_EQ(presence_of(scratch / "1.sock"), Presence::kListening);
}

TEST(PeerOf, IsTheProcessAtTheOtherEnd) {
  const Scratch scratch;
  std::string error;
  const UniqueFd listener = listen_at(scratch / "1.sock", error);
  int connect_error = 0;
  const UniqueFd client =
      connect_to(scratch / "1.sock", after(std::chrono::seconds(1)), connect_error);
  EXPECT_EQ(peer_of(client.get()).pid, getpid());
  EXPECT_EQ(peer_of(client.get()).uid, geteuid());
  EXPECT_EQ(peer_of(-1).pid, -1);
}

}  // namespace
}  // namespace dormouse::control
