// Calls functions of the runtime that a library which hooks allocations lacks, and prints what each
// returned.
#include <cuda_runtime_api.h>

#include <cstdio>

int main() {
  void* pointer = nullptr;
  void* async = nullptr;
  void* pitched = nullptr;
  std::size_t free_bytes = 0;
  std::size_t total = 0;
  std::size_t pitch = 0;
  std::printf("cudaMalloc %d\n", cudaMalloc(&pointer, 1 << 20));
  std::printf("cudaMemGetInfo %d\n", cudaMemGetInfo(&free_bytes, &total));
  std::printf("cudaMallocAsync %d\n", cudaMallocAsync(&async, 1 << 20, nullptr));
  std::printf("cudaMallocPitch %d\n", cudaMallocPitch(&pitched, &pitch, 1000, 100));
  std::printf("cudaFreeAsync %d\n", cudaFreeAsync(async, nullptr));
  std::printf("cudaFree %d %d\n", cudaFree(pitched), cudaFree(pointer));
  std::printf("cudaDeviceReset %d\n", cudaDeviceReset());
  return 0;
}
