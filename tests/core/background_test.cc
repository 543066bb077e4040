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

TEST_F(BackgroundTest, EachTagsBackupsHaveTheirOwnTime) {
  EngineOptions options = small_options();
  options.keep_backups_for = std::chrono::milliseconds(100);
  restart(options);
  const TagId other = tags.intern("other", Backup::kHost);
  fill(allocate(weights, 8 * kMiB), 8 * kMiB, 1);
  fill(allocate(other, 2 * kMiB), 2 * kMiB, 2);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  // The other tag is used more often than its time passes.
  EXPECT_TRUE(eventually([&] {
    EXPECT_TRUE(sleep({"other"}).is_ok());
    EXPECT_TRUE(wake({"other"}).is_ok());
    return stats_of("weights").backed_up == 0;
  }));
}

TEST_F(BackgroundTest, TheTimeOfOneTagLeavesWhatIsPreparedForAnother) {
  EngineOptions options = small_options();
  options.prepare = true;
  options.keep_backups_for = std::chrono::milliseconds(20);
  restart(options);
  const TagId other = tags.intern("other", Backup::kHost);
  allocate(weights, 16 * kMiB);
  engine->region_ended(weights);
  ASSERT_TRUE(eventually([&] { return pinned_for_backups() == 16 * kMiB; }));
  fill(allocate(other, 2 * kMiB), 2 * kMiB, 2);
  ASSERT_TRUE(sleep({"other"}).is_ok());
  ASSERT_TRUE(wake({"other"}).is_ok());
  ASSERT_TRUE(eventually([&] { return stats_of("other").backed_up == 0; }));
  EXPECT_EQ(pinned_for_backups(), 16 * kMiB);
}

TEST_F(BackgroundTest, AChunkThatExceedsTheLimitDoesNotEndPreparation) {
  EngineOptions options = small_options();
  options.prepare = true;
  options.prepare_limit_bytes = 10 * kMiB;
  restart(options);
  allocate(weights, 16 * kMiB);
  allocate(weights, 8 * kMiB);
  engine->region_ended(weights);
  EXPECT_TRUE(eventually([&] { return pinned_for_backups() == 8 * kMiB; }));
}

// Of many chunks and of one large one.
TEST_F(BackgroundTest, PreparationGivesWayToASleep) {
  for (const std::size_t chunk : {8 * kMiB, 512 * kMiB}) {
    EngineOptions options = small_options();
    options.prepare = true;
    options.piece_bytes = 8 * kMiB;
    options.max_chunk_bytes = chunk;
    restart(options);
    constexpr std::size_t kAll = 512 * kMiB;
    for (std::size_t at = 0; at < kAll; at += chunk) allocate(weights, chunk);
    allocate(kv_cache, 2 * kMiB);
    engine->region_ended(weights);
    ASSERT_TRUE(eventually([&] { return pinned_for_backups() >= 16 * kMiB; }));
    ASSERT_TRUE(sleep({"kv_cache"}).is_ok());
    EXPECT_LT(pinned_for_backups(), kAll / 2) << "the sleep waited for most of it";
    EXPECT_TRUE(eventually([&] { return pinned_for_backups() == kAll; })) << "and then it goes on";
    ASSERT_TRUE(wake().is_ok());
  }
}

// The driver gives page-locked memory back only after all running work, and that may wait for what
// the program does next.
TEST_F(BackgroundTest, BackupsThatGoBesideRunningWorkHoldNobodyUp) {
  EngineOptions options = small_options();
  options.keep_backups_for = std::chrono::milliseconds(300);
  options.drain_timeout = std::chrono::milliseconds(200);
  restart(options);
  const CUdeviceptr block = allocate(weights, 8 * kMiB);
  fill(block, 8 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block, 9, 16, nullptr), CUDA_SUCCESS);
  ASSERT_TRUE(eventually([&] { return stats_of("weights").backed_up == 0; }));
  EXPECT_NE(allocate(weights, kMiB), 0u);
  EXPECT_EQ(engine->sleep({{}, Origin::kOutside}, &report).code(), Code::kBusy);
  EXPECT_EQ(engine->trim(true).code(), Code::kBusy);
  simgpu_release_streams();
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_TRUE(engine->trim(true).is_ok());
}

TEST_F(BackgroundTest, WhatSleepsIsFreedBesideRunningWorkAndHoldsNobodyUp) {
  const CUdeviceptr first = allocate(weights, 16 * kMiB);
  const CUdeviceptr second = allocate(weights, 16 * kMiB);
  fill(first, 16 * kMiB, 1);
  fill(second, 16 * kMiB, 2);
  ASSERT_TRUE(sleep().is_ok());
  CUdeviceptr other = 0;
  ASSERT_EQ(cuMemAlloc_v2(&other, kMiB), CUDA_SUCCESS);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(other, 1, kMiB, nullptr), CUDA_SUCCESS);
  std::atomic<bool> freed{false}, found{false};
  std::thread frees([&] {
    EXPECT_EQ(engine->free(first), CUDA_SUCCESS);
    freed = true;
  });
  EXPECT_TRUE(eventually([&] { return freed.load(); }));
  std::thread asks([&] {
    BlockInfo block;
    EXPECT_TRUE(engine->find(second, &block));
    found = true;
  });
  EXPECT_TRUE(eventually([&] { return found.load(); }));
  EXPECT_EQ(stats_of("weights").backed_up, 16 * kMiB);
  EXPECT_FALSE(engine->wait_for_dropped(std::chrono::milliseconds(50)));
  simgpu_release_streams();
  frees.join();
  asks.join();
  EXPECT_EQ(pinned_for_backups(), 16 * kMiB);
  EXPECT_EQ(cuMemFree_v2(other), CUDA_SUCCESS);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(second, 16 * kMiB, 2));
}

TEST_F(BackgroundTest, BackgroundWorkIsLeftToItselfAfterATime) {
  EngineOptions options = small_options();
  options.prepare = true;
  restart(options);
  engine->region_ended(weights);
  engine->stop_background(std::chrono::seconds(30));
  engine->stop_background(std::chrono::milliseconds(1));
}

TEST_F(BackgroundTest, AmongTagsOfOnePriorityTheOldestFallsAsleepFirst) {
  const TagId other = tags.intern("other", Backup::kHost);
  const CUdeviceptr first = allocate(weights, 16 * kMiB);
  const CUdeviceptr second = allocate(other, 16 * kMiB);
  const CUdeviceptr third = allocate(weights, 16 * kMiB);
  SleepRequest request;
  request.at_least_bytes = 17 * kMiB;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  const auto asleep = [&](CUdeviceptr address) {
    BlockInfo block;
    return engine->find(address, &block) && block.asleep;
  };
  EXPECT_TRUE(asleep(first));
  EXPECT_TRUE(asleep(second));
  EXPECT_FALSE(asleep(third));
  ASSERT_TRUE(wake().is_ok());
  // By name, tag by tag.
  request.tags = {"weights", "other"};
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_TRUE(asleep(first));
  EXPECT_FALSE(asleep(second));
  EXPECT_TRUE(asleep(third));
  ASSERT_TRUE(wake().is_ok());
}

}  // namespace
}  // namespace dormouse
