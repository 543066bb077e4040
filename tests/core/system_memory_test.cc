#include "core/backup/system_memory.h"

#include <gtest/gtest.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/control_groups.h"

namespace dormouse {
namespace {

// A made-up machine below a temporary folder.
class SystemMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/dormouse-system-memory-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    root_ = name;
    write("/proc/meminfo",
          "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:     800 kB\n");
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
};

TEST_F(SystemMemoryTest, WithoutGroupsItIsWhatTheMachineHas) {
  EXPECT_EQ(available_host_memory(root_), 800u * 1024);
}

TEST_F(SystemMemoryTest, NothingLeftIsNotNoLimit) {
  write("/proc/meminfo", "MemFree:  0 kB\nMemAvailable:         0 kB\n");
  EXPECT_EQ(available_host_memory(root_), 0u);
}

TEST_F(SystemMemoryTest, AGroupsLimitCountsAndItsFileCacheIsAvailable) {
  write("/proc/self/cgroup", "0::/a/b\n");
  write("/sys/fs/cgroup/a/b/memory.max", "400000\n");
  write("/sys/fs/cgroup/a/b/memory.current", "300000\n");
  write("/sys/fs/cgroup/a/b/memory.stat", "anon 1\ninactive_file 50000\nactive_file 9\n");
  EXPECT_EQ(available_host_memory(root_), 150000u);
}

// With memory.high reached the kernel slows the group down until a backup stands still.
TEST_F(SystemMemoryTest, TheMarkWhereAGroupIsSlowedDownCountsAsALimit) {
  write("/proc/self/cgroup", "0::/a\n");
  write("/sys/fs/cgroup/a/memory.max", "max\n");
  write("/sys/fs/cgroup/a/memory.high", "350000\n");
  write("/sys/fs/cgroup/a/memory.current", "300000\n");
  EXPECT_EQ(available_host_memory(root_), 50000u);
}

TEST_F(SystemMemoryTest, TheProcessorTimeThatTheGroupsGrantIsTheLeastOfAll) {
  EXPECT_EQ(processor_quota(root_), std::nullopt);
  write("/proc/self/cgroup", "0::/a/b\n");
  write("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  EXPECT_EQ(processor_quota(root_), std::nullopt);
  write("/sys/fs/cgroup/a/cpu.max", "150000 100000\n");
  EXPECT_EQ(processor_quota(root_), 2u);
  write("/sys/fs/cgroup/a/b/cpu.max", "20000 100000\n");
  EXPECT_EQ(processor_quota(root_), 1u);
}

TEST_F(SystemMemoryTest, TheOlderGroupsGrantProcessorTimeToo) {
  write("/proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/y\n");
  write("/sys/fs/cgroup/cpu/y/cpu.cfs_quota_us", "-1\n");
  write("/sys/fs/cgroup/cpu/y/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(processor_quota(root_), std::nullopt);
  write("/sys/fs/cgroup/cpu/y/cpu.cfs_quota_us", "300000\n");
  EXPECT_EQ(processor_quota(root_), 3u);
}

TEST_F(SystemMemoryTest, AParentsLimitCounts) {
  write("/proc/self/cgroup", "0::/a/b\n");
  write("/sys/fs/cgroup/a/b/memory.max", "max\n");
  write("/sys/fs/cgroup/a/b/memory.current", "300000\n");
  write("/sys/fs/cgroup/a/memory.max", "310000\n");
  write("/sys/fs/cgroup/a/memory.current", "300000\n");
  EXPECT_EQ(available_host_memory(root_), 10000u);
}

TEST_F(SystemMemoryTest, TheOldHierarchyCounts) {
  write("/proc/self/cgroup", "4:cpu:/x\n3:memory:/x\n");
  write("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "200000\n");
  write("/sys/fs/cgroup/memory/x/memory.usage_in_bytes", "250000\n");
  EXPECT_EQ(available_host_memory(root_), 0u) << "over its limit there is nothing left";
}

TEST_F(SystemMemoryTest, NothingReadableIsNoLimit) {
  std::filesystem::remove_all(root_ + "/proc");
  EXPECT_EQ(available_host_memory(root_), UINT64_MAX);
}

TEST(SystemMemory, ThisMachineHasSome) {
  EXPECT_GT(available_host_memory(), 1u << 20);
  EXPECT_LT(available_host_memory(), std::uint64_t{1} << 50);
}

TEST(SystemMemory, MemoryCanBePlacedOnANode) {
  constexpr std::size_t kBytes = 1 << 20;
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  if (!prefer_numa_node(memory, kBytes, 0)) {
    munmap(memory, kBytes);
    GTEST_SKIP() << "mbind: " << std::strerror(errno);
  }
  int mode = -1;
  unsigned long nodes[16] = {};
  ASSERT_EQ(syscall(SYS_get_mempolicy, &mode, nodes, 1025ul, memory, MPOL_F_ADDR), 0);
  EXPECT_EQ(mode, MPOL_PREFERRED);
  EXPECT_EQ(nodes[0], 1u);
  EXPECT_FALSE(prefer_numa_node(memory, kBytes, -1));
  EXPECT_FALSE(prefer_numa_node(memory, kBytes, 1 << 20));
  munmap(memory, kBytes);
}

}  // namespace
}  // namespace dormouse
