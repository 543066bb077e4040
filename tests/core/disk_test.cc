// Backups in files: what is kept, where, and what is left when calls fail or the process is killed.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "core/backup/disk_calls.h"
#include "core/process_identity.h"
#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

namespace fs = std::filesystem;

enum Call { kOpen, kClose, kUnlink, kStat, kSpace, kLock, kFlags, kAllocate, kSync, kRead, kWrite };
constexpr int kCallCount = kWrite + 1;
constexpr const char* kCallNames[kCallCount] = {"open",      "close", "unlink",    "fstat",
                                                "fstatfs",   "flock", "set_flags", "fallocate",
                                                "fdatasync", "pread", "pwrite"};
constexpr int kShort = -1;   // half of what was asked for
constexpr int kKill = -2;    // the process dies in the call
constexpr int kDamage = -3;  // a byte of what is written is another

// Changed while what was dropped may still be given back beside.
struct Fault {
  std::atomic<int> call{-1};
  std::atomic<int> nth{0};  // 0: every use
  std::atomic<int> error{0};

  void set(int of, int use, int with) {
    call = -1;
    nth = use;
    error = with;
    call = of;
  }
  void clear() { set(-1, 0, 0); }
};
Fault fault;
std::array<std::atomic<int>, kCallCount> uses;

// True if this use is to fail; errno is set then.
bool fails(Call call) {
  const int use = ++uses[call];
  if (fault.call != call || (fault.nth != 0 && fault.nth != use)) return false;
  if (fault.error == kKill) raise(SIGKILL);
  if (fault.error > 0) errno = fault.error;
  return true;
}

ssize_t faulty_write(int fd, const void* data, std::size_t bytes, off_t offset) {
  const bool fail = fails(kWrite);
  if (fail && fault.error > 0) return -1;
  const ssize_t result = system_disk_calls().pwrite(fd, data, bytes, offset);
  if (fail && fault.error == kDamage) {
    const int buffered = open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDWR);
    char byte = 0;
    EXPECT_EQ(pread(buffered, &byte, 1, offset + 77), 1);
    byte = static_cast<char>(byte ^ 1);
    EXPECT_EQ(pwrite(buffered, &byte, 1, offset + 77), 1);
    close(buffered);
  }
  return fail && fault.error == kShort ? result / 2 : result;
}

const DiskCalls& faulty_calls() {
  static const DiskCalls calls = [] {
    static const DiskCalls& real = system_disk_calls();
    DiskCalls made;
    made.open = [](const char* path, int flags, mode_t mode) {
      return fails(kOpen) ? -1 : real.open(path, flags, mode);
    };
    made.close = [](int fd) {  // as Linux: closed whatever the answer
      const int result = real.close(fd);
      return fails(kClose) ? -1 : result;
    };
    made.unlink = [](const char* path) { return fails(kUnlink) ? -1 : real.unlink(path); };
    made.fstat = [](int fd, struct stat* out) { return fails(kStat) ? -1 : real.fstat(fd, out); };
    made.fstatfs = [](int fd, struct statfs* out) {
      return fails(kSpace) ? -1 : real.fstatfs(fd, out);
    };
    made.flock = [](int fd, int what) { return fails(kLock) ? -1 : real.flock(fd, what); };
    made.set_flags = [](int fd, int flags) {
      return fails(kFlags) ? -1 : real.set_flags(fd, flags);
    };
    made.fallocate = [](int fd, int mode, off_t offset, off_t bytes) {
      return fails(kAllocate) ? -1 : real.fallocate(fd, mode, offset, bytes);
    };
    // What is read back comes from the same cache: waiting for the disk would only take time.
    made.fdatasync = [](int) { return fails(kSync) ? -1 : 0; };
    made.pread = [](int fd, void* data, std::size_t bytes, off_t offset) -> ssize_t {
      const bool fail = fails(kRead);
      if (fail && fault.error > 0) return -1;
      const ssize_t result = real.pread(fd, data, bytes, offset);
      return fail && fault.error == kShort ? result / 2 : result;
    };
    made.pwrite = &faulty_write;
    return made;
  }();
  return calls;
}

std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

class DiskTest : public SimulatedEngine {
 protected:
  void SetUp() override {
    SimulatedEngine::SetUp();
    fault.clear();
    make_directory(::testing::TempDir());
    archive = tags.intern("archive", Backup::kDisk);
    start(disk_options());
  }

  void TearDown() override {
    fault.clear();
    SimulatedEngine::TearDown();
    EXPECT_TRUE(files().empty());
    fs::remove_all(directory);
  }

  void make_directory(const std::string& parent) {
    std::string pattern = parent + "/diskXXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory = pattern;
  }

  EngineOptions disk_options() const {
    EngineOptions options = small_options();
    options.max_chunk_bytes = 4 * kMiB;
    options.disk_directory = directory;
    options.disk_directory_option = "THE_OPTION";
    return options;
  }

  void start(const EngineOptions& options) {
    engine.reset();
    engine = std::make_unique<Engine>(simulated_driver(), tags, options, faulty_calls());
  }

  std::vector<fs::path> files() const {
    if (engine != nullptr) engine->wait_for_dropped(std::chrono::seconds(10));
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(directory)) found.push_back(entry.path());
    return found;
  }

  // Blocks of odd sizes, so that what is kept does not begin and end at the disk's blocks.
  void make_blocks(TagId tag) {
    for (std::size_t i = 0; i < kBlocks; ++i) {
      blocks[i] = allocate(tag, kSizes[i]);
      fill(blocks[i], kSizes[i], i + 1);
    }
    ASSERT_EQ(engine->free(blocks[1]), CUDA_SUCCESS);  // a gap
  }

  void expect_intact(const std::string& where = "") const {
    for (std::size_t i = 0; i < kBlocks; ++i) {
      if (i == 1) continue;
      EXPECT_TRUE(holds(blocks[i], kSizes[i], i + 1)) << where;
    }
  }

  static constexpr std::size_t kBlocks = 5;
  static constexpr std::size_t kSizes[kBlocks] = {512, 1536, kMiB + 512, 2 * kMiB, 5 * kMiB};
  CUdeviceptr blocks[kBlocks] = {};
  std::string directory;
  TagId archive = kNoTag;
};

TEST_F(DiskTest, ContentComesBackFromTheDiskAndTheFileGoesWithTheEngine) {
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(simgpu_usage(0), 0u);
  ASSERT_EQ(files().size(), 1u);
  EXPECT_EQ(fs::status(files()[0]).permissions(), fs::perms(0600));
  EXPECT_GT(stats_of("archive").on_disk, 8 * kMiB);
  EXPECT_EQ(stats_of("archive").backed_up, 0u);
  EXPECT_EQ(engine->host_backup(blocks[0], 512), nullptr);
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
  EXPECT_EQ(pinned_for_backups(), 0u);
  engine.reset();
  EXPECT_TRUE(files().empty());
}

TEST_F(DiskTest, OnlyWhatChangedIsWrittenAgain) {
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 0u);
  ASSERT_TRUE(wake().is_ok());
  fill(blocks[4] + kMiB, 512, 77);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 256u << 10);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(blocks[4] + kMiB, 512, 77));
  EXPECT_TRUE(holds(blocks[4], kMiB, 5));
}

TEST_F(DiskTest, WhatIsAllZeroNeedsNoSpace) {
  const CUdeviceptr block = allocate(archive, 8 * kMiB);
  ASSERT_EQ(cuMemsetD8_v2(block, 0, 8 * kMiB), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(stats_of("archive").on_disk, 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(is_zero(block, 8 * kMiB));
}

TEST_F(DiskTest, ManyCyclesOfChangesFreesAndAllocationsLoseNothing) {
  EngineOptions options = disk_options();
  options.verify = true;
  start(options);
  std::mt19937 random(7);
  std::map<CUdeviceptr, std::pair<std::size_t, std::uint64_t>> live;
  for (int cycle = 0; cycle < 25; ++cycle) {
    for (int i = 0; i < 6; ++i) {
      const std::size_t bytes = 512 * (1 + random() % 5000);
      const CUdeviceptr block = allocate(archive, bytes);
      live[block] = {bytes, random()};
      fill(block, bytes, live[block].second);
    }
    for (int i = 0; i < 4; ++i) {
      auto at = std::next(live.begin(), random() % live.size());
      ASSERT_EQ(engine->free(at->first), CUDA_SUCCESS);
      live.erase(at);
    }
    ASSERT_TRUE(sleep().is_ok());
    if (random() % 2 == 0) {
      ASSERT_EQ(engine->free(live.begin()->first), CUDA_SUCCESS);
      live.erase(live.begin());
    }
    ASSERT_TRUE(wake().is_ok());
    EXPECT_EQ(report.differing_bytes, 0u);
    for (const auto& [block, content] : live)
      ASSERT_TRUE(holds(block, content.first, content.second)) << cycle;
  }
}

TEST_F(DiskTest, WithoutDirectIoTheSameHolds) {
  if (access("/dev/shm", W_OK) != 0) GTEST_SKIP() << "no memory file system here";
  fs::remove_all(directory);
  make_directory("/dev/shm");
  start(disk_options());
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
}

TEST_F(DiskTest, WhatExceedsTheHostLimitGoesToTheDisk) {
  EngineOptions options = disk_options();
  options.host_limit_bytes = 4 * kMiB;
  start(options);
  make_blocks(weights);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_GT(stats_of("weights").backed_up, 0u);
  EXPECT_LE(stats_of("weights").backed_up, 4 * kMiB);
  EXPECT_GT(stats_of("weights").on_disk, 0u);
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 0u);
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
}

TEST_F(DiskTest, AnImageThatOutgrowsTheHostLimitMovesToTheDisk) {
  EngineOptions options = disk_options();
  options.host_limit_bytes = 6 * kMiB;
  options.max_chunk_bytes = 16 * kMiB;
  start(options);
  const CUdeviceptr first = allocate(weights, 5 * kMiB);
  fill(first, 5 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(stats_of("weights").on_disk, 0u);
  ASSERT_TRUE(wake().is_ok());
  const CUdeviceptr second = allocate(weights, 5 * kMiB);  // in the same chunk
  fill(second, 5 * kMiB, 2);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_GE(stats_of("weights").on_disk, 10 * kMiB);
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(first, 5 * kMiB, 1));
  EXPECT_TRUE(holds(second, 5 * kMiB, 2));
}

TEST_F(DiskTest, BackupsThatAreNotKeptLeaveNoFile) {
  EngineOptions options = disk_options();
  options.keep_backups = false;
  start(options);
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(files().empty());
  expect_intact();
  ASSERT_TRUE(sleep().is_ok());
  for (std::size_t i = 0; i < kBlocks; ++i) {
    if (i == 1) continue;
    ASSERT_EQ(engine->free(blocks[i]), CUDA_SUCCESS);
  }
  EXPECT_TRUE(files().empty());
}

// A free is a call that programs expect to cost next to nothing.
TEST_F(DiskTest, AFreeOfWhatSleepsTouchesNoFile) {
  static std::atomic<int> calls_here;
  static thread_local bool counting = false;
  static const auto counted = [](auto result) {
    if (counting) ++calls_here;
    return result;
  };
  DiskCalls calls = system_disk_calls();
  calls.unlink = [](const char* path) { return counted(system_disk_calls().unlink(path)); };
  calls.close = [](int fd) { return counted(system_disk_calls().close(fd)); };
  calls.fstat = [](int fd, struct stat* out) {
    return counted(system_disk_calls().fstat(fd, out));
  };
  calls.fallocate = [](int fd, int mode, off_t offset, off_t bytes) {
    return counted(system_disk_calls().fallocate(fd, mode, offset, bytes));
  };
  calls.pwrite = [](int fd, const void* data, std::size_t bytes, off_t offset) {
    return counted(system_disk_calls().pwrite(fd, data, bytes, offset));
  };
  calls_here = 0;
  engine = std::make_unique<Engine>(simulated_driver(), tags, disk_options(), calls);
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_FALSE(files().empty());
  counting = true;
  for (std::size_t i = 0; i < kBlocks; ++i) {
    if (i == 1) continue;
    EXPECT_EQ(engine->free(blocks[i]), CUDA_SUCCESS);
  }
  counting = false;
  EXPECT_EQ(calls_here.load(), 0);
  EXPECT_TRUE(files().empty());
}

TEST_F(DiskTest, ADirectoryThatIsNotTheUsersAloneIsRefusedBeforeAnythingIsReleased) {
  const auto refused = [&](Code code, const std::string& says) {
    make_blocks(archive);
    const Status status = sleep();
    EXPECT_EQ(status.code(), code);
    EXPECT_NE(status.message().find(says), std::string::npos) << status.message();
    EXPECT_FALSE(engine->is_sleeping({}));
    expect_intact();
  };
  start(small_options());
  refused(Code::kUnsupported, "set the directory for backups");
  EngineOptions options = disk_options();
  options.disk_directory += "/missing";
  start(options);
  refused(Code::kIo, "create it");
  options.disk_directory = "/proc/self/exe";
  start(options);
  refused(Code::kIo, "Not a directory; name a directory of your own in THE_OPTION");
  DiskCalls calls = faulty_calls();
  calls.fstatfs = [](int fd, struct statfs* out) {
    const int result = system_disk_calls().fstatfs(fd, out);
    out->f_flags |= ST_RDONLY;
    return result;
  };
  engine.reset();
  engine = std::make_unique<Engine>(simulated_driver(), tags, disk_options(), calls);
  refused(Code::kIo, "mounted read-only: name another in THE_OPTION");
  ASSERT_EQ(chmod(directory.c_str(), 0777), 0);
  start(disk_options());
  refused(Code::kIo, "others may write");
  if (geteuid() == 0) {
    ASSERT_EQ(chmod(directory.c_str(), 0700), 0);
    ASSERT_EQ(chown(directory.c_str(), 12345, static_cast<gid_t>(-1)), 0);
    start(disk_options());
    refused(Code::kIo, "belongs to user 12345");
  }
  EXPECT_TRUE(files().empty());
}

TEST_F(DiskTest, TooLittleSpaceIsRefusedBeforeAnythingIsReleased) {
  DiskCalls calls = faulty_calls();
  calls.fstatfs = [](int fd, struct statfs* out) {
    const int result = system_disk_calls().fstatfs(fd, out);
    out->f_bavail = 1;
    return result;
  };
  engine = std::make_unique<Engine>(simulated_driver(), tags, disk_options(), calls);
  make_blocks(archive);
  const Status status = sleep();
  EXPECT_EQ(status.code(), Code::kIo);
  EXPECT_NE(status.message().find("has only"), std::string::npos) << status.message();
  EXPECT_FALSE(engine->is_sleeping({}));
  EXPECT_TRUE(files().empty());
  expect_intact();
  engine.reset();
}

TEST_F(DiskTest, DamageOnTheDiskIsFoundWhenTheMemoryWakes) {
  EngineOptions options = disk_options();
  options.verify = true;
  start(options);
  make_blocks(archive);
  fault.set(kWrite, 0, kDamage);
  ASSERT_TRUE(sleep().is_ok());
  fault.clear();
  ASSERT_TRUE(wake().is_ok());
  EXPECT_GT(report.differing_bytes, 0u);
}

TEST_F(DiskTest, BlocksThatSleepMayBeFreedWhileOthersFallAsleep) {
  EngineOptions options = disk_options();
  options.max_chunk_bytes = 2 * kMiB;
  options.verify = true;
  start(options);
  for (int round = 0; round < 20; ++round) {
    std::vector<CUdeviceptr> asleep;
    for (int i = 0; i < 16; ++i) {
      asleep.push_back(allocate(archive, 2 * kMiB));
      fill(asleep.back(), 4096, i + 1);
    }
    ASSERT_TRUE(sleep().is_ok());
    const CUdeviceptr block = allocate(archive, 2 * kMiB);
    fill(block, 2 * kMiB, round + 100);
    std::thread program([&] {
      for (const CUdeviceptr each : asleep) {
        EXPECT_EQ(engine->free(each), CUDA_SUCCESS);
        std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
    const Status status = sleep();
    program.join();
    ASSERT_TRUE(status.is_ok()) << status.message();
    ASSERT_TRUE(wake().is_ok());
    EXPECT_TRUE(holds(block, 2 * kMiB, round + 100));
    ASSERT_EQ(engine->free(block), CUDA_SUCCESS);
  }
}

// exec leaves the process its number and its start time, and none of its exit handlers run.
TEST_F(DiskTest, WhatTheSameProcessLeftBeforeExecIsRemovedAtTheNextStart) {
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(files().size(), 1u);
  const fs::path file = files().front();
  start(disk_options());
  const fs::path kept = fs::path(directory) / "kept";
  allocate(archive, 2 * kMiB);
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(files().size(), 1u);
  fs::copy_file(files().front(), kept);
  engine.reset();
  ASSERT_TRUE(fs::exists(kept));
  fs::rename(kept, file);
  start(disk_options());
  EXPECT_TRUE(files().empty());
}

TEST_F(DiskTest, AFileIsLeftOverOnlyIfItsProcessIsKnownToBeGone) {
  const ProcessIdentity self = own_identity();
  ProcessIdentity dead = self;
  dead.pid = 4194999;  // beyond the kernel's largest
  const auto left_by = [&](const ProcessIdentity& owner) {
    const fs::path path = fmt::format("{}/dormouse-{}-{}-{}-{}-0.backup", directory, owner.boot_id,
                                      owner.pid_namespace, owner.pid, owner.start_ticks);
    std::ofstream(path) << "content";
    return path;
  };
  ProcessIdentity elsewhere = dead;
  elsewhere.boot_id = std::string(32, 'a');
  const fs::path of_other_machine = left_by(elsewhere);
  elsewhere = dead;
  ++elsewhere.pid_namespace;
  const fs::path of_other_container = left_by(elsewhere);
  const fs::path gone = left_by(dead);
  fault.set(kLock, 0, ENOSYS);  // a file system without locks
  start(disk_options());
  EXPECT_TRUE(fs::exists(gone)) << "nobody can tell whether it is locked";
  fault.clear();
  start(disk_options());
  EXPECT_FALSE(fs::exists(gone));
  for (const fs::path& file : {of_other_machine, of_other_container}) {
    EXPECT_TRUE(fs::exists(file)) << file;
    fs::remove(file);
  }
}

TEST_F(DiskTest, ADescriptorThatTheProgramClosedAndReusedIsNeverTouched) {
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  const fs::path own = files().at(0);
  int stolen = -1;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    if (fs::read_symlink(entry, error) == own) stolen = std::stoi(entry.path().filename());
  }
  ASSERT_GE(stolen, 0);
  const std::string other = ::testing::TempDir() + "/other";
  const int fd = open(other.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
  ASSERT_EQ(dup2(fd, stolen), stolen);
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
  fill(blocks[4], kSizes[4], 5);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  engine.reset();
  EXPECT_EQ(fs::file_size(other), 0u);
  EXPECT_EQ(close(stolen), 0);
  EXPECT_EQ(close(fd), 0);
  fs::remove(other);
}

TEST_F(DiskTest, AtTheProcesssEndFilesGoAndWhatSleepsCanStillBeWoken) {
  make_blocks(archive);
  ASSERT_TRUE(sleep().is_ok());
  engine->remove_files();
  EXPECT_TRUE(files().empty());
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
}

// Every error that a call may give, at each of its uses in `operation`, from the state that
// `begin` makes.
class DiskFaultTest : public DiskTest {
 protected:
  static bool gives(Call call, int error) {
    const bool moves_data = call == kRead || call == kWrite;
    switch (error) {
      case ENOSPC:
        return call == kOpen || call == kAllocate || call == kWrite;
      case EINVAL:  // as file systems say that they know no direct I/O
        return call == kOpen || moves_data;
      case kShort:
        return moves_data;
      default:
        return true;
    }
  }

  template <typename Begin, typename Operation, typename After>
  void at_each_use(Begin&& begin, Operation&& operation, After&& after) {
    begin();
    for (auto& count : uses) count = 0;
    ASSERT_TRUE(operation().is_ok());
    std::array<int, kCallCount> used{};
    for (int call = 0; call < kCallCount; ++call) used[call] = uses[call];
    for (int call = 0; call < kCallCount; ++call) {
      for (int nth = 1; nth <= used[call]; ++nth) {
        for (const int error : {EIO, ENOSPC, EINTR, EINVAL, kShort}) {
          if (!gives(static_cast<Call>(call), error)) continue;
          const std::string where = std::string(kCallNames[call]) + " use " + std::to_string(nth) +
                                    " error " + std::to_string(error);
          begin();
          for (auto& count : uses) count = 0;
          fault.set(call, nth, error);
          const Status status = operation();
          fault.clear();
          EXPECT_TRUE(error != EINTR || status.is_ok()) << where << status.message();
          after(status, where);
          engine.reset();
          EXPECT_TRUE(files().empty()) << where;
          EXPECT_EQ(open_descriptors(), descriptors_) << where;
          simgpu_live_counts live{};
          simgpu_live(&live);
          EXPECT_EQ(live.handles + live.mappings + live.registrations + live.streams, 0u) << where;
          ASSERT_FALSE(HasFailure()) << where;
          ++tried_;
        }
      }
    }
  }

  void begin_awake() {
    EngineOptions options = disk_options();
    options.copy_threads = 1;
    options.verify = true;
    start(options);
    make_blocks(archive);
  }

  void after_sleep(const Status& status, const std::string& where) {
    if (!status.is_ok()) {
      EXPECT_FALSE(engine->is_sleeping({})) << where;
      expect_intact(where);
      ASSERT_TRUE(sleep().is_ok()) << where;
    }
    ASSERT_TRUE(wake().is_ok()) << where;
    EXPECT_EQ(report.differing_bytes, 0u) << where;
    expect_intact(where);
  }

  void SetUp() override {
    DiskTest::SetUp();
    engine.reset();
    descriptors_ = open_descriptors();
  }

  // This program again, which runs the disabled test below and dies at the given use of the call.
  pid_t start_child(int call, int nth, int to_child = -1, int to_parent = -1) const {
    const pid_t child = fork();
    if (child != 0) return child;
    setenv("DISK_TEST_DIRECTORY", directory.c_str(), 1);
    setenv("DISK_TEST_CALL", std::to_string(call).c_str(), 1);
    setenv("DISK_TEST_USE", std::to_string(nth).c_str(), 1);
    unsetenv("XML_OUTPUT_FILE");  // the report is the parent's
    if (to_child >= 0) setenv("DISK_TEST_TOLD", "1", 1);
    if (to_child >= 0) dup2(to_child, kToChild);
    if (to_parent >= 0) dup2(to_parent, kToParent);
    execl("/proc/self/exe", "disk_test", "--gtest_also_run_disabled_tests", "--gtest_brief=1",
          "--gtest_filter=DiskFaultTest.DISABLED_AsAnotherProcessItSleepsAndWakes", nullptr);
    _exit(127);
  }

  bool sleep_wake_change_and_sleep() {
    if (!sleep().is_ok() || !wake().is_ok()) return false;
    fill(blocks[4], kSizes[4], 99);
    return sleep().is_ok();
  }

  static constexpr int kToChild = 100;  // descriptors in the child
  static constexpr int kToParent = 101;
  std::size_t descriptors_ = 0;
  int tried_ = 0;
};

TEST_F(DiskFaultTest, EverySystemCallOfAFirstSleepMayFailAtEachOfItsUses) {
  at_each_use([&] { begin_awake(); }, [&] { return sleep(); },
              [&](const Status& status, const std::string& where) { after_sleep(status, where); });
  EXPECT_GT(tried_, 50);
}

TEST_F(DiskFaultTest, EverySystemCallOfALaterSleepMayFailAtEachOfItsUses) {
  at_each_use(
      [&] {
        begin_awake();
        fill(blocks[4], kSizes[4], 99);
        ASSERT_TRUE(sleep().is_ok());
        ASSERT_TRUE(wake().is_ok());
        fill(blocks[4], kSizes[4], 5);
      },
      [&] { return sleep(); },
      [&](const Status& status, const std::string& where) { after_sleep(status, where); });
  EXPECT_GT(tried_, 15);
}

TEST_F(DiskFaultTest, EverySystemCallOfAWakeMayFailAtEachOfItsUses) {
  at_each_use(
      [&] {
        begin_awake();
        ASSERT_TRUE(sleep().is_ok());
      },
      [&] { return wake(); },
      [&](const Status& status, const std::string& where) {
        if (!status.is_ok()) {
          EXPECT_TRUE(engine->is_sleeping({"archive"})) << where;
          ASSERT_TRUE(wake().is_ok()) << where << status.message();
        }
        expect_intact(where);
      });
  EXPECT_GT(tried_, 20);
}

TEST_F(DiskFaultTest, EveryDriverCallOfASleepAndOfAWakeMayFailAtEachOfItsUses) {
  begin_awake();
  simgpu_reset_counts();
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  std::map<std::string, unsigned long long> counts;
  simgpu_for_each_count(
      [](const char* name, unsigned long long count, void* user) {
        (*static_cast<std::map<std::string, unsigned long long>*>(user))[name] = count;
      },
      &counts);
  for (const auto& [name, count] : counts) {
    for (unsigned long long nth = 1; nth <= count; ++nth) {
      const std::string where = name + " use " + std::to_string(nth);
      begin_awake();
      ASSERT_EQ(simgpu_fail_at(name.c_str(), nth, CUDA_ERROR_UNKNOWN), 0);
      if (sleep().is_ok()) {
        (void)wake();
      } else {
        EXPECT_FALSE(engine->is_sleeping({})) << where;
      }
      simgpu_clear_failures();
      ASSERT_TRUE(wake().is_ok()) << where;
      expect_intact(where);
      engine.reset();
      EXPECT_TRUE(files().empty()) << where;
      ASSERT_FALSE(HasFailure()) << where;
      ++tried_;
    }
  }
  EXPECT_GT(tried_, 40);
}

// What another process does of which the two tests below start one: it sleeps, wakes, changes some
// of it, sleeps, says so if somebody listens, and wakes when it is told to; or it is killed in the
// middle.
TEST_F(DiskFaultTest, DISABLED_AsAnotherProcessItSleepsAndWakes) {
  const char* own = std::getenv("DISK_TEST_DIRECTORY");
  ASSERT_NE(own, nullptr);
  fs::remove_all(std::exchange(directory, own));
  begin_awake();
  for (auto& count : uses) count = 0;
  fault.set(std::atoi(std::getenv("DISK_TEST_CALL")), std::atoi(std::getenv("DISK_TEST_USE")),
            kKill);
  const bool slept = sleep_wake_change_and_sleep();
  char byte = 'x';
  if (std::getenv("DISK_TEST_TOLD") != nullptr &&
      (write(kToParent, &byte, 1) != 1 || read(kToChild, &byte, 1) != 1))
    _exit(2);
  const bool woken = slept && wake().is_ok() && holds(blocks[4], kSizes[4], 99);
  engine.reset();
  _exit(woken ? 0 : 1);
}

TEST_F(DiskFaultTest, WhatAProcessLeftThatWasKilledAtAnyCallIsRemovedAtTheNextStart) {
  begin_awake();
  for (auto& count : uses) count = 0;
  ASSERT_TRUE(sleep_wake_change_and_sleep());
  ASSERT_TRUE(wake().is_ok());
  std::array<int, kCallCount> used{};
  for (int call = 0; call < kCallCount; ++call) used[call] = uses[call];
  engine.reset();
  int left = 0;
  for (int call = 0; call < kCallCount; ++call) {
    for (int nth = 1; nth <= used[call]; ++nth) {
      const pid_t child = start_child(call, nth);
      int status = 0;
      ASSERT_EQ(waitpid(child, &status, 0), child);
      ASSERT_TRUE(WIFSIGNALED(status)) << kCallNames[call] << " use " << nth;
      left += files().empty() ? 0 : 1;
      start(disk_options());
      EXPECT_TRUE(files().empty()) << kCallNames[call] << " use " << nth;
      engine.reset();
    }
  }
  EXPECT_GT(left, 10);
}

TEST_F(DiskFaultTest, FilesOfALivingProcessAreLeftAlone) {
  int to_parent[2];
  int to_child[2];
  ASSERT_EQ(pipe2(to_parent, O_CLOEXEC), 0);
  ASSERT_EQ(pipe2(to_child, O_CLOEXEC), 0);
  const pid_t child = start_child(-1, 0, to_child[0], to_parent[1]);
  close(to_child[0]);
  close(to_parent[1]);
  char byte = 'x';
  ASSERT_EQ(read(to_parent[0], &byte, 1), 1);
  EXPECT_EQ(files().size(), 1u);
  start(disk_options());
  EXPECT_EQ(files().size(), 1u);
  ASSERT_EQ(write(to_child[1], &byte, 1), 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  close(to_child[1]);
  close(to_parent[0]);
}

TEST_F(DiskFaultTest, AForkedChildTakesNothingFromItsParent) {
  begin_awake();
  ASSERT_TRUE(sleep().is_ok());
  int status = 0;
  const pid_t child = fork();
  if (child == 0) {
    engine->remove_files();
    for (std::size_t i : {0, 2, 3}) (void)engine->free(blocks[i]);
    _exit(0);
  }
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(files().size(), 1u);
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
}

}  // namespace
}  // namespace dormouse
