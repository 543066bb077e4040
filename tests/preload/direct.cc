// A program on direct_runtime.cc, whose calls no driver hook sees: the runtime's hooks serve it.
#include <cuda_runtime_api.h>

#define DORMOUSE_OPTIONAL
#include "shim/abi/dormouse.h"
#include "tests/preload/expect.h"

namespace {

constexpr size_t kBytes = size_t{8} << 20;

dormouse_tag_stats stats() {
  dormouse_tag_stats result{};
  result.size = sizeof(result);
  size_t count = 0;
  EXPECT(dormouse_stats(&result, 1, &count) == DORMOUSE_OK, "stats");
  return result;
}

size_t free_bytes() {
  size_t free = 0;
  size_t total = 0;
  EXPECT(cudaMemGetInfo(&free, &total) == cudaSuccess, "cudaMemGetInfo");
  return free;
}

void a_runtime_past_the_driver() {
  void* plain = nullptr;
  EXPECT(cudaMalloc(&plain, kBytes) == cudaSuccess, "outside a region");
  const size_t before = free_bytes();
  void* tagged = nullptr;
  dormouse_region_begin("weights");
  EXPECT(cudaMalloc(&tagged, kBytes) == cudaSuccess, "inside");
  void* too_much = nullptr;
  EXPECT(cudaMalloc(&too_much, size_t{1} << 50) == cudaErrorMemoryAllocation, "too much");
  void* nothing = &nothing;
  EXPECT(cudaMalloc(&nothing, 0) != cudaSuccess, "this runtime's cudaMalloc(0)");
  dormouse_region_end();
  EXPECT(stats().blocks == 1 && stats().allocations == 1, "the tagged block");
  EXPECT(free_bytes() + kBytes <= before, "it is the only one");
  EXPECT(cudaFree(static_cast<char*>(tagged) + 256) == cudaErrorInvalidValue, "in the middle");
  EXPECT(cudaFree(tagged) == cudaSuccess, "its free");
  EXPECT(cudaFree(tagged) == cudaErrorInvalidValue, "twice");
  EXPECT(stats().blocks == 0, "after it");
  EXPECT(free_bytes() == before, "kept memory counts as free");
  EXPECT(cudaFree(plain) == cudaSuccess, "the plain block");
}

void a_reset_past_the_driver() {
  void* tagged = nullptr;
  dormouse_region_begin("weights");
  EXPECT(cudaMalloc(&tagged, kBytes) == cudaSuccess, "cudaMalloc");
  dormouse_region_end();
  EXPECT(cudaDeviceReset() == cudaSuccess, "cudaDeviceReset");
  EXPECT(stats().blocks == 0, "blocks after the reset");
}

}  // namespace

int main(int argc, char** argv) {
  if (dormouse_version == nullptr) fail("the library is not loaded");
  return run_case(argc, argv, {CASE(a_runtime_past_the_driver), CASE(a_reset_past_the_driver)});
}
