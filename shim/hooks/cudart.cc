// The hooks of libcudart's functions: the public face, for programs that link libcudart. Each calls
// the caller's own real libcudart, which makes the context and keeps the last error, and whose call
// into the driver passes the driver's hooks: they do the work. Only for a libcudart that was seen
// to get past them do these act themselves.
#include "core/log.h"
#include "core/sleep/engine.h"
#include "shim/hooks/hooks.h"
#include "shim/hooks/real.h"
#include "shim/hooks/support.h"
#include "shim/process/process.h"
#include "shim/process/settings.h"
#include "shim/rules/regions.h"

namespace {

using namespace dormouse;
using namespace dormouse::shim;

// A call into the real libcudart, watched for whether it came past a driver hook.
class Watch {
 public:
  Watch() noexcept : outer_(driver_hook_ran) { driver_hook_ran = false; }
  ~Watch() { driver_hook_ran = outer_; }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  bool reached_driver_hook() const noexcept { return driver_hook_ran; }

 private:
  const bool outer_;
};

CUdeviceptr device_pointer(const void* address) noexcept {
  return reinterpret_cast<CUdeviceptr>(address);
}

// After the real function gave memory without a driver hook seeing it: swaps it for the tag's if
// the allocation has one. `address` is where the program reads the result.
cudaError_t settle(Cudart& cudart, const Watch& watch, cudaError_t result, void** address,
                   std::size_t bytes) noexcept {
  if (result != cudaSuccess || watch.reached_driver_hook() || address == nullptr ||
      *address == nullptr) {
    return result;
  }
  driver_initialised();
  Engine* known = engine();
  const TagId tag = known != nullptr && !exiting() ? allocation_tag(bytes) : kNoTag;
  if (tag == kNoTag) return result;
  if (!cudart.bypasses_driver_hooks.exchange(true)) {
    log().info(
        "a CUDA runtime in this process calls the driver directly; its calls are handled "
        "where the program calls it");
  }
  CUdeviceptr tagged = 0;
  const CUresult allocated = known->allocate(tag, bytes, &tagged);
  if (allocated != CUDA_SUCCESS && allocated != CUDA_ERROR_OUT_OF_MEMORY) {
    say_untagged(allocated);
    return cudaSuccess;
  }
  DORMOUSE_CUDART(cudart, cudaFree)(*address);
  *address = reinterpret_cast<void*>(tagged);
  return allocated == CUDA_SUCCESS ? cudaSuccess : cudaErrorMemoryAllocation;
}

// The engine if it must free `address` here, since the driver's hook will not see the call.
Engine* owner_past_driver(const Cudart& cudart, const void* address) noexcept {
  if (!cudart.bypasses_driver_hooks.load(std::memory_order_relaxed)) return nullptr;
  Engine* known = engine();
  return known != nullptr && known->owns(device_pointer(address)) ? known : nullptr;
}

cudaError_t free_here(Engine& owner, const void* address) noexcept {
  if (exiting()) return cudaSuccess;
  return owner.free(device_pointer(address)) == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t handed_out(cudaError_t result, const char* symbol, void** function) noexcept {
  if (result == cudaSuccess) hand_out(symbol, function);
  return result;
}

}  // namespace

#define DORMOUSE_CALLERS_CUDART cudart_of(__builtin_return_address(0))

// --- Allocation

cudaError_t cudaMalloc(void** address, size_t size) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  const Watch watch;
  return settle(cudart, watch, DORMOUSE_CUDART(cudart, cudaMalloc)(address, size), address, size);
}

cudaError_t cudaMallocPitch(void** address, size_t* pitch, size_t width, size_t height) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  const Watch watch;
  const cudaError_t result =
      DORMOUSE_CUDART(cudart, cudaMallocPitch)(address, pitch, width, height);
  return settle(cudart, watch, result, address, result == cudaSuccess ? *pitch * height : 0);
}

cudaError_t cudaMalloc3D(cudaPitchedPtr* pitched, cudaExtent extent) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  const Watch watch;
  const cudaError_t result = DORMOUSE_CUDART(cudart, cudaMalloc3D)(pitched, extent);
  if (result != cudaSuccess) return result;
  return settle(cudart, watch, result, &pitched->ptr,
                pitched->pitch * extent.height * extent.depth);
}

// Within a capture the allocation is a node of the graph, and stays the runtime's.
cudaError_t cudaMallocAsync(void** address, size_t size, cudaStream_t stream) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  const Watch watch;
  const cudaError_t result = DORMOUSE_CUDART(cudart, cudaMallocAsync)(address, size, stream);
  if (watch.reached_driver_hook() || is_capturing(stream)) return result;
  return settle(cudart, watch, result, address, size);
}

cudaError_t cudaMallocAsync_ptsz(void** address, size_t size, cudaStream_t stream) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  const Watch watch;
  const cudaError_t result = DORMOUSE_CUDART(cudart, cudaMallocAsync_ptsz)(address, size, stream);
  if (watch.reached_driver_hook() || is_capturing(per_thread(stream))) return result;
  return settle(cudart, watch, result, address, size);
}

// --- Release

cudaError_t cudaFree(void* address) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  if (Engine* owner = owner_past_driver(cudart, address)) return free_here(*owner, address);
  return DORMOUSE_CUDART(cudart, cudaFree)(address);
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t stream) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  if (Engine* owner = owner_past_driver(cudart, address)) return free_here(*owner, address);
  return DORMOUSE_CUDART(cudart, cudaFreeAsync)(address, stream);
}

cudaError_t cudaFreeAsync_ptsz(void* address, cudaStream_t stream) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  if (Engine* owner = owner_past_driver(cudart, address)) return free_here(*owner, address);
  return DORMOUSE_CUDART(cudart, cudaFreeAsync_ptsz)(address, stream);
}

// --- Queries and contexts

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  const Watch watch;
  const cudaError_t result = DORMOUSE_CUDART(cudart, cudaMemGetInfo)(free_bytes, total_bytes);
  if (result == cudaSuccess && !watch.reached_driver_hook()) {
    add_retained(free_bytes, *total_bytes);
  }
  return result;
}

cudaError_t cudaDeviceReset(void) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  CUcontext context = nullptr;
  real::cuCtxGetCurrent(&context);
  const Watch watch;
  const cudaError_t result = DORMOUSE_CUDART(cudart, cudaDeviceReset)();
  Engine* known = engine();
  if (result == cudaSuccess && known != nullptr && !exiting() && !watch.reached_driver_hook()) {
    known->context_destroyed(context);
  }
  return result;
}

// --- Entry points

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* status) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  return handed_out(
      DORMOUSE_CUDART(cudart, cudaGetDriverEntryPoint)(symbol, function, flags, status), symbol,
      function);
}

cudaError_t cudaGetDriverEntryPoint_ptsz(const char* symbol, void** function,
                                         unsigned long long flags,
                                         cudaDriverEntryPointQueryResult* status) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  return handed_out(
      DORMOUSE_CUDART(cudart, cudaGetDriverEntryPoint_ptsz)(symbol, function, flags, status),
      symbol, function);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                             unsigned int cuda_version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* status) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  return handed_out(DORMOUSE_CUDART(cudart, cudaGetDriverEntryPointByVersion)(
                        symbol, function, cuda_version, flags, status),
                    symbol, function);
}

cudaError_t cudaGetDriverEntryPointByVersion_ptsz(const char* symbol, void** function,
                                                  unsigned int cuda_version,
                                                  unsigned long long flags,
                                                  cudaDriverEntryPointQueryResult* status) {
  Cudart& cudart = DORMOUSE_CALLERS_CUDART;
  return handed_out(DORMOUSE_CUDART(cudart, cudaGetDriverEntryPointByVersion_ptsz)(
                        symbol, function, cuda_version, flags, status),
                    symbol, function);
}
