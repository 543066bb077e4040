// Host memory runs out inside core, at each of its uses: once, and from then on. No byte differs,
// nothing is left behind, nothing ends the process, and the operation can be tried again.
//
// operator new of this program fails on request, but not inside the simulated driver.
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <new>

#include "core/sleep/gate.h"
#include "tests/core/simulated_engine.h"

namespace {

std::atomic<bool> armed{false};
std::atomic<long> until_failure{0};  // allocations that still succeed
std::atomic<bool> for_ever{false};
std::atomic<long> failures{0};

bool fails() noexcept {
  if (!armed.load() || dormouse::in_driver()) return false;
  const long left = until_failure.fetch_sub(1);
  const bool fail = for_ever.load() ? left <= 0 : left == 0;
  if (fail) failures.fetch_add(1);
  return fail;
}

void* get(std::size_t bytes, std::size_t alignment) {
  if (fails()) throw std::bad_alloc();
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) {
  return get(bytes, alignof(std::max_align_t));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return get(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return fails() ? nullptr : std::malloc(bytes);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}

namespace dormouse {
namespace {

// What the disk holds after a loss of power is not asked here.
const DiskCalls& calls_without_waiting() {
  static const DiskCalls calls = [] {
    DiskCalls made = system_disk_calls();
    made.fdatasync = [](int) { return 0; };
    return made;
  }();
  return calls;
}

constexpr std::size_t kBlocks = 5;
constexpr std::size_t kSizes[kBlocks] = {kMiB / 2, kMiB, 3 * kMiB, 512, kMiB};

class AllFree : public UnusedMemory {
 public:
  void look(bool) noexcept override {}
  Ranges unused() noexcept override {
    try {
      return {range};
    } catch (const std::bad_alloc&) {
      return {};
    }
  }
  Range range;
};

class MemoryFaultTest : public SimulatedEngine {
 protected:
  void SetUp() override {
    SimulatedEngine::SetUp();
    spilled = tags.intern("spilled", Backup::kDisk);
    directory = std::filesystem::path(testing::TempDir()) /
                ("dormouse_memory_fault_" + std::to_string(getpid()));
    std::filesystem::create_directories(directory);
    std::filesystem::permissions(directory, std::filesystem::perms::owner_all);
  }

  void TearDown() override {
    armed = false;
    SimulatedEngine::TearDown();
    std::filesystem::remove_all(directory);
  }

  void begin() {
    engine.reset();
    EngineOptions options = small_options();
    options.max_chunk_bytes = 2 * kMiB;
    options.stage_bytes = 2 * kMiB;
    options.copy_threads = 1;  // the same allocations in the same order every time
    options.disk_directory = directory.string();
    options.keep_backups = keep;
    engine = std::make_unique<Engine>(driver_apart(), tags, options, calls_without_waiting());
    engine->set_unused_memory(&unused);
    for (std::size_t i = 0; i < kBlocks; ++i) {
      blocks[i] = allocate(weights, kSizes[i]);
      fill(blocks[i], kSizes[i], seeds[i] = i + 1);
    }
    on_disk = allocate(spilled, kMiB);
    fill(on_disk, kMiB, disk_seed = 9);
    unused.range = {allocate(weights, kMiB), kMiB};
    discarded = allocate(kv_cache, kMiB);
  }

  void expect_intact(const std::string& where) {
    for (std::size_t i = 0; i < kBlocks; ++i)
      EXPECT_TRUE(holds(blocks[i], kSizes[i], seeds[i])) << where;
    EXPECT_TRUE(holds(on_disk, kMiB, disk_seed)) << where;
  }

  // Everything can be given back, and the budget knows it.
  void expect_nothing_left(const std::string& where) {
    ASSERT_TRUE(wake().is_ok()) << where;
    ASSERT_TRUE(engine->trim(true).is_ok()) << where;
    EXPECT_EQ(pinned_for_backups(), 0u) << where;
    engine.reset();
    simgpu_live_counts live{};
    simgpu_live(&live);
    EXPECT_EQ(live.handles + live.mappings + live.reservations + live.registrations + live.streams,
              0u)
        << where;
    EXPECT_TRUE(std::filesystem::is_empty(directory)) << where;
    EXPECT_FALSE(gate::is_closed()) << where;
  }

  // Runs `work` with the allocation `nth` failing, or all from it on. False if there are fewer.
  template <typename Work>
  bool with_failure(long nth, bool all, Work&& work) {
    failures = 0;
    until_failure = nth;
    for_ever = all;
    armed = true;
    work();
    armed = false;
    return failures.load() != 0;
  }

  // At each allocation that there is, once and from it on.
  template <typename Case>
  void at_each_use(Case&& run) {
    for (const bool all : {false, true}) {
      long nth = 0;
      // A few are missed in a row where threads share them out otherwise.
      for (int missed = 0; missed < 3; ++nth) {
        const std::string where =
            std::string(all ? "from allocation " : "allocation ") + std::to_string(nth);
        missed = run(nth, all, where) ? 0 : missed + 1;
        if (HasFailure()) FAIL() << where;
      }
      EXPECT_GT(nth, 50);
    }
  }

  CUdeviceptr blocks[kBlocks] = {};
  std::uint64_t seeds[kBlocks] = {};
  std::uint64_t disk_seed = 0;
  CUdeviceptr on_disk = 0;
  CUdeviceptr discarded = 0;
  TagId spilled = kNoTag;
  AllFree unused;
  bool keep = true;
  std::filesystem::path directory;
};

TEST_F(MemoryFaultTest, HostMemoryMayRunOutAtEachPlaceOfASleep) {
  at_each_use([&](long nth, bool all, const std::string& where) {
    begin();
    Status status;
    const SleepRequest request{{}, Origin::kOutside};
    const bool failed = with_failure(nth, all, [&] { status = engine->sleep(request, &report); });
    if (!status.is_ok()) {
      EXPECT_FALSE(engine->is_sleeping({})) << where << ": " << status.message();
      EXPECT_FALSE(gate::is_closed()) << where;
      expect_intact(where);
      EXPECT_TRUE(engine->sleep(request, &report).is_ok()) << where;
    }
    EXPECT_TRUE(wake().is_ok()) << where;
    expect_intact(where);
    expect_nothing_left(where);
    return failed;
  });
}

TEST_F(MemoryFaultTest, HostMemoryMayRunOutAtEachPlaceOfASecondSleep) {
  at_each_use([&](long nth, bool all, const std::string& where) {
    begin();
    EXPECT_TRUE(sleep().is_ok());
    EXPECT_TRUE(wake().is_ok());
    // What the first sleep left is old for a part, and its place too small for another.
    for (std::size_t i = 0; i < kBlocks; i += 2) fill(blocks[i], kSizes[i], seeds[i] = 40 + i);
    const CUdeviceptr more = allocate(weights, 2 * kMiB);
    fill(more, 2 * kMiB, 20);
    fill(on_disk, kMiB, disk_seed = 21);
    Status status;
    const bool failed = with_failure(nth, all, [&] { status = sleep(); });
    if (!status.is_ok()) {
      EXPECT_FALSE(engine->is_sleeping({})) << where << ": " << status.message();
      expect_intact(where);
      EXPECT_TRUE(holds(more, 2 * kMiB, 20)) << where;
      EXPECT_TRUE(sleep().is_ok()) << where;
    }
    EXPECT_TRUE(wake().is_ok()) << where;
    expect_intact(where);
    EXPECT_TRUE(holds(more, 2 * kMiB, 20)) << where;
    expect_nothing_left(where);
    return failed;
  });
}

TEST_F(MemoryFaultTest, HostMemoryMayRunOutAtEachPlaceOfAWakeThatKeepsNoBackup) {
  keep = false;
  at_each_use([&](long nth, bool all, const std::string& where) {
    begin();
    EXPECT_TRUE(sleep().is_ok());
    Status status;
    const bool failed = with_failure(nth, all, [&] { status = wake(); });
    if (!status.is_ok()) {
      EXPECT_TRUE(engine->is_sleeping({"weights"})) << where << ": " << status.message();
      EXPECT_TRUE(wake().is_ok()) << where;
    }
    expect_intact(where);
    EXPECT_TRUE(is_zero(discarded, kMiB)) << where;
    expect_nothing_left(where);
    return failed;
  });
}

// The driver refuses to release the second chunk, and there is no memory for the way back.
TEST_F(MemoryFaultTest, HostMemoryMayRunOutWhileAHalfDoneSleepIsTakenBack) {
  at_each_use([&](long nth, bool all, const std::string& where) {
    begin();
    simgpu_fail_at("cuMemUnmap", 2, CUDA_ERROR_UNKNOWN);
    Status status;
    const SleepRequest request{{}, Origin::kOutside};
    const bool failed = with_failure(nth, all, [&] { status = engine->sleep(request, &report); });
    simgpu_clear_failures();
    EXPECT_FALSE(status.is_ok()) << where;
    EXPECT_EQ(gate::is_closed(), engine->is_sleeping({})) << where;
    EXPECT_TRUE(wake().is_ok()) << where;
    expect_intact(where);
    expect_nothing_left(where);
    return failed;
  });
}

TEST_F(MemoryFaultTest, HostMemoryMayRunOutAtEachPlaceOfAllocatingAndFreeing) {
  for (const bool all : {false, true}) {
    bool failed = true;
    for (long nth = 0; failed; ++nth) {
      const std::string where = "allocation " + std::to_string(nth);
      begin();
      std::vector<CUdeviceptr> made(8);
      failed = with_failure(nth, all, [&] {
        for (CUdeviceptr& block : made) {
          if (engine->allocate(weights, kMiB, &block) != CUDA_SUCCESS) block = 0;
        }
        for (std::size_t i = 0; i < made.size(); i += 2) {
          if (made[i] != 0 && engine->free(made[i]) == CUDA_SUCCESS) made[i] = 0;
        }
        (void)engine->allocate(weights, kMiB, &made[0]);
      });
      for (std::size_t i = 0; i < made.size(); ++i) {
        if (made[i] != 0) fill(made[i], i == 0 ? kMiB : kMiB, 30 + i);
      }
      EXPECT_TRUE(sleep().is_ok()) << where;
      EXPECT_TRUE(wake().is_ok()) << where;
      for (std::size_t i = 0; i < made.size(); ++i) {
        if (made[i] == 0) continue;
        EXPECT_TRUE(holds(made[i], i == 0 ? kMiB : kMiB, 30 + i)) << where;
        EXPECT_EQ(engine->free(made[i]), CUDA_SUCCESS) << where;
      }
      expect_intact(where);
      expect_nothing_left(where);
      ASSERT_FALSE(HasFailure()) << where;
    }
  }
}

}  // namespace
}  // namespace dormouse
