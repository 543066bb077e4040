// The rules of the CUDA driver that Dormouse and the simulation rely on. The test links
// libcuda.so.1 and nothing of the simulation, so it holds the real driver and the simulated one to
// the same expectations: what it says was first seen on driver 580 with an H100.
#include <cuda.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <vector>

namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kPage = 2 * kMiB;

// A function that runs on a stream and keeps it busy for a while.
void nap(void*) {
  usleep(100000);
}

class DriverRules : public ::testing::Test {
 protected:
  void SetUp() override {
    CUresult start = cuInit(0);
    if (start == CUDA_ERROR_NO_DEVICE) GTEST_SKIP() << "no GPU";
    ASSERT_EQ(start, CUDA_SUCCESS);
    ASSERT_EQ(cuDevicePrimaryCtxRetain(&context_, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSetCurrent(context_), CUDA_SUCCESS);
    ASSERT_EQ(cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
    prop_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access_.location = prop_.location;
    access_.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  void TearDown() override {
    if (context_ == nullptr) return;
    EXPECT_EQ(cuStreamDestroy(stream_), CUDA_SUCCESS);
    EXPECT_EQ(cuDevicePrimaryCtxRelease(0), CUDA_SUCCESS);
  }

  // Reserves `pages` pages and maps a handle of two pages at the start and, if told so, a second
  // one behind it.
  void map_pairs(size_t pages, int pairs) {
    ASSERT_EQ(cuMemAddressReserve(&at_, pages * kPage, 0, 0, 0), CUDA_SUCCESS);
    for (int i = 0; i < pairs; ++i) {
      CUmemGenericAllocationHandle handle;
      ASSERT_EQ(cuMemCreate(&handle, 2 * kPage, &prop_, 0), CUDA_SUCCESS);
      ASSERT_EQ(cuMemMap(at_ + 2 * i * kPage, 2 * kPage, 0, handle, 0), CUDA_SUCCESS);
      ASSERT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
    }
  }
  void unmap(size_t pages, int pairs) {
    EXPECT_EQ(cuMemUnmap(at_, 2 * pairs * kPage), CUDA_SUCCESS);
    EXPECT_EQ(cuMemAddressFree(at_, pages * kPage), CUDA_SUCCESS);
  }

  CUcontext context_ = nullptr;
  CUstream stream_ = nullptr;
  CUdeviceptr at_ = 0;
  CUmemAllocationProp prop_{};
  CUmemAccessDesc access_{};
};

// A forked child's result of a call, as its exit status.
int in_child(const std::function<int()>& call) {
  pid_t child = fork();
  if (child == 0) _exit(call());
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(DriverRules, HandlesAreWholePagesOfAKnownDevice) {
  CUmemGenericAllocationHandle handle;
  EXPECT_EQ(cuMemCreate(&handle, 0, &prop_, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemCreate(&handle, kMiB, &prop_, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemCreate(&handle, kPage + 1, &prop_, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemCreate(&handle, kPage, &prop_, 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemCreate(&handle, size_t{1} << 45, &prop_, 0), CUDA_ERROR_OUT_OF_MEMORY);
  prop_.location.id = 77;
  EXPECT_EQ(cuMemCreate(&handle, kPage, &prop_, 0), CUDA_ERROR_INVALID_DEVICE);
}

TEST_F(DriverRules, ReservationsAreWholePagesAtAlignedHints) {
  CUdeviceptr first = 0, second = 0;
  EXPECT_EQ(cuMemAddressReserve(&first, 0, 0, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemAddressReserve(&first, 4096, 0, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemAddressReserve(&first, kPage, 3, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemAddressReserve(&first, kPage, 0, 0, 1), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemAddressReserve(&first, kPage, 64 * kMiB, 0, 0), CUDA_SUCCESS);
  EXPECT_EQ(first % (64 * kMiB), 0u);
  EXPECT_EQ(cuMemAddressFree(first, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressReserve(&first, 8 * kPage, 0, 0, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressReserve(&second, kPage, 0, first, 0), CUDA_SUCCESS);
  EXPECT_NE(second, first) << "a taken hint moves it";
  EXPECT_EQ(cuMemAddressFree(second, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(first, kPage), CUDA_ERROR_INVALID_VALUE) << "a part of it";
  EXPECT_EQ(cuMemAddressFree(first, 8 * kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(first, 8 * kPage), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemAddressReserve(&second, kPage, 0, first, 0), CUDA_SUCCESS);
  EXPECT_EQ(second, first) << "a free hint is honoured";
  EXPECT_EQ(cuMemAddressFree(second, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressReserve(&second, kPage, 0, first + 4096, 0), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(DriverRules, AHandleIsMappedWholeAndOnceToAPlace) {
  CUmemGenericAllocationHandle handle;
  ASSERT_EQ(cuMemAddressReserve(&at_, 8 * kPage, 0, 0, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemCreate(&handle, 2 * kPage, &prop_, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemMap(at_, kPage, 0, handle, 0), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(cuMemMap(at_, kPage, kPage, handle, 0), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(cuMemMap(at_, 4 * kPage, 0, handle, 0), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(cuMemMap(at_, 0, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemMap(at_, 2 * kPage, 0, handle, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemMap(at_, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemMap(at_ + kPage, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemMap(at_ + 2 * kPage, 2 * kPage, 0, handle, 0), CUDA_SUCCESS)
      << "a second place is fine";
  EXPECT_EQ(cuMemAddressFree(at_, 8 * kPage), CUDA_ERROR_INVALID_VALUE) << "something is mapped";
  EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  unmap(8, 2);
  EXPECT_EQ(cuMemRelease(handle), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(DriverRules, WholeMappingsAreUnmappedSeveralAtOnce) {
  map_pairs(8, 3);
  EXPECT_EQ(cuMemUnmap(at_, kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemUnmap(at_ + kPage, kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemUnmap(at_, 3 * kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemUnmap(at_, 0), CUDA_ERROR_INVALID_VALUE);
  unmap(8, 3);
}

TEST_F(DriverRules, AccessIsPerWholeMappingAndCopiesNeedIt) {
  std::vector<char> host(4 * kPage);
  map_pairs(8, 2);
  EXPECT_EQ(cuMemcpyHtoD(at_, host.data(), 16), CUDA_ERROR_INVALID_VALUE) << "no access yet";
  EXPECT_EQ(cuMemsetD8(at_, 1, 16), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemSetAccess(at_, kPage, &access_, 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemSetAccess(at_, 8 * kPage, &access_, 1), CUDA_ERROR_INVALID_VALUE)
      << "the end is not mapped";
  EXPECT_EQ(cuMemSetAccess(at_, 4 * kPage, &access_, 0), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemSetAccess(at_, 4 * kPage, &access_, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemsetD8(at_, 1, 4 * kPage), CUDA_SUCCESS) << "across mappings that touch";
  EXPECT_EQ(cuMemcpyDtoH(host.data(), at_, 4 * kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemsetD8(at_ + 3 * kPage, 1, 2 * kPage), CUDA_ERROR_INVALID_VALUE);
  access_.flags = CU_MEM_ACCESS_FLAGS_PROT_READ;
  ASSERT_EQ(cuMemSetAccess(at_, 4 * kPage, &access_, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyDtoH(host.data(), at_, 16), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyHtoD(at_, host.data(), 16), CUDA_ERROR_INVALID_VALUE);
  access_.flags = CU_MEM_ACCESS_FLAGS_PROT_NONE;
  ASSERT_EQ(cuMemSetAccess(at_, 4 * kPage, &access_, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyDtoH(host.data(), at_, 16), CUDA_ERROR_INVALID_VALUE);
  unmap(8, 2);
}

TEST_F(DriverRules, QueriesTellTheMappingAndTheReservation) {
  map_pairs(8, 2);
  CUdeviceptr base = 0;
  size_t size = 0;
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, at_ + 2 * kPage + 5), CUDA_ERROR_NOT_FOUND)
      << "no access yet";
  ASSERT_EQ(cuMemSetAccess(at_, 4 * kPage, &access_, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, at_ + 2 * kPage + 5), CUDA_SUCCESS);
  EXPECT_EQ(base, at_ + 2 * kPage);
  EXPECT_EQ(size, 2 * kPage);
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, at_ + 6 * kPage), CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(cuPointerGetAttribute(&size, CU_POINTER_ATTRIBUTE_RANGE_SIZE, at_), CUDA_SUCCESS);
  EXPECT_EQ(size, 8 * kPage) << "the reservation's";
  CUcontext owner = context_;
  EXPECT_EQ(cuPointerGetAttribute(&owner, CU_POINTER_ATTRIBUTE_CONTEXT, at_), CUDA_SUCCESS);
  EXPECT_EQ(owner, nullptr);
  int capable = 9;
  EXPECT_EQ(cuPointerGetAttribute(&capable, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, at_),
            CUDA_SUCCESS);
  EXPECT_EQ(capable, 0);
  CUipcMemHandle shared;
  EXPECT_EQ(cuIpcGetMemHandle(&shared, at_), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(at_), CUDA_ERROR_INVALID_VALUE);
  CUmemGenericAllocationHandle handle;
  EXPECT_EQ(cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(at_ + 6 * kPage)),
            CUDA_ERROR_INVALID_VALUE);
  unmap(8, 2);
}

TEST_F(DriverRules, UnmappingWaitsForNothingButFreeingDoes) {
  CUdeviceptr block;
  void* host = nullptr;
  map_pairs(2, 1);
  ASSERT_EQ(cuLaunchHostFunc(stream_, nap, nullptr), CUDA_SUCCESS);
  unmap(2, 1);
  EXPECT_EQ(cuStreamQuery(stream_), CUDA_ERROR_NOT_READY);
  ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  for (size_t bytes : {size_t{4096}, kPage}) {
    ASSERT_EQ(cuMemAlloc(&block, bytes), CUDA_SUCCESS);
    ASSERT_EQ(cuLaunchHostFunc(stream_, nap, nullptr), CUDA_SUCCESS);
    EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
    EXPECT_EQ(cuStreamQuery(stream_), CUDA_SUCCESS);
  }
  ASSERT_EQ(cuMemHostAlloc(&host, kMiB, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuLaunchHostFunc(stream_, nap, nullptr), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFreeHost(host), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(stream_), CUDA_SUCCESS);
}

TEST_F(DriverRules, BlocksAreFreedByTheirStartOnce) {
  CUdeviceptr block;
  EXPECT_EQ(cuMemAlloc(&block, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemAlloc(&block, size_t{1} << 50), CUDA_ERROR_OUT_OF_MEMORY);
  ASSERT_EQ(cuMemAlloc(&block, 5 * kMiB), CUDA_SUCCESS);
  std::vector<char> host(6 * kMiB);
  EXPECT_EQ(cuMemcpyHtoD(block, host.data(), 5 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyHtoD(block, host.data(), 5 * kMiB + 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemcpyDtoH(host.data(), block + 1, 5 * kMiB), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemsetD32(block + 1, 0, 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(block + 512), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(block), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemcpyDtoH(host.data(), block, 16), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(reinterpret_cast<CUdeviceptr>(host.data())), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(DriverRules, HostMemoryIsRegisteredOnceAndEndsByItsStart) {
  char* host = static_cast<char*>(
      mmap(nullptr, 8 * kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(host, MAP_FAILED);
  EXPECT_EQ(cuMemHostRegister(nullptr, kMiB, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemHostRegister(host, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemHostRegister(host, kMiB, 0x100), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemHostRegister(host + 100, 2 * kMiB, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemHostRegister(host + kMiB, 2 * kMiB, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  EXPECT_EQ(cuMemHostUnregister(host + kMiB), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFreeHost(host + 100), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemHostUnregister(host + 100), CUDA_SUCCESS);
  EXPECT_EQ(cuMemHostUnregister(host + 100), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
  munmap(host + 4 * kMiB, kMiB);
  EXPECT_EQ(cuMemHostRegister(host + 3 * kMiB, 2 * kMiB, 0), CUDA_ERROR_INVALID_VALUE) << "a hole";
  munmap(host, 8 * kMiB);
  void* pinned = nullptr;
  ASSERT_EQ(cuMemHostAlloc(&pinned, 100, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemHostRegister(pinned, 100, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemHostUnregister(pinned), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFreeHost(pinned), CUDA_SUCCESS);
}

TEST_F(DriverRules, AForkedChildHasNoDriverButSeesHostMemory) {
  void* pinned = nullptr;
  ASSERT_EQ(cuMemHostAlloc(&pinned, 4096, 0), CUDA_SUCCESS);
  std::memset(pinned, 7, 4096);
  CUdeviceptr block;
  int count;
  EXPECT_EQ(in_child([&] { return static_cast<int>(cuMemAlloc(&block, 1)); }),
            CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(in_child([&] { return static_cast<int>(cuInit(0)); }), CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(in_child([&] { return static_cast<int>(cuDeviceGetCount(&count)); }),
            CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(in_child([&] { return *static_cast<char*>(pinned); }), 7);
  EXPECT_EQ(cuMemFreeHost(pinned), CUDA_SUCCESS);
}

TEST_F(DriverRules, LookupsTellByTheirStatus) {
  void* function = &function;
  auto status = CU_GET_PROC_ADDRESS_SUCCESS;
  EXPECT_EQ(cuGetProcAddress("cuNoSuch", &function, 12000, 0, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  EXPECT_EQ(function, nullptr);
  function = &function;
  EXPECT_EQ(cuGetProcAddress("cuMemCreate", &function, 10000, 0, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
  EXPECT_EQ(function, nullptr);
  EXPECT_EQ(cuGetProcAddress("cuMemAlloc_v2", &function, 12000, 0, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  EXPECT_EQ(cuGetProcAddress("cuMemAlloc", &function, 99000, 0, &status), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(DriverRules, TheLegacyStreamIsBusyWithTheBlockingOnes) {
  CUstream blocking;
  ASSERT_EQ(cuStreamCreate(&blocking, CU_STREAM_DEFAULT), CUDA_SUCCESS);
  ASSERT_EQ(cuLaunchHostFunc(stream_, nap, nullptr), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(nullptr), CUDA_SUCCESS);
  ASSERT_EQ(cuLaunchHostFunc(blocking, nap, nullptr), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(nullptr), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(cuStreamSynchronize(nullptr), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(blocking), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamDestroy(blocking), CUDA_SUCCESS);
}

TEST_F(DriverRules, HostFunctionsMayNotCallTheDriver) {
  static CUresult seen;
  auto call = [](void*) { seen = cuCtxSynchronize(); };
  ASSERT_EQ(cuLaunchHostFunc(stream_, call, nullptr), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamSynchronize(stream_), CUDA_SUCCESS);
  EXPECT_EQ(seen, CUDA_ERROR_NOT_PERMITTED);
}

// What a call returns while stream_ is captured in global mode, and whether the capture survives
// it.
TEST_F(DriverRules, CapturesForbidWhatWaitsOrAllocates) {
  CUdeviceptr block, other;
  void* pinned = nullptr;
  CUmemGenericAllocationHandle handle;
  CUevent event;
  size_t free, total;
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuMemHostAlloc(&pinned, kPage, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), CUDA_SUCCESS);
  const auto during_capture = [this](const char* name, CUresult expected,
                                     const std::function<CUresult()>& call) {
    CUgraph graph = nullptr;
    ASSERT_EQ(cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_GLOBAL), CUDA_SUCCESS) << name;
    EXPECT_EQ(call(), expected) << name;
    EXPECT_EQ(cuStreamEndCapture(stream_, &graph),
              expected == CUDA_SUCCESS ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        << name;
    if (graph != nullptr) cuGraphDestroy(graph);
  };
  constexpr CUresult kNo = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  during_capture("cuCtxSynchronize", kNo, [] { return cuCtxSynchronize(); });
  during_capture("cuStreamSynchronize", kNo, [this] { return cuStreamSynchronize(stream_); });
  during_capture("cuStreamSynchronize legacy", kNo, [] { return cuStreamSynchronize(nullptr); });
  during_capture("cuStreamQuery", kNo, [this] { return cuStreamQuery(stream_); });
  during_capture("cuEventQuery", kNo, [&] { return cuEventQuery(event); });
  during_capture("cuEventSynchronize", kNo, [&] { return cuEventSynchronize(event); });
  during_capture("cuMemAlloc", kNo, [&] { return cuMemAlloc(&other, kPage); });
  during_capture("cuMemFree", kNo, [&] { return cuMemFree(block); });
  during_capture("cuMemHostAlloc", kNo, [] {
    void* more = nullptr;
    return cuMemHostAlloc(&more, kMiB, 0);
  });
  during_capture("cuMemcpyDtoH", CUDA_SUCCESS, [&] { return cuMemcpyDtoH(pinned, block, 16); });
  during_capture("cuMemsetD8", CUDA_SUCCESS, [&] { return cuMemsetD8(block, 1, 16); });
  during_capture("cuMemGetInfo", CUDA_SUCCESS, [&] { return cuMemGetInfo(&free, &total); });
  during_capture("cuMemCreate", CUDA_SUCCESS,
                 [&] { return cuMemCreate(&handle, kPage, &prop_, 0); });
  EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  EXPECT_EQ(cuEventDestroy(event), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFreeHost(pinned), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
}

// Last in the file, as it ends the context that the others use.
TEST_F(DriverRules, APrimaryContextThatEndedStaysCurrentAndDead) {
  CUdeviceptr block, other;
  CUcontext again = nullptr, current = nullptr;
  CUdevice device = -1;
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuDevicePrimaryCtxRelease(0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAlloc(&other, 1), CUDA_ERROR_CONTEXT_IS_DESTROYED);
  EXPECT_EQ(cuCtxSynchronize(), CUDA_ERROR_CONTEXT_IS_DESTROYED);
  EXPECT_EQ(cuCtxGetDevice(&device), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxGetCurrent(&current), CUDA_SUCCESS);
  EXPECT_EQ(current, context_);
  EXPECT_EQ(cuCtxSetCurrent(context_), CUDA_SUCCESS);
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&again, 0), CUDA_SUCCESS);
  EXPECT_EQ(again, context_);
  EXPECT_EQ(cuMemFree(block), CUDA_ERROR_INVALID_VALUE) << "freed with the context";
  EXPECT_EQ(cuCtxDestroy(again), CUDA_ERROR_INVALID_CONTEXT);
  ASSERT_EQ(cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
}

}  // namespace
