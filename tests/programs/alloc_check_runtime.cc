// alloc_check on the runtime; linked once to a dynamic and once to a static libcudart.
#include <cuda_runtime_api.h>

#include "tests/programs/alloc_check_body.h"

namespace {

struct RuntimeGpu {
  void start() { CHECK(cudaFree(nullptr)); }
  uint64_t allocate(size_t bytes) {
    void* pointer = nullptr;
    CHECK(cudaMalloc(&pointer, bytes));
    return reinterpret_cast<uint64_t>(pointer);
  }
  void release(uint64_t pointer) { CHECK(cudaFree(at(pointer))); }
  void to_device(uint64_t to, const void* from, size_t bytes) {
    CHECK(cudaMemcpy(at(to), from, bytes, cudaMemcpyHostToDevice));
  }
  void to_host(void* to, uint64_t from, size_t bytes) {
    CHECK(cudaMemcpy(to, at(from), bytes, cudaMemcpyDeviceToHost));
  }
  void on_device(uint64_t to, uint64_t from, size_t bytes) {
    CHECK(cudaMemcpy(at(to), at(from), bytes, cudaMemcpyDeviceToDevice));
  }
  void set(uint64_t pointer, int byte, size_t bytes) {
    CHECK(cudaMemset(at(pointer), byte, bytes));
  }
  void synchronize() { CHECK(cudaDeviceSynchronize()); }

  static void* at(uint64_t pointer) { return reinterpret_cast<void*>(pointer); }
};

}  // namespace

int main() {
  RuntimeGpu gpu;
  return programs::alloc_check(gpu);
}
