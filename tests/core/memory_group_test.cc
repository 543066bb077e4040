// Sleep under a memory limit of the kernel's own, as in a container: this process puts itself into
// a control group. Skipped where it may not make one. Only what the kernel counts decides here;
// host_memory_test has the made-up machines.
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

// What is kept for the machine and the program; see host_image.cc.
constexpr std::uint64_t kMargin = 256 * kMiB;

bool write_to(const std::filesystem::path& file, const std::string& text) {
  std::ofstream out(file);
  out << text;
  out.flush();
  return static_cast<bool>(out);
}

// A group with a limit, below the one that the process was in, which it goes back to at the end.
class MemoryGroup {
 public:
  // Null where the system does not let this process have one; `why_not` says why.
  static std::unique_ptr<MemoryGroup> make(std::string* why_not) {
    for (const auto& [parent, limit, usage] : hierarchies()) {
      auto group = std::unique_ptr<MemoryGroup>(
          new MemoryGroup(parent, parent / ("dormouse_test_" + std::to_string(getpid()))));
      if (mkdir(group->folder_.c_str(), 0755) != 0) {
        *why_not = group->folder_.string() + ": " + std::strerror(errno);
        continue;
      }
      group->made_ = true;
      group->limit_ = group->folder_ / limit;
      group->usage_ = group->folder_ / usage;
      if (!std::filesystem::exists(group->limit_)) {
        *why_not = group->limit_.string() + " is missing: groups here have no memory controller";
      } else if (!write_to(group->folder_ / "cgroup.procs", std::to_string(getpid()))) {
        *why_not = group->folder_.string() + " takes no process";
      } else {
        return group;
      }
    }
    return nullptr;
  }

  ~MemoryGroup() {
    if (!made_) return;
    write_to(parent_ / "cgroup.procs", std::to_string(getpid()));
    for (int i = 0; i < 100 && rmdir(folder_.c_str()) != 0 && errno == EBUSY; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
  MemoryGroup(const MemoryGroup&) = delete;
  MemoryGroup& operator=(const MemoryGroup&) = delete;

  std::uint64_t usage() const {
    std::uint64_t bytes = 0;
    std::ifstream(usage_) >> bytes;
    return bytes;
  }
  // So that `bytes` can be had beside what is used now.
  void leave(std::uint64_t bytes) {
    ASSERT_TRUE(write_to(limit_, std::to_string(usage() + bytes))) << limit_;
  }

 private:
  struct Hierarchy {
    std::filesystem::path parent;
    const char* limit;
    const char* usage;
  };

  MemoryGroup(std::filesystem::path parent, std::filesystem::path folder)
      : parent_(std::move(parent)), folder_(std::move(folder)) {}

  // This process's groups of memory; where a namespace hides the path, the root is it.
  static std::vector<Hierarchy> hierarchies() {
    std::vector<Hierarchy> found;
    const auto add = [&](const std::filesystem::path& root, const std::string& path,
                         const char* limit, const char* usage) {
      const std::filesystem::path folder = root.string() + path;
      found.push_back({std::filesystem::exists(folder) ? folder : root, limit, usage});
    };
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {
      const std::size_t first = line.find(':');
      const std::size_t second = line.find(':', first + 1);
      const std::string controllers = line.substr(first + 1, second - first - 1);
      const std::string path = line.substr(second + 1);
      if (controllers == "memory") {
        add("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes");
      } else if (controllers.empty()) {
        add("/sys/fs/cgroup", path, "memory.max", "memory.current");
      }
    }
    return found;
  }

  const std::filesystem::path parent_;
  const std::filesystem::path folder_;
  std::filesystem::path limit_;
  std::filesystem::path usage_;
  bool made_ = false;
};

// Another program in the same group, which takes memory bit by bit and keeps it until it is ended.
class Neighbour {
 public:
  Neighbour(std::size_t bytes, std::chrono::microseconds pause) {
    int ends[2];
    EXPECT_EQ(pipe(ends), 0);
    child_ = fork();
    if (child_ == 0) take(bytes, pause, ends[1]);
    close(ends[1]);
    done_ = ends[0];
  }
  ~Neighbour() { EXPECT_EQ(end(), 0) << "the kernel ended the other program"; }
  Neighbour(const Neighbour&) = delete;
  Neighbour& operator=(const Neighbour&) = delete;

  void wait_until_it_has_all() {
    char byte = 0;
    EXPECT_EQ(read(done_, &byte, 1), 1);
  }

 private:
  [[noreturn]] static void take(std::size_t bytes, std::chrono::microseconds pause, int done) {
    alarm(60);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) _exit(1);
    for (std::size_t at = 0; at < bytes; at += 2 * kMiB) {
      std::memset(static_cast<char*>(memory) + at, 1, 2 * kMiB);
      usleep(static_cast<useconds_t>(pause.count()));
    }
    if (write(done, "x", 1) != 1) _exit(1);
    while (true) pause_forever();
  }
  static void pause_forever() { ::pause(); }

  // 0 if it ran until it was told to end.
  int end() {
    kill(child_, SIGTERM);
    int status = 0;
    waitpid(child_, &status, 0);
    close(done_);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM ? 0 : status;
  }

  pid_t child_ = -1;
  int done_ = -1;
};

class MemoryGroupTest : public SimulatedEngine {
 protected:
  static constexpr std::size_t kBytes = 32 * kMiB;  // of a block

  void SetUp() override {
    std::string why_not = "this system has no control groups";
    group = MemoryGroup::make(&why_not);
    SimulatedEngine::SetUp();
    if (group == nullptr) GTEST_SKIP() << why_not;
    allocate_blocks(8);
    ASSERT_GE(group->usage(), all()) << "the kernel does not count this process's memory";
  }

  void TearDown() override {
    SimulatedEngine::TearDown();
    group.reset();
  }

  void allocate_blocks(std::size_t count) {
    blocks.clear();
    for (std::size_t i = 0; i < count; ++i) {
      blocks.push_back(allocate(weights, kBytes));
      fill(blocks[i], kBytes, i + 1);
    }
  }
  std::uint64_t all() const { return blocks.size() * kBytes; }

  void expect_all_there(const char* when) {
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      EXPECT_TRUE(holds(blocks[i], kBytes, i + 1)) << when;
    }
  }

  void expect_refused(const Status& status) {
    EXPECT_EQ(status.code(), Code::kOutOfHostMemory) << status.message();
    EXPECT_NE(status.message().find("control group"), std::string::npos) << status.message();
    EXPECT_EQ(stats_of("weights").asleep, 0u);
    expect_all_there("after a refusal");
  }

  std::unique_ptr<MemoryGroup> group;
  std::vector<CUdeviceptr> blocks;
};

TEST_F(MemoryGroupTest, WhatDoesNotFitIsRefusedAndWhatFitsSleeps) {
  group->leave(kMargin + all() / 2);
  expect_refused(sleep());
  group->leave(kMargin + all() + 64 * kMiB);
  const Status asleep = sleep();
  ASSERT_TRUE(asleep.is_ok()) << asleep.message();
  EXPECT_GE(stats_of("weights").asleep, all());
  const Status awake = wake();
  ASSERT_TRUE(awake.is_ok()) << awake.message();
  expect_all_there("after a wake");
}

TEST_F(MemoryGroupTest, WhatOtherProgramsOfTheGroupHaveCounts) {
  group->leave(kMargin + all() + 64 * kMiB);
  {
    Neighbour neighbour(128 * kMiB, std::chrono::microseconds(0));
    neighbour.wait_until_it_has_all();
    expect_refused(sleep());
  }
  const Status asleep = sleep();
  ASSERT_TRUE(asleep.is_ok()) << asleep.message();
  ASSERT_TRUE(wake().is_ok());
  expect_all_there("after a wake");
}

// Promised memory is taken while it is touched, more of it than is kept for others: the sleep gives
// up in time, and neither program is ended by the kernel.
TEST_F(MemoryGroupTest, AProgramThatTakesMemoryMeanwhileEndsNobody) {
  for (int round = 1; round <= 6; ++round) {
    restart(small_options());
    allocate_blocks(24);
    group->leave(kMargin + all() + 32 * kMiB);
    Neighbour neighbour(400 * kMiB, round * std::chrono::microseconds(300));
    const Status status = sleep();
    if (status.is_ok()) {
      ASSERT_TRUE(wake().is_ok());
      expect_all_there("after a wake");
    } else {
      expect_refused(status);
    }
  }
}

// A limit of the user's does not mean that the memory is there.
TEST_F(MemoryGroupTest, ALimitAboveTheGroupsEndsNobody) {
  EngineOptions options = small_options();
  options.host_limit_bytes = std::uint64_t{1} << 30;
  restart(options);
  allocate_blocks(8);
  group->leave(64 * kMiB);
  expect_refused(sleep());
}

// The buffers on the way to and from the disk are memory too.
TEST_F(MemoryGroupTest, LittleMemoryIsLeftBesideTheDisk) {
  std::string directory = "/var/tmp/dormouse-groupXXXXXX";
  ASSERT_NE(mkdtemp(directory.data()), nullptr);
  EngineOptions options = small_options();
  options.copy_threads = 8;
  options.disk_directory = directory;
  restart(options);
  allocate_blocks(2);
  group->leave(16 * kMiB);
  expect_refused(sleep());
  group->leave(kMargin / 2 + 24 * kMiB);  // for some of the buffers
  const Status asleep = sleep();
  ASSERT_TRUE(asleep.is_ok()) << asleep.message();
  EXPECT_GE(stats_of("weights").on_disk, all() / 2);
  group->leave(16 * kMiB);
  EXPECT_EQ(wake().code(), Code::kOutOfHostMemory);
  EXPECT_TRUE(engine->is_sleeping({}));
  // The simulated device's memory is the process's too.
  group->leave(all() + kMargin / 2);
  const Status awake = wake();
  ASSERT_TRUE(awake.is_ok()) << awake.message();
  expect_all_there("after a wake from the disk");
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace dormouse
