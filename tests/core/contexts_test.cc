// Contexts that come and go, and captures that run, beside sleeps, wakes and trims.
#include <dirent.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <thread>

#include "core/memory/mapped_memory.h"
#include "core/sleep/gate.h"
#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

using std::chrono::milliseconds;

// What copies to the host and launches do besides.
std::function<void()> at_copy;
std::atomic<bool> copied{false};
std::function<void(void**)> at_copy_kernel;

CUresult copy_to_host(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  if (!copied.exchange(true) && at_copy) at_copy();
  return cuMemcpyDtoHAsync_v2(to, from, bytes, stream);
}

CUresult launch(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                CUstream stream, void** parameters, void** extra) {
  constexpr unsigned kThreadsOfCopies = 512;
  if (block_x == kThreadsOfCopies && at_copy_kernel) at_copy_kernel(parameters);
  return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream,
                        parameters, extra);
}

SleepRequest from_outside() {
  SleepRequest request;
  request.origin = Origin::kOutside;
  return request;
}

class ContextsTest : public SimulatedEngine {
 protected:
  void SetUp() override {
    SimulatedEngine::SetUp();
    driver = simulated_driver();
    driver.cuMemcpyDtoHAsync_v2 = copy_to_host;
    driver.cuLaunchKernel = launch;
    EngineOptions options = small_options();
    options.capture_timeout = milliseconds(100);
    options.drain_timeout = milliseconds(5000);
    make_engine(options);
  }
  void TearDown() override {
    at_copy = nullptr;
    copied = false;
    at_copy_kernel = nullptr;
    if (primary_left) {
      EXPECT_EQ(cuDevicePrimaryCtxRetain(&context, 0), CUDA_SUCCESS);
      EXPECT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
    }
    SimulatedEngine::TearDown();
  }

  void make_engine(const EngineOptions& options) {
    engine.reset();
    engine = std::make_unique<Engine>(driver, tags, options);
  }

  // The program works in contexts of its own alone.
  void leave_primary() {
    CUcontext popped = nullptr;
    ASSERT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
    ASSERT_EQ(cuDevicePrimaryCtxRelease_v2(0), CUDA_SUCCESS);
    primary_left = true;
  }

  // Not current.
  CUcontext make_context() {
    CUcontext made = nullptr;
    CUcontext popped = nullptr;
    EXPECT_EQ(cuCtxCreate_v4(&made, nullptr, 0, 0), CUDA_SUCCESS);
    EXPECT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
    engine->context_created(made, 0);
    return made;
  }
  void destroy(CUcontext which) {
    engine->context_going(which);
    EXPECT_EQ(cuCtxDestroy_v2(which), CUDA_SUCCESS);
    engine->context_gone(which, true);
  }
  CUdeviceptr allocate_in(CUcontext which, std::size_t bytes) {
    CUcontext popped = nullptr;
    EXPECT_EQ(cuCtxPushCurrent_v2(which), CUDA_SUCCESS);
    const CUdeviceptr address = allocate(weights, bytes);
    EXPECT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
    return address;
  }
  CUcontext make_green(CUgreenCtx* green) {
    CUdevResource resource;
    CUdevResourceDesc description;
    CUcontext made = nullptr;
    EXPECT_EQ(cuDeviceGetDevResource(0, &resource, CU_DEV_RESOURCE_TYPE_SM), CUDA_SUCCESS);
    EXPECT_EQ(cuDevResourceGenerateDesc(&description, &resource, 1), CUDA_SUCCESS);
    EXPECT_EQ(cuGreenCtxCreate(green, description, 0, CU_GREEN_CTX_DEFAULT_STREAM), CUDA_SUCCESS);
    EXPECT_EQ(cuCtxFromGreenCtx(&made, *green), CUDA_SUCCESS);
    return made;
  }

  Driver driver;
  bool primary_left = false;
};

TEST_F(ContextsTest, WhatWasPageLockedInAContextThatWentIsPageLockedAgain) {
  leave_primary();
  const CUcontext one = make_context();
  const CUcontext two = make_context();
  const CUcontext first = std::min(one, two);
  const CUcontext last = std::max(one, two);
  allocate_in(first, 16 * kMiB);
  const CUdeviceptr block = allocate_in(last, 128 * kMiB);
  fill(block, 128 * kMiB, 1);
  ASSERT_TRUE(engine->sleep(from_outside(), &report).is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_GE(pinned_for_backups(), 128 * kMiB);
  destroy(first);
  EXPECT_EQ(pinned_for_backups(), 0u) << "all was page-locked in the first";
  EXPECT_TRUE(holds(block, 128 * kMiB, 1));
  fill(block, kMiB, 2);
  ASSERT_TRUE(engine->sleep(from_outside(), &report).is_ok());
  std::atomic<int> reads{0}, unlocked_reads{0};
  at_copy_kernel = [&](void** parameters) {
    CUdeviceptr seen = 0;
    void* from = *static_cast<void**>(parameters[1]);
    ++reads;
    if (cuMemHostGetDevicePointer_v2(&seen, from, 0) != CUDA_SUCCESS) ++unlocked_reads;
  };
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(unlocked_reads.load(), 0) << "of " << reads.load();
  EXPECT_TRUE(holds(block, kMiB, 2));
  EXPECT_GE(pinned_for_backups(), 128 * kMiB);
  destroy(last);
}

TEST_F(ContextsTest, AContextStaysWhileAnOperationWorksInIt) {
  leave_primary();
  const CUcontext one = make_context();
  const CUcontext two = make_context();
  allocate_in(one, 16 * kMiB);
  allocate_in(two, 16 * kMiB);
  const CUcontext working = std::min(one, two);
  std::thread program;
  bool waited = false;
  at_copy = [&] {
    std::promise<void> gone;
    auto future = gone.get_future();
    program = std::thread([this, working, gone = std::move(gone)]() mutable {
      destroy(working);
      gone.set_value();
    });
    waited = future.wait_for(milliseconds(200)) == std::future_status::timeout;
  };
  fill(allocate_in(std::max(one, two), kMiB), kMiB, 3);
  const Status slept = engine->sleep(from_outside(), &report);
  program.join();
  EXPECT_TRUE(slept.is_ok()) << slept.message();
  EXPECT_TRUE(waited);
  ASSERT_TRUE(wake().is_ok());
  destroy(std::max(one, two));
}

TEST_F(ContextsTest, APrimaryContextWhoseLastUserLeavesGoesAfterTheOperation) {
  const CUdeviceptr block = allocate(weights, 16 * kMiB);
  fill(block, 16 * kMiB, 1);
  unsigned flags = 0;
  int active = 0;
  at_copy = [&] {
    EXPECT_EQ(cuDevicePrimaryCtxRelease_v2(0), CUDA_SUCCESS);
    EXPECT_EQ(cuDevicePrimaryCtxGetState(0, &flags, &active), CUDA_SUCCESS);
    EXPECT_EQ(active, 1);
  };
  EXPECT_TRUE(engine->sleep(from_outside(), &report).is_ok());
  EXPECT_EQ(cuDevicePrimaryCtxGetState(0, &flags, &active), CUDA_SUCCESS);
  EXPECT_EQ(active, 0);
  BlockInfo info;
  EXPECT_FALSE(engine->find(block, &info)) << "its memory has gone with it";
  EXPECT_FALSE(gate::is_closed());
  EXPECT_EQ(cuDevicePrimaryCtxRetain(&context, 0), CUDA_SUCCESS);
}

TEST_F(ContextsTest, MemoryOfAGreenContextIsItsPrimaryContexts) {
  CUgreenCtx green;
  const CUcontext made = make_green(&green);
  engine->green_context_created(made, 0);
  const CUdeviceptr block = allocate_in(made, kMiB);
  fill(block, kMiB, 1);
  engine->context_going(made);
  ASSERT_EQ(cuGreenCtxDestroy(green), CUDA_SUCCESS);
  engine->context_gone(made, true);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_TRUE(holds(block, kMiB, 1));
  EXPECT_EQ(engine->free(block), CUDA_SUCCESS);
}

TEST_F(ContextsTest, AContextThatGoesUnseenEndsNoSleep) {
  CUgreenCtx green;
  const CUcontext made = make_green(&green);
  const CUdeviceptr block = allocate_in(made, kMiB);
  fill(block, kMiB, 1);
  ASSERT_EQ(cuGreenCtxDestroy(green), CUDA_SUCCESS);
  for (int i = 0; i < 2; ++i) {
    const Status slept = sleep();
    ASSERT_TRUE(slept.is_ok()) << slept.message();
    ASSERT_TRUE(wake().is_ok());
  }
  EXPECT_TRUE(holds(block, kMiB, 1));
  EXPECT_EQ(engine->free(block), CUDA_SUCCESS);
}

TEST_F(ContextsTest, AWakeWithoutAContextSaysSo) {
  leave_primary();
  CUcontext own = make_context();
  ASSERT_EQ(cuCtxPushCurrent_v2(own), CUDA_SUCCESS);
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
  const CUmemAccessDesc access{properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr address = 0;
  ASSERT_EQ(engine->mapped().create(weights, &handle, 4 * kMiB, &properties, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressReserve(&address, 4 * kMiB, 0, 0, 0), CUDA_SUCCESS);
  ASSERT_EQ(engine->mapped().map(address, 4 * kMiB, 0, handle, 0), CUDA_SUCCESS);
  ASSERT_EQ(engine->mapped().set_access(address, 4 * kMiB, &access, 1), CUDA_SUCCESS);
  fill(address, 4 * kMiB, 1);
  ASSERT_TRUE(engine->sleep(from_outside(), &report).is_ok());
  destroy(own);
  const Status woke = wake();
  EXPECT_EQ(woke.code(), Code::kBusy);
  EXPECT_NE(woke.message().find("no context on device 0"), std::string::npos) << woke.message();
  EXPECT_TRUE(engine->is_sleeping({}));
  own = make_context();
  EXPECT_TRUE(wake().is_ok());
  EXPECT_FALSE(gate::is_closed());
  EXPECT_TRUE(holds(address, 4 * kMiB, 1));
  EXPECT_EQ(engine->mapped().unmap(address, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(engine->mapped().release(handle), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(address, 4 * kMiB), CUDA_SUCCESS);
  destroy(own);
}

// --- Captures

class CapturesTest : public ContextsTest {
 protected:
  void SetUp() override {
    ContextsTest::SetUp();
    ASSERT_EQ(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
    fill(allocate(weights, kMiB), kMiB, 1);
  }
  void TearDown() override {
    EXPECT_EQ(cuStreamDestroy_v2(stream), CUDA_SUCCESS);
    ContextsTest::TearDown();
  }

  // As the hooks do, but for the gate.
  void begin() {
    engine->capture_begins();
    ASSERT_EQ(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED), CUDA_SUCCESS);
  }
  void end() {
    CUgraph graph = nullptr;
    EXPECT_EQ(cuStreamEndCapture(stream, &graph), CUDA_SUCCESS) << "the capture was broken";
    engine->capture_ended();
    EXPECT_TRUE(graph == nullptr || cuGraphDestroy(graph) == CUDA_SUCCESS);
  }
  std::thread end_soon() {
    return std::thread([this] {
      EXPECT_EQ(cuCtxSetCurrent(context), CUDA_SUCCESS);
      std::this_thread::sleep_for(milliseconds(30));
      end();
    });
  }

  CUstream stream = nullptr;
};

TEST_F(CapturesTest, ATrimBreaksNoCapture) {
  begin();
  EXPECT_EQ(engine->trim(true).code(), Code::kBusy);
  std::thread program = end_soon();
  EXPECT_TRUE(engine->trim(true).is_ok());
  program.join();
}

TEST_F(CapturesTest, ASleepWaitsForACaptureToEnd) {
  begin();
  EXPECT_EQ(engine->sleep(from_outside(), &report).code(), Code::kBusy);
  EXPECT_FALSE(gate::is_closed());
  std::thread program = end_soon();
  EXPECT_TRUE(engine->sleep(from_outside(), &report).is_ok());
  program.join();
  EXPECT_TRUE(wake().is_ok());
}

// At its last moment: another thread of the program is about to call the driver.
class Program : public UnusedMemory {
 public:
  explicit Program(std::function<void()> then) : then_(std::move(then)) {}
  void look(bool) noexcept override { std::thread(then_).join(); }
  Ranges unused() noexcept override { return {}; }

 private:
  const std::function<void()> then_;
};

TEST_F(CapturesTest, ACaptureThatBeginsAsASleepBeginsIsNotBroken) {
  for (const Origin origin : {Origin::kOutside, Origin::kProgram}) {
    Program program([this] {
      CUcontext popped = nullptr;
      EXPECT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
      begin();
      EXPECT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
    });
    engine->set_unused_memory(&program);
    SleepRequest request;
    request.origin = origin;
    EXPECT_EQ(engine->sleep(request, &report).code(), Code::kBusy);
    engine->set_unused_memory(nullptr);
    EXPECT_FALSE(gate::is_closed()) << "the capture's thread would wait there";
    end();
  }
}

TEST_F(CapturesTest, ACaptureThatWouldBeginWhileTheDeviceIsWaitedForBeginsLater) {
  CUdeviceptr outside = 0;
  ASSERT_EQ(cuMemAlloc_v2(&outside, 4096), CUDA_SUCCESS);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(outside, 1, 4096, nullptr), CUDA_SUCCESS);
  simgpu_reset_counts();
  auto trim = std::async(std::launch::async, [&] { return engine->trim(false); });
  while (simgpu_call_count("cuCtxSynchronize") == 0) std::this_thread::yield();
  const auto began = std::chrono::steady_clock::now();
  engine->capture_begins();
  EXPECT_GE(std::chrono::steady_clock::now() - began, Captures::kLongestDelay / 2);
  engine->capture_ended();
  simgpu_release_streams();
  EXPECT_TRUE(trim.get().is_ok());
  EXPECT_EQ(cuMemFree_v2(outside), CUDA_SUCCESS);
}

// --- Who waits, and what a wake of the gate wakes

int threads_now() {
  int count = 0;
  DIR* directory = opendir("/proc/self/task");
  while (const dirent* entry = readdir(directory)) count += entry->d_name[0] != '.' ? 1 : 0;
  closedir(directory);
  return count;
}

TEST_F(ContextsTest, SleepsThatGiveUpLeaveOneThreadForEachContext) {
  EngineOptions options = small_options();
  options.drain_timeout = milliseconds(10);
  make_engine(options);
  const CUdeviceptr block = allocate(weights, kMiB);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block, 1, kMiB, nullptr), CUDA_SUCCESS);
  const int before = threads_now();
  for (int i = 0; i < 20; ++i) EXPECT_EQ(sleep().code(), Code::kBusy);
  EXPECT_LE(threads_now(), before + 1);
  simgpu_release_streams();
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  while (sleep().code() == Code::kBusy) std::this_thread::yield();
  EXPECT_TRUE(engine->is_sleeping({}));
  EXPECT_TRUE(wake().is_ok());
}

TEST_F(ContextsTest, AWakeForTheGateLeavesWhatTheProgramPutToSleepItself) {
  allocate(weights, 16 * kMiB);
  allocate(kv_cache, 16 * kMiB);
  ASSERT_TRUE(sleep({"kv_cache"}).is_ok());
  ASSERT_TRUE(engine->sleep(from_outside(), &report).is_ok());
  EXPECT_TRUE(gate::is_closed());
  ASSERT_TRUE(engine->wake({.tags = {}, .only_slept_outside = true}, &report).is_ok());
  EXPECT_FALSE(gate::is_closed());
  EXPECT_FALSE(engine->is_sleeping({"weights"}));
  EXPECT_TRUE(engine->is_sleeping({"kv_cache"}));
  ASSERT_TRUE(wake().is_ok());
}

}  // namespace
}  // namespace dormouse
