// The functions of the simulated libcudart.so.12 whose form differs from CUDA 13's. Their symbols
// are given by hand, since CUDA 13's header declares the same names otherwise.
#include <cstddef>

#include "tests/simgpu/cudart_driver.h"

using namespace simgpu::cudart;  // NOLINT: the functions below carry the real runtime's names

// Declares a function of the runtime's interface whose symbol is `symbol`.
#define SIMGPU_RUNTIME_12(function, symbol, ...)                    \
  SIMGPU_RUNTIME cudaError_t function(__VA_ARGS__) __asm__(symbol); \
  cudaError_t function(__VA_ARGS__)

namespace {

// CUDA 12's cudaDeviceProp: CUDA 13 took some fields out, so the offsets differ. Only what the
// simulation fills is named.
struct Properties12 {
  char name[256];
  char uuid[16];
  char luid[8];
  unsigned luid_device_node_mask;
  size_t total_global_memory;  // 288
  size_t shared_memory_per_block;
  int registers_per_block;
  int warp_size;
  size_t pitch;
  int threads_per_block;
  int threads[3];
  int grid[3];
  int clock_rate;
  size_t constant_memory;
  int major;  // 360
  int minor;
  size_t texture_alignment;
  size_t texture_pitch_alignment;
  int device_overlap;
  int multiprocessors;  // 388
  int rest[160];        // more than the 640 bytes that follow are never written
};
static_assert(offsetof(Properties12, total_global_memory) == 288);
static_assert(offsetof(Properties12, major) == 360);
static_assert(offsetof(Properties12, multiprocessors) == 388);

cudaError_t properties(void* prop, int device) {
  // The size of the structure in CUDA 12: 1032 bytes since 12.0.
  constexpr size_t kSize = 1032;
  static_assert(sizeof(Properties12) >= kSize);
  SIMGPU_DRIVER();
  SIMGPU_CHECK(prop != nullptr, cudaErrorInvalidValue);
  Properties12 filled{};
  if (driver().cuDeviceTotalMem(&filled.total_global_memory, device) != CUDA_SUCCESS) {
    return finish(cudaErrorInvalidDevice);
  }
  driver().cuDeviceGetName(filled.name, sizeof(filled.name), device);
  driver().cuDeviceGetUuid(reinterpret_cast<CUuuid*>(filled.uuid), device);
  filled.warp_size = attribute(device, CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  filled.threads_per_block = attribute(device, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  filled.major = attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  filled.minor = attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  filled.multiprocessors = attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  __builtin_memcpy(prop, &filled, kSize);
  return cudaSuccess;
}

cudaError_t advise(const void* pointer, size_t count, int advice, int device) {
  SIMGPU_CONTEXT();
  return finish(driver().cuMemAdvise(reinterpret_cast<CUdeviceptr>(pointer), count,
                                     static_cast<CUmem_advise>(advice), device));
}

cudaError_t prefetch(const void* pointer, size_t count, int device, cudaStream_t stream,
                     bool per_thread) {
  SIMGPU_CONTEXT();
  auto function = per_thread ? driver().cuMemPrefetchAsync_per_thread : driver().cuMemPrefetchAsync;
  return finish(function(reinterpret_cast<CUdeviceptr>(pointer), count, device, stream));
}

int device_of(cudaMemLocation location) {
  return location.type == cudaMemLocationTypeDevice ? location.id : cudaCpuDeviceId;
}

cudaError_t capture_info(cudaStream_t stream, cudaStreamCaptureStatus* status,
                         unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                         size_t* count, bool per_thread) {
  SIMGPU_CONTEXT();
  auto function =
      per_thread ? driver().cuStreamGetCaptureInfo_per_thread : driver().cuStreamGetCaptureInfo;
  cuuint64_t found = 0;
  CUresult result = function(stream, reinterpret_cast<CUstreamCaptureStatus*>(status), &found,
                             graph, nodes, count);
  if (id != nullptr) *id = found;
  return finish(result);
}

}  // namespace

SIMGPU_RUNTIME_12(get_properties_12, "cudaGetDeviceProperties_v2", void* prop, int device) {
  return properties(prop, device);
}

SIMGPU_RUNTIME_12(advise_12, "cudaMemAdvise", const void* pointer, size_t count, int advice,
                  int device) {
  return advise(pointer, count, advice, device);
}

SIMGPU_RUNTIME_12(advise_v2_12, "cudaMemAdvise_v2", const void* pointer, size_t count, int advice,
                  cudaMemLocation location) {
  return advise(pointer, count, advice, device_of(location));
}

SIMGPU_RUNTIME_12(prefetch_12, "cudaMemPrefetchAsync", const void* pointer, size_t count,
                  int device, cudaStream_t stream) {
  return prefetch(pointer, count, device, stream, false);
}

SIMGPU_RUNTIME_12(prefetch_ptsz_12, "cudaMemPrefetchAsync_ptsz", const void* pointer, size_t count,
                  int device, cudaStream_t stream) {
  return prefetch(pointer, count, device, stream, true);
}

SIMGPU_RUNTIME_12(prefetch_v2_12, "cudaMemPrefetchAsync_v2", const void* pointer, size_t count,
                  cudaMemLocation location, unsigned int, cudaStream_t stream) {
  return prefetch(pointer, count, device_of(location), stream, false);
}

SIMGPU_RUNTIME_12(prefetch_v2_ptsz_12, "cudaMemPrefetchAsync_v2_ptsz", const void* pointer,
                  size_t count, cudaMemLocation location, unsigned int, cudaStream_t stream) {
  return prefetch(pointer, count, device_of(location), stream, true);
}

SIMGPU_RUNTIME_12(capture_info_v2_12, "cudaStreamGetCaptureInfo_v2", cudaStream_t stream,
                  cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                  const cudaGraphNode_t** nodes, size_t* count) {
  return capture_info(stream, status, id, graph, nodes, count, false);
}

SIMGPU_RUNTIME_12(capture_info_v2_ptsz_12, "cudaStreamGetCaptureInfo_v2_ptsz", cudaStream_t stream,
                  cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                  const cudaGraphNode_t** nodes, size_t* count) {
  return capture_info(stream, status, id, graph, nodes, count, true);
}
