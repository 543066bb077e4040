// A program on direct_runtime.cc, whose calls no hook sees: it runs as without the library, which
// says that it does nothing for it.
#include <cuda_runtime_api.h>

#define DORMOUSE_OPTIONAL
#include "shim/abi/dormouse.h"
#include "tests/preload/expect.h"

namespace {

void a_runtime_past_the_hooks() {
  for (int i = 0; i < 2; ++i) {
    void* pointer = nullptr;
    EXPECT(dormouse_region_begin("weights") == DORMOUSE_OK, "a region");
    EXPECT(cudaMalloc(&pointer, size_t{8} << 20) == cudaSuccess, "cudaMalloc");
    EXPECT(dormouse_region_end() == DORMOUSE_OK, "its end");
    EXPECT(cudaFree(pointer) == cudaSuccess, "cudaFree");
  }
  EXPECT(dormouse_sleep(nullptr, 0, 0) == DORMOUSE_NOT_ACTIVE, "a sleep");
}

}  // namespace

int main(int argc, char** argv) {
  if (dormouse_version == nullptr) fail("the library is not loaded");
  return run_case(argc, argv, {CASE(a_runtime_past_the_hooks)});
}
