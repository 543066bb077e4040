// Every driver call of a sleep and of a wake fails once at each of its uses: no byte differs,
// nothing is left behind, and the operation can be tried again.
#include <map>

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

TEST_F(FaultTest, EveryDriverCallOfAWakeMayFailAtEachOfItsUses) {
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
