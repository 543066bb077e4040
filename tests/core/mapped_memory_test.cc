// Memory that the program makes and maps itself: it sleeps and wakes where the program put it, and
// whatever the program does with it meanwhile, no byte differs and nothing is left behind.
#include "core/memory/mapped_memory.h"

#include <gmock/gmock.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <map>
#include <string>
#include <thread>
#include <vector>

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

CUmemAccessDesc access_of(CUmemAccess_flags flags, int device = 0) {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = flags;
  return access;
}

// Work on a stream of the current context that ends when it is told.
class RunningWork {
 public:
  RunningWork() {
    EXPECT_EQ(cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
    EXPECT_EQ(cuLaunchHostFunc(
                  stream_,
                  [](void* self) {
                    auto* work = static_cast<RunningWork*>(self);
                    work->began_ = true;
                    while (!work->may_end_) std::this_thread::yield();
                  },
                  this),
              CUDA_SUCCESS);
    while (!began_) std::this_thread::yield();
  }
  ~RunningWork() { end(); }
  RunningWork(const RunningWork&) = delete;
  RunningWork& operator=(const RunningWork&) = delete;

  CUstream stream() const { return stream_; }
  void end() {
    if (may_end_.exchange(true)) return;
    EXPECT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
    EXPECT_EQ(cuStreamDestroy_v2(stream_), CUDA_SUCCESS);
  }

 private:
  std::atomic<bool> began_{false};
  std::atomic<bool> may_end_{false};
  CUstream stream_ = nullptr;
};

// Another context, current for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    CUcontext context = nullptr;
    EXPECT_EQ(cuDevicePrimaryCtxRetain(&context, device), CUDA_SUCCESS);
    EXPECT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
  }
  ~OnDevice() {
    CUcontext popped = nullptr;
    EXPECT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
    EXPECT_EQ(cuDevicePrimaryCtxRelease_v2(device_), CUDA_SUCCESS);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const int device_;
};

bool two_devices() {
  int devices = 0;
  return cuDeviceGetCount(&devices) == CUDA_SUCCESS && devices >= 2;
}

class MappedMemoryTest : public SimulatedEngine {
 protected:
  MappedMemory& mapped() { return engine->mapped(); }

  CUdeviceptr reserve(std::size_t bytes) {
    CUdeviceptr address = 0;
    EXPECT_EQ(cuMemAddressReserve(&address, bytes, 0, 0, 0), CUDA_SUCCESS);
    return address;
  }

  CUmemGenericAllocationHandle create(std::size_t bytes = kBytes, TagId tag = kNoTag,
                                      int device = 0) {
    const CUmemAllocationProp properties = on_device(device);
    CUmemGenericAllocationHandle handle = 0;
    EXPECT_EQ(mapped().create(tag == kNoTag ? weights : tag, &handle, bytes, &properties, 0),
              CUDA_SUCCESS);
    return handle;
  }

  CUresult allow(CUdeviceptr address, std::size_t bytes,
                 CUmemAccess_flags flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE, int device = 0) {
    const CUmemAccessDesc access = access_of(flags, device);
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
    return mapped().find(place, &block) && block.asleep;
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
  if (!two_devices()) GTEST_SKIP() << "one device";
  begin();
  CUmemAccessDesc peer = access_of(CU_MEM_ACCESS_FLAGS_PROT_READ);
  peer.location.id = 1;
  ASSERT_EQ(mapped().set_access(place, kBytes, &peer, 1), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  unsigned long long flags = 0;
  EXPECT_TRUE(mapped().access(place + 5, peer.location, &flags));
  EXPECT_EQ(flags, CU_MEM_ACCESS_FLAGS_PROT_READ);
  ASSERT_TRUE(wake().is_ok());
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

TEST_F(MappedMemoryTest, UnmappedInItsSleepItIsStillInTheFiguresAndCanBeDiscarded) {
  begin();
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(mapped().unmap(place, kBytes), CUDA_SUCCESS);
  EXPECT_EQ(stats_of("weights").backed_up, kBytes);
  EXPECT_EQ(stats_of("weights").asleep, 0u);
  SleepRequest request;
  request.tags = {"kv_cache"};
  request.discard = true;
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(report.dropped_bytes, 0u);
  request.tags = {"weights"};
  ASSERT_TRUE(engine->sleep(request, &report).is_ok());
  EXPECT_EQ(report.dropped_bytes, kBytes);
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
  map(place, handle);
  EXPECT_TRUE(is_zero(place, kBytes));
  end();
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
    ASSERT_EQ(mapped().share(handle, Holder::kHandle, &real), CUDA_SUCCESS);
    EXPECT_NE(real, handle);
    int fd = -1;
    ASSERT_EQ(cuMemExportToShareableHandle(&fd, real, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
              CUDA_SUCCESS);
    close(fd);
    EXPECT_TRUE(holds(place, kBytes, 1));
    ASSERT_TRUE(sleep().is_ok());
    EXPECT_EQ(report.bytes, 0u);
    ASSERT_EQ(report.held.size(), 1u) << "it is listed";
    EXPECT_EQ(report.held[0].by, Holder::kHandle);
    EXPECT_EQ(report.held[0].bytes, kBytes);
    EXPECT_EQ(stats_of("weights").mapped, kBytes);
    EXPECT_TRUE(holds(place, kBytes, 1));
    end();
    EXPECT_TRUE(stats_of("weights").held.empty());
  }
}

TEST_F(MappedMemoryTest, StaysAwakeForAsLongAsTheProgramWants) {
  begin();
  std::size_t bytes = 0;
  ASSERT_TRUE(engine->keep_awake(place + kMiB, true, &bytes).is_ok());
  EXPECT_EQ(bytes, kBytes);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, 0u);
  ASSERT_EQ(report.held.size(), 1u);
  EXPECT_EQ(report.held[0].by, Holder::kProgram);
  ASSERT_TRUE(engine->keep_awake(place, false, &bytes).is_ok());
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, kBytes);
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(place, kBytes, 1));
  end();
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
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(report.bytes, kBytes) << "it may sleep as before";
  const CUmemAllocationProp properties = on_device();
  CUmemGenericAllocationHandle other = 0;
  ASSERT_EQ(cuMemCreate(&other, kBytes, &properties, 0), CUDA_SUCCESS);
  EXPECT_EQ(mapped().map(place, kBytes, 0, other, 0), CUDA_ERROR_INVALID_VALUE)
      << "untagged memory over what sleeps";
  ASSERT_EQ(cuMemRelease(other), CUDA_SUCCESS);
  ASSERT_TRUE(wake().is_ok());
  end();
}

// Access that its own device alone would not need to be woken for.
TEST_F(MappedMemoryTest, UnmappedInItsSleepItComesBackForWhoeverMayReadIt) {
  if (!two_devices()) GTEST_SKIP() << "one device";
  for (const int device : {0, 1}) {
    begin();
    ASSERT_TRUE(sleep().is_ok());
    ASSERT_EQ(mapped().unmap(place, kBytes), CUDA_SUCCESS);
    ASSERT_EQ(mapped().map(place, kBytes, 0, handle, 0), CUDA_SUCCESS);
    ASSERT_EQ(allow(place, kBytes, CU_MEM_ACCESS_FLAGS_PROT_READ, device), CUDA_SUCCESS);
    EXPECT_TRUE(holds(place, kBytes, 1)) << device;
    end();
  }
}

TEST_F(MappedMemoryTest, UnmappedInItsSleepItComesBackWhereOnlyRetainedMemoryIsLeft) {
  EngineOptions options = small_options();
  options.retain_bytes = 64 * kMiB;
  restart(options);
  begin();
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(mapped().unmap(place, kBytes), CUDA_SUCCESS);
  ASSERT_EQ(engine->free(allocate(weights, kBytes)), CUDA_SUCCESS);
  ASSERT_GE(engine->retained_bytes(0), kBytes);
  std::vector<CUmemGenericAllocationHandle> all;
  const CUmemAllocationProp properties = on_device();
  for (std::size_t size = std::size_t{1} << 40; size >= 2 * kMiB;) {
    CUmemGenericAllocationHandle taken = 0;
    if (cuMemCreate(&taken, size, &properties, 0) == CUDA_SUCCESS) {
      all.push_back(taken);
    } else {
      size /= 2;
    }
  }
  map(place, handle);
  EXPECT_TRUE(holds(place, kBytes, 1));
  for (const auto each : all) EXPECT_EQ(cuMemRelease(each), CUDA_SUCCESS);
  end();
}

TEST_F(MappedMemoryTest, WhatSleepsWithItsMappingIsUnmappedByTheDriver) {
  begin();
  ASSERT_TRUE(sleep().is_ok());
  simgpu_fail_at("cuMemcpyHtoDAsync", 1, CUDA_ERROR_UNKNOWN);
  simgpu_fail_range("cuMemUnmap", 1, 2, CUDA_ERROR_UNKNOWN);
  EXPECT_FALSE(wake().is_ok());
  simgpu_clear_failures();
  ASSERT_EQ(mapped().unmap(place, kBytes), CUDA_SUCCESS);
  simgpu_live_counts live{};
  simgpu_live(&live);
  EXPECT_EQ(live.mappings, 0u);
  map(place, handle);
  EXPECT_TRUE(holds(place, kBytes, 1));
  end();
}

// As the hooks ask: the driver first, then our books.
TEST_F(MappedMemoryTest, ItIsKnownAtEveryMomentOfASleep) {
  constexpr int kCount = 16;
  const CUdeviceptr all = reserve(kCount * kBytes);
  std::vector<CUmemGenericAllocationHandle> handles;
  for (int i = 0; i < kCount; ++i) {
    handles.push_back(create());
    map(all + i * kBytes, handles.back());
    fill(all + i * kBytes, kBytes, i + 1);
  }
  std::atomic<bool> stop{false};
  std::atomic<int> unknown{0};
  std::thread program([&] {
    ASSERT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
    while (!stop) {
      CUdeviceptr pointer = 0;
      BlockInfo block;
      if (cuPointerGetAttribute(&pointer, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, all) !=
              CUDA_SUCCESS &&
          !mapped().find(all, &block)) {
        ++unknown;
      }
    }
    CUcontext popped = nullptr;
    cuCtxPopCurrent_v2(&popped);
  });
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(engine->sleep({}, nullptr).is_ok());
    EXPECT_TRUE(engine->wake({}, nullptr).is_ok());
  }
  stop = true;
  program.join();
  EXPECT_EQ(unknown, 0);
  EXPECT_EQ(mapped().unmap(all, kCount * kBytes), CUDA_SUCCESS);
  for (const auto each : handles) EXPECT_EQ(mapped().release(each), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(all, kCount * kBytes), CUDA_SUCCESS);
}

// Of its own device in another context, and of a device that has access.
TEST_F(MappedMemoryTest, ASleepWaitsForTheWorkOfWhoeverMayUseIt) {
  if (!two_devices()) GTEST_SKIP() << "one device";
  EngineOptions options = small_options();
  options.drain_timeout = std::chrono::milliseconds(100);
  restart(options);
  begin();
  CUcontext made = nullptr;
  CUcontext popped = nullptr;
  ASSERT_EQ(cuCtxCreate_v4(&made, nullptr, 0, 0), CUDA_SUCCESS);
  engine->context_created(made, 0);
  {
    RunningWork work;
    ASSERT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
    EXPECT_EQ(sleep().code(), Code::kBusy);
    ASSERT_EQ(cuCtxPushCurrent_v2(made), CUDA_SUCCESS);
  }
  ASSERT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
  engine->context_destroyed(made);
  ASSERT_EQ(cuCtxDestroy_v2(made), CUDA_SUCCESS);
  {
    const OnDevice other(1);
    RunningWork work;
    ASSERT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
    EXPECT_TRUE(sleep().is_ok()) << "device 1 has no access yet";
    EXPECT_TRUE(wake().is_ok());
    ASSERT_EQ(allow(place, kBytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE, 1), CUDA_SUCCESS);
    EXPECT_EQ(sleep().code(), Code::kBusy);
    ASSERT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
  }
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  end();
}

TEST_F(MappedMemoryTest, WhatHadNoContextSleepsOnceThereIsOne) {
  if (!two_devices()) GTEST_SKIP() << "one device";
  {
    const OnDevice other(1);  // the context stays
    place = reserve(2 * kBytes);
    handle = create(kBytes, kNoTag, 1);
    ASSERT_EQ(mapped().map(place, kBytes, 0, handle, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
    ASSERT_EQ(allow(place, kBytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE, 1), CUDA_SUCCESS);
    CUcontext popped = nullptr;
    ASSERT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
    fill(place, kBytes, 1);
    ASSERT_TRUE(sleep().is_ok());
    EXPECT_EQ(report.bytes, kBytes);
    ASSERT_TRUE(wake().is_ok());
    EXPECT_TRUE(holds(place, kBytes, 1));
    end();
    engine.reset();
  }
}

// The driver gives page-locked memory back only after all running work, which may wait for what the
// program does next.
TEST_F(MappedMemoryTest, BackupsThatGoBesideRunningWorkHoldNobodyUp) {
  begin();
  const CUdeviceptr second = reserve(kBytes);
  const CUmemGenericAllocationHandle parked = create();
  map(second, parked);
  fill(second, kBytes, 2);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(mapped().unmap(second, kBytes), CUDA_SUCCESS);
  ASSERT_TRUE(wake().is_ok());
  CUcontext made = nullptr;
  CUcontext popped = nullptr;
  ASSERT_EQ(cuCtxCreate_v4(&made, nullptr, 0, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
  RunningWork work;
  engine->context_destroyed(made);
  EXPECT_EQ(mapped().unmap(place, kBytes), CUDA_SUCCESS);
  EXPECT_EQ(mapped().release(handle), CUDA_SUCCESS);
  EXPECT_EQ(mapped().release(parked), CUDA_SUCCESS);
  EXPECT_FALSE(mapped().any());
  work.end();
  ASSERT_EQ(cuCtxDestroy_v2(made), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(place, 2 * kBytes), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(second, kBytes), CUDA_SUCCESS);
}

// A preparation that gave way leaves an image that is ready in parts.
TEST_F(MappedMemoryTest, AContextThatGoesTakesNothingThatIsBeingPrepared) {
  EngineOptions options = small_options();
  options.prepare = true;
  options.piece_bytes = 2 * kMiB;
  restart(options);
  constexpr std::size_t kLarge = 64 * kMiB;
  place = reserve(kLarge);
  handle = create(kLarge);
  map(place, handle, kLarge);
  fill(place, kLarge, 1);
  for (int round = 0; round < 20; ++round) {
    CUcontext made = nullptr;
    CUcontext popped = nullptr;
    ASSERT_EQ(cuCtxCreate_v4(&made, nullptr, 0, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
    engine->region_ended(weights);
    std::this_thread::sleep_for(std::chrono::milliseconds(round % 5));
    engine->context_destroyed(made);
    ASSERT_EQ(cuCtxDestroy_v2(made), CUDA_SUCCESS);
    ASSERT_TRUE(engine->trim(round % 2 == 0).is_ok());
  }
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(place, kLarge, 1));
  ASSERT_EQ(mapped().unmap(place, kLarge), CUDA_SUCCESS);
  ASSERT_EQ(mapped().release(handle), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressFree(place, kLarge), CUDA_SUCCESS);
}

TEST_F(MappedMemoryTest, AWakeByTheProgramsOwnCallStartsTheTimeOfKeptBackups) {
  EngineOptions options = small_options();
  options.keep_backups_for = std::chrono::milliseconds(20);
  restart(options);
  begin();
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_EQ(allow(place, kBytes), CUDA_SUCCESS);
  for (int i = 0; i < 2000 && stats_of("weights").backed_up != 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(stats_of("weights").backed_up, 0u);
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
  ASSERT_TRUE(mapped().find(place + kBytes - 1, &block));
  EXPECT_TRUE(block.asleep);
  EXPECT_EQ(block.address, place);
  EXPECT_EQ(block.bytes, kBytes);
  EXPECT_EQ(block.tag, weights);
  EXPECT_FALSE(mapped().find(place + kBytes, &block));
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
  engine->context_going(context);
  ASSERT_EQ(cuDevicePrimaryCtxReset(0), CUDA_SUCCESS);
  engine->context_gone(context, true);
  EXPECT_EQ(wake().code(), Code::kBusy) << "nothing can be copied";
  EXPECT_TRUE(is_asleep());
  EXPECT_EQ(allow(place, kBytes), CUDA_ERROR_INVALID_CONTEXT);
  CUcontext again = nullptr;
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&again, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuDevicePrimaryCtxRelease(0), CUDA_SUCCESS);
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
    retried([&] { return mapped().share(handle, Holder::kHandle, nullptr); });
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
        mapped().find(place, &block);
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
