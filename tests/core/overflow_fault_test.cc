// A sleep that overflows from host memory to the disk, and its wake: every driver call and every
// call to the disk fails once at each of its uses, first and later, verified (a check reads all
// files). No byte differs, nothing is left behind, and the operation can be tried again.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "core/backup/disk_calls.h"
#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

namespace fs = std::filesystem;

std::atomic<long> disk_uses{0};
long failing_use = -1;
int failing_error = 0;

bool disk_fails() {
  if (disk_uses.fetch_add(1) + 1 != failing_use) return false;
  errno = failing_error;
  return true;
}

const DiskCalls& faulty_calls() {
  static const DiskCalls calls = [] {
    static const DiskCalls& real = system_disk_calls();
    DiskCalls made = real;
    made.open = [](const char* path, int flags, mode_t mode) {
      return disk_fails() ? -1 : real.open(path, flags, mode);
    };
    made.close = [](int fd) {  // as Linux: closed whatever the answer
      const int result = real.close(fd);
      return disk_fails() ? -1 : result;
    };
    made.fstat = [](int fd, struct stat* out) { return disk_fails() ? -1 : real.fstat(fd, out); };
    made.fstatfs = [](int fd, struct statfs* out) {
      return disk_fails() ? -1 : real.fstatfs(fd, out);
    };
    made.flock = [](int fd, int what) { return disk_fails() ? -1 : real.flock(fd, what); };
    made.fallocate = [](int fd, int mode, off_t offset, off_t bytes) {
      return disk_fails() ? -1 : real.fallocate(fd, mode, offset, bytes);
    };
    // What is read back comes from the same cache: waiting for the disk would only take time.
    made.fdatasync = [](int) { return disk_fails() ? -1 : 0; };
    made.pread = [](int fd, void* data, std::size_t bytes, off_t offset) -> ssize_t {
      return disk_fails() ? -1 : real.pread(fd, data, bytes, offset);
    };
    made.pwrite = [](int fd, const void* data, std::size_t bytes, off_t offset) -> ssize_t {
      return disk_fails() ? -1 : real.pwrite(fd, data, bytes, offset);
    };
    return made;
  }();
  return calls;
}

// What is tried: a sleep or a wake, the process's first or a later one.
struct Scene {
  bool sleeping = false;
  bool later = false;
  bool verify = false;
};

class OverflowFaultTest : public SimulatedEngine, public ::testing::WithParamInterface<Scene> {
 protected:
  static constexpr std::size_t kBlocks = 6;
  static constexpr std::size_t kSizes[kBlocks] = {kMiB, 3 * kMiB, 5 * kMiB,
                                                  512,  2 * kMiB, 3 * kMiB + 512};

  void SetUp() override {
    SimulatedEngine::SetUp();
    std::string pattern = ::testing::TempDir() + "/overflowXXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory = pattern;
    archive = tags.intern("archive", Backup::kDisk);
  }

  void TearDown() override {
    failing_use = -1;
    SimulatedEngine::TearDown();
    fs::remove_all(directory);
  }

  // Up to the operation that is tried.
  void begin() {
    engine.reset();
    EngineOptions options = small_options();
    options.max_chunk_bytes = 4 * kMiB;
    options.host_limit_bytes = 6 * kMiB;
    options.disk_directory = directory;
    options.verify = GetParam().verify;
    options.copy_threads = 1;
    engine = std::make_unique<Engine>(simulated_driver(), tags, options, faulty_calls());
    for (std::size_t i = 0; i < kBlocks; ++i) {
      blocks[i] = allocate(i + 1 == kBlocks ? archive : weights, kSizes[i]);
      fill(blocks[i], kSizes[i], seeds[i] = i + 1);
    }
    discarded = allocate(kv_cache, 2 * kMiB);
    if (GetParam().later) {
      ASSERT_TRUE(from_outside().is_ok());
      ASSERT_TRUE(wake().is_ok());
      for (std::size_t i = 0; i < kBlocks; i += 2) fill(blocks[i], kSizes[i], seeds[i] = 40 + i);
    }
    if (!GetParam().sleeping) {
      ASSERT_TRUE(from_outside().is_ok());
    }
  }

  Status from_outside() { return engine->sleep({{}, Origin::kOutside}, &report); }
  Status operation() { return GetParam().sleeping ? from_outside() : wake(); }

  void expect_intact(const std::string& where) {
    for (std::size_t i = 0; i < kBlocks; ++i) {
      EXPECT_TRUE(holds(blocks[i], kSizes[i], seeds[i])) << where << ", block " << i;
    }
  }

  void try_with(const std::string& where, const std::function<void()>& arm) {
    begin();
    arm();
    Status status = operation();
    failing_use = -1;
    simgpu_clear_failures();
    if (!status.is_ok()) {
      ++refused;
      EXPECT_EQ(engine->is_sleeping({"weights"}), !GetParam().sleeping) << where;
      if (GetParam().sleeping) expect_intact(where);
      status = operation();
      ASSERT_TRUE(status.is_ok()) << where << ": " << status.message();
    }
    if (GetParam().sleeping) {
      ASSERT_TRUE(wake().is_ok()) << where;
    }
    EXPECT_EQ(report.differing_bytes, 0u) << where;
    expect_intact(where);
    EXPECT_TRUE(is_zero(discarded, 2 * kMiB)) << where;
    engine.reset();
    EXPECT_TRUE(fs::is_empty(directory)) << where;
    simgpu_live_counts live{};
    simgpu_live(&live);
    EXPECT_EQ(live.handles + live.mappings + live.reservations + live.registrations + live.streams,
              0u)
        << where;
    ++tried;
  }

  CUdeviceptr blocks[kBlocks] = {};
  std::uint64_t seeds[kBlocks] = {};
  CUdeviceptr discarded = 0;
  std::string directory;
  TagId archive = kNoTag;
  int tried = 0;
  int refused = 0;
};

TEST_P(OverflowFaultTest, EveryCallMayFailAtEachOfItsUses) {
  begin();
  simgpu_reset_counts();
  disk_uses = 0;
  const Status first = operation();
  ASSERT_TRUE(first.is_ok()) << first.message();
  const long uses_of_disk = disk_uses;
  std::map<std::string, unsigned long long> uses;
  simgpu_for_each_count(
      [](const char* name, unsigned long long count, void* user) {
        (*static_cast<std::map<std::string, unsigned long long>*>(user))[name] = count;
      },
      &uses);
  if (GetParam().sleeping) {
    EXPECT_GT(stats_of("weights").on_disk, 0u) << "some of it";
    EXPECT_GT(stats_of("weights").backed_up, 0u) << "and not all of it";
  }
  for (long use = 1; use <= uses_of_disk; ++use) {
    for (const int error : {EIO, ENOSPC}) {
      try_with("use " + std::to_string(use) + " of the disk", [&] {
        disk_uses = 0;
        failing_error = error;
        failing_use = use;
      });
      ASSERT_FALSE(HasFailure());
    }
  }
  for (const auto& [name, count] : uses) {
    for (unsigned long long use = 1; use <= count; ++use) {
      try_with(name + " use " + std::to_string(use), [&, &function = name] {
        ASSERT_EQ(simgpu_fail_at(function.c_str(), use, CUDA_ERROR_UNKNOWN), 0) << function;
      });
      ASSERT_FALSE(HasFailure());
    }
  }
  EXPECT_GT(tried, 60);
  EXPECT_GT(refused, 20);
}

INSTANTIATE_TEST_SUITE_P(All, OverflowFaultTest,
                         ::testing::Values(Scene{true, false, true}, Scene{true, true, true},
                                           Scene{false, false, true}, Scene{false, true, true},
                                           Scene{true, true, false}),
                         [](const auto& info) {
                           const Scene& scene = info.param;
                           return std::string(scene.later ? "Later" : "First") +
                                  (scene.sleeping ? "Sleep" : "Wake") +
                                  (scene.verify ? "Verified" : "");
                         });

}  // namespace
}  // namespace dormouse
