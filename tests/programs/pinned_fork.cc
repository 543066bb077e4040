// pinned_fork: uses device and pinned memory, forks, and goes on. The child has no CUDA: its calls
// must fail and its exit must disturb nothing. Prints "parent ok" when all of the parent's memory
// is as it was.
#include <cuda_runtime_api.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "tests/programs/check.h"

namespace {

// What the child does; its exit status.
int child() {
  void* pointer = nullptr;
  if (cudaMalloc(&pointer, 1 << 20) == cudaSuccess) return 2;  // a forked child cannot use CUDA
  std::vector<unsigned char> host = programs::pattern(1 << 20, 3);
  return programs::checksum(host) != 0 ? 0 : 3;
}

}  // namespace

int main() {
  constexpr size_t kBytes = 4 << 20;
  std::vector<unsigned char> content = programs::pattern(kBytes, 1);
  void *device = nullptr, *pinned = nullptr;
  std::vector<unsigned char> registered(kBytes);
  CHECK(cudaMalloc(&device, kBytes));
  CHECK(cudaMallocHost(&pinned, kBytes));
  CHECK(cudaHostRegister(registered.data(), kBytes, cudaHostRegisterDefault));
  std::memcpy(pinned, content.data(), kBytes);
  CHECK(cudaMemcpy(device, pinned, kBytes, cudaMemcpyHostToDevice));
  pid_t process = fork();
  if (process < 0) {
    std::perror("fork");
    return 1;
  }
  if (process == 0) _exit(child());
  int status = 0;
  if (waitpid(process, &status, 0) != process || status != 0) {
    std::fprintf(stderr, "the child ended with status %d\n", status);
    return 1;
  }
  CHECK(cudaMemcpy(registered.data(), device, kBytes, cudaMemcpyDeviceToHost));
  if (registered != content || std::memcmp(pinned, content.data(), kBytes) != 0) {
    std::fprintf(stderr, "memory changed\n");
    return 1;
  }
  CHECK(cudaHostUnregister(registered.data()));
  CHECK(cudaFreeHost(pinned));
  CHECK(cudaFree(device));
  std::printf("parent ok\n");
  return 0;
}
