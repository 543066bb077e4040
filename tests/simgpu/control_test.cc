// Injected failures, counts, lookup by name, and the process's life in the simulation.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "tests/simgpu/failures.h"
#include "tests/simgpu/kernels.h"
#include "tests/simgpu/settings.h"
#include "tests/simgpu/test_support.h"

namespace simgpu {
namespace {

using ControlTest = SimulatedGpu;

CUresult allocate_and_free() {
  CUdeviceptr block = 0;
  CUresult result = cuMemAlloc(&block, 4096);
  return result == CUDA_SUCCESS ? cuMemFree(block) : result;
}

TEST_F(ControlTest, TheNthUseFailsWithoutEffect) {
  ASSERT_EQ(simgpu_fail_at("cuMemAlloc_v2", 2, CUDA_ERROR_OUT_OF_MEMORY), 0);
  EXPECT_EQ(allocate_and_free(), CUDA_SUCCESS);
  EXPECT_EQ(allocate_and_free(), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(simgpu_usage(0), 0u);
  EXPECT_EQ(allocate_and_free(), CUDA_SUCCESS);
}

TEST_F(ControlTest, RangesAndAllUsesFail) {
  ASSERT_EQ(simgpu_fail_range("cuMemAlloc", 2, 3, CUDA_ERROR_UNKNOWN), 0);
  CUresult expected[] = {CUDA_SUCCESS, CUDA_ERROR_UNKNOWN, CUDA_ERROR_UNKNOWN, CUDA_SUCCESS};
  for (CUresult result : expected) EXPECT_EQ(allocate_and_free(), result);
  ASSERT_EQ(simgpu_fail_at("cuMemAlloc", 0, CUDA_ERROR_OUT_OF_MEMORY), 0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(allocate_and_free(), CUDA_ERROR_OUT_OF_MEMORY);
  simgpu_clear_failures();
  EXPECT_EQ(allocate_and_free(), CUDA_SUCCESS);
}

TEST_F(ControlTest, AnyFunctionCanBeTheOneThatFails) {
  ASSERT_EQ(simgpu_fail_at("*", 2, CUDA_ERROR_UNKNOWN), 0);
  CUdeviceptr block = 0;
  EXPECT_EQ(cuMemAlloc(&block, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(block), CUDA_ERROR_UNKNOWN);
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_fail_at("cuNoSuchFunction", 1, CUDA_ERROR_UNKNOWN), -1);
}

TEST_F(ControlTest, UsesAreCountedByName) {
  for (int i = 0; i < 3; ++i) EXPECT_EQ(allocate_and_free(), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_call_count("cuMemAlloc"), 3u);
  EXPECT_EQ(simgpu_call_count("cuMemFree_v2"), 3u);
  EXPECT_EQ(simgpu_call_count("*"), 6u);
  std::map<std::string, unsigned long long> counts;
  simgpu_for_each_count([](const char* name, unsigned long long count,
                           void* user) { (*static_cast<decltype(counts)*>(user))[name] = count; },
                        &counts);
  EXPECT_EQ(counts, (decltype(counts){{"cuMemAlloc", 3}, {"cuMemFree", 3}}));
  simgpu_reset_counts();
  EXPECT_EQ(simgpu_call_count("*"), 0u);
}

TEST_F(ControlTest, TheGrammarOfFailuresIsStrict) {
  EXPECT_TRUE(inject_failures(""));
  EXPECT_TRUE(
      inject_failures("cuMemCreate:3:CUDA_ERROR_OUT_OF_MEMORY,cuMemMap:*,cuMemFree:2-4:999"));
  for (const char* bad : {"cuMemCreate", "cuMemCreate:", "cuMemCreate:0", "cuMemCreate:x",
                          "cuMemCreate:3:NO_SUCH", "cuMemCreate:4-2", ":1", "cuMemCreate:1-"}) {
    EXPECT_FALSE(inject_failures(bad)) << bad;
  }
}

TEST_F(ControlTest, SizesTakeUnits) {
  size_t bytes = 0;
  EXPECT_TRUE(parse_size("512MiB", &bytes));
  EXPECT_EQ(bytes, 512 * kMiB);
  EXPECT_TRUE(parse_size("3G", &bytes));
  EXPECT_EQ(bytes, size_t{3} << 30);
  EXPECT_TRUE(parse_size("17", &bytes));
  EXPECT_EQ(bytes, 17u);
  for (const char* bad : {"", "x", "-1", "1 MiB", "1MB", "99999999999999999999"})
    EXPECT_FALSE(parse_size(bad, &bytes));
}

TEST_F(ControlTest, LookupGivesTheFormOfTheVersion) {
  struct Case {
    const char* name;
    int version;
    cuuint64_t flags;
    void* expected;
  };
  const Case cases[] = {
      {"cuMemAlloc", 3020, 0, reinterpret_cast<void*>(&cuMemAlloc)},
      {"cuMemAlloc", 13000, 0, reinterpret_cast<void*>(&cuMemAlloc)},
      {"cuMemcpyHtoD", 13000, CU_GET_PROC_ADDRESS_LEGACY_STREAM,
       reinterpret_cast<void*>(&cuMemcpyHtoD)},
      {"cuGetProcAddress", 12000, 0, reinterpret_cast<void*>(&cuGetProcAddress)},
  };
  for (const Case& c : cases) {
    void* address = nullptr;
    auto status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    EXPECT_EQ(cuGetProcAddress(c.name, &address, c.version, c.flags, &status), CUDA_SUCCESS)
        << c.name;
    EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SUCCESS);
    EXPECT_EQ(address, c.expected) << c.name;
  }
}

TEST_F(ControlTest, LookupTellsWhyThereIsNothing) {
  void* address = &address;
  auto status = CU_GET_PROC_ADDRESS_SUCCESS;
  cuGetProcAddress("cuNoSuchFunction", &address, 13000, 0, &status);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  EXPECT_EQ(address, nullptr);
  address = &address;
  cuGetProcAddress("cuMemCreate", &address, 10000, 0, &status);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
  EXPECT_EQ(address, nullptr);
  cuGetProcAddress("cuMemAlloc_v2", &address, 13000, 0, &status);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND) << "names come without a version";
  EXPECT_EQ(cuGetProcAddress(nullptr, &address, 13000, 0, &status), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(ControlTest, LibrariesBringKernels) {
  EXPECT_EQ(find_kernel("kernel_from_a_library"), nullptr);
  EXPECT_FALSE(load_kernel_libraries("/nonexistent.so"));
  EXPECT_TRUE(load_kernel_libraries("tests/simgpu/libtest_kernels.so"));
  EXPECT_NE(find_kernel("kernel_from_a_library"), nullptr);
}

TEST_F(ControlTest, AForkedChildHasNoDriver) {
  CUdeviceptr block = 0;
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  *reinterpret_cast<char*>(block) = 1;
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    CUdeviceptr other = 0;
    bool refused = cuMemAlloc(&other, 1) == CUDA_ERROR_NOT_INITIALIZED &&
                   cuInit(0) == CUDA_ERROR_NOT_INITIALIZED;
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(*reinterpret_cast<char*>(block), 1);
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
}

TEST_F(ControlTest, ManyThreadsUseItAtOnce) {
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      cuCtxSetCurrent(context_);
      CUstream stream;
      if (cuStreamCreate(&stream, i % 2) != CUDA_SUCCESS) ++failures;
      for (int round = 0; round < 50; ++round) {
        CUdeviceptr block = 0;
        char seen = 0;
        size_t bytes = size_t{1} << (8 + (round + i) % 14);
        bool good =
            cuMemAlloc(&block, bytes) == CUDA_SUCCESS &&
            cuMemsetD8Async(block, static_cast<unsigned char>(i), bytes, stream) == CUDA_SUCCESS &&
            cuMemcpyDtoHAsync(&seen, block + bytes - 1, 1, stream) == CUDA_SUCCESS && seen == i &&
            cuMemFree(block) == CUDA_SUCCESS;
        if (!good) ++failures;
      }
      if (cuStreamDestroy(stream) != CUDA_SUCCESS) ++failures;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
}

}  // namespace
}  // namespace simgpu
