// Allocation, sleep and wake over the simulated driver.
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/sleep/gate.h"
#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

using EngineTest = SimulatedEngine;

TEST_F(EngineTest, SmallBlocksShareChunksAndLargeOnesHaveTheirOwn) {
  for (int i = 0; i < 8; ++i) allocate(weights, kMiB);
  EXPECT_EQ(stats_of("weights").chunks, 4u);
  allocate(weights, 40 * kMiB);
  const TagStats stats = stats_of("weights");
  EXPECT_EQ(stats.chunks, 5u);
  EXPECT_EQ(stats.blocks, 9u);
  EXPECT_EQ(stats.allocated, 48 * kMiB);
  EXPECT_EQ(stats.mapped, 48 * kMiB);
}

TEST_F(EngineTest, BlocksOfOneSizeLeaveNoRestInTheirChunks) {
  EngineOptions options = small_options();
  options.max_chunk_bytes = 256 * kMiB;
  restart(options);
  for (int i = 0; i < 400; ++i) {
    allocate(weights, 2 * kMiB);
    // As large a part of the pool's as it always is.
    ASSERT_LE(stats_of("weights").mapped, stats_of("weights").allocated / 64 * 65);
  }
  EXPECT_LE(stats_of("weights").chunks, 230u);
}

TEST_F(EngineTest, BlocksAreAlignedAndDoNotOverlap) {
  const CUdeviceptr odd = allocate(weights, 1000);
  const CUdeviceptr small = allocate(weights, 1);
  const CUdeviceptr large = allocate(weights, 2 * kMiB);
  const CUdeviceptr uneven = allocate(weights, 2 * kMiB + 1);
  EXPECT_EQ(odd % 512, 0u);
  EXPECT_EQ(small % 512, 0u);
  EXPECT_EQ(uneven % 512, 0u);
  EXPECT_EQ(large % (2 * kMiB), 0u);
  EXPECT_GE(small, odd + 1000);
  fill(odd, 1000, 1);
  fill(large, 2 * kMiB, 2);
  EXPECT_TRUE(holds(odd, 1000, 1));
}

TEST_F(EngineTest, TagsHavePoolsOfTheirOwn) {
  allocate(weights, kMiB);
  allocate(kv_cache, kMiB);
  EXPECT_EQ(stats_of("weights").chunks, 1u);
  EXPECT_EQ(stats_of("kv_cache").chunks, 1u);
}

TEST_F(EngineTest, FreeInsideABlockOrOfAStrangerIsRefused) {
  const CUdeviceptr block = allocate(weights, 4096);
  EXPECT_EQ(engine->free(block + 512), CUDA_ERROR_INVALID_VALUE);
  EXPECT_TRUE(engine->owns(block + 512));
  EXPECT_FALSE(engine->owns(0x1000));
  EXPECT_EQ(engine->free(block), CUDA_SUCCESS);
  EXPECT_EQ(engine->free(block), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(EngineTest, FindGivesBaseAndSizeOfTheBlockAround) {
  const CUdeviceptr block = allocate(weights, 5000);
  BlockInfo info;
  ASSERT_TRUE(engine->find(block + 4999, &info));
  EXPECT_EQ(info.address, block);
  EXPECT_EQ(info.bytes, 5000u);
  EXPECT_EQ(info.tag, weights);
  EXPECT_EQ(info.context, context);
  EXPECT_FALSE(engine->find(block + 5000, &info));
}

TEST_F(EngineTest, MoreThanTheDeviceHasIsOutOfMemoryAndHarmsNothing) {
  CUdeviceptr address = 0;
  EXPECT_EQ(engine->allocate(weights, std::size_t{1} << 40, &address), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(engine->allocate(weights, 900 * kMiB, &address), CUDA_SUCCESS);
  CUdeviceptr second = 0;
  EXPECT_EQ(engine->allocate(weights, 900 * kMiB, &second), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(engine->free(address), CUDA_SUCCESS);
  EXPECT_EQ(engine->allocate(weights, 900 * kMiB, &second), CUDA_SUCCESS);
}

TEST_F(EngineTest, TheLastMegabytesCanBeHadThoughASharedChunkWouldNotFit) {
  const CUdeviceptr most = allocate(weights, 1020 * kMiB);
  const CUdeviceptr rest = allocate(weights, 3 * kMiB);
  EXPECT_NE(most, 0u);
  EXPECT_NE(rest, 0u);
}

TEST_F(EngineTest, WithoutAContextAnAllocationSaysSo) {
  CUcontext popped = nullptr;
  ASSERT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
  CUdeviceptr address = 0;
  EXPECT_EQ(engine->allocate(weights, 512, &address), CUDA_ERROR_INVALID_CONTEXT);
  ASSERT_EQ(cuCtxPushCurrent_v2(popped), CUDA_SUCCESS);
}

TEST_F(EngineTest, FreedMemoryIsReusedOnlyAfterTheDeviceHasPassedTheFree) {
  EngineOptions options = small_options();
  options.retain_bytes = 64 * kMiB;
  restart(options);
  const CUdeviceptr first = allocate(weights, 16 * kMiB);
  ASSERT_EQ(engine->free(first), CUDA_SUCCESS);
  simgpu_reset_counts();
  EXPECT_EQ(allocate(weights, 16 * kMiB), first);
  EXPECT_EQ(simgpu_call_count("cuCtxRecordEvent"), 1u);
  EXPECT_EQ(simgpu_call_count("cuEventQuery"), 1u);
}

TEST_F(EngineTest, DuringACaptureFreedMemoryIsNotReusedAndNothingIsSynchronized) {
  EngineOptions options = small_options();
  options.retain_bytes = 64 * kMiB;
  restart(options);
  const CUdeviceptr first = allocate(weights, 16 * kMiB);
  engine->capture_begins();
  ASSERT_EQ(engine->free(first), CUDA_SUCCESS);
  simgpu_reset_counts();
  EXPECT_NE(allocate(weights, 16 * kMiB), first);
  EXPECT_EQ(simgpu_call_count("cuCtxSynchronize"), 0u);
  EXPECT_EQ(sleep().code(), Code::kBusy);
  engine->capture_ended();
}

TEST_F(EngineTest, EmptyChunksGoBackBeyondWhatIsRetained) {
  const CUdeviceptr block = allocate(weights, 32 * kMiB);
  EXPECT_EQ(simgpu_usage(0), 32 * kMiB);
  ASSERT_EQ(engine->free(block), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_usage(0), 0u);
  EXPECT_EQ(stats_of("weights").mapped, 0u);
}

TEST_F(EngineTest, SleepReleasesAllAndWakeRestoresEveryByteAtTheSameAddress) {
  std::vector<CUdeviceptr> blocks;
  const std::vector<std::size_t> sizes = {512,      4096,      300 * 1024, kMiB,
                                          3 * kMiB, 20 * kMiB, 70 * kMiB};
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    blocks.push_back(allocate(weights, sizes[i]));
    fill(blocks[i], sizes[i], i);
  }
  const std::size_t used = simgpu_usage(0);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(simgpu_usage(0), 0u);
  EXPECT_EQ(report.bytes, used);
  EXPECT_TRUE(engine->is_sleeping({}));
  ASSERT_TRUE(wake().is_ok());
  EXPECT_FALSE(engine->is_sleeping({}));
  for (std::size_t i = 0; i < sizes.size(); ++i)
    EXPECT_TRUE(holds(blocks[i], sizes[i], i)) << sizes[i];
}

TEST_F(EngineTest, TwoDevicesSleepAndWakeTogether) {
  CUcontext second = nullptr;
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&second, 1), CUDA_SUCCESS);
  std::vector<CUdeviceptr> blocks;
  for (int i = 0; i < 6; ++i) {
    ASSERT_EQ(cuCtxSetCurrent(i % 2 == 0 ? context : second), CUDA_SUCCESS);
    blocks.push_back(allocate(weights, 12 * kMiB));
    fill(blocks.back(), 12 * kMiB, blocks.size());
  }
  ASSERT_EQ(cuCtxSetCurrent(context), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 72 * kMiB);
  EXPECT_EQ(simgpu_usage(0) + simgpu_usage(1), 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_GE(simgpu_usage(1), 36 * kMiB);
  for (std::size_t i = 0; i < blocks.size(); ++i) EXPECT_TRUE(holds(blocks[i], 12 * kMiB, i + 1));
  // The second device is full: nothing of either wakes, and all of it later.
  ASSERT_TRUE(sleep().is_ok());
  simgpu_fail_at("cuMemCreate", 5, CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(wake().code(), Code::kOutOfDeviceMemory);
  simgpu_clear_failures();
  EXPECT_EQ(simgpu_usage(0) + simgpu_usage(1), 0u);
  ASSERT_TRUE(wake().is_ok());
  for (std::size_t i = 0; i < blocks.size(); ++i) EXPECT_TRUE(holds(blocks[i], 12 * kMiB, i + 1));
  engine.reset();
  ASSERT_EQ(cuDevicePrimaryCtxRelease_v2(1), CUDA_SUCCESS);
}

TEST_F(EngineTest, SleepAndWakeAreIdempotentAndByTag) {
  const CUdeviceptr w = allocate(weights, 8 * kMiB);
  const CUdeviceptr k = allocate(kv_cache, 8 * kMiB);
  fill(w, 8 * kMiB, 1);
  fill(k, 8 * kMiB, 2);
  ASSERT_TRUE(wake().is_ok());
  ASSERT_TRUE(sleep({"kv_cache"}).is_ok());
  EXPECT_TRUE(engine->is_sleeping({"kv_cache"}));
  EXPECT_FALSE(engine->is_sleeping({"weights"}));
  EXPECT_TRUE(holds(w, 8 * kMiB, 1));
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, 0u);
  ASSERT_TRUE(wake({"weights"}).is_ok());
  EXPECT_TRUE(holds(w, 8 * kMiB, 1));
  EXPECT_TRUE(engine->is_sleeping({"kv_cache"}));
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(is_zero(k, 8 * kMiB));
}

TEST_F(EngineTest, AnUnknownTagIsRefusedWithTheKnownOnes) {
  allocate(weights, 512);
  const Status status = sleep({"wieghts"});
  EXPECT_EQ(status.code(), Code::kNotFound);
  EXPECT_NE(status.message().find("weights"), std::string::npos);
  EXPECT_EQ(wake({"nothing"}).code(), Code::kNotFound);
}

TEST_F(EngineTest, UnchangedContentIsNotCopiedAgainAndChangedContentIs) {
  const CUdeviceptr block = allocate(weights, 16 * kMiB);
  fill(block, 16 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 16 * kMiB);
  ASSERT_TRUE(wake().is_ok());
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 0u);
  EXPECT_EQ(report.unchanged_bytes, 16 * kMiB);
  ASSERT_TRUE(wake().is_ok());
  *reinterpret_cast<char*>(block + 5 * kMiB) ^= 1;
  const char changed = *reinterpret_cast<char*>(block + 5 * kMiB);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 256u << 10);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(*reinterpret_cast<char*>(block + 5 * kMiB), changed);
}

TEST_F(EngineTest, ZeroContentNeedsNoBackupAndComesBackAsZero) {
  const CUdeviceptr block = allocate(weights, 16 * kMiB);
  std::memset(reinterpret_cast<void*>(block), 0, 16 * kMiB);
  fill(block + 4 * kMiB, kMiB, 3);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, kMiB);
  EXPECT_LE(stats_of("weights").backed_up, 2 * kMiB);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(is_zero(block, 4 * kMiB));
  EXPECT_TRUE(holds(block + 4 * kMiB, kMiB, 3));
  EXPECT_TRUE(is_zero(block + 5 * kMiB, 11 * kMiB));
}

TEST_F(EngineTest, WithoutHashesEverythingIsCopiedAndRestored) {
  EngineOptions options = small_options();
  options.hash = false;
  restart(options);
  const CUdeviceptr block = allocate(weights, 6 * kMiB);
  fill(block, 6 * kMiB, 9);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(sleep().is_ok());
    EXPECT_EQ(report.copied_bytes, 6 * kMiB);
    ASSERT_TRUE(wake().is_ok());
    EXPECT_TRUE(holds(block, 6 * kMiB, 9));
  }
}

TEST_F(EngineTest, FreePartsAreNeitherCopiedNorKept) {
  const CUdeviceptr keep = allocate(weights, 2 * kMiB);
  const CUdeviceptr gone = allocate(weights, 12 * kMiB);
  fill(keep, 2 * kMiB, 1);
  fill(gone, 12 * kMiB, 2);
  ASSERT_EQ(engine->free(gone), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 2 * kMiB);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(keep, 2 * kMiB, 1));
}

TEST_F(EngineTest, BlocksCanBeFreedAndMadeWhileTheirPoolSleeps) {
  const CUdeviceptr first = allocate(weights, 8 * kMiB);
  const CUdeviceptr second = allocate(weights, 8 * kMiB);
  fill(first, 8 * kMiB, 1);
  fill(second, 8 * kMiB, 2);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(engine->free(first), CUDA_SUCCESS);
  const CUdeviceptr fresh = allocate(weights, 8 * kMiB);
  fill(fresh, 8 * kMiB, 3);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(second, 8 * kMiB, 2));
  EXPECT_TRUE(holds(fresh, 8 * kMiB, 3));
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(engine->free(second), CUDA_SUCCESS);
  ASSERT_EQ(engine->free(fresh), CUDA_SUCCESS);
  EXPECT_EQ(stats_of("weights").asleep, 0u);
  EXPECT_FALSE(engine->is_sleeping({}));
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
}

TEST_F(EngineTest, AWakeWithoutMemoryLeavesAllAsleepAndIntactAndCanBeTriedAgain) {
  const CUdeviceptr block = allocate(weights, 600 * kMiB);
  const CUdeviceptr other = allocate(weights, 100 * kMiB);
  fill(block, 600 * kMiB, 1);
  fill(other, 100 * kMiB, 2);
  ASSERT_TRUE(sleep().is_ok());
  CUdeviceptr tenant = 0;
  ASSERT_EQ(cuMemAlloc_v2(&tenant, 500 * kMiB), CUDA_SUCCESS);
  const std::size_t used = simgpu_usage(0);
  const Status status = wake();
  EXPECT_EQ(status.code(), Code::kOutOfDeviceMemory);
  EXPECT_EQ(simgpu_usage(0), used);
  EXPECT_TRUE(engine->is_sleeping({}));
  ASSERT_EQ(cuMemFree_v2(tenant), CUDA_SUCCESS);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(block, 600 * kMiB, 1));
  EXPECT_TRUE(holds(other, 100 * kMiB, 2));
}

TEST_F(EngineTest, TheHostLimitRefusesBeforeAnythingIsReleased) {
  EngineOptions options = small_options();
  options.host_limit_bytes = 8 * kMiB;
  options.host_limit_option = "THE_OPTION";
  restart(options);
  const CUdeviceptr block = allocate(weights, 32 * kMiB);
  fill(block, 32 * kMiB, 1);
  const std::size_t used = simgpu_usage(0);
  const Status status = sleep();
  EXPECT_EQ(status.code(), Code::kOutOfHostMemory);
  EXPECT_NE(status.message().find("and THE_OPTION is 8 MiB"), std::string::npos);
  EXPECT_GE(simgpu_usage(0), used);
  EXPECT_TRUE(holds(block, 32 * kMiB, 1));
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
  ASSERT_EQ(engine->free(block), CUDA_SUCCESS);
}

TEST_F(EngineTest, WhatTheHostLimitRefusesTouchesNoHostMemory) {
  EngineOptions options = small_options();
  options.host_limit_bytes = 20 * kMiB;
  restart(options);
  CUdeviceptr blocks[4];
  for (CUdeviceptr& block : blocks) {
    block = allocate(weights, 16 * kMiB);
    fill(block, 16 * kMiB, 1);
  }
  simgpu_reset_counts();
  EXPECT_EQ(sleep().code(), Code::kOutOfHostMemory);
  EXPECT_EQ(simgpu_call_count("cuMemHostRegister"), 0u);
  for (CUdeviceptr block : blocks) ASSERT_EQ(engine->free(block), CUDA_SUCCESS);
}

TEST_F(EngineTest, WhatFitsOnlyBecauseSomeOfItIsZeroSleepsAllTheSame) {
  EngineOptions options = small_options();
  options.host_limit_bytes = 20 * kMiB;
  restart(options);
  CUdeviceptr blocks[4];
  for (CUdeviceptr& block : blocks) {
    block = allocate(weights, 16 * kMiB);
    ASSERT_EQ(cuMemsetD8_v2(block, 0, 16 * kMiB), CUDA_SUCCESS);
  }
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  fill(blocks[3], 16 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(blocks[3], 16 * kMiB, 1));
  EXPECT_TRUE(is_zero(blocks[0], 16 * kMiB));
}

TEST_F(EngineTest, ASleepDoesNotWaitForEverForRunningWork) {
  EngineOptions options = small_options();
  options.drain_timeout = std::chrono::milliseconds(20);
  restart(options);
  const CUdeviceptr block = allocate(weights, kMiB);
  ASSERT_EQ(cuMemsetD8_v2(block, 7, kMiB), CUDA_SUCCESS);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block, 9, kMiB, nullptr), CUDA_SUCCESS);
  const Status status = engine->sleep({{}, Origin::kOutside}, &report);
  EXPECT_EQ(status.code(), Code::kBusy) << status.message();
  EXPECT_FALSE(engine->is_sleeping({}));
  EXPECT_FALSE(gate::is_closed());
  simgpu_release_streams();
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(*reinterpret_cast<unsigned char*>(block), 9);
}

TEST_F(EngineTest, DiscardDropsTheContentOfAKeptTag) {
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 1);
  SleepRequest request;
  request.discard = true;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(report.copied_bytes, 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(is_zero(block, 4 * kMiB));
}

TEST_F(EngineTest, DiscardOfWhatSleepsDropsItsBackup) {
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  SleepRequest request;
  request.discard = true;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(report.dropped_bytes, 4 * kMiB);
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(is_zero(block, 4 * kMiB));
}

TEST_F(EngineTest, DiscardOfSoManyBytesLeavesWhatSleeps) {
  const CUdeviceptr asleep = allocate(weights, 4 * kMiB);
  fill(asleep, 4 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  SleepRequest request;
  request.discard = true;
  request.at_least_bytes = kMiB;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(report.dropped_bytes, 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(asleep, 4 * kMiB, 1));
}

TEST_F(EngineTest, DiscardOfWhatIsAwakeLeavesWhatSleeps) {
  const CUdeviceptr asleep = allocate(weights, 4 * kMiB);
  fill(asleep, 4 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  const CUdeviceptr awake = allocate(weights, 4 * kMiB);
  fill(awake, 4 * kMiB, 2);
  SleepRequest request;
  request.discard = true;
  request.only_awake = true;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(report.copied_bytes, 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(asleep, 4 * kMiB, 1));
  EXPECT_TRUE(is_zero(awake, 4 * kMiB));
}

// An allocator above the engine that holds these ranges free.
class FreeRanges : public UnusedMemory {
 public:
  void look(bool from_outside) noexcept override {
    ++looks;
    gives_back = from_outside;
    if (after_look) after_look();
  }
  Ranges unused() noexcept override {
    gate_closed_meanwhile = gate::is_closed();
    return ranges;
  }

  Ranges ranges;
  std::function<void()> after_look;  // what the program does then
  int looks = 0;
  bool gives_back = false;
  bool gate_closed_meanwhile = false;
};

std::vector<unsigned char> bytes_at(CUdeviceptr address, std::size_t bytes) {
  const auto* begin = reinterpret_cast<const unsigned char*>(address);
  return {begin, begin + bytes};
}

TEST_F(EngineTest, WhatTheProgramsAllocatorHoldsFreeIsNotBackedUp) {
  FreeRanges free;
  engine->set_unused_memory(&free);
  const CUdeviceptr first = allocate(weights, 8 * kMiB);
  const CUdeviceptr second = allocate(weights, 8 * kMiB);
  const CUdeviceptr third = allocate(weights, 8 * kMiB);
  for (const CUdeviceptr block : {first, second, third}) fill(block, 8 * kMiB, block);
  free.ranges = {
      {third + 4096, 1024}, {second, 8 * kMiB}, {first, kMiB}, {first + 6 * kMiB, 2 * kMiB}};
  const Range used[] = {{first + kMiB, 5 * kMiB}, {third, 4096}, {third + 5120, 8 * kMiB - 5120}};
  std::vector<std::vector<unsigned char>> before;
  for (const Range& range : used) before.push_back(bytes_at(range.begin, range.bytes));
  ASSERT_TRUE(engine->sleep({{}, Origin::kOutside}, &report).is_ok());
  EXPECT_EQ(report.copied_bytes, 13 * kMiB - 1024);
  EXPECT_TRUE(free.gate_closed_meanwhile);
  EXPECT_TRUE(free.gives_back);
  ASSERT_TRUE(wake().is_ok());
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(bytes_at(used[i].begin, used[i].bytes), before[i]) << "range " << i;
  }
  // In use again: all of it is kept, and nothing of the older backup is taken for it.
  free.ranges.clear();
  fill(second, 8 * kMiB, 9);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_FALSE(free.gives_back);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(second, 8 * kMiB, 9));
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(bytes_at(used[i].begin, used[i].bytes), before[i]) << "range " << i;
  }
  engine->set_unused_memory(nullptr);
}

// The hash kernel loads words of 16 bytes, and a device's process does not survive one that is not.
TEST_F(EngineTest, OddRangesThatAreSaidToBeFreeAreCutToWholeUnitsInsideTheirBlock) {
  FreeRanges free;
  engine->set_unused_memory(&free);
  const CUdeviceptr first = allocate(weights, 4 * kMiB);
  const CUdeviceptr second = allocate(weights, 4 * kMiB);
  fill(first, 4 * kMiB, 1);
  fill(second, 4 * kMiB, 2);
  free.ranges = {{first + 1000, 500},                   // no whole unit
                 {first + kMiB + 1, 2048},              // from 512 on, three units
                 {first + kMiB + 100, 700},             // overlaps, no whole unit
                 {first + 3 * kMiB, 9 * kMiB},          // beyond its block
                 {first + 3 * kMiB + 512, 512},         // inside the last
                 {first - 512, 4096},                   // begins outside
                 {0x1000, kMiB},                        // nobody's
                 {first + 2 * kMiB, 0},                 // empty
                 {first + 2 * kMiB, ~std::size_t{0}}};  // beyond the end of all addresses
  const Range used[] = {{first, kMiB + 512}, {first + kMiB + 2048, kMiB - 2048}};
  std::vector<std::vector<unsigned char>> before;
  for (const Range& range : used) before.push_back(bytes_at(range.begin, range.bytes));
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 6 * kMiB - 3 * 512);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(second, 4 * kMiB, 2));
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(bytes_at(used[i].begin, used[i].bytes), before[i]) << "range " << i;
  }
  engine->set_unused_memory(nullptr);
}

TEST_F(EngineTest, ABlockThatTookTheAddressesOfAFreeOneAfterTheLookIsBackedUp) {
  FreeRanges free;
  engine->set_unused_memory(&free);
  const CUdeviceptr kept = allocate(weights, 8 * kMiB);
  const CUdeviceptr block = allocate(weights, 8 * kMiB);
  fill(kept, 8 * kMiB, 1);
  fill(block, 8 * kMiB, 2);
  free.ranges = {{block, 8 * kMiB}};
  free.after_look = [&] {
    ASSERT_EQ(engine->free(block), CUDA_SUCCESS);
    ASSERT_EQ(allocate(weights, 8 * kMiB), block);
    fill(block, 8 * kMiB, 3);
  };
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(kept, 8 * kMiB, 1));
  EXPECT_TRUE(holds(block, 8 * kMiB, 3));
  engine->set_unused_memory(nullptr);
}

// A look that a sleep did not come to use says nothing to the next one.
TEST_F(EngineTest, WhatWasFreeForAnEarlierSleepIsNotTakenForFreeInALaterOne) {
  FreeRanges free;
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 1);
  free.ranges = {{block, 4 * kMiB}};
  engine->set_unused_memory(&free);
  simgpu_fail_at("cuCtxSynchronize", 1, CUDA_ERROR_UNKNOWN);
  EXPECT_FALSE(sleep().is_ok());
  EXPECT_EQ(free.looks, 1);
  ASSERT_EQ(engine->free(block), CUDA_SUCCESS);
  ASSERT_TRUE(engine->trim(false).is_ok());
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(free.looks, 1);
  const CUdeviceptr again = allocate(weights, 4 * kMiB);
  fill(again, 4 * kMiB, 2);
  free.ranges.clear();
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(again, 4 * kMiB, 2));
  engine->set_unused_memory(nullptr);
}

TEST_F(EngineTest, TheProgramsAllocatorIsAskedOnlyWhereSomethingIsToBeBackedUp) {
  FreeRanges free;
  engine->set_unused_memory(&free);
  allocate(weights, 4 * kMiB);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(free.looks, 1);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(free.looks, 1);
  ASSERT_TRUE(wake().is_ok());
  SleepRequest request;
  request.discard = true;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(free.looks, 1);
  engine->set_unused_memory(nullptr);
}

TEST_F(EngineTest, BackupsGoAfterWakingIfTheyAreNotKept) {
  EngineOptions options = small_options();
  options.keep_backups = false;
  restart(options);
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(stats_of("weights").backed_up, 4 * kMiB);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
  EXPECT_EQ(pinned_for_backups(), 0u);
}

TEST_F(EngineTest, TrimGivesKeptBackupsBack) {
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(engine->trim(true).is_ok());
  EXPECT_EQ(stats_of("weights").backed_up, 4 * kMiB) << "a sleeping chunk's backup is not trimmed";
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(block, 4 * kMiB, 1));
  ASSERT_TRUE(engine->trim(true).is_ok());
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
}

TEST_F(EngineTest, TheHostBackupOfASleepingBlockCanBeRead) {
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 5);
  EXPECT_EQ(engine->host_backup(block, 4 * kMiB), nullptr);
  ASSERT_TRUE(sleep().is_ok());
  const void* backup = engine->host_backup(block + kMiB, kMiB);
  ASSERT_NE(backup, nullptr);
  EXPECT_EQ(engine->host_backup(block + kMiB, 4 * kMiB), nullptr) << "more than the block";
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(std::memcmp(backup, reinterpret_cast<void*>(block + kMiB), kMiB), 0);
}

// What is zero is not stored, and an older backup may lie where it would.
TEST_F(EngineTest, TheHostBackupOfWhatHasBecomeZeroReadsAsZero) {
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 5);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  std::memset(reinterpret_cast<void*>(block + kMiB), 0, 2 * kMiB);
  ASSERT_TRUE(sleep().is_ok());
  const void* backup = engine->host_backup(block, 4 * kMiB);
  ASSERT_NE(backup, nullptr);
  const auto address = reinterpret_cast<CUdeviceptr>(backup);
  EXPECT_TRUE(holds(address, kMiB, 5));
  EXPECT_TRUE(is_zero(address + kMiB, 2 * kMiB));
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(block, kMiB, 5));
  EXPECT_TRUE(is_zero(block + kMiB, 2 * kMiB));
}

TEST_F(EngineTest, VerifyReportsNothingForAnHonestWake) {
  EngineOptions options = small_options();
  options.verify = true;
  restart(options);
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 5);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(report.differing_bytes, 0u);
  ASSERT_TRUE(sleep().is_ok());
  // A flipped bit in the backup, as a fault of memory would leave it.
  *static_cast<char*>(const_cast<void*>(engine->host_backup(block + 3 * kMiB, 1))) ^= 4;
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(report.differing_bytes, 256u << 10);
}

TEST_F(EngineTest, WhatCouldNotBeVerifiedIsReported) {
  EngineOptions options = small_options();
  options.verify = true;
  restart(options);
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 5);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(simgpu_fail_at("cuLaunchKernel", 1, CUDA_ERROR_UNKNOWN), 0);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(report.unchecked_bytes, 4 * kMiB);
  EXPECT_EQ(report.differing_bytes, 0u);
  // Nor what was not hashed when it fell asleep.
  fill(block, 4 * kMiB, 6);
  ASSERT_EQ(simgpu_fail_at("cuLaunchKernel", 1, CUDA_ERROR_UNKNOWN), 0);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(report.unchecked_bytes, 4 * kMiB);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(report.unchecked_bytes, 0u);
}

// Kept after waking, or prepared ahead.
TEST_F(EngineTest, BackupsOfWhatIsAwakeMakeRoomForASleep) {
  for (const bool prepared : {false, true}) {
    EngineOptions options = small_options();
    options.host_limit_bytes = 16 * kMiB;
    options.prepare = prepared;
    restart(options);
    const TagId other = tags.intern("other", Backup::kHost);
    const CUdeviceptr first = allocate(weights, 12 * kMiB);
    fill(first, 12 * kMiB, 1);
    if (prepared) {
      engine->region_ended(weights);
      for (int i = 0; i < 2000 && pinned_for_backups() < 12 * kMiB; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    } else {
      ASSERT_TRUE(sleep({"weights"}).is_ok());
      ASSERT_TRUE(wake({"weights"}).is_ok());
    }
    ASSERT_EQ(pinned_for_backups(), 12 * kMiB);
    const CUdeviceptr second = allocate(other, 12 * kMiB);
    fill(second, 12 * kMiB, 2);
    const Status status = sleep({"other"});
    ASSERT_TRUE(status.is_ok()) << status.message();
    EXPECT_EQ(sleep({"weights"}).code(), Code::kOutOfHostMemory) << "what sleeps keeps its backup";
    EXPECT_TRUE(holds(first, 12 * kMiB, 1));
    ASSERT_TRUE(wake().is_ok());
    EXPECT_TRUE(holds(second, 12 * kMiB, 2));
  }
}

TEST_F(EngineTest, ADiscardThatFailsHalfwaySaysWhatIsGone) {
  const CUdeviceptr first = allocate(weights, 16 * kMiB);
  const CUdeviceptr second = allocate(weights, 16 * kMiB);
  fill(first, 16 * kMiB, 1);
  fill(second, 16 * kMiB, 2);
  ASSERT_EQ(simgpu_fail_at("cuMemUnmap", 2, CUDA_ERROR_UNKNOWN), 0);
  SleepRequest request;
  request.discard = true;
  const Status status = engine->sleep(request, &report);
  EXPECT_NE(status.message().find("reads as zero now"), std::string::npos) << status.message();
  EXPECT_FALSE(engine->is_sleeping({}));
  EXPECT_TRUE(is_zero(first, 16 * kMiB));
  EXPECT_TRUE(holds(second, 16 * kMiB, 2));
}

// What the device runs may wait for something that the program does only after the next call.
TEST_F(EngineTest, AnAllocationDoesNotWaitForTheDeviceWhichASleepDoes) {
  EngineOptions options = small_options();
  options.drain_timeout = std::chrono::milliseconds(100);
  options.retain_bytes = 32 * kMiB;
  restart(options);
  const CUdeviceptr freed = allocate(weights, 4 * kMiB);
  const CUdeviceptr kept = allocate(weights, 12 * kMiB);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(kept, 9, 16, nullptr), CUDA_SUCCESS);
  ASSERT_EQ(engine->free(freed), CUDA_SUCCESS);
  EXPECT_NE(allocate(weights, 4 * kMiB), freed);
  EXPECT_EQ(engine->sleep({{}, Origin::kOutside}, &report).code(), Code::kBusy);
  EXPECT_NE(allocate(weights, 32 * kMiB), 0u);
  simgpu_release_streams();
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_EQ(allocate(weights, 4 * kMiB), freed);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
}

TEST_F(EngineTest, MemoryIsAllocatedAndFreedBesideSleepsAndWaits) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> programs;
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    programs.emplace_back([&, seed] {
      ASSERT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
      std::mt19937_64 random(seed);
      while (!stop) {
        const std::size_t bytes = (1 + random() % 12) * kMiB;
        const CUdeviceptr block = allocate(weights, bytes);
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
        EXPECT_EQ(engine->free(block), CUDA_SUCCESS);
      }
      CUcontext popped = nullptr;
      cuCtxPopCurrent_v2(&popped);
    });
  }
  const CUdeviceptr kept = allocate(weights, 3 * kMiB);
  for (int round = 0; round < 100; ++round) {
    fill(kept, 3 * kMiB, round);
    EXPECT_TRUE(engine->sleep({}, nullptr).is_ok());
    EXPECT_TRUE(engine->wake({}, nullptr).is_ok());
    EXPECT_TRUE(holds(kept, 3 * kMiB, round));
  }
  stop = true;
  for (std::thread& program : programs) program.join();
  EXPECT_EQ(stats_of("weights").allocated, 3 * kMiB);
}

TEST_F(EngineTest, ARefusedRegistrationOnlySlowsTheCopy) {
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 5);
  simgpu_fail_at("cuMemHostRegister", 0, CUDA_ERROR_OUT_OF_MEMORY);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(block, 4 * kMiB, 5));
}

TEST_F(EngineTest, WithoutRoomForTheHashEverythingIsCopied) {
  const CUdeviceptr block = allocate(weights, 4 * kMiB);
  fill(block, 4 * kMiB, 5);
  simgpu_fail_at("cuMemHostAlloc", 0, CUDA_ERROR_OUT_OF_MEMORY);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 4 * kMiB);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(block, 4 * kMiB, 5));
}

TEST_F(EngineTest, ASleepFromOutsideClosesTheGateUntilAllItPutToSleepIsAwake) {
  allocate(weights, kMiB);
  allocate(kv_cache, kMiB);
  SleepRequest request;
  request.origin = Origin::kOutside;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_TRUE(gate::is_closed());
  ASSERT_TRUE(wake({"weights"}).is_ok());
  EXPECT_TRUE(gate::is_closed());
  ASSERT_TRUE(wake({"kv_cache"}).is_ok());
  EXPECT_FALSE(gate::is_closed());
}

TEST_F(EngineTest, TheGateStaysClosedWhileASleepFromOutsideCannotBeTakenBack) {
  const CUdeviceptr first = allocate(weights, 20 * kMiB);
  const CUdeviceptr second = allocate(weights, 20 * kMiB);
  fill(first, 20 * kMiB, 1);
  fill(second, 20 * kMiB, 2);
  simgpu_fail_at("cuMemUnmap", 2, CUDA_ERROR_UNKNOWN);
  simgpu_fail_at("cuMemCreate", 1, CUDA_ERROR_UNKNOWN);
  SleepRequest request;
  request.origin = Origin::kOutside;
  EXPECT_FALSE(engine->sleep(request, &report).is_ok());
  simgpu_clear_failures();
  EXPECT_TRUE(engine->is_sleeping({}));
  EXPECT_TRUE(gate::is_closed());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_FALSE(gate::is_closed());
  EXPECT_TRUE(holds(first, 20 * kMiB, 1));
  EXPECT_TRUE(holds(second, 20 * kMiB, 2));
}

TEST_F(EngineTest, TheProgramsOwnSleepLeavesTheGateOpen) {
  allocate(weights, kMiB);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_FALSE(gate::is_closed());
  ASSERT_TRUE(wake().is_ok());
}

TEST_F(EngineTest, AnOutsideSleepOfNothingLeavesTheGateOpen) {
  SleepRequest request;
  request.origin = Origin::kOutside;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_FALSE(gate::is_closed());
}

TEST_F(EngineTest, EnoughBytesAreReleasedAndNoMoreChunksThanNeeded) {
  for (int i = 0; i < 4; ++i)
    fill(allocate(weights, 20 * kMiB), 20 * kMiB, static_cast<std::uint64_t>(i));
  SleepRequest request;
  request.at_least_bytes = 30 * kMiB;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(report.bytes, 40 * kMiB);
  ASSERT_TRUE(wake().is_ok());
}

TEST_F(EngineTest, BlocksOfADestroyedContextAreGone) {
  CUcontext own = nullptr;
  ASSERT_EQ(cuCtxCreate_v4(&own, nullptr, 0, 0), CUDA_SUCCESS);
  const CUdeviceptr block = allocate(weights, kMiB);
  engine->context_destroyed(own);
  ASSERT_EQ(cuCtxDestroy_v2(own), CUDA_SUCCESS);
  EXPECT_EQ(engine->free(block), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(stats_of("weights").blocks, 0u);
}

// A dma-buf keeps the physical memory: putting it to sleep would free nothing, and after the wake
// its holder would use other memory than the program.
TEST_F(EngineTest, WhatOthersHoldStaysAwakeAndIsListed) {
  const CUdeviceptr held = allocate(weights, 8 * kMiB);
  const CUdeviceptr other = allocate(weights, 20 * kMiB);
  fill(held, 8 * kMiB, 1);
  fill(other, 20 * kMiB, 2);
  for (const bool asleep_before : {true, false}) {
    if (asleep_before) {
      ASSERT_TRUE(sleep().is_ok());
    }
    Engine::Hold hold;
    ASSERT_EQ(engine->hold(held, 4096, Holder::kDmaBuf, &hold), CUDA_SUCCESS);
    EXPECT_TRUE(holds(held, 8 * kMiB, 1)) << "woken for its holder";
    if (asleep_before) {
      engine->let_go(hold);
      ASSERT_TRUE(wake().is_ok());
      ASSERT_TRUE(sleep().is_ok());
      EXPECT_TRUE(report.held.empty()) << "nobody got it";
      EXPECT_GE(report.bytes, 28 * kMiB);
      ASSERT_TRUE(wake().is_ok());
    }
  }
  SleepRequest request;
  request.at_least_bytes = 24 * kMiB;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(report.bytes, 20 * kMiB) << "what is held does not count";
  ASSERT_EQ(report.held.size(), 1u);
  EXPECT_EQ(report.held[0].by, Holder::kDmaBuf);
  EXPECT_EQ(report.held[0].bytes, stats_of("weights").mapped);
  EXPECT_EQ(simgpu_usage(0), report.held[0].bytes);
  EXPECT_TRUE(holds(held, 8 * kMiB, 1));
  EXPECT_TRUE(engine->is_sleeping({}));
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(other, 20 * kMiB, 2));
  EXPECT_EQ(engine->free(held), CUDA_SUCCESS);
  EXPECT_TRUE(stats_of("weights").held.empty()) << "held for the block's life";
  Engine::Hold none;
  EXPECT_EQ(engine->hold(held, 4096, Holder::kDmaBuf, &none), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(EngineTest, ABufferStaysAwakeForAsLongAsTheProgramWants) {
  const CUdeviceptr block = allocate(weights, 8 * kMiB);
  fill(block, 8 * kMiB, 1);
  ASSERT_TRUE(sleep().is_ok());
  std::size_t bytes = 0;
  simgpu_fail_at("cuMemCreate", 0, CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(engine->keep_awake(block + kMiB, true, &bytes).code(), Code::kOutOfDeviceMemory);
  EXPECT_EQ(bytes, 0u);
  simgpu_clear_failures();
  ASSERT_TRUE(engine->keep_awake(block + kMiB, true, &bytes).is_ok());
  EXPECT_EQ(bytes, 8 * kMiB);
  EXPECT_TRUE(holds(block, 8 * kMiB, 1));
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, 0u);
  ASSERT_EQ(report.held.size(), 1u);
  EXPECT_EQ(report.held[0].by, Holder::kProgram);
  Engine::Hold hold;
  ASSERT_EQ(engine->hold(block, 4096, Holder::kMulticast, &hold), CUDA_SUCCESS);
  ASSERT_TRUE(engine->keep_awake(block, false, &bytes).is_ok());
  ASSERT_EQ(stats_of("weights").held.size(), 1u) << "the program cannot let go for others";
  EXPECT_EQ(stats_of("weights").held[0].by, Holder::kMulticast);
  engine->let_go(hold);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_TRUE(report.held.empty());
  EXPECT_GE(report.bytes, 8 * kMiB);
  ASSERT_TRUE(wake().is_ok());
  ASSERT_TRUE(engine->keep_awake(4096, true, &bytes).is_ok());
  EXPECT_EQ(bytes, 0u) << "no memory of a tag";
}

TEST_F(EngineTest, PeersGetAccessToPresentAndFutureMemory) {
  allocate(weights, 8 * kMiB);
  CUcontext peer = nullptr;
  EXPECT_EQ(engine->set_peer_access(peer, 1, context, 0, true), CUDA_SUCCESS);
  simgpu_reset_counts();
  allocate(weights, 64 * kMiB);
  EXPECT_EQ(simgpu_call_count("cuMemSetAccess"), 1u);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(engine->set_peer_access(peer, 1, context, 0, false), CUDA_SUCCESS);
}

TEST_F(EngineTest, ThreadsAllocateAndFreeWhileOthersSleepAndWake) {
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      cuCtxPushCurrent_v2(context);
      std::mt19937 random(static_cast<unsigned>(t));
      std::vector<CUdeviceptr> mine;
      while (!stop.load()) {
        CUdeviceptr block = 0;
        if (mine.size() < 20 &&
            engine->allocate(t == 0 ? kv_cache : weights, 1 + random() % (3 * kMiB), &block) ==
                CUDA_SUCCESS) {
          mine.push_back(block);
        } else if (!mine.empty()) {
          const std::size_t which = random() % mine.size();
          if (engine->free(mine[which]) != CUDA_SUCCESS) ++wrong;
          mine.erase(mine.begin() + static_cast<std::ptrdiff_t>(which));
        }
      }
      for (CUdeviceptr block : mine) {
        if (engine->free(block) != CUDA_SUCCESS) ++wrong;
      }
      CUcontext popped = nullptr;
      cuCtxPopCurrent_v2(&popped);
    });
  }
  const CUdeviceptr constant = allocate(weights, 2 * kMiB);
  fill(constant, 2 * kMiB, 77);
  for (int i = 0; i < 30; ++i) {
    ASSERT_TRUE(sleep().is_ok());
    ASSERT_TRUE(wake().is_ok());
    ASSERT_TRUE(holds(constant, 2 * kMiB, 77));
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST_F(EngineTest, RandomOperationsNeverLoseAByte) {
  std::mt19937_64 random(11);
  struct Known {
    CUdeviceptr address;
    std::size_t bytes;
    std::uint64_t seed;
  };
  std::vector<Known> known;
  bool asleep = false;
  for (int i = 0; i < 400; ++i) {
    const int what = static_cast<int>(random() % 10);
    if (what < 4 && known.size() < 40) {
      const std::size_t bytes = 8 * (1 + random() % (6 * kMiB / 8));
      CUdeviceptr block = 0;
      ASSERT_EQ(engine->allocate(weights, bytes, &block), CUDA_SUCCESS);
      fill(block, bytes, random());
      known.push_back({block, bytes, 0});
      known.back().seed = static_cast<std::uint64_t>(i);
      fill(block, bytes, known.back().seed);
    } else if (what < 6 && !known.empty()) {
      const std::size_t which = random() % known.size();
      ASSERT_EQ(engine->free(known[which].address), CUDA_SUCCESS);
      known.erase(known.begin() + static_cast<std::ptrdiff_t>(which));
    } else if (what < 8) {
      ASSERT_TRUE(sleep().is_ok());
      asleep = true;
    } else {
      ASSERT_TRUE(wake().is_ok());
      asleep = false;
    }
    if (asleep) continue;
    for (const Known& block : known)
      ASSERT_TRUE(holds(block.address, block.bytes, block.seed)) << i;
  }
}

}  // namespace
}  // namespace dormouse
