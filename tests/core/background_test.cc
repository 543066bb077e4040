// Host memory that is prepared before it is needed and given back after its time, and the order of
// tags.
#include <chrono>
#include <functional>
#include <thread>

#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

using BackgroundTest = SimulatedEngine;

// Polls until the condition holds: background work has no other sign of its end.
bool eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 2000 && !condition(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return condition();
}

TEST_F(BackgroundTest, PreparedMemoryIsReadyBeforeTheFirstSleep) {
  EngineOptions options = small_options();
  options.prepare = true;
  restart(options);
  const CUdeviceptr block = allocate(weights, 8 * kMiB);
  fill(block, 8 * kMiB, 1);
  engine->region_ended(weights);
  ASSERT_TRUE(eventually([&] { return pinned_for_backups() == 8 * kMiB; }));
  simgpu_reset_counts();
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(simgpu_call_count("cuMemHostRegister"), 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(block, 8 * kMiB, 1));
}

TEST_F(BackgroundTest, PreparationStopsAtItsLimit) {
  EngineOptions options = small_options();
  options.prepare = true;
  options.prepare_limit_bytes = 10 * kMiB;
  restart(options);
  allocate(weights, 8 * kMiB);
  allocate(weights, 8 * kMiB);
  engine->region_ended(weights);
  ASSERT_TRUE(eventually([&] { return pinned_for_backups() == 8 * kMiB; }));
  engine->stop_background();
  EXPECT_EQ(pinned_for_backups(), 8 * kMiB);
}

TEST_F(BackgroundTest, ATagThatIsDiscardedNeedsNoPreparation) {
  EngineOptions options = small_options();
  options.prepare = true;
  restart(options);
  allocate(kv_cache, 8 * kMiB);
  engine->region_ended(kv_cache);
  engine->stop_background();
  EXPECT_EQ(pinned_for_backups(), 0u);
}

TEST_F(BackgroundTest, MemoryMayBeFreedWhileItIsPrepared) {
  EngineOptions options = small_options();
  options.prepare = true;
  restart(options);
  for (int i = 0; i < 50; ++i) {
    const CUdeviceptr block = allocate(weights, 4 * kMiB);
    engine->region_ended(weights);
    ASSERT_EQ(engine->free(block), CUDA_SUCCESS);
  }
}

TEST_F(BackgroundTest, KeptBackupsGoAfterTheirTime) {
  EngineOptions options = small_options();
  options.keep_backups_for = std::chrono::milliseconds(30);
  restart(options);
  const CUdeviceptr block = allocate(weights, 8 * kMiB);
  fill(block, 8 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(eventually([&] { return pinned_for_backups() == 0; }));
  EXPECT_TRUE(holds(block, 8 * kMiB, 1));
}

TEST_F(BackgroundTest, TheLeastImportantTagFallsAsleepFirst) {
  const TagId drafts = tags.intern("drafts", Backup::kHost);
  tags.set_priority("weights", 5);
  fill(allocate(weights, 20 * kMiB), 20 * kMiB, 1);
  fill(allocate(drafts, 20 * kMiB), 20 * kMiB, 2);
  SleepRequest request;
  request.at_least_bytes = 10 * kMiB;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_TRUE(engine->is_sleeping({"drafts"}));
  EXPECT_FALSE(engine->is_sleeping({"weights"}));
}

TEST_F(BackgroundTest, WithinATagTheOldestFallsAsleepFirst) {
  const CUdeviceptr old = allocate(weights, 20 * kMiB);
  const CUdeviceptr young = allocate(weights, 20 * kMiB);
  SleepRequest request;
  request.at_least_bytes = 1;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  BlockInfo info;
  ASSERT_TRUE(engine->find(old, &info));
  EXPECT_TRUE(info.asleep);
  ASSERT_TRUE(engine->find(young, &info));
  EXPECT_FALSE(info.asleep);
}

}  // namespace
}  // namespace dormouse
