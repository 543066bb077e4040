// Host memory for backups: what is promised is there when it is touched, whatever other threads and
// programs take, and the system's calls may fail. The linker puts the calls of this file in place
// of the system's (see BUILD.bazel).
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <thread>
#include <vector>

#include "core/backup/host_image.h"
#include "core/memory/pool.h"
#include "core/sleep/gate.h"
#include "tests/core/simulated_engine.h"

namespace {

// A made-up machine: what /proc/meminfo says is available, if set; there are no control groups.
std::function<std::uint64_t()> available;
std::atomic<int> questions{0};  // how often it was read

int open_made_up(const char* path) {
  if (std::strcmp(path, "/proc/meminfo") != 0) {
    errno = ENOENT;
    return -1;
  }
  ++questions;
  const int fd = memfd_create("meminfo", MFD_CLOEXEC);
  EXPECT_GE(dprintf(fd, "MemTotal:  99999999 kB\nMemAvailable:  %llu kB\n",
                    static_cast<unsigned long long>(available() / 1024)),
            0);
  lseek(fd, 0, SEEK_SET);
  return fd;
}

enum Call { kMap, kUnmap, kDoNotFork, kHugePages, kDoNotNeed, kPlace, kCalls };
constexpr const char* kCallNames[kCalls] = {"mmap",     "munmap",        "DONTFORK",
                                            "HUGEPAGE", "MADV_DONTNEED", "mbind"};
std::atomic<bool> armed{false};
// The reaper's calls count too.
std::atomic<int> failing_call{0};
std::atomic<int> failing_use{0};
std::atomic<int> uses[kCalls];

// Not of what the simulated driver does.
bool fails(Call call) {
  if (!armed.load() || dormouse::in_driver()) return false;
  if (++uses[call] != failing_use || call != failing_call) return false;
  errno = ENOMEM;
  return true;
}

}  // namespace

extern "C" {
int __real_open(const char* path, int flags, ...);
void* __real_mmap(void* at, std::size_t bytes, int access, int flags, int fd, off_t offset);
int __real_munmap(void* at, std::size_t bytes);
int __real_madvise(void* at, std::size_t bytes, int advice);

int __wrap_open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(list, mode_t) : 0;
  va_end(list);
  const bool asked = std::strcmp(path, "/proc/meminfo") == 0 ||
                     std::strcmp(path, "/proc/self/cgroup") == 0 ||
                     std::strncmp(path, "/sys/fs/cgroup", 14) == 0;
  return asked && available ? open_made_up(path) : __real_open(path, flags, mode);
}

void* __wrap_mmap(void* at, std::size_t bytes, int access, int flags, int fd, off_t offset) {
  return fails(kMap) ? MAP_FAILED : __real_mmap(at, bytes, access, flags, fd, offset);
}

int __wrap_munmap(void* at, std::size_t bytes) {
  return fails(kUnmap) ? -1 : __real_munmap(at, bytes);
}

int __wrap_madvise(void* at, std::size_t bytes, int advice) {
  const Call call = advice == MADV_DONTFORK   ? kDoNotFork
                    : advice == MADV_HUGEPAGE ? kHugePages
                                              : kDoNotNeed;
  return fails(call) ? -1 : __real_madvise(at, bytes, advice);
}

bool __real__ZN8dormouse16prefer_numa_nodeEPvmi(void* begin, std::size_t bytes, int node) noexcept;
bool __wrap__ZN8dormouse16prefer_numa_nodeEPvmi(void* begin, std::size_t bytes, int node) noexcept {
  return !fails(kPlace) && __real__ZN8dormouse16prefer_numa_nodeEPvmi(begin, bytes, node);
}
}

namespace dormouse {
namespace {

constexpr std::uint64_t kMargin = 256 * kMiB;

std::size_t resident_pages(const HostImage& image, std::size_t bytes) {
  std::vector<unsigned char> resident(bytes / 4096);
  EXPECT_EQ(mincore(image.data(), bytes, resident.data()), 0);
  return static_cast<std::size_t>(
      std::count_if(resident.begin(), resident.end(), [](unsigned char in) { return in & 1; }));
}

class HostMemoryTest : public SimulatedEngine {
 protected:
  void TearDown() override {
    armed = false;
    SimulatedEngine::TearDown();
    available = nullptr;
  }
};

TEST_F(HostMemoryTest, WhatWasPromisedIsNotPromisedAgainBeforeItIsTouched) {
  available = [] { return kMargin + 100 * kMiB; };
  HostMemory memory(0, true, 64 * kMiB);
  ASSERT_TRUE(memory.admit(60 * kMiB).is_ok());
  EXPECT_FALSE(memory.fits(41 * kMiB));
  EXPECT_TRUE(memory.fits(40 * kMiB));
  EXPECT_EQ(memory.admit(60 * kMiB).code(), Code::kOutOfHostMemory);
  EXPECT_EQ(memory.held_bytes(), 60 * kMiB);
  memory.give_back(60 * kMiB, 60 * kMiB);
  EXPECT_TRUE(memory.admit(100 * kMiB).is_ok());
}

TEST_F(HostMemoryTest, WhatIsTouchedCountsOnce) {
  std::uint64_t used = 0;
  available = [&] { return kMargin + 100 * kMiB - used; };
  HostMemory memory(0, true, 64 * kMiB);
  ASSERT_TRUE(memory.admit(60 * kMiB).is_ok());
  for (; used < 60 * kMiB; used += 2 * kMiB) {
    ASSERT_TRUE(memory.begin_touch(2 * kMiB));
    memory.end_touch(2 * kMiB);
  }
  EXPECT_FALSE(memory.fits(42 * kMiB));
  EXPECT_TRUE(memory.fits(40 * kMiB));
  memory.give_back(60 * kMiB, 0);
  used = 0;
  EXPECT_TRUE(memory.fits(100 * kMiB));
}

TEST_F(HostMemoryTest, WithALimitTheMachineIsAskedOnlyBeforeTouching) {
  available = [] { return std::uint64_t{0}; };
  questions = 0;
  HostMemory memory(8 * kMiB, true, 64 * kMiB);
  EXPECT_TRUE(memory.admit(6 * kMiB).is_ok());
  EXPECT_FALSE(memory.admit(4 * kMiB).is_ok());
  EXPECT_TRUE(memory.fits(2 * kMiB));
  EXPECT_EQ(questions.load(), 0);
  EXPECT_FALSE(memory.begin_touch(2 * kMiB)) << "the kernel would end the process";
  available = [] { return kMargin; };
  EXPECT_TRUE(memory.begin_touch(2 * kMiB));
  memory.end_touch(2 * kMiB);
}

TEST_F(HostMemoryTest, AnImageThatGoesGivesBackWhatItTouchedAndWhatItDidNot) {
  available = [] { return kMargin + 100 * kMiB; };
  HostMemory memory(0, true, 8 * kMiB);
  for (int round = 0; round < 3; ++round) {
    // Not a whole number of units, as chunks of a driver with small granularity are.
    auto image = HostImage::reserve(simulated_driver(), contexts, memory, 0, 21 * kMiB);
    ASSERT_NE(image, nullptr);
    ASSERT_EQ(image->missing_bytes({{0, 21 * kMiB}}), 22 * kMiB);
    ASSERT_TRUE(memory.admit(22 * kMiB).is_ok());
    image->add_pieces({{0, 21 * kMiB}});
    ASSERT_EQ(image->pieces().size(), 3u);
    ASSERT_TRUE(image->make_ready(image->pieces()[2], context_id()).is_ok());
    ASSERT_TRUE(image->make_ready(image->pieces()[0], context_id()).is_ok());
    EXPECT_TRUE(memory.fits(92 * kMiB)) << "8 MiB are untouched";
    EXPECT_FALSE(memory.fits(94 * kMiB));
    image.reset();
    EXPECT_EQ(memory.held_bytes(), 0u);
    EXPECT_TRUE(memory.fits(100 * kMiB));
    EXPECT_FALSE(memory.fits(102 * kMiB));
  }
}

TEST_F(HostMemoryTest, MemoryThatOthersTookIsNotTouchedAndCanBeHadLater) {
  std::uint64_t left = kMargin + 64 * kMiB;
  available = [&] { return left; };
  HostMemory memory(0, true, 64 * kMiB);
  ASSERT_TRUE(memory.admit(32 * kMiB).is_ok());
  auto image = HostImage::reserve(simulated_driver(), contexts, memory, 0, 32 * kMiB);
  ASSERT_NE(image, nullptr);
  image->add_pieces({{0, 32 * kMiB}});
  HostImage::Piece& piece = image->pieces().front();
  left = 100 * kMiB;
  const Status status = image->make_ready(piece, context_id());
  EXPECT_EQ(status.code(), Code::kOutOfHostMemory);
  EXPECT_NE(status.message().find("other programs"), std::string::npos) << status.message();
  EXPECT_FALSE(piece.ready);
  EXPECT_EQ(resident_pages(*image, 32 * kMiB), 0u);
  EXPECT_EQ(pinned_for_backups(), 0u);
  left = kMargin + 64 * kMiB;
  EXPECT_TRUE(image->make_ready(piece, context_id()).is_ok());
  EXPECT_TRUE(piece.ready);
  EXPECT_EQ(pinned_for_backups(), 32 * kMiB);
}

TEST_F(HostMemoryTest, WhatIsTouchedCountsOnceInWhateverOrderItIs) {
  available = [] { return kMargin + 32 * kMiB; };
  HostMemory memory(0, true, 16 * kMiB);
  ASSERT_TRUE(memory.admit(16 * kMiB).is_ok());
  auto image = HostImage::reserve(simulated_driver(), contexts, memory, 0, 16 * kMiB);
  ASSERT_NE(image, nullptr);
  image->add_pieces({{0, 16 * kMiB}});
  HostImage::Piece& piece = image->pieces().front();
  ASSERT_TRUE(image->touch(12 * kMiB, 4 * kMiB).is_ok());
  ASSERT_TRUE(image->touch(2 * kMiB, 2 * kMiB).is_ok());
  EXPECT_TRUE(memory.fits(22 * kMiB)) << "10 MiB are untouched";
  EXPECT_FALSE(memory.fits(24 * kMiB));
  image->data()[12 * kMiB] = std::byte{1};
  image->data()[14 * kMiB] = std::byte{2};
  ASSERT_TRUE(image->touch(10 * kMiB, 4 * kMiB).is_ok());
  ASSERT_TRUE(image->make_ready(piece, context_id()).is_ok());
  EXPECT_TRUE(piece.ready);
  EXPECT_EQ(image->data()[12 * kMiB], std::byte{1}) << "touched twice";
  EXPECT_EQ(image->data()[14 * kMiB], std::byte{2});
  EXPECT_TRUE(memory.fits(32 * kMiB));
  EXPECT_EQ(resident_pages(*image, 16 * kMiB), 16 * kMiB / 4096);
}

// Threads of one process that promise, touch and give back: never more than there is, and in the
// end the books are even.
TEST_F(HostMemoryTest, ThreadsPromiseNoMoreThanThereIs) {
  constexpr std::uint64_t kThere = 64 * kMiB;
  constexpr std::uint64_t kUnit = 2 * kMiB;
  std::atomic<std::uint64_t> used{0};
  std::atomic<std::uint64_t> promised{0};
  std::atomic<std::uint64_t> most{0};
  available = [&] { return kMargin + kThere - used.load(); };
  HostMemory memory(0, true, 64 * kMiB);
  const auto work = [&] {
    for (int i = 0; i < 300; ++i) {
      const std::uint64_t bytes = kUnit * static_cast<std::uint64_t>(1 + i % 16);
      if (!memory.admit(bytes).is_ok()) continue;
      const std::uint64_t now = promised.fetch_add(bytes) + bytes;
      std::uint64_t before = most.load();
      while (before < now && !most.compare_exchange_weak(before, now)) {
      }
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      std::uint64_t touched = 0;
      while (touched < bytes / 2 && memory.begin_touch(kUnit)) {
        used += kUnit;
        memory.end_touch(kUnit);
        touched += kUnit;
      }
      promised -= bytes;
      used -= touched;
      memory.give_back(bytes, bytes - touched);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(most.load(), kThere);
  EXPECT_GT(most.load(), kThere / 2);
  EXPECT_EQ(memory.held_bytes(), 0u);
  EXPECT_TRUE(memory.fits(kThere));
  EXPECT_FALSE(memory.fits(kThere + kUnit));
}

// Each process was promised all that there is, for none knows of the others. Together they take
// memory as fast as machines can.
TEST_F(HostMemoryTest, ProcessesThatTouchAtTheSameTimeLeaveTheMachineSome) {
  constexpr auto kThere = static_cast<std::int64_t>(20480 * kMiB);
  constexpr auto kUnit = static_cast<std::int64_t>(2 * kMiB);
  constexpr std::size_t kProcesses = 8;
  std::atomic<std::int64_t> left{kThere};
  available = [&] { return static_cast<std::uint64_t>(std::max<std::int64_t>(left.load(), 0)); };
  std::vector<std::unique_ptr<HostMemory>> processes;
  for (std::size_t i = 0; i < kProcesses; ++i) {
    processes.push_back(std::make_unique<HostMemory>(0, true, 64 * kMiB));
    ASSERT_TRUE(processes.back()->admit(static_cast<std::uint64_t>(kThere) - kMargin).is_ok());
  }
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 2 * kProcesses; ++i) {
    threads.emplace_back([&, memory = processes[i / 2].get()] {
      while (left.load() > 0 && memory->begin_touch(kUnit)) {
        left.fetch_sub(kUnit);
        std::this_thread::sleep_for(std::chrono::microseconds(300));
        memory->end_touch(kUnit);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(left.load(), 0) << "the machine has run out of memory";
  EXPECT_LE(left.load(), static_cast<std::int64_t>(kMargin)) << "there was enough for more";
}

class HostMemoryOfSleeps : public HostMemoryTest {
 protected:
  static constexpr std::size_t kBlocks = 8;
  static constexpr std::size_t kBytes = 4 * kMiB;  // each a chunk of its own

  void SetUp() override {
    HostMemoryTest::SetUp();
    directory = std::filesystem::path(testing::TempDir()) /
                ("dormouse_host_memory_" + std::to_string(getpid()));
    std::filesystem::create_directories(directory);
    std::filesystem::permissions(directory, std::filesystem::perms::owner_all);
  }

  void TearDown() override {
    HostMemoryTest::TearDown();
    std::filesystem::remove_all(directory);
  }

  static EngineOptions one_stage() {
    EngineOptions options = small_options();
    options.max_chunk_bytes = kBytes;
    options.stage_bytes = std::size_t{1} << 30;
    return options;
  }

  void begin(const EngineOptions& options) {
    engine.reset();
    engine = std::make_unique<Engine>(driver_apart(), tags, options);
    for (std::size_t i = 0; i < kBlocks; ++i) {
      blocks[i] = allocate(weights, kBytes);
      fill(blocks[i], kBytes, i + 1);
    }
  }

  void expect_intact(const std::string& where) {
    for (std::size_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(holds(blocks[i], kBytes, i + 1)) << where;
  }

  std::filesystem::path directory;
  CUdeviceptr blocks[kBlocks] = {};
};

TEST_F(HostMemoryOfSleeps, WhatTheMachineHasNoMemoryForGoesToTheDisk) {
  available = [] { return kMargin + 3 * kBytes + kMiB; };
  EngineOptions options = one_stage();
  options.disk_directory = directory.string();
  begin(options);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(pinned_for_backups(), 3 * kBytes);
  EXPECT_EQ(stats_of("weights").on_disk, 5 * kBytes);
  ASSERT_TRUE(wake().is_ok());
  expect_intact("");
}

TEST_F(HostMemoryOfSleeps, AWakeFromTheDiskNeedsNoMoreMemoryThanItsBuffers) {
  std::uint64_t left = kMargin + 3 * kBytes + kMiB;
  available = [&] { return left; };
  EngineOptions options = one_stage();
  options.disk_directory = directory.string();
  begin(options);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_GT(stats_of("weights").on_disk, 0u);
  left = 44 * kMiB;
  ASSERT_TRUE(wake().is_ok());
  expect_intact("");
}

// A device that shares the host's memory: a kept copy would take as much as the content.
TEST_F(HostMemoryOfSleeps, OfADeviceWithoutMemoryOfItsOwnNoBackupIsKept) {
  Driver unified = driver_apart();
  unified.cuDeviceGetAttribute = [](int* value, CUdevice_attribute attribute, CUdevice device) {
    const CUresult result = cuDeviceGetAttribute(value, attribute, device);
    if (attribute == CU_DEVICE_ATTRIBUTE_INTEGRATED) *value = 1;
    return result;
  };
  EngineOptions options = one_stage();
  options.prepare = true;
  engine.reset();
  engine = std::make_unique<Engine>(unified, tags, options);
  blocks[0] = allocate(weights, kBytes);
  fill(blocks[0], kBytes, 1);
  engine->region_ended(weights);
  engine->stop_background();
  EXPECT_EQ(pinned_for_backups(), 0u) << "nothing is prepared";
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(stats_of("weights").backed_up, kBytes);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(blocks[0], kBytes, 1));
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
  engine.reset();
}

TEST_F(HostMemoryOfSleeps, AFileSystemInMemoryHasNoMoreThanTheMachine) {
  if (access("/dev/shm", W_OK) != 0) GTEST_SKIP() << "no memory file system here";
  std::string in_memory = "/dev/shm/dormouse_XXXXXX";
  ASSERT_NE(mkdtemp(in_memory.data()), nullptr);
  available = [] { return kMargin + 3 * kBytes; };
  EngineOptions options = one_stage();
  options.disk_directory = in_memory;
  begin(options);
  const Status status = sleep();
  EXPECT_NE(status.message().find("has only 0.01 GiB left"), std::string::npos) << status.message();
  EXPECT_FALSE(engine->is_sleeping({}));
  expect_intact("");
  engine.reset();
  std::filesystem::remove_all(in_memory);
}

// At each time at which the machine is asked, from then on.
TEST_F(HostMemoryOfSleeps, ASleepWhoseMemoryOthersTakeMeanwhileFailsAndCanBeTriedAgain) {
  int refused = 0;
  for (int from = 1;; ++from) {
    const std::string where = "question " + std::to_string(from);
    std::atomic<bool> taken{true};
    available = [&, from] {
      return taken && questions >= from ? std::uint64_t{0} : kMargin + kBlocks * kBytes + kMiB;
    };
    begin(one_stage());
    questions = 0;
    const Status status = engine->sleep({{}, Origin::kOutside}, &report);
    const bool asleep = status.is_ok();
    if (!asleep) {
      ++refused;
      EXPECT_EQ(status.code(), Code::kOutOfHostMemory) << where << ": " << status.message();
      EXPECT_FALSE(engine->is_sleeping({})) << where;
      EXPECT_FALSE(gate::is_closed()) << where;
      expect_intact(where);
      taken = false;
      EXPECT_TRUE(sleep().is_ok()) << where;
    }
    ASSERT_TRUE(wake().is_ok()) << where;
    expect_intact(where);
    ASSERT_FALSE(HasFailure()) << where;
    if (asleep) break;
  }
  EXPECT_GT(refused, 3) << "the machine was asked while memory was touched";
}

TEST_F(HostMemoryOfSleeps, PreparationEndsWhereOthersTookTheMemory) {
  std::atomic<bool> taken{false};
  available = [&] { return taken ? std::uint64_t{0} : kMargin + 4 * kBlocks * kBytes; };
  EngineOptions options = one_stage();
  options.prepare = true;
  begin(options);
  questions = 0;
  available = [&] {
    taken = taken || questions == 2;
    return taken ? std::uint64_t{0} : kMargin + 4 * kBlocks * kBytes;
  };
  engine->region_ended(weights);
  for (int i = 0; i < 500 && !taken; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  ASSERT_TRUE(taken);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(pinned_for_backups(), 0u);
  expect_intact("");
  engine.reset();
  EXPECT_EQ(pinned_for_backups(), 0u);
}

// Each of the system's calls for memory, at each of its uses.
TEST_F(HostMemoryOfSleeps, ASystemCallForMemoryThatFailsLosesNothing) {
  EngineOptions options = one_stage();
  options.copy_threads = 1;
  options.host_limit_bytes = 4 * kBlocks * kBytes;
  options.keep_backups = false;
  int refused = 0;
  for (failing_call = 0; failing_call < kCalls; ++failing_call) {
    bool used = true;
    for (failing_use = 1; used; ++failing_use) {
      const std::string where =
          std::string(kCallNames[failing_call]) + " use " + std::to_string(failing_use);
      begin(options);
      for (std::atomic<int>& each : uses) each = 0;
      armed = true;
      const Status status = sleep();
      if (!status.is_ok()) {
        ++refused;
        EXPECT_EQ(status.code(), Code::kOutOfHostMemory) << where << ": " << status.message();
        EXPECT_FALSE(engine->is_sleeping({})) << where;
        expect_intact(where);
        EXPECT_TRUE(sleep().is_ok()) << where;
      }
      EXPECT_TRUE(wake().is_ok()) << where;
      armed = false;
      used = uses[failing_call] >= failing_use;
      expect_intact(where);
      EXPECT_EQ(pinned_for_backups(), 0u) << where;
      ASSERT_FALSE(HasFailure()) << where;
    }
    // What nothing calls cannot fail: taking memory back from what stays mapped is the exception.
    EXPECT_TRUE(failing_use > 8 || failing_call == kDoNotNeed) << kCallNames[failing_call];
  }
  EXPECT_GE(refused, 16) << "without address space, or without its being kept from children";
}

// The memory goes back all the same.
TEST_F(HostMemoryOfSleeps, AnImageThatCannotBeUnmappedHoldsNoMemory) {
  HostMemory memory(64 * kMiB, false, 64 * kMiB);
  auto image = HostImage::reserve(simulated_driver(), contexts, memory, 0, 8 * kMiB);
  ASSERT_TRUE(memory.admit(8 * kMiB).is_ok());
  image->add_pieces({{0, 8 * kMiB}});
  ASSERT_TRUE(image->make_ready(image->pieces().front(), context_id()).is_ok());
  std::byte* data = image->data();
  failing_call = kUnmap;
  failing_use = 1;
  for (std::atomic<int>& each : uses) each = 0;
  armed = true;
  image.reset();
  armed = false;
  ASSERT_EQ(uses[kUnmap], 1);
  std::vector<unsigned char> in_core(8 * kMiB / 4096, 0xff);
  ASSERT_EQ(mincore(data, 8 * kMiB, in_core.data()), 0) << "it is mapped still";
  EXPECT_EQ(std::count_if(in_core.begin(), in_core.end(), [](auto page) { return page & 1; }), 0);
  ASSERT_EQ(munmap(data, 8 * kMiB), 0);
}

}  // namespace
}  // namespace dormouse
