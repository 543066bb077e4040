// Streams, events, captures and kernels of the simulated driver.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/simgpu/kernels.h"
#include "tests/simgpu/test_support.h"

namespace simgpu {
namespace {

constexpr char kPtx[] = R"(
// .entry not_this_one( in a comment
.version 7.0
.target sm_70
.address_size 64
.visible .entry fill_u32(
    .param .u64 .ptr .global .align 4 data,
    .param .u64 count,
    .param .u32 value
) { ret; }
.entry mystery(.param .align 8 .b8 block[24]) { ret; }
)";

class StreamTest : public SimulatedGpu {
 protected:
  void SetUp() override {
    SimulatedGpu::SetUp();
    ASSERT_EQ(cuMemAlloc(&block_, kPage), CUDA_SUCCESS);
    ASSERT_EQ(cuMemHostAlloc(&pinned_, kPage, 0), CUDA_SUCCESS);
    std::memset(pinned_, 0, kPage);
    ASSERT_EQ(cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
    ASSERT_EQ(cuStreamCreate(&blocking_, CU_STREAM_DEFAULT), CUDA_SUCCESS);
  }
  void TearDown() override {
    EXPECT_EQ(cuStreamDestroy(stream_), CUDA_SUCCESS);
    EXPECT_EQ(cuStreamDestroy(blocking_), CUDA_SUCCESS);
    EXPECT_EQ(cuMemFree(block_), CUDA_SUCCESS);
    EXPECT_EQ(cuMemFreeHost(pinned_), CUDA_SUCCESS);
    SimulatedGpu::TearDown();
  }

  char first() const { return *static_cast<volatile char*>(pinned_); }

  CUdeviceptr block_ = 0;
  void* pinned_ = nullptr;
  CUstream stream_ = nullptr;
  CUstream blocking_ = nullptr;
};
using CaptureTest = StreamTest;
using KernelTest = StreamTest;

TEST_F(StreamTest, WorkIsNotDoneBeforeSynchronization) {
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block_, 5, kPage, stream_), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoHAsync(pinned_, block_, kPage, stream_), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(stream_), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(first(), 0);
  simgpu_release_streams();
  ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  EXPECT_EQ(first(), 5);
  EXPECT_EQ(cuStreamQuery(stream_), CUDA_SUCCESS);
}

TEST_F(StreamTest, PinnedSourcesAreReadLateAndPageableOnesAtOnce) {
  std::vector<char> pageable(16, 1);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemcpyHtoDAsync(block_, pinned_, 16, stream_), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyHtoDAsync(block_ + 16, pageable.data(), 16, stream_), CUDA_SUCCESS);
  std::memset(pinned_, 2, 16);
  std::fill(pageable.begin(), pageable.end(), 2);
  simgpu_release_streams();
  ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  EXPECT_EQ(*reinterpret_cast<char*>(block_), 2);
  EXPECT_EQ(*reinterpret_cast<char*>(block_ + 16), 1);
}

TEST_F(StreamTest, CopiesToPageableMemoryAreDoneWhenTheCallReturns) {
  std::vector<char> pageable(kPage);
  ASSERT_EQ(cuMemsetD8Async(block_, 6, kPage, stream_), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoHAsync(pageable.data(), block_, kPage, stream_), CUDA_SUCCESS);
  EXPECT_EQ(pageable.back(), 6);
}

TEST_F(StreamTest, TheLegacyStreamWaitsForBlockingStreamsAndTheyForIt) {
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block_, 1, kPage, blocking_), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoDAsync(block_ + kMiB, block_, kMiB, nullptr), CUDA_SUCCESS);
  ASSERT_EQ(cuMemsetD8Async(block_, 2, kMiB, blocking_), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoHAsync(pinned_, block_ + kMiB, kMiB, CU_STREAM_LEGACY), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(nullptr), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(cuStreamQuery(stream_), CUDA_SUCCESS) << "the non-blocking one has no part in it";
  simgpu_release_streams();
  ASSERT_EQ(cuStreamSynchronize(nullptr), CUDA_SUCCESS);
  EXPECT_EQ(first(), 1);
  EXPECT_EQ(*reinterpret_cast<char*>(block_), 2);
}

TEST_F(StreamTest, ANonBlockingStreamDoesNotWaitForTheLegacyOne) {
  CUevent event;
  ASSERT_EQ(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), CUDA_SUCCESS);
  struct Latch {
    std::atomic<bool> open{false};
  } latch;
  auto wait = [](void* user) {
    while (!static_cast<Latch*>(user)->open) std::this_thread::yield();
  };
  ASSERT_EQ(cuLaunchHostFunc(nullptr, wait, &latch), CUDA_SUCCESS);
  ASSERT_EQ(cuMemsetD8Async(block_, 9, kPage, stream_), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(nullptr), CUDA_ERROR_NOT_READY);
  ASSERT_EQ(cuMemsetD8Async(block_, 8, kPage, blocking_), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(blocking_), CUDA_ERROR_NOT_READY);
  latch.open = true;
  EXPECT_EQ(cuStreamSynchronize(blocking_), CUDA_SUCCESS);
  EXPECT_EQ(cuEventDestroy(event), CUDA_SUCCESS);
}

TEST_F(StreamTest, EachThreadHasItsOwnDefaultStream) {
  std::atomic<bool> open{false};
  auto wait = [](void* user) {
    while (!*static_cast<std::atomic<bool>*>(user)) std::this_thread::yield();
  };
  ASSERT_EQ(cuLaunchHostFunc(CU_STREAM_PER_THREAD, wait, &open), CUDA_SUCCESS);
  std::thread([&] {
    ASSERT_EQ(cuCtxSetCurrent(context_), CUDA_SUCCESS);
    EXPECT_EQ(cuMemsetD8Async(block_, 4, kPage, CU_STREAM_PER_THREAD), CUDA_SUCCESS);
    EXPECT_EQ(cuStreamSynchronize(CU_STREAM_PER_THREAD), CUDA_SUCCESS);
  }).join();
  EXPECT_EQ(cuStreamQuery(CU_STREAM_PER_THREAD), CUDA_ERROR_NOT_READY);
  open = true;
  EXPECT_EQ(cuStreamSynchronize(CU_STREAM_PER_THREAD), CUDA_SUCCESS);
}

TEST_F(StreamTest, EventsOrderStreamsAndMeasureTime) {
  CUevent begin, end, never, untimed;
  ASSERT_EQ(cuEventCreate(&begin, CU_EVENT_DEFAULT), CUDA_SUCCESS);
  ASSERT_EQ(cuEventCreate(&end, CU_EVENT_DEFAULT), CUDA_SUCCESS);
  ASSERT_EQ(cuEventCreate(&never, CU_EVENT_DEFAULT), CUDA_SUCCESS);
  ASSERT_EQ(cuEventCreate(&untimed, CU_EVENT_DISABLE_TIMING), CUDA_SUCCESS);
  EXPECT_EQ(cuEventQuery(never), CUDA_SUCCESS);
  EXPECT_EQ(cuEventSynchronize(never), CUDA_SUCCESS);
  auto nap = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  ASSERT_EQ(cuEventRecord(begin, stream_), CUDA_SUCCESS);
  ASSERT_EQ(cuLaunchHostFunc(stream_, nap, nullptr), CUDA_SUCCESS);
  ASSERT_EQ(cuMemsetD8Async(block_, 7, kPage, stream_), CUDA_SUCCESS);
  ASSERT_EQ(cuEventRecord(end, stream_), CUDA_SUCCESS);
  EXPECT_EQ(cuEventQuery(end), CUDA_ERROR_NOT_READY);
  ASSERT_EQ(cuStreamWaitEvent(blocking_, end, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoHAsync(pinned_, block_, kPage, blocking_), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamSynchronize(blocking_), CUDA_SUCCESS);
  EXPECT_EQ(first(), 7);
  float milliseconds = 0;
  EXPECT_EQ(cuEventElapsedTime(&milliseconds, begin, end), CUDA_SUCCESS);
  EXPECT_GE(milliseconds, 19.0f);
  EXPECT_EQ(cuEventElapsedTime(&milliseconds, begin, never), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(cuEventElapsedTime(&milliseconds, begin, untimed), CUDA_ERROR_INVALID_HANDLE);
  for (CUevent event : {begin, end, never, untimed}) EXPECT_EQ(cuEventDestroy(event), CUDA_SUCCESS);
  EXPECT_EQ(cuEventDestroy(begin), CUDA_ERROR_INVALID_HANDLE);
}

TEST_F(StreamTest, ADestroyedStreamFinishesItsWork) {
  CUstream brief;
  ASSERT_EQ(cuStreamCreate(&brief, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block_, 3, kPage, brief), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamDestroy(brief), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(brief), CUDA_ERROR_INVALID_HANDLE);
  simgpu_release_streams();
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_EQ(*reinterpret_cast<char*>(block_ + kPage - 1), 3);
}

TEST_F(StreamTest, HostFunctionsMayNotCallTheDriver) {
  CUresult seen = CUDA_SUCCESS;
  auto call = [](void* user) { *static_cast<CUresult*>(user) = cuCtxSynchronize(); };
  ASSERT_EQ(cuLaunchHostFunc(stream_, call, &seen), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  EXPECT_EQ(seen, CUDA_ERROR_NOT_PERMITTED);
}

TEST_F(StreamTest, AStreamWaitsForAValueAndWritesOne) {
  auto* flag = static_cast<std::atomic<uint32_t>*>(pinned_);
  ASSERT_EQ(cuStreamWaitValue32(stream_, reinterpret_cast<CUdeviceptr>(pinned_), 5,
                                CU_STREAM_WAIT_VALUE_GEQ),
            CUDA_SUCCESS);
  ASSERT_EQ(cuStreamWriteValue64(stream_, block_ + 8, 77, CU_STREAM_WRITE_VALUE_DEFAULT),
            CUDA_SUCCESS);
  *flag = 4;
  EXPECT_EQ(cuStreamQuery(stream_), CUDA_ERROR_NOT_READY);
  *flag = 6;
  ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  EXPECT_EQ(*reinterpret_cast<uint64_t*>(block_ + 8), 77u);
  EXPECT_EQ(cuStreamWriteValue64(stream_, block_ + 4, 77, 0), CUDA_ERROR_INVALID_VALUE)
      << "not aligned";
  EXPECT_EQ(cuStreamWriteValue32(stream_, reinterpret_cast<CUdeviceptr>(&flag), 1, 0),
            CUDA_ERROR_INVALID_VALUE);
}

TEST_F(StreamTest, MemoryThatVanishesUnderACopyFailsTheContextForGood) {
  CUcontext own;
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&own, 1), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxPushCurrent(own), CUDA_SUCCESS);
  CUmemAllocationProp prop = properties(1);
  CUmemAccessDesc desc = access(1);
  CUstream stream;
  ASSERT_EQ(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  {
    Mapped mapped(kPage, prop);
    ASSERT_EQ(cuMemSetAccess(mapped.at, kPage, &desc, 1), CUDA_SUCCESS);
    simgpu_hold_streams();
    ASSERT_EQ(cuMemsetD8Async(mapped.at, 1, kPage, stream), CUDA_SUCCESS);
  }
  simgpu_release_streams();
  EXPECT_EQ(cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
  size_t free, total;
  EXPECT_EQ(cuMemGetInfo(&free, &total), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_EQ(cuCtxPopCurrent(&own), CUDA_SUCCESS);
  EXPECT_EQ(cuDevicePrimaryCtxReset(1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemGetInfo(&free, &total), CUDA_SUCCESS)
      << "the other device's context is not touched";
}

TEST_F(CaptureTest, ACaptureRecordsAndALaunchReplays) {
  CUgraph graph;
  CUgraphExec exec;
  ASSERT_EQ(cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_GLOBAL), CUDA_SUCCESS);
  CUstreamCaptureStatus status;
  EXPECT_EQ(cuStreamIsCapturing(stream_, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
  ASSERT_EQ(cuMemsetD8Async(block_, 11, kPage, stream_), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoHAsync(pinned_, block_, kPage, stream_), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamEndCapture(stream_, &graph), CUDA_SUCCESS);
  EXPECT_EQ(first(), 0) << "capturing does nothing";
  size_t count = 0;
  EXPECT_EQ(cuGraphGetNodes(graph, nullptr, &count), CUDA_SUCCESS);
  EXPECT_EQ(count, 2u);
  CUgraphNode nodes[2];
  EXPECT_EQ(cuGraphGetNodes(graph, nodes, &count), CUDA_SUCCESS);
  CUgraphNodeType type;
  EXPECT_EQ(cuGraphNodeGetType(nodes[0], &type), CUDA_SUCCESS);
  EXPECT_EQ(type, CU_GRAPH_NODE_TYPE_MEMSET);
  ASSERT_EQ(cuGraphInstantiate(&exec, graph, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuGraphDestroy(graph), CUDA_SUCCESS);
  for (int i = 0; i < 2; ++i) {
    std::memset(pinned_, 0, kPage);
    ASSERT_EQ(cuGraphLaunch(exec, stream_), CUDA_SUCCESS);
    ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
    EXPECT_EQ(first(), 11);
  }
  EXPECT_EQ(cuGraphExecDestroy(exec), CUDA_SUCCESS);
}

TEST_F(CaptureTest, ForbiddenCallsFailAndInvalidateTheCapture) {
  CUgraph graph;
  const auto forbidden = [this](auto call) {
    ASSERT_EQ(cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_GLOBAL), CUDA_SUCCESS);
    EXPECT_EQ(call(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    CUgraph graph;
    EXPECT_EQ(cuStreamEndCapture(stream_, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    EXPECT_EQ(graph, nullptr);
  };
  forbidden([] { return cuCtxSynchronize(); });
  forbidden([this] { return cuStreamSynchronize(stream_); });
  forbidden([this] { return cuStreamQuery(stream_); });
  forbidden([] {
    CUdeviceptr other;
    return cuMemAlloc(&other, 1);
  });
  forbidden([this] { return cuMemFree(block_); });
  forbidden([this] { return cuStreamSynchronize(blocking_); });
  forbidden([] { return cuStreamQuery(nullptr); });
  EXPECT_EQ(cuStreamEndCapture(stream_, &graph), CUDA_ERROR_ILLEGAL_STATE);
  EXPECT_EQ(cuStreamBeginCapture(nullptr, CU_STREAM_CAPTURE_MODE_GLOBAL),
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

TEST_F(CaptureTest, TheModeOfTheThreadDecidesWhatIsForbidden) {
  CUgraph graph;
  CUdeviceptr other;
  ASSERT_EQ(cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_GLOBAL), CUDA_SUCCESS);
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  ASSERT_EQ(cuThreadExchangeStreamCaptureMode(&mode), CUDA_SUCCESS);
  EXPECT_EQ(mode, CU_STREAM_CAPTURE_MODE_GLOBAL);
  EXPECT_EQ(cuMemAlloc(&other, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(other), CUDA_SUCCESS);
  ASSERT_EQ(cuThreadExchangeStreamCaptureMode(&mode), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamEndCapture(stream_, &graph), CUDA_SUCCESS);
  EXPECT_EQ(cuGraphDestroy(graph), CUDA_SUCCESS);
  // Another thread is not concerned by a thread-local capture, and is by a global one.
  for (CUstreamCaptureMode of :
       {CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_GLOBAL}) {
    ASSERT_EQ(cuStreamBeginCapture(stream_, of), CUDA_SUCCESS);
    CUresult allocated = CUDA_SUCCESS;
    std::thread([&] {
      cuCtxSetCurrent(context_);
      CUdeviceptr in_thread;
      allocated = cuMemAlloc(&in_thread, kPage);
      if (allocated == CUDA_SUCCESS) cuMemFree(in_thread);
    }).join();
    bool global = of == CU_STREAM_CAPTURE_MODE_GLOBAL;
    EXPECT_EQ(allocated, global ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS);
    EXPECT_EQ(cuStreamEndCapture(stream_, &graph),
              global ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS);
    if (graph != nullptr) {
      EXPECT_EQ(cuGraphDestroy(graph), CUDA_SUCCESS);
    }
  }
}

TEST_F(CaptureTest, StreamsForkAndMustJoin) {
  CUevent fork, join;
  CUgraph graph;
  ASSERT_EQ(cuEventCreate(&fork, CU_EVENT_DISABLE_TIMING), CUDA_SUCCESS);
  ASSERT_EQ(cuEventCreate(&join, CU_EVENT_DISABLE_TIMING), CUDA_SUCCESS);
  for (bool joined : {true, false}) {
    ASSERT_EQ(cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), CUDA_SUCCESS);
    ASSERT_EQ(cuEventRecord(fork, stream_), CUDA_SUCCESS);
    ASSERT_EQ(cuStreamWaitEvent(blocking_, fork, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemsetD8Async(block_, 1, kPage, blocking_), CUDA_SUCCESS);
    ASSERT_EQ(cuEventRecord(join, blocking_), CUDA_SUCCESS);
    if (joined) {
      ASSERT_EQ(cuStreamWaitEvent(stream_, join, 0), CUDA_SUCCESS);
    }
    EXPECT_EQ(cuStreamEndCapture(stream_, &graph),
              joined ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    if (graph != nullptr) {
      EXPECT_EQ(cuGraphDestroy(graph), CUDA_SUCCESS);
    }
    CUstreamCaptureStatus status;
    EXPECT_EQ(cuStreamIsCapturing(blocking_, &status), CUDA_SUCCESS);
    EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_NONE);
  }
  EXPECT_EQ(cuEventDestroy(fork), CUDA_SUCCESS);
  EXPECT_EQ(cuEventDestroy(join), CUDA_SUCCESS);
}

TEST_F(CaptureTest, TheLegacyStreamMayNotBeUsedWhileABlockingOneIsCaptured) {
  CUgraph graph;
  ASSERT_EQ(cuStreamBeginCapture(blocking_, CU_STREAM_CAPTURE_MODE_RELAXED), CUDA_SUCCESS);
  EXPECT_EQ(cuMemsetD8Async(block_, 1, kPage, nullptr), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  EXPECT_EQ(cuStreamEndCapture(blocking_, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

TEST_F(KernelTest, KernelsRunInStreamOrderWithTheArgumentsOfTheLaunch) {
  CUmodule module;
  CUfunction fill, missing;
  ASSERT_EQ(cuModuleLoadData(&module, kPtx), CUDA_SUCCESS);
  ASSERT_EQ(cuModuleGetFunction(&fill, module, "fill_u32"), CUDA_SUCCESS);
  EXPECT_EQ(cuModuleGetFunction(&missing, module, "mystery"), CUDA_ERROR_NOT_FOUND)
      << "no implementation";
  EXPECT_EQ(cuModuleGetFunction(&missing, module, "not_this_one"), CUDA_ERROR_NOT_FOUND);
  uint64_t count = kPage / 4;
  uint32_t value = 0x01020304;
  void* arguments[] = {&block_, &count, &value};
  simgpu_hold_streams();
  ASSERT_EQ(cuLaunchKernel(fill, 1, 1, 1, 32, 1, 1, 0, stream_, arguments, nullptr), CUDA_SUCCESS);
  value = 0;
  struct {
    CUdeviceptr data;
    uint64_t count;
    uint32_t value;
  } packed = {block_, 1, 77};
  size_t packed_size = sizeof(packed);
  void* extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, &packed, CU_LAUNCH_PARAM_BUFFER_SIZE,
                   &packed_size, CU_LAUNCH_PARAM_END};
  ASSERT_EQ(cuLaunchKernel(fill, 1, 1, 1, 32, 1, 1, 0, stream_, nullptr, extra), CUDA_SUCCESS);
  simgpu_release_streams();
  ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  EXPECT_EQ(*reinterpret_cast<uint32_t*>(block_ + kPage - 4), 0x01020304u);
  EXPECT_EQ(*reinterpret_cast<uint32_t*>(block_), 77u);
  EXPECT_EQ(cuLaunchKernel(fill, 0, 1, 1, 32, 1, 1, 0, stream_, arguments, nullptr),
            CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuLaunchKernel(fill, 1, 1, 1, 2048, 1, 1, 0, stream_, arguments, nullptr),
            CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuLaunchKernel(fill, 1, 1, 1, 32, 1, 1, 0, stream_, nullptr, nullptr),
            CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuModuleUnload(module), CUDA_SUCCESS);
  EXPECT_EQ(cuModuleUnload(module), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(cuLaunchKernel(fill, 1, 1, 1, 32, 1, 1, 0, stream_, arguments, nullptr),
            CUDA_ERROR_INVALID_HANDLE);
}

TEST_F(KernelTest, ARegisteredKernelStandsForItsNameInALibrary) {
  static unsigned char seen[24];
  EXPECT_TRUE(register_kernel("mystery", [](const simgpu_launch& launch) {
    std::memcpy(seen, launch.params[0], launch.param_sizes[0]);
  }));
  EXPECT_FALSE(register_kernel("fill_u32", [](const simgpu_launch&) {})) << "the name is taken";
  CUlibrary library;
  CUkernel kernel;
  ASSERT_EQ(cuLibraryLoadData(&library, kPtx, nullptr, nullptr, 0, nullptr, nullptr, 0),
            CUDA_SUCCESS);
  ASSERT_EQ(cuLibraryGetKernel(&kernel, library, "mystery"), CUDA_SUCCESS);
  unsigned char block[24];
  std::memset(block, 9, sizeof(block));
  void* arguments[] = {block};
  ASSERT_EQ(cuLaunchKernel(reinterpret_cast<CUfunction>(kernel), 1, 1, 1, 1, 1, 1, 0, stream_,
                           arguments, nullptr),
            CUDA_SUCCESS);
  ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  EXPECT_EQ(std::memcmp(seen, block, sizeof(seen)), 0);
  EXPECT_EQ(cuLibraryUnload(library), CUDA_SUCCESS);
}

TEST_F(KernelTest, ModulesThatCannotRunHereAreRefused) {
  CUmodule module;
  EXPECT_EQ(cuModuleLoadData(&module, "this is no PTX"), CUDA_ERROR_INVALID_IMAGE);
  EXPECT_EQ(cuModuleLoadData(&module, "\177ELF compiled code"), CUDA_ERROR_NO_BINARY_FOR_GPU);
  EXPECT_EQ(cuModuleLoadData(&module, ".version 7.0\n.entry unheard_of() { ret; }"),
            CUDA_ERROR_NO_BINARY_FOR_GPU);
  EXPECT_EQ(cuModuleLoad(&module, "/nonexistent.ptx"), CUDA_ERROR_FILE_NOT_FOUND);
}

}  // namespace
}  // namespace simgpu
