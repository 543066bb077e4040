// Every driver call of a sleep and of a wake fails once at each of its uses: no byte differs,
// nothing is left behind, and the operation can be tried again.
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <iterator>
#include <map>
#include <random>

#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

constexpr std::size_t kBlocks = 5;
constexpr std::size_t kSizes[kBlocks] = {kMiB, 3 * kMiB, 9 * kMiB, 512, 2 * kMiB};

class FaultTest : public SimulatedEngine {
 protected:
  void begin() {
    restart(small_options());
    for (std::size_t i = 0; i < kBlocks; ++i) {
      blocks[i] = allocate(weights, kSizes[i]);
      fill(blocks[i], kSizes[i], i + 1);
    }
    discarded = allocate(kv_cache, 4 * kMiB);
  }

  void expect_intact(const std::string& where) {
    for (std::size_t i = 0; i < kBlocks; ++i)
      EXPECT_TRUE(holds(blocks[i], kSizes[i], i + 1)) << where;
  }

  // How often each driver function is used by `operation`.
  template <typename Operation>
  std::map<std::string, unsigned long long> uses_of(Operation&& operation) {
    simgpu_reset_counts();
    operation();
    std::map<std::string, unsigned long long> uses;
    simgpu_for_each_count(
        [](const char* name, unsigned long long count, void* user) {
          (*static_cast<std::map<std::string, unsigned long long>*>(user))[name] = count;
        },
        &uses);
    return uses;
  }

  void expect_nothing_left() {
    engine.reset();
    simgpu_live_counts live{};
    simgpu_live(&live);
    EXPECT_EQ(live.handles + live.mappings + live.reservations + live.registrations + live.streams,
              0u);
    EXPECT_EQ(live.allocations + live.host, 0u);
  }

  CUdeviceptr blocks[kBlocks] = {};
  CUdeviceptr discarded = 0;
};

TEST_F(FaultTest, EveryDriverCallOfASleepMayFailAtEachOfItsUses) {
  begin();
  const auto uses = uses_of([&] { ASSERT_TRUE(sleep().is_ok()); });
  ASSERT_TRUE(wake().is_ok());
  std::size_t tried = 0;
  for (const auto& [name, count] : uses) {
    for (unsigned long long nth = 1; nth <= count; ++nth) {
      const std::string where = name + " use " + std::to_string(nth);
      begin();
      ASSERT_EQ(simgpu_fail_at(name.c_str(), nth, CUDA_ERROR_UNKNOWN), 0) << name;
      const Status status = sleep();
      simgpu_clear_failures();
      if (!status.is_ok()) {
        EXPECT_FALSE(engine->is_sleeping({})) << where << ": " << status.message();
        expect_intact(where);
        ASSERT_TRUE(sleep().is_ok()) << where;
      }
      ASSERT_TRUE(wake().is_ok()) << where;
      expect_intact(where);
      expect_nothing_left();
      ASSERT_FALSE(HasFailure()) << where;
      ++tried;
    }
  }
  EXPECT_GT(tried, 40u);
}

// A sleep that fails has overwritten a part of what an earlier one kept. The program then puts back
// what it had: the kept part is no longer what it was.
TEST_F(FaultTest, AnOldBackupIsNotTrustedForWhatAFailedSleepHasOverwritten) {
  const auto fill_all = [&](std::uint64_t seed) {
    for (std::size_t i = 0; i < kBlocks; ++i) fill(blocks[i], kSizes[i], seed + i);
  };
  const auto sleep_once = [&] {
    begin();
    ASSERT_TRUE(sleep().is_ok());
    ASSERT_TRUE(wake().is_ok());
    fill_all(20);
  };
  sleep_once();
  const auto uses = uses_of([&] { ASSERT_TRUE(sleep().is_ok()); });
  ASSERT_TRUE(wake().is_ok());
  std::size_t failed = 0;
  for (const auto& [name, count] : uses) {
    for (unsigned long long nth = 1; nth <= count; ++nth) {
      const std::string where = name + " use " + std::to_string(nth);
      sleep_once();
      ASSERT_EQ(simgpu_fail_at(name.c_str(), nth, CUDA_ERROR_UNKNOWN), 0) << name;
      const Status status = sleep();
      simgpu_clear_failures();
      if (status.is_ok()) {
        ASSERT_TRUE(wake().is_ok()) << where;
      } else {
        ++failed;
      }
      fill_all(1);
      ASSERT_TRUE(sleep().is_ok()) << where;
      ASSERT_TRUE(wake().is_ok()) << where;
      expect_intact(where);
      ASSERT_FALSE(HasFailure()) << where;
    }
  }
  EXPECT_GT(failed, 8u);
}

// Behind a closed gate a kernel copies too.
class WakeFaultTest : public FaultTest, public testing::WithParamInterface<Origin> {
 protected:
  Status sleep() { return engine->sleep({.tags = {}, .origin = GetParam()}, &report); }
};

INSTANTIATE_TEST_SUITE_P(Origins, WakeFaultTest,
                         testing::Values(Origin::kProgram, Origin::kOutside));

TEST_P(WakeFaultTest, EveryDriverCallOfAWakeMayFailAtEachOfItsUses) {
  begin();
  ASSERT_TRUE(sleep().is_ok());
  const auto uses = uses_of([&] { ASSERT_TRUE(wake().is_ok()); });
  std::size_t tried = 0;
  for (const auto& [name, count] : uses) {
    for (unsigned long long nth = 1; nth <= count; ++nth) {
      for (const CUresult error : {CUDA_ERROR_UNKNOWN, CUDA_ERROR_OUT_OF_MEMORY}) {
        const std::string where = name + " use " + std::to_string(nth);
        begin();
        ASSERT_TRUE(sleep().is_ok());
        ASSERT_EQ(simgpu_fail_at(name.c_str(), nth, error), 0) << name;
        const Status status = wake();
        simgpu_clear_failures();
        if (!status.is_ok()) {
          EXPECT_TRUE(engine->is_sleeping({"weights"})) << where << ": " << status.message();
          ASSERT_TRUE(wake().is_ok()) << where;
        }
        expect_intact(where);
        EXPECT_TRUE(is_zero(discarded, 4 * kMiB)) << where;
        expect_nothing_left();
        ASSERT_FALSE(HasFailure()) << where;
        ++tried;
      }
    }
  }
  EXPECT_GT(tried, 40u);
}

TEST_F(FaultTest, ADriverCallThatFailsForEverStillLosesNothing) {
  begin();
  const auto uses = uses_of([&] {
    ASSERT_TRUE(sleep().is_ok());
    ASSERT_TRUE(wake().is_ok());
  });
  for (const auto& [name, count] : uses) {
    // What cannot be undone is lost to the process by nature: giving back that never succeeds.
    const bool gives_back = name == "cuMemRelease" || name == "cuMemHostUnregister" ||
                            name == "cuMemFreeHost" || name == "cuStreamDestroy" ||
                            name == "cuMemFree" || name == "cuCtxPopCurrent" ||
                            name == "cuMemUnmap";
    if (gives_back) continue;
    begin();
    simgpu_fail_at(name.c_str(), 0, CUDA_ERROR_UNKNOWN);
    if (sleep().is_ok()) (void)wake();
    simgpu_clear_failures();
    ASSERT_TRUE(wake().is_ok()) << name;
    expect_intact(name);
    expect_nothing_left();
    ASSERT_FALSE(HasFailure()) << name;
  }
}

// A program that allocates, writes and frees, whose memory sleeps and wakes in parts, in host
// memory that does not suffice and in files, while driver calls fail now and then.
class RandomFaultTest : public SimulatedEngine {
 protected:
  struct Known {
    CUdeviceptr address;
    std::vector<unsigned char> content;
    std::vector<unsigned char> before;
  };

  void SetUp() override {
    SimulatedEngine::SetUp();
    spilled = tags.intern("spilled", Backup::kDisk);
    directory = std::filesystem::path(testing::TempDir()) /
                ("dormouse_random_fault_" + std::to_string(getpid()));
    std::filesystem::create_directories(directory);
    std::filesystem::permissions(directory, std::filesystem::perms::owner_all);
  }

  void TearDown() override {
    SimulatedEngine::TearDown();
    std::filesystem::remove_all(directory);
  }

  EngineOptions options_of(int round) {
    EngineOptions options = small_options();
    options.max_chunk_bytes = 4 * kMiB;
    options.stage_bytes = 4 * kMiB;
    options.piece_bytes = 2 * kMiB;
    options.disk_directory = round % 2 == 0 ? "" : directory.string();
    options.host_limit_bytes = round % 3 == 2 ? 0 : 16 * kMiB;
    options.keep_backups = round % 4 != 3;
    return options;
  }

  std::size_t below(std::size_t limit) { return random() % limit; }

  bool awake(const Known& block) const {
    BlockInfo info;
    return engine->find(block.address, &info) && !info.asleep;
  }

  void allocate_one(bool disk) {
    const std::size_t bytes = 8 + below(below(8) == 0 ? 6 * kMiB : kMiB);
    CUdeviceptr address = 0;
    ASSERT_EQ(engine->allocate(disk && below(3) == 0 ? spilled : weights, bytes, &address),
              CUDA_SUCCESS);
    known.push_back({address, std::vector<unsigned char>(bytes), {}});
    write_to(known.back(), 0, bytes);
  }

  // Something new, zero, or what was there before: an old backup must be trusted for no more than
  // it holds.
  void write_to(Known& block, std::size_t offset, std::size_t bytes) {
    const std::size_t what = below(4);
    if (what > 1 && !block.before.empty()) {
      block.content.swap(block.before);
      bytes = 0;
    } else {
      block.before = block.content;
    }
    for (std::size_t i = 0; i < bytes; i += 64) {
      block.content[offset + i] = what == 0 ? 0 : static_cast<unsigned char>(random());
    }
    if (what == 0 && bytes != 0) std::memset(block.content.data() + offset, 0, bytes);
    std::memcpy(reinterpret_cast<void*>(block.address), block.content.data(), block.content.size());
  }

  void write_somewhere() {
    Known& block = known[below(known.size())];
    if (!awake(block)) return;
    const std::size_t offset = below(block.content.size());
    write_to(block, offset, 1 + below(block.content.size() - offset));
  }

  void free_one() {
    const std::size_t which = below(known.size());
    ASSERT_EQ(engine->free(known[which].address), CUDA_SUCCESS);
    known.erase(known.begin() + static_cast<std::ptrdiff_t>(which));
  }

  void fail_something() {
    static constexpr const char* kNames[] = {
        "cuMemUnmap",       "cuMemMap",          "cuMemCreate",         "cuMemSetAccess",
        "cuStreamCreate",   "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync",   "cuMemsetD8Async",
        "cuLaunchKernel",   "cuMemHostRegister", "cuStreamSynchronize", "cuCtxSynchronize",
        "cuCtxPushCurrent", "cuMemHostAlloc",    "cuEventSynchronize",  "cuEventRecord",
        "cuEventCreate"};
    if (below(3) == 0) return;
    simgpu_fail_at(kNames[below(std::size(kNames))], 1 + below(12),
                   below(2) == 0 ? CUDA_ERROR_UNKNOWN : CUDA_ERROR_OUT_OF_MEMORY);
  }

  void sleep_or_wake() {
    std::vector<std::string> names;
    if (below(3) == 0) names.push_back("weights");
    fail_something();
    if (below(2) == 0) {
      SleepRequest request;
      request.tags = names;
      request.origin = below(2) == 0 ? Origin::kOutside : Origin::kProgram;
      request.at_least_bytes = below(2) == 0 ? 0 : 1 + below(12 * kMiB);
      (void)engine->sleep(request, &report);
    } else {
      (void)engine->wake({names}, &report);
    }
    simgpu_clear_failures();
  }

  void expect_intact(int step) {
    for (const Known& block : known) {
      if (!awake(block)) continue;
      ASSERT_EQ(std::memcmp(reinterpret_cast<const void*>(block.address), block.content.data(),
                            block.content.size()),
                0)
          << "step " << step;
    }
  }

  std::mt19937_64 random;
  std::vector<Known> known;
  TagId spilled = kNoTag;
  std::filesystem::path directory;
};

TEST_F(RandomFaultTest, WhateverFailsAtWhateverTimeNoByteDiffers) {
  for (int round = 0; round < 12; ++round) {
    random.seed(static_cast<unsigned>(100 + round));
    known.clear();
    restart(options_of(round));
    for (int step = 0; step < 120; ++step) {
      const std::size_t what = below(10);
      if (what < 2 && known.size() < 16) allocate_one(round % 2 != 0);
      if (what == 2 && !known.empty()) free_one();
      if (what > 2 && what < 5 && !known.empty()) write_somewhere();
      if (what >= 5 && what < 9) sleep_or_wake();
      if (what == 9) (void)engine->trim(below(2) == 0);
      expect_intact(step);
      ASSERT_FALSE(HasFailure()) << "round " << round;
    }
    ASSERT_TRUE(wake().is_ok());
    EXPECT_FALSE(engine->is_sleeping({}));
    expect_intact(-1);
    ASSERT_FALSE(HasFailure()) << "round " << round;
  }
}

TEST_F(FaultTest, AnAllocationWhoseDriverCallsFailLeavesNothingAndCanBeTriedAgain) {
  restart(small_options());
  const auto uses = uses_of([&] { allocate(weights, 24 * kMiB); });
  for (const auto& [name, count] : uses) {
    for (unsigned long long nth = 1; nth <= count; ++nth) {
      restart(small_options());
      CUdeviceptr address = 0;
      simgpu_fail_at(name.c_str(), nth, CUDA_ERROR_UNKNOWN);
      const CUresult result = engine->allocate(weights, 24 * kMiB, &address);
      simgpu_clear_failures();
      if (result != CUDA_SUCCESS) {
        EXPECT_EQ(simgpu_usage(0), 0u) << name;
        EXPECT_EQ(engine->allocate(weights, 24 * kMiB, &address), CUDA_SUCCESS) << name;
      }
      fill(address, 24 * kMiB, 1);
      EXPECT_EQ(engine->free(address), CUDA_SUCCESS);
      expect_nothing_left();
      ASSERT_FALSE(HasFailure()) << name << " use " << nth;
    }
  }
}

}  // namespace
}  // namespace dormouse
