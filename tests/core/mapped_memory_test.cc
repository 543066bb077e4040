// Memory that the program makes and maps itself: it sleeps and wakes where the program put it, and
// whatever the program does with it meanwhile, no byte differs and nothing is left behind.
#include "core/mapped_memory.h"

#include <gmock/gmock.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <map>
#include <thread>

#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

constexpr std::size_t kBytes = 4 * kMiB;

CUmemAllocationProp on_device(int device = 0) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return properties;
}

CUmemAccessDesc access_of(CUmemAccess_flags flags) {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.flags = flags;
  return access;
}

class MappedMemoryTest : public SimulatedEngine {
 protected:
  MappedMemory& mapped() { return engine->mapped(); }

  CUdeviceptr reserve(std::size_t bytes) {
    CUdeviceptr address = 0;
    EXPECT_EQ(cuMemAddressReserve(&address, bytes, 0, 0, 0), CUDA_SUCCESS);
    return address;
  }

  CUmemGenericAllocationHandle create(std::size_t bytes = kBytes, TagId tag = kNoTag) {
    const CUmemAllocationProp properties = on_device();
    CUmemGenericAllocationHandle handle = 0;
    EXPECT_EQ(mapped().create(tag == kNoTag ? weights : tag, &handle, bytes, &properties, 0),
              CUDA_SUCCESS);
    return handle;
  }

  CUresult allow(CUdeviceptr address, std::size_t bytes,
                 CUmemAccess_flags flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
    const CUmemAccessDesc access = access_of(flags);
    return mapped().set_access(address, bytes, &access, 1);
  }

  void map(CUdeviceptr address, CUmemGenericAllocationHandle handle, std::size_t bytes = kBytes) {
    ASSERT_EQ(mapped().map(address, bytes, 0, handle, 0), CUDA_SUCCESS);
    ASSERT_EQ(allow(address, bytes), CUDA_SUCCESS);
  }

  // A mapping with content, and its handle, for most tests.
  void begin(TagId tag = kNoTag) {
    place = reserve(2 * kBytes);
    handle = create(kBytes, tag);
    map(place, handle);
    fill(place, kBytes, 1);
  }

  void end() {
    EXPECT_EQ(mapped().unmap(place, kBytes), CUDA_SUCCESS);
    EXPECT_EQ(mapped().release(handle), CUDA_SUCCESS);
    EXPECT_EQ(cuMemAddressFree(place, 2 * kBytes), CUDA_SUCCESS);
    EXPECT_FALSE(mapped().any());
  }

  bool is_asleep() {
    BlockInfo block;
    return mapped().find_asleep(place, &block);
  }

  CUdeviceptr place = 0;
  CUmemGenericAllocationHandle handle = 0;
};

TEST_F(MappedMemoryTest, SleepsAndWakesWhereTheProgramMappedIt) {
  const CUdeviceptr own = allocate(weights, kMiB);
  fill(own, kMiB, 7);
  begin();
  EXPECT_EQ(stats_of("weights").allocated, kBytes + kMiB);
  EXPECT_EQ(stats_of("weights").blocks, 2u);
  for (int round = 0; round < 3; ++round) {
    const std::size_t before = simgpu_usage(0);
    ASSERT_TRUE(sleep().is_ok());
    EXPECT_EQ(report.bytes, stats_of("weights").asleep);
    EXPECT_LE(simgpu_usage(0), before - kBytes);
    EXPECT_TRUE(is_asleep());
    ASSERT_TRUE(wake().is_ok());
    EXPECT_TRUE(holds(place, kBytes, 1));
    EXPECT_TRUE(holds(own, kMiB, 7));
    EXPECT_FALSE(is_asleep());
  }
  EXPECT_EQ(report.copied_bytes, kBytes + kMiB);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.copied_bytes, 0u) << "its backup is kept as any other";
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(engine->free(own), CUDA_SUCCESS);
  end();
  EXPECT_EQ(stats_of("weights").allocated, 0u);
  EXPECT_EQ(stats_of("weights").mapped, 0u);
}

TEST_F(MappedMemoryTest, FollowsItsTagsPolicy) {
  begin(kv_cache);
  ASSERT_TRUE(sleep({"kv_cache"}).is_ok());
  EXPECT_EQ(report.copied_bytes, 0u);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(is_zero(place, kBytes));
  end();
}

TEST_F(MappedMemoryTest, IsAwakeUntilItsDeviceMayReadAndWriteIt) {
  place = reserve(2 * kBytes);
  handle = create();
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(mapped().map(place, kBytes, 0, handle, 0), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(allow(place, kBytes, CU_MEM_ACCESS_FLAGS_PROT_READ), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, 0u);
  ASSERT_EQ(allow(place, kBytes), CUDA_SUCCESS);
  fill(place, kBytes, 1);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, kBytes);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(place, kBytes, 1));
  end();
}

TEST_F(MappedMemoryTest, AccessTakenAwayKeepsItAwake) {
  begin();
  ASSERT_EQ(allow(place, kBytes, CU_MEM_ACCESS_FLAGS_PROT_READ), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, 0u);
  EXPECT_TRUE(holds(place, kBytes, 1));
  end();
}

TEST_F(MappedMemoryTest, AccessOfAllDevicesIsBackAfterWaking) {
  int devices = 0;
  ASSERT_EQ(cuDeviceGetCount(&devices), CUDA_SUCCESS);
  if (devices < 2) GTEST_SKIP() << "one device";
  begin();
  CUmemAccessDesc peer = access_of(CU_MEM_ACCESS_FLAGS_PROT_READ);
  peer.location.id = 1;
  ASSERT_EQ(mapped().set_access(place, kBytes, &peer, 1), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  unsigned long long flags = 0;
  EXPECT_TRUE(mapped().access_asleep(place + 5, peer.location, &flags));
  EXPECT_EQ(flags, CU_MEM_ACCESS_FLAGS_PROT_READ);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_FALSE(mapped().access_asleep(place, peer.location, &flags));
  EXPECT_EQ(cuMemGetAccess(&flags, &peer.location, place), CUDA_SUCCESS);
  EXPECT_EQ(flags, CU_MEM_ACCESS_FLAGS_PROT_READ);
  const CUmemAccessDesc own = access_of(CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  EXPECT_EQ(cuMemGetAccess(&flags, &own.location, place), CUDA_SUCCESS);
  EXPECT_EQ(flags, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  end();
}

TEST_F(MappedMemoryTest, AccessSetInItsSleepWakesIt) {
  begin();
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(allow(place, kBytes), CUDA_SUCCESS);
  EXPECT_FALSE(is_asleep());
  EXPECT_TRUE(holds(place, kBytes, 1));
  end();
}

// As JAX takes it down.
TEST_F(MappedMemoryTest, UnmappedAndReleasedInItsSleepItIsGone) {
  begin();
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_TRUE(mapped().any_asleep(place, 2 * kBytes));
  end();
  EXPECT_FALSE(engine->is_sleeping({}));
  EXPECT_EQ(stats_of("weights").asleep, 0u);
}

TEST_F(MappedMemoryTest, ReleasedWhileMappedItIsThereUntilItIsUnmapped) {
  begin();
  ASSERT_EQ(mapped().release(handle), CUDA_SUCCESS);
  EXPECT_EQ(mapped().release(handle), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(mapped().map(place + kBytes, kBytes, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(place, kBytes, 1));
  EXPECT_TRUE(mapped().any());
  ASSERT_EQ(mapped().unmap(place, kBytes), CUDA_SUCCESS);
  EXPECT_FALSE(mapped().any());
  ASSERT_EQ(cuMemAddressFree(place, 2 * kBytes), CUDA_SUCCESS);
}

TEST_F(MappedMemoryTest, UnmappedInItsSleepItComesBackWhereItIsMappedNext) {
  for (const bool disk : {false, true}) {
    EngineOptions options = small_options();
    const std::filesystem::path directory =
        std::filesystem::temp_directory_path() / ("dormouse-mapped-" + std::to_string(getpid()));
    if (disk) {
      std::filesystem::create_directory(directory);
      std::filesystem::permissions(directory, std::filesystem::perms::owner_all);
      options.disk_directory = directory;
    }
    restart(options);
    begin(disk ? tags.intern("on_disk", Backup::kDisk) : weights);
    ASSERT_TRUE(sleep().is_ok()) << disk;
    ASSERT_EQ(mapped().unmap(place, kBytes), CUDA_SUCCESS);
    EXPECT_EQ(simgpu_usage(0), 0u);
    EXPECT_FALSE(engine->is_sleeping({}));
    map(place + kBytes, handle);
    EXPECT_TRUE(holds(place + kBytes, kBytes, 1)) << disk;
    ASSERT_TRUE(sleep().is_ok());
    EXPECT_EQ(report.copied_bytes, 0u) << "its backup went along";
    ASSERT_TRUE(wake().is_ok());
    EXPECT_TRUE(holds(place + kBytes, kBytes, 1)) << disk;
    ASSERT_EQ(mapped().unmap(place + kBytes, kBytes), CUDA_SUCCESS);
    ASSERT_EQ(mapped().map(place, kBytes, 0, handle, 0), CUDA_SUCCESS);
    end();
    engine.reset();
    if (disk) std::filesystem::remove_all(directory);
  }
}

// PyTorch's expandable segments: many handles side by side, and calls for all of them at once.
TEST_F(MappedMemoryTest, OneCallForManyMappings) {
  constexpr int kCount = 4;
  const CUdeviceptr all = reserve(kCount * kBytes);
  CUmemGenericAllocationHandle handles[kCount] = {};
  for (int i = 0; i < kCount; ++i) {
    handles[i] = create();
    ASSERT_EQ(mapped().map(all + i * kBytes, kBytes, 0, handles[i], 0), CUDA_SUCCESS);
  }
  ASSERT_EQ(allow(all, kCount * kBytes), CUDA_SUCCESS);
  fill(all, kCount * kBytes, 3);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, kCount * kBytes);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(all, kCount * kBytes, 3));
  // Of some asleep, some awake and some that nobody tagged.
  ASSERT_EQ(mapped().unmap(all + kBytes, kBytes), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  const CUmemAllocationProp properties = on_device();
  CUmemGenericAllocationHandle other = 0;
  ASSERT_EQ(cuMemCreate(&other, kBytes, &properties, 0), CUDA_SUCCESS);
  ASSERT_EQ(mapped().map(all + kBytes, kBytes, 0, other, 0), CUDA_SUCCESS);
  ASSERT_EQ(mapped().set_access(all + 2 * kBytes, kBytes, nullptr, 0), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(allow(all + 2 * kBytes, kBytes), CUDA_SUCCESS);
  EXPECT_EQ(mapped().unmap(all, kBytes / 2), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(mapped().unmap(all, kCount * kBytes), CUDA_SUCCESS);
  ASSERT_EQ(mapped().release(other), CUDA_SUCCESS);
  for (const auto each : handles) EXPECT_EQ(mapped().release(each), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(all, kCount * kBytes), CUDA_SUCCESS);
  EXPECT_FALSE(mapped().any());
}

TEST_F(MappedMemoryTest, WhatIsSharedIsWokenAndStaysAwake) {
  for (const bool asleep_before : {false, true}) {
    begin();
    if (asleep_before) {
      ASSERT_TRUE(sleep().is_ok());
    }
    CUmemGenericAllocationHandle real = 0;
    ASSERT_EQ(mapped().share(handle, "shares", &real), CUDA_SUCCESS);
    EXPECT_NE(real, handle);
    int fd = -1;
    ASSERT_EQ(cuMemExportToShareableHandle(&fd, real, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
              CUDA_SUCCESS);
    close(fd);
    EXPECT_TRUE(holds(place, kBytes, 1));
    ASSERT_TRUE(sleep().is_ok());
    EXPECT_EQ(report.bytes, 0u);
    EXPECT_TRUE(holds(place, kBytes, 1));
    end();
  }
}

TEST_F(MappedMemoryTest, ASecondAddressKeepsItAwake) {
  begin();
  ASSERT_TRUE(sleep().is_ok());
  map(place + kBytes, handle);
  EXPECT_TRUE(holds(place, kBytes, 1));
  EXPECT_TRUE(holds(place + kBytes, kBytes, 1));
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, 0u);
  ASSERT_EQ(mapped().unmap(place + kBytes, kBytes), CUDA_SUCCESS);
  end();
}

TEST_F(MappedMemoryTest, WhatTheDriverRefusesChangesNothing) {
  begin();
  EXPECT_EQ(allow(place, kBytes / 2), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(mapped().unmap(place, kBytes / 2), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(mapped().map(place, kBytes, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  end();
}

TEST_F(MappedMemoryTest, QueriesAreAnsweredForNames) {
  begin();
  CUmemGenericAllocationHandle again = 0;
  ASSERT_TRUE(mapped().retain(place + 3, &again));
  EXPECT_EQ(again, handle);
  EXPECT_FALSE(mapped().retain(place + kBytes, &again));
  CUmemAllocationProp properties{};
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(mapped().properties(handle, &properties));
  EXPECT_EQ(properties.requestedHandleTypes, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  EXPECT_FALSE(mapped().properties(handle + 1, &properties));
  BlockInfo block;
  ASSERT_TRUE(mapped().find_asleep(place + kBytes - 1, &block));
  EXPECT_EQ(block.address, place);
  EXPECT_EQ(block.bytes, kBytes);
  EXPECT_EQ(block.tag, weights);
  EXPECT_FALSE(mapped().find_asleep(place + kBytes, &block));
  const CUmemGenericAllocationHandle other = create();
  EXPECT_EQ(mapped().map(place, kBytes, 0, other, 0), CUDA_ERROR_INVALID_VALUE)
      << "something is there";
  EXPECT_EQ(mapped().release(other), CUDA_SUCCESS);
  ASSERT_TRUE(wake().is_ok());
  ASSERT_EQ(mapped().release(handle), CUDA_SUCCESS);  // the one of retain()
  end();
}

TEST_F(MappedMemoryTest, WithoutAContextItWaitsForOne) {
  begin();
  ASSERT_TRUE(sleep().is_ok());
  engine->context_destroyed(context);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(is_asleep()) << "nothing could be copied";
  EXPECT_EQ(allow(place, kBytes), CUDA_ERROR_INVALID_CONTEXT);
  const CUdeviceptr own = allocate(weights, kMiB);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(place, kBytes, 1));
  EXPECT_EQ(engine->free(own), CUDA_SUCCESS);
  end();
}

TEST_F(MappedMemoryTest, EveryDriverCallMayFailAtEachOfItsUses) {
  // Sleep, unmap, map elsewhere (which wakes it), sleep, and share in its sleep. Each step is tried
  // again until it works.
  std::string failed_at;
  const auto retried = [&](auto step) {
    for (int i = 0; i < 3; ++i) {
      if (step() == CUDA_SUCCESS) return;
      simgpu_clear_failures();
    }
    ADD_FAILURE() << "a step does not work again after " << failed_at;
  };
  const auto sleeps = [&] { return sleep().is_ok() ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN; };
  const auto run = [&] {
    const CUmemAllocationProp properties = on_device();
    retried([&] { return mapped().create(weights, &handle, kBytes, &properties, 0); });
    retried([&] { return mapped().map(place, kBytes, 0, handle, 0); });
    retried([&] { return allow(place, kBytes); });
    fill(place, kBytes, 1);
    retried(sleeps);
    retried([&] { return mapped().unmap(place, kBytes); });
    const CUdeviceptr second = place + kBytes;
    retried([&] { return mapped().map(second, kBytes, 0, handle, 0); });
    retried([&] { return allow(second, kBytes); });
    EXPECT_TRUE(holds(second, kBytes, 1)) << failed_at;
    retried(sleeps);
    retried([&] { return mapped().share(handle, "shares", nullptr); });
    EXPECT_TRUE(holds(second, kBytes, 1)) << failed_at;
    retried([&] { return mapped().unmap(second, kBytes); });
    retried([&] { return mapped().release(handle); });
    EXPECT_FALSE(mapped().any()) << failed_at;
  };
  place = reserve(2 * kBytes);
  run();
  restart(small_options());
  simgpu_reset_counts();
  run();
  std::map<std::string, unsigned long long> uses;
  simgpu_for_each_count(
      [](const char* name, unsigned long long count, void* user) {
        (*static_cast<std::map<std::string, unsigned long long>*>(user))[name] = count;
      },
      &uses);
  int tried = 0;
  for (const auto& [name, count] : uses) {
    for (unsigned long long nth = 1; nth <= count; ++nth) {
      failed_at = name + " use " + std::to_string(nth);
      restart(small_options());
      ASSERT_EQ(simgpu_fail_at(name.c_str(), nth, CUDA_ERROR_OUT_OF_MEMORY), 0) << name;
      run();
      simgpu_clear_failures();
      ASSERT_FALSE(HasFailure()) << failed_at;
      ++tried;
    }
  }
  EXPECT_GT(tried, 40);
  engine.reset();
  EXPECT_EQ(simgpu_usage(0), 0u);
  EXPECT_EQ(cuMemAddressFree(place, 2 * kBytes), CUDA_SUCCESS);
}

TEST_F(MappedMemoryTest, ProgramsMapAndUnmapBesideSleepsAndWakes) {
  begin();
  std::atomic<bool> stop{false};
  std::thread sleeper([&] {
    ASSERT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
    for (int i = 0; i < 60; ++i) {
      EXPECT_TRUE(engine->sleep({}, nullptr).is_ok());
      EXPECT_TRUE(engine->wake({}, nullptr).is_ok());
    }
    stop = true;
    CUcontext popped = nullptr;
    cuCtxPopCurrent_v2(&popped);
  });
  std::vector<std::thread> programs;
  for (int i = 0; i < 2; ++i) {
    programs.emplace_back([&] {
      ASSERT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
      const CUdeviceptr mine = reserve(kBytes);
      while (!stop) {
        const CUmemGenericAllocationHandle made = create(kBytes);
        map(mine, made);
        BlockInfo block;
        mapped().find_asleep(place, &block);
        EXPECT_EQ(mapped().unmap(mine, kBytes), CUDA_SUCCESS);
        EXPECT_EQ(mapped().release(made), CUDA_SUCCESS);
      }
      EXPECT_EQ(cuMemAddressFree(mine, kBytes), CUDA_SUCCESS);
      CUcontext popped = nullptr;
      cuCtxPopCurrent_v2(&popped);
    });
  }
  sleeper.join();
  for (std::thread& program : programs) program.join();
  EXPECT_TRUE(holds(place, kBytes, 1));
  end();
}

TEST_F(MappedMemoryTest, OtherKindsOfMemoryAreTheDrivers) {
  CUmemAllocationProp properties = on_device();
  properties.location.type = CU_MEM_LOCATION_TYPE_HOST;
  CUmemGenericAllocationHandle made = 0;
  if (mapped().create(weights, &made, kBytes, &properties, 0) == CUDA_SUCCESS) {
    EXPECT_EQ(cuMemRelease(made), CUDA_SUCCESS);
  }
  EXPECT_FALSE(mapped().any());
  EXPECT_EQ(mapped().release(12345), cuMemRelease(12345));
  EXPECT_EQ(mapped().create(weights, nullptr, kBytes, &properties, 0), CUDA_ERROR_INVALID_VALUE);
}

}  // namespace
}  // namespace dormouse
