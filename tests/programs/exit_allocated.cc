// exit_allocated: ends while memory is allocated, a stream has work and an event is recorded, as
// many programs do. With the argument "thread", another thread is in the middle of allocating.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "tests/programs/check.h"

int main(int argc, char** argv) {
  constexpr size_t kBytes = 8 << 20;
  void *large = nullptr, *small = nullptr, *pinned = nullptr;
  cudaStream_t stream = nullptr;
  cudaEvent_t event = nullptr;
  CHECK(cudaMalloc(&large, kBytes));
  CHECK(cudaMalloc(&small, 100));
  CHECK(cudaMallocHost(&pinned, kBytes));
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&event));
  CHECK(cudaMemsetAsync(large, 1, kBytes, stream));
  CHECK(cudaMemcpyAsync(pinned, large, kBytes, cudaMemcpyDeviceToHost, stream));
  CHECK(cudaEventRecord(event, stream));
  if (argc > 1 && std::strcmp(argv[1], "thread") == 0) {
    static std::atomic<int> rounds{0};
    std::thread([] {
      void* pointer = nullptr;
      // Calls may fail once the process is on its way out.
      while (cudaMalloc(&pointer, 1 << 16) == cudaSuccess && cudaFree(pointer) == cudaSuccess)
        ++rounds;
    }).detach();
    while (rounds < 10) std::this_thread::yield();
  }
  std::printf("leaving\n");
  return 0;
}
