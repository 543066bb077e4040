// serve: a program of the kind that Dormouse is for. It loads "weights" between an NVTX push and
// pop, allocates scratch memory outside, and then works on both at each line "step" that it reads:
// kernels, copies, fills. Each step prints a checksum of the weights and the scratch; "info" prints
// the device's free memory; "quit" or the end of the input ends it. Arguments: MiB of weights (64),
// MiB of scratch (8).
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <nvtx3/nvToolsExt.h>

#include <cinttypes>
#include <iostream>
#include <string>

#include "tests/programs/check.h"
#include "tests/programs/kernels.h"

namespace {

constexpr size_t kMiB = size_t{1} << 20;

class Server {
 public:
  Server(size_t weight_bytes, size_t scratch_bytes) : scratch_bytes_(scratch_bytes) {
    CHECK(cudaFree(nullptr));
    CHECK(cuModuleLoadData(&module_, programs::kKernels));
    CHECK(cuModuleGetFunction(&fill_, module_, "fill_u32"));
    CHECK(cuModuleGetFunction(&add_, module_, "add_u32"));
    CHECK(cuModuleGetFunction(&sum_, module_, "checksum_u64"));
    CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK(cudaMallocHost(reinterpret_cast<void**>(&result_), sizeof(uint64_t)));
    load_weights(weight_bytes);
    CHECK(cudaMalloc(&scratch_, scratch_bytes_));
    CHECK(cudaMalloc(&device_result_, sizeof(uint64_t)));
  }

  ~Server() {
    for (const Layer& layer : weights_) CHECK(cudaFree(layer.pointer));
    CHECK(cudaFree(scratch_));
    CHECK(cudaFree(device_result_));
    CHECK(cudaFreeHost(result_));
    CHECK(cudaStreamDestroy(stream_));
    CHECK(cuModuleUnload(module_));
  }

  // Weights are only read, as in serving; the scratch changes from step to step.
  void step() {
    ++steps_;
    uint64_t words = scratch_bytes_ / sizeof(uint32_t);
    launch(fill_, scratch_, words, steps_);
    launch(add_, scratch_, words, 7u);
    size_t piece = std::min(scratch_bytes_ / 2, weights_.front().bytes);
    CHECK(cudaMemcpyAsync(scratch_, weights_.front().pointer, piece, cudaMemcpyDeviceToDevice,
                          stream_));
    CHECK(cudaMemsetAsync(device_result_, 0, sizeof(uint64_t), stream_));
    for (const Layer& layer : weights_)
      launch(sum_, layer.pointer, layer.bytes / sizeof(uint64_t), device_result_);
    launch(sum_, scratch_, scratch_bytes_ / sizeof(uint64_t), device_result_);
    CHECK(cudaMemcpyAsync(result_, device_result_, sizeof(uint64_t), cudaMemcpyDeviceToHost,
                          stream_));
    CHECK(cudaStreamSynchronize(stream_));
    std::printf("step %u checksum %016" PRIx64 "\n", steps_, *result_);
    std::fflush(stdout);
  }

 private:
  struct Layer {
    void* pointer;
    size_t bytes;
  };

  void load_weights(size_t bytes) {
    nvtxRangePushA("weights");
    // Layers of unequal sizes, as a model's are.
    for (size_t left = bytes, layer = 0; left > 0; ++layer) {
      size_t size = std::min(left, (layer % 3 + 1) * 3 * kMiB);
      void* pointer = nullptr;
      CHECK(cudaMalloc(&pointer, size));
      std::vector<unsigned char> content = programs::pattern(size, static_cast<uint32_t>(layer));
      CHECK(cudaMemcpy(pointer, content.data(), size, cudaMemcpyHostToDevice));
      weights_.push_back({pointer, size});
      left -= size;
    }
    nvtxRangePop();
  }

  template <typename Last>
  void launch(CUfunction function, void* data, uint64_t count, Last last) {
    void* arguments[] = {&data, &count, &last};
    CHECK(cuLaunchKernel(function, 64, 1, 1, 256, 1, 1, 0, stream_, arguments, nullptr));
  }

  const size_t scratch_bytes_;
  CUmodule module_ = nullptr;
  CUfunction fill_ = nullptr, add_ = nullptr, sum_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::vector<Layer> weights_;
  void* scratch_ = nullptr;
  void* device_result_ = nullptr;
  uint64_t* result_ = nullptr;
  unsigned steps_ = 0;
};

void print_info() {
  size_t free = 0, total = 0;
  CHECK(cudaMemGetInfo(&free, &total));
  std::printf("free %zu total %zu\n", free, total);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  size_t weights = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 64;
  size_t scratch = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 8;
  if (weights == 0 || scratch == 0) {
    std::fprintf(stderr, "usage: serve [MiB of weights] [MiB of scratch]\n");
    return 2;
  }
  Server server(weights * kMiB, scratch * kMiB);
  std::printf("ready\n");
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line) && line != "quit";) {
    if (line == "step") {
      server.step();
    } else if (line == "info") {
      print_info();
    } else {
      std::fprintf(stderr, "unknown command '%s'\n", line.c_str());
      return 2;
    }
  }
  return 0;
}
