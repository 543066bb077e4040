// A CUDA C++ program as nvcc builds it by default, with the runtime linked in: a digest of the same
// result for each line `compute`. Argument: MiB of memory.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#define CHECK(call)                                                                      \
  do {                                                                                   \
    cudaError_t check_result_ = (call);                                                  \
    if (check_result_ != cudaSuccess) {                                                  \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(check_result_));        \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

__global__ void fill(uint64_t* data, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    data[i] = (i + 1) * 0x9E3779B97F4A7C15;
  }
}

__global__ void stencil(const uint64_t* from, uint64_t* to, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint64_t left = from[(i + count - 1) % count];
    const uint64_t right = from[(i + 1) % count];
    to[i] = (from[i] ^ (left >> 7)) + (right << 3);
  }
}

__global__ void digest(const uint64_t* data, size_t count, unsigned long long* sum) {
  unsigned long long mine = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    mine += data[i] * (2 * i + 1);
  }
  atomicAdd(sum, mine);
}

int main(int argc, char** argv) {
  const size_t bytes = (argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 512) << 20;
  const size_t count = bytes / 2 / sizeof(uint64_t);
  uint64_t* source = nullptr;
  uint64_t* target = nullptr;
  unsigned long long* sum = nullptr;
  CHECK(cudaMalloc(&source, bytes / 2));
  CHECK(cudaMalloc(&target, bytes / 2));
  CHECK(cudaMalloc(&sum, sizeof(*sum)));
  fill<<<1024, 256>>>(source, count);
  CHECK(cudaDeviceSynchronize());
  std::printf("ready %zu\n", bytes);
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line) && line != "quit";) {
    if (line != "compute") continue;
    unsigned long long result = 0;
    CHECK(cudaMemset(sum, 0, sizeof(*sum)));
    stencil<<<1024, 256>>>(source, target, count);
    digest<<<1024, 256>>>(target, count, sum);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(&result, sum, sizeof(result), cudaMemcpyDeviceToHost));
    std::printf("result %016llx\n", result);
    std::fflush(stdout);
  }
  CHECK(cudaFree(source));
  CHECK(cudaFree(target));
  CHECK(cudaFree(sum));
  return 0;
}
