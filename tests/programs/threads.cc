// threads: THREADS (default 8) threads allocate, fill, check and free blocks of many sizes for
// ROUNDS (default 200) rounds each. Prints the number of blocks that passed.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "tests/programs/check.h"

namespace {

struct Block {
  void* pointer;
  size_t bytes;
  unsigned char fill;
};

void verify_and_free(const Block& block, cudaStream_t stream) {
  std::vector<unsigned char> seen(block.bytes);
  CHECK(cudaMemcpyAsync(seen.data(), block.pointer, block.bytes, cudaMemcpyDeviceToHost, stream));
  CHECK(cudaStreamSynchronize(stream));
  for (unsigned char byte : seen) {
    if (byte == block.fill) continue;
    std::fprintf(stderr, "a block of %zu bytes was overwritten\n", block.bytes);
    std::exit(1);
  }
  CHECK(cudaFree(block.pointer));
}

void work(unsigned seed, int rounds, std::atomic<int>* passed) {
  std::mt19937 random(seed);
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::vector<Block> live;
  for (int round = 0; round < rounds; ++round) {
    Block block{nullptr, size_t{1} << (random() % 22), static_cast<unsigned char>(random())};
    CHECK(cudaMalloc(&block.pointer, block.bytes));
    CHECK(cudaMemsetAsync(block.pointer, block.fill, block.bytes, stream));
    live.push_back(block);
    if (live.size() < 8) continue;
    size_t at = random() % live.size();
    verify_and_free(live[at], stream);
    live.erase(live.begin() + static_cast<std::ptrdiff_t>(at));
    ++*passed;
  }
  for (const Block& block : live) {
    verify_and_free(block, stream);
    ++*passed;
  }
  CHECK(cudaStreamDestroy(stream));
}

}  // namespace

int main(int argc, char** argv) {
  int threads = argc > 1 ? std::atoi(argv[1]) : 8;
  int rounds = argc > 2 ? std::atoi(argv[2]) : 200;
  std::atomic<int> passed{0};
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) {
    workers.emplace_back(work, static_cast<unsigned>(i + 1), rounds, &passed);
  }
  for (std::thread& worker : workers) worker.join();
  std::printf("passed %d\n", passed.load());
  return passed == threads * rounds ? 0 : 1;
}
