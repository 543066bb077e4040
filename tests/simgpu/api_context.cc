// Exported functions of the simulated driver: start, devices, contexts, peers.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/simgpu/api_support.h"
#include "tests/simgpu/errors.h"
#include "tests/simgpu/settings.h"

namespace simgpu {
namespace {

int attribute(CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 4;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
      return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return 48 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return 227 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return 228 << 10;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      return 64 << 10;
    case static_cast<CUdevice_attribute>(134):  // HOST_NUMA_ID, in headers since CUDA 12.3
      return 0;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return 2048;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
      return 32;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      return 1000000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      return 5120;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      return 3;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH:
      return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT:
      return 512;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_PITCH_ALIGNMENT:
      return 32;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
      return device + 1;
    case CU_DEVICE_ATTRIBUTE_MEMPOOL_SUPPORTED_HANDLE_TYPES:
      return 0;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
      return 1;
    default:
      return 0;  // a feature that is not simulated
  }
}

CUresult device_of(CUdevice device) {
  return simulation().valid(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult make_context(CUcontext* out, unsigned flags, CUdevice device) {
  SIMGPU_REQUIRE(out != nullptr && (flags & ~static_cast<unsigned>(CU_CTX_FLAGS_MASK)) == 0);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().create_context(device, flags, &context));
  this_thread().contexts.push_back(context);
  *out = context->handle();
  return CUDA_SUCCESS;
}

size_t default_limit(CUlimit limit) {
  switch (limit) {
    case CU_LIMIT_STACK_SIZE:
      return 1024;
    case CU_LIMIT_PRINTF_FIFO_SIZE:
      return size_t{1} << 20;
    case CU_LIMIT_MALLOC_HEAP_SIZE:
      return size_t{8} << 20;
    default:
      return 0;
  }
}

}  // namespace
}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

SIMGPU_API CUresult CUDAAPI cuInit(unsigned int Flags) {
  SIMGPU_ENTER_EARLY(cuInit);
  return simulation().initialize(Flags);
}

SIMGPU_API CUresult CUDAAPI cuDriverGetVersion(int* driverVersion) {
  SIMGPU_ENTER_EARLY(cuDriverGetVersion);
  SIMGPU_REQUIRE(driverVersion != nullptr);
  *driverVersion = settings().driver_version;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuGetErrorString(CUresult error, const char** pStr) {
  SIMGPU_ENTER_EARLY(cuGetErrorString);
  SIMGPU_REQUIRE(pStr != nullptr);
  *pStr = result_text(error);
  return *pStr == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuGetErrorName(CUresult error, const char** pStr) {
  SIMGPU_ENTER_EARLY(cuGetErrorName);
  SIMGPU_REQUIRE(pStr != nullptr);
  *pStr = result_name(error);
  return *pStr == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuGetExportTable(const void** ppExportTable,
                                             const CUuuid* pExportTableId) {
  SIMGPU_ENTER_EARLY(cuGetExportTable);
  SIMGPU_REQUIRE(ppExportTable != nullptr && pExportTableId != nullptr);
  *ppExportTable = nullptr;  // the driver's undocumented tables are not simulated
  return CUDA_ERROR_INVALID_VALUE;
}

// Devices.

SIMGPU_API CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  SIMGPU_ENTER(cuDeviceGet);
  SIMGPU_REQUIRE(device != nullptr);
  SIMGPU_TRY(device_of(ordinal));
  *device = ordinal;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetCount(int* count) {
  SIMGPU_ENTER(cuDeviceGetCount);
  SIMGPU_REQUIRE(count != nullptr);
  *count = simulation().device_count();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetName(char* name, int len, CUdevice dev) {
  SIMGPU_ENTER(cuDeviceGetName);
  SIMGPU_REQUIRE(name != nullptr && len > 0);
  SIMGPU_TRY(device_of(dev));
  std::snprintf(name, static_cast<size_t>(len), "%s", settings().device_name.c_str());
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetUuid(CUuuid* uuid, CUdevice dev) {
  SIMGPU_ENTER(cuDeviceGetUuid);
  SIMGPU_REQUIRE(uuid != nullptr);
  SIMGPU_TRY(device_of(dev));
  std::memcpy(uuid->bytes, "simulated-gpu-0", sizeof(uuid->bytes));
  uuid->bytes[15] = static_cast<char>(dev);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice dev) {
  return cuDeviceGetUuid(uuid, dev);
}

SIMGPU_API CUresult CUDAAPI cuDeviceTotalMem_v2(size_t* bytes, CUdevice dev) {
  SIMGPU_ENTER(cuDeviceTotalMem);
  SIMGPU_REQUIRE(bytes != nullptr);
  SIMGPU_TRY(device_of(dev));
  *bytes = memory().capacity(dev);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetAttribute(int* pi, CUdevice_attribute attrib, CUdevice dev) {
  SIMGPU_ENTER(cuDeviceGetAttribute);
  SIMGPU_REQUIRE(pi != nullptr && attrib >= CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK &&
                 attrib < CU_DEVICE_ATTRIBUTE_MAX);
  SIMGPU_TRY(device_of(dev));
  *pi = attribute(attrib, dev);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceComputeCapability(int* major, int* minor, CUdevice dev) {
  SIMGPU_ENTER(cuDeviceComputeCapability);
  SIMGPU_REQUIRE(major != nullptr && minor != nullptr);
  SIMGPU_TRY(device_of(dev));
  *major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, dev);
  *minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, dev);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetPCIBusId(char* pciBusId, int len, CUdevice dev) {
  SIMGPU_ENTER(cuDeviceGetPCIBusId);
  SIMGPU_REQUIRE(pciBusId != nullptr && len > 0);
  SIMGPU_TRY(device_of(dev));
  std::snprintf(pciBusId, static_cast<size_t>(len), "0000:%02x:00.0", dev + 1);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetByPCIBusId(CUdevice* dev, const char* pciBusId) {
  SIMGPU_ENTER(cuDeviceGetByPCIBusId);
  SIMGPU_REQUIRE(dev != nullptr && pciBusId != nullptr);
  unsigned domain = 0, bus = 0, slot = 0, function = 0;
  bool full = std::sscanf(pciBusId, "%x:%x:%x.%x", &domain, &bus, &slot, &function) == 4;
  if (!full && std::sscanf(pciBusId, "%x:%x.%x", &bus, &slot, &function) != 3) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  SIMGPU_TRY(device_of(static_cast<CUdevice>(bus) - 1));
  *dev = static_cast<CUdevice>(bus) - 1;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceCanAccessPeer(int* canAccessPeer, CUdevice dev,
                                                  CUdevice peerDev) {
  SIMGPU_ENTER(cuDeviceCanAccessPeer);
  SIMGPU_REQUIRE(canAccessPeer != nullptr);
  SIMGPU_TRY(device_of(dev));
  SIMGPU_TRY(device_of(peerDev));
  *canAccessPeer = dev != peerDev && settings().peers;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute attrib,
                                                    CUdevice srcDevice, CUdevice dstDevice) {
  SIMGPU_ENTER(cuDeviceGetP2PAttribute);
  SIMGPU_REQUIRE(value != nullptr);
  SIMGPU_TRY(device_of(srcDevice));
  SIMGPU_TRY(device_of(dstDevice));
  if (srcDevice == dstDevice) return CUDA_ERROR_INVALID_DEVICE;
  *value = attrib == CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED && settings().peers;
  return CUDA_SUCCESS;
}

// Primary contexts.

SIMGPU_API CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* pctx, CUdevice dev) {
  SIMGPU_ENTER(cuDevicePrimaryCtxRetain);
  SIMGPU_REQUIRE(pctx != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().retain_primary(dev, &context));
  *pctx = context->handle();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice dev) {
  SIMGPU_ENTER(cuDevicePrimaryCtxRelease);
  return simulation().release_primary(dev);
}

SIMGPU_API CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice dev) {
  return cuDevicePrimaryCtxRelease_v2(dev);
}

SIMGPU_API CUresult CUDAAPI cuDevicePrimaryCtxReset_v2(CUdevice dev) {
  SIMGPU_ENTER(cuDevicePrimaryCtxReset);
  SIMGPU_TRY(simulation().check_unsafe_call());
  return simulation().reset_primary(dev);
}

SIMGPU_API CUresult CUDAAPI cuDevicePrimaryCtxReset(CUdevice dev) {
  return cuDevicePrimaryCtxReset_v2(dev);
}

SIMGPU_API CUresult CUDAAPI cuDevicePrimaryCtxGetState(CUdevice dev, unsigned int* flags,
                                                       int* active) {
  SIMGPU_ENTER(cuDevicePrimaryCtxGetState);
  SIMGPU_REQUIRE(flags != nullptr && active != nullptr);
  return simulation().primary_state(dev, flags, active);
}

SIMGPU_API CUresult CUDAAPI cuDevicePrimaryCtxSetFlags_v2(CUdevice dev, unsigned int flags) {
  SIMGPU_ENTER(cuDevicePrimaryCtxSetFlags);
  return simulation().set_primary_flags(dev, flags);
}

SIMGPU_API CUresult CUDAAPI cuDevicePrimaryCtxSetFlags(CUdevice dev, unsigned int flags) {
  return cuDevicePrimaryCtxSetFlags_v2(dev, flags);
}

// Contexts.

SIMGPU_API CUresult CUDAAPI cuCtxCreate_v2(CUcontext* pctx, unsigned int flags, CUdevice dev) {
  SIMGPU_ENTER(cuCtxCreate);
  return make_context(pctx, flags, dev);
}

SIMGPU_API CUresult CUDAAPI cuCtxCreate_v3(CUcontext* pctx, CUexecAffinityParam* paramsArray,
                                           int numParams, unsigned int flags, CUdevice dev) {
  SIMGPU_ENTER(cuCtxCreate);
  if (paramsArray != nullptr || numParams != 0) return CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY;
  return make_context(pctx, flags, dev);
}

SIMGPU_API CUresult CUDAAPI cuCtxCreate_v4(CUcontext* pctx, CUctxCreateParams* ctxCreateParams,
                                           unsigned int flags, CUdevice dev) {
  SIMGPU_ENTER(cuCtxCreate);
  if (ctxCreateParams != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  return make_context(pctx, flags, dev);
}

SIMGPU_API CUresult CUDAAPI cuCtxDestroy_v2(CUcontext ctx) {
  SIMGPU_ENTER(cuCtxDestroy);
  Context* context = simulation().find_context(ctx);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return simulation().destroy_context(context);
}

SIMGPU_API CUresult CUDAAPI cuCtxAttach(CUcontext* pctx, unsigned int flags) {
  SIMGPU_ENTER(cuCtxAttach);
  SIMGPU_REQUIRE(pctx != nullptr && flags == 0);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  *pctx = context->handle();
  return simulation().attach(context);
}

SIMGPU_API CUresult CUDAAPI cuCtxDetach(CUcontext ctx) {
  SIMGPU_ENTER(cuCtxDetach);
  Context* context = simulation().find_context(ctx);
  if (context == nullptr || context->green_of() != nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return simulation().detach(context);
}

// As seen on H100: a context that was destroyed can be pushed, its use is refused, and the pop ends
// the process, except for a primary or a green one.
SIMGPU_API CUresult CUDAAPI cuCtxPushCurrent_v2(CUcontext ctx) {
  SIMGPU_ENTER(cuCtxPushCurrent);
  Context* context = simulation().find_any_context(ctx);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  ThreadState& thread = this_thread();
  if (!context->alive && !context->primary() && context->green_of() == nullptr) {
    thread.pushed_dead.insert(context);
  }
  thread.contexts.push_back(context);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxPopCurrent_v2(CUcontext* pctx) {
  SIMGPU_ENTER(cuCtxPopCurrent);
  std::vector<Context*>& stack = this_thread().contexts;
  if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (this_thread().pushed_dead.contains(stack.back())) {
    std::fprintf(stderr, "simgpu: a context was pushed after its end; the driver crashes here\n");
    std::abort();
  }
  if (pctx != nullptr) *pctx = reinterpret_cast<CUcontext>(stack.back());
  stack.pop_back();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxSetCurrent(CUcontext ctx) {
  SIMGPU_ENTER(cuCtxSetCurrent);
  std::vector<Context*>& stack = this_thread().contexts;
  if (ctx == nullptr) {
    if (!stack.empty()) stack.pop_back();
    return CUDA_SUCCESS;
  }
  Context* context = simulation().find_any_context(ctx);
  if (context == nullptr || (!context->alive && !context->primary())) {
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  if (stack.empty()) {
    stack.push_back(context);
  } else {
    stack.back() = context;
  }
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxGetCurrent(CUcontext* pctx) {
  SIMGPU_ENTER(cuCtxGetCurrent);
  SIMGPU_REQUIRE(pctx != nullptr);
  std::vector<Context*>& stack = this_thread().contexts;
  *pctx = stack.empty() ? nullptr : reinterpret_cast<CUcontext>(stack.back());
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  SIMGPU_ENTER(cuCtxGetDevice);
  SIMGPU_REQUIRE(device != nullptr);
  std::vector<Context*>& stack = this_thread().contexts;
  if (stack.empty() || stack.back() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *device = stack.back()->device();
  return CUDA_SUCCESS;
}

#if CUDA_VERSION >= 13000
SIMGPU_API CUresult CUDAAPI cuCtxGetDevice_v2(CUdevice* device, CUcontext ctx) {
  if (ctx == nullptr) return cuCtxGetDevice(device);
  SIMGPU_ENTER(cuCtxGetDevice);
  SIMGPU_REQUIRE(device != nullptr);
  Context* context = simulation().find_context(ctx);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *device = context->device();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxSynchronize_v2(CUcontext ctx) {
  SIMGPU_ENTER(cuCtxSynchronize);
  Context* context = simulation().find_context(ctx);
  if (ctx == nullptr) {
    SIMGPU_TRY(simulation().current(&context));
  } else if (context == nullptr) {
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  SIMGPU_TRY(simulation().check_unsafe_call());
  return simulation().synchronize_context(context);
}
#endif

SIMGPU_API CUresult CUDAAPI cuCtxGetId(CUcontext ctx, unsigned long long* ctxId) {
  SIMGPU_ENTER(cuCtxGetId);
  SIMGPU_REQUIRE(ctxId != nullptr);
  Context* context = nullptr;
  if (ctx == nullptr) {
    SIMGPU_TRY(simulation().current(&context));
  } else {
    context = simulation().find_context(ctx);
  }
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *ctxId = context->id();
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxGetFlags(unsigned int* flags) {
  SIMGPU_ENTER(cuCtxGetFlags);
  SIMGPU_REQUIRE(flags != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  *flags = context->flags;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxSetFlags(unsigned int flags) {
  SIMGPU_ENTER(cuCtxSetFlags);
  SIMGPU_REQUIRE((flags & ~static_cast<unsigned>(CU_CTX_FLAGS_MASK)) == 0);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  context->flags = flags;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxGetApiVersion(CUcontext ctx, unsigned int* version) {
  SIMGPU_ENTER(cuCtxGetApiVersion);
  SIMGPU_REQUIRE(version != nullptr);
  if (ctx != nullptr && simulation().find_context(ctx) == nullptr)
    return CUDA_ERROR_INVALID_CONTEXT;
  *version = 3020;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxSynchronize(void) {
  SIMGPU_ENTER(cuCtxSynchronize);
  Context* context = nullptr;
  SIMGPU_TRY(current_for_unsafe_call(&context));
  return simulation().synchronize_context(context);
}

SIMGPU_API CUresult CUDAAPI cuCtxGetLimit(size_t* pvalue, CUlimit limit) {
  SIMGPU_ENTER(cuCtxGetLimit);
  SIMGPU_REQUIRE(pvalue != nullptr);
  if (limit < CU_LIMIT_STACK_SIZE || limit >= CU_LIMIT_MAX) return CUDA_ERROR_UNSUPPORTED_LIMIT;
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  *pvalue = simulation().limit(context, limit, default_limit(limit));
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxSetLimit(CUlimit limit, size_t value) {
  SIMGPU_ENTER(cuCtxSetLimit);
  if (limit < CU_LIMIT_STACK_SIZE || limit >= CU_LIMIT_MAX) return CUDA_ERROR_UNSUPPORTED_LIMIT;
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  simulation().set_limit(context, limit, value);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxGetStreamPriorityRange(int* leastPriority, int* greatestPriority) {
  SIMGPU_ENTER(cuCtxGetStreamPriorityRange);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  if (leastPriority != nullptr) *leastPriority = 0;
  if (greatestPriority != nullptr) *greatestPriority = -5;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuCtxEnablePeerAccess(CUcontext peerContext, unsigned int Flags) {
  SIMGPU_ENTER(cuCtxEnablePeerAccess);
  SIMGPU_REQUIRE(Flags == 0);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  return simulation().enable_peer(context, simulation().find_context(peerContext));
}

SIMGPU_API CUresult CUDAAPI cuCtxDisablePeerAccess(CUcontext peerContext) {
  SIMGPU_ENTER(cuCtxDisablePeerAccess);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  return simulation().disable_peer(context, simulation().find_context(peerContext));
}

// Green contexts: each is made of the whole device.

#if CUDA_VERSION >= 12040
SIMGPU_API CUresult CUDAAPI cuDeviceGetDevResource(CUdevice device, CUdevResource* resource,
                                                   CUdevResourceType type) {
  SIMGPU_ENTER(cuDeviceGetDevResource);
  SIMGPU_REQUIRE(resource != nullptr && type == CU_DEV_RESOURCE_TYPE_SM);
  SIMGPU_TRY(device_of(device));
  *resource = {};
  resource->type = type;
  resource->sm.smCount =
      static_cast<unsigned>(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device));
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuDevResourceGenerateDesc(CUdevResourceDesc* phDesc,
                                                      CUdevResource* resources,
                                                      unsigned int nbResources) {
  SIMGPU_ENTER(cuDevResourceGenerateDesc);
  SIMGPU_REQUIRE(phDesc != nullptr && resources != nullptr && nbResources == 1);
  static char described;
  *phDesc = reinterpret_cast<CUdevResourceDesc>(&described);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuGreenCtxCreate(CUgreenCtx* phCtx, CUdevResourceDesc desc,
                                             CUdevice dev, unsigned int flags) {
  SIMGPU_ENTER(cuGreenCtxCreate);
  SIMGPU_REQUIRE(phCtx != nullptr && desc != nullptr && flags == CU_GREEN_CTX_DEFAULT_STREAM);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().create_green(dev, &context));
  *phCtx = reinterpret_cast<CUgreenCtx>(context);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuGreenCtxDestroy(CUgreenCtx hCtx) {
  SIMGPU_ENTER(cuGreenCtxDestroy);
  Context* context = simulation().find_context(reinterpret_cast<CUcontext>(hCtx));
  if (context == nullptr || context->green_of() == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return simulation().destroy_context(context);
}

SIMGPU_API CUresult CUDAAPI cuCtxFromGreenCtx(CUcontext* pContext, CUgreenCtx hCtx) {
  SIMGPU_ENTER(cuCtxFromGreenCtx);
  Context* context = simulation().find_context(reinterpret_cast<CUcontext>(hCtx));
  SIMGPU_REQUIRE(pContext != nullptr);
  if (context == nullptr || context->green_of() == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  *pContext = context->handle();
  return CUDA_SUCCESS;
}
#endif
