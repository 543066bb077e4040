// The simulated runtime on the simulated libcuda.so.1: errors, contexts, entry points, memory.
// Built against the dynamic and the static runtime.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr size_t kMiB = size_t{1} << 20;

// A control function of the simulated driver that the runtime loaded.
template <typename Function>
Function control(const char* name) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, name));
}

TEST(RuntimeTest, TheFirstCallMakesAContext) {
  int count = 0, device = -1;
  ASSERT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  EXPECT_EQ(count, 2);
  ASSERT_EQ(cudaFree(nullptr), cudaSuccess);
  EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
  EXPECT_EQ(device, 0);
  std::thread([] {
    void* pointer = nullptr;
    EXPECT_EQ(cudaMalloc(&pointer, kMiB), cudaSuccess) << "every thread has one";
    EXPECT_EQ(cudaFree(pointer), cudaSuccess);
  }).join();
}

TEST(RuntimeTest, TheLastErrorIsKeptPerThread) {
  ASSERT_EQ(cudaGetLastError(), cudaSuccess);
  void* pointer = nullptr;
  EXPECT_EQ(cudaMalloc(&pointer, size_t{1} << 50), cudaErrorMemoryAllocation);
  EXPECT_EQ(pointer, nullptr);
  std::thread([] { EXPECT_EQ(cudaGetLastError(), cudaSuccess); }).join();
  EXPECT_EQ(cudaPeekAtLastError(), cudaErrorMemoryAllocation);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation) << "a success does not clear it";
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_STREQ(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation");
  EXPECT_STREQ(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory");
}

TEST(RuntimeTest, NothingIsAllocatedForZeroBytesAndFreeingItIsFine) {
  void* pointer = &pointer;
  EXPECT_EQ(cudaMalloc(&pointer, 0), cudaSuccess);
  EXPECT_EQ(pointer, nullptr);
  EXPECT_EQ(cudaFree(pointer), cudaSuccess);
  int local = 0;
  EXPECT_EQ(cudaFree(&local), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
}

TEST(RuntimeTest, CopiesGoBothWays) {
  std::vector<char> in(kMiB), out(kMiB);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<char>(i * 3);
  void *first = nullptr, *second = nullptr;
  ASSERT_EQ(cudaMalloc(&first, kMiB), cudaSuccess);
  ASSERT_EQ(cudaMalloc(&second, kMiB), cudaSuccess);
  ASSERT_EQ(cudaMemcpy(first, in.data(), kMiB, cudaMemcpyHostToDevice), cudaSuccess);
  ASSERT_EQ(cudaMemcpy(second, first, kMiB, cudaMemcpyDefault), cudaSuccess);
  ASSERT_EQ(cudaMemset(first, 0, kMiB), cudaSuccess);
  ASSERT_EQ(cudaMemcpy(out.data(), second, kMiB, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(in, out);
  EXPECT_EQ(cudaMemcpy(out.data(), second, kMiB + 1, cudaMemcpyDeviceToHost),
            cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(out.data(), second, 1, static_cast<cudaMemcpyKind>(9)),
            cudaErrorInvalidMemcpyDirection);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidMemcpyDirection);
  EXPECT_EQ(cudaFree(first), cudaSuccess);
  EXPECT_EQ(cudaFree(second), cudaSuccess);
}

TEST(RuntimeTest, PitchedAndThreeDimensionalMemory) {
  cudaPitchedPtr volume{};
  ASSERT_EQ(cudaMalloc3D(&volume, cudaExtent{100, 4, 3}), cudaSuccess);
  EXPECT_GE(volume.pitch, 100u);
  ASSERT_EQ(cudaMemset3D(volume, 8, cudaExtent{100, 4, 3}), cudaSuccess);
  std::vector<char> out(100 * 4 * 3);
  cudaMemcpy3DParms copy{};
  copy.srcPtr = volume;
  copy.dstPtr = {out.data(), 100, 100, 4};
  copy.extent = {100, 4, 3};
  copy.kind = cudaMemcpyDeviceToHost;
  ASSERT_EQ(cudaMemcpy3D(&copy), cudaSuccess);
  EXPECT_EQ(out, std::vector<char>(out.size(), 8));
  EXPECT_EQ(cudaFree(volume.ptr), cudaSuccess);
}

TEST(RuntimeTest, EntryPointsAreTheDriversOwn) {
  void* function = nullptr;
  auto status = cudaDriverEntryPointSymbolNotFound;
  ASSERT_EQ(
      cudaGetDriverEntryPointByVersion("cuMemCreate", &function, 12000, cudaEnableDefault, &status),
      cudaSuccess);
  EXPECT_EQ(status, cudaDriverEntryPointSuccess);
  EXPECT_EQ(function, control<void*>("cuMemCreate"));
  ASSERT_EQ(
      cudaGetDriverEntryPointByVersion("cuMemCreate", &function, 10000, cudaEnableDefault, &status),
      cudaSuccess);
  EXPECT_EQ(status, cudaDriverEntryPointVersionNotSufficent);
  EXPECT_EQ(function, nullptr);
}

TEST(RuntimeTest, PointersTellWhatTheyAre) {
  void* pointer = nullptr;
  ASSERT_EQ(cudaMalloc(&pointer, kMiB), cudaSuccess);
  cudaPointerAttributes attributes{};
  EXPECT_EQ(cudaPointerGetAttributes(&attributes, pointer), cudaSuccess);
  EXPECT_EQ(attributes.type, cudaMemoryTypeDevice);
  EXPECT_EQ(attributes.devicePointer, pointer);
  EXPECT_EQ(cudaPointerGetAttributes(&attributes, &attributes), cudaSuccess);
  EXPECT_EQ(attributes.type, cudaMemoryTypeUnregistered);
  EXPECT_EQ(cudaFree(pointer), cudaSuccess);
}

TEST(RuntimeTest, StreamsAreAsynchronous) {
  auto hold = control<void (*)()>("simgpu_hold_streams");
  auto release = control<void (*)()>("simgpu_release_streams");
  ASSERT_NE(hold, nullptr);
  cudaStream_t stream = nullptr;
  void* pointer = nullptr;
  void* pinned = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaMallocAsync(&pointer, kMiB, stream), cudaSuccess);
  ASSERT_EQ(cudaMallocHost(&pinned, kMiB), cudaSuccess);
  std::memset(pinned, 0, kMiB);
  hold();
  ASSERT_EQ(cudaMemsetAsync(pointer, 5, kMiB, stream), cudaSuccess);
  ASSERT_EQ(cudaMemcpyAsync(pinned, pointer, kMiB, cudaMemcpyDeviceToHost, stream), cudaSuccess);
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  EXPECT_EQ(*static_cast<char*>(pinned), 0);
  release();
  ASSERT_EQ(cudaFreeAsync(pointer, stream), cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(*static_cast<char*>(pinned), 5);
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  cudaGetLastError();
}

TEST(RuntimeTest, AResetFreesAllAndTheNextCallStartsAnew) {
  void* pointer = nullptr;
  size_t before = 0, after = 0, total = 0;
  ASSERT_EQ(cudaMalloc(&pointer, 64 * kMiB), cudaSuccess);
  ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
  ASSERT_EQ(cudaDeviceReset(), cudaSuccess);
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  EXPECT_EQ(after - before, 64 * kMiB);
  EXPECT_EQ(cudaFree(pointer), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
}

TEST(RuntimeTest, DevicesAreChosenAndReachEachOther) {
  EXPECT_EQ(cudaSetDevice(2), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidDevice);
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  int device = 0;
  EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
  EXPECT_EQ(device, 1);
  void *here = nullptr, *there = nullptr;
  ASSERT_EQ(cudaMalloc(&here, kMiB), cudaSuccess);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(0, 0), cudaSuccess);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(0, 0), cudaErrorPeerAccessAlreadyEnabled);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  ASSERT_EQ(cudaMalloc(&there, kMiB), cudaSuccess);
  EXPECT_EQ(cudaMemcpyPeer(there, 0, here, 1, kMiB), cudaSuccess);
  cudaPointerAttributes attributes{};
  EXPECT_EQ(cudaPointerGetAttributes(&attributes, here), cudaSuccess);
  EXPECT_EQ(attributes.device, 1);
  EXPECT_EQ(cudaFree(here), cudaSuccess);
  EXPECT_EQ(cudaFree(there), cudaSuccess);
  cudaGetLastError();
}

#if CUDART_VERSION >= 13000
TEST(RuntimeTest, PropertiesDescribeTheDevice) {
  cudaDeviceProp properties;
  ASSERT_EQ(cudaGetDeviceProperties(&properties, 1), cudaSuccess);
  EXPECT_STREQ(properties.name, "Simulated GPU");
  EXPECT_EQ(properties.major, 9);
  EXPECT_EQ(properties.totalGlobalMem, size_t{1} << 30);
}
#endif

}  // namespace
