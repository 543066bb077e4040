// The hooks of libcuda's functions that are more than a gate pass. Each calls the real function
// unless the memory in question is a tag's. Programs reach them by linking, by dlsym and by
// cuGetProcAddress; the runtime library reaches them the same way.
#include <cstdint>

#include "core/log.h"
#include "core/memory/mapped_memory.h"
#include "core/sleep/engine.h"
#include "core/sleep/gate.h"
#include "shim/abi/tms.h"
#include "shim/hooks/captures.h"
#include "shim/hooks/hooks.h"
#include "shim/hooks/real.h"
#include "shim/hooks/support.h"
#include "shim/hooks/unknown.h"
#include "shim/process/process.h"
#include "shim/process/settings.h"
#include "shim/rules/regions.h"

namespace {

using namespace dormouse;
using namespace dormouse::shim;

// The engine if `address` is its memory, else null.
Engine* owner_of(CUdeviceptr address) noexcept {
  Engine* known = engine();
  return known != nullptr && known->owns(address) ? known : nullptr;
}

// Memory for a tag, in the order of `stream` unless that is null. What else fails than for want of
// memory (a driver without virtual memory management, as many vGPUs have) goes to `untagged`, the
// program's own call. torch_memory_saver's callers can ask that so much of the device stays free.
template <typename Call>
CUresult allocate_tagged(Engine& engine, TagId tag, std::size_t bytes, const CUstream* stream,
                         CUdeviceptr* address, Call untagged) noexcept {
  if (const std::uint64_t margin = tms::memory_margin_bytes(); margin != 0) {
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    const CUresult result = real::cuMemGetInfo_v2(&free_bytes, &total_bytes);
    if (result != CUDA_SUCCESS) return result;
    add_retained(&free_bytes, total_bytes);
    if (free_bytes < margin || free_bytes - margin < bytes) return CUDA_ERROR_OUT_OF_MEMORY;
  }
  const CUresult result = stream != nullptr ? engine.allocate_async(tag, bytes, *stream, address)
                                            : engine.allocate(tag, bytes, address);
  if (result == CUDA_SUCCESS || result == CUDA_ERROR_OUT_OF_MEMORY) return result;
  const CUresult otherwise = untagged();
  if (otherwise == CUDA_SUCCESS) say_untagged(result);
  return otherwise;
}

// --- Stream-ordered memory

// Makes the stream's context current: stream-ordered memory is allocated on the stream's device.
class StreamContext {
 public:
  explicit StreamContext(CUstream stream) noexcept {
    CUcontext current = nullptr;
    CUcontext wanted = nullptr;
    if (is_default_stream(stream) || real::cuStreamGetCtx(stream, &wanted) != CUDA_SUCCESS) return;
    real::cuCtxGetCurrent(&current);
    pushed_ = wanted != current && real::cuCtxPushCurrent_v2(wanted) == CUDA_SUCCESS;
  }
  ~StreamContext() {
    CUcontext popped = nullptr;
    if (pushed_) real::cuCtxPopCurrent_v2(&popped);
  }
  StreamContext(const StreamContext&) = delete;
  StreamContext& operator=(const StreamContext&) = delete;

 private:
  bool pushed_ = false;
};

using AllocAsync = CUresult (*)(CUdeviceptr*, size_t, CUstream);
using FreeAsync = CUresult (*)(CUdeviceptr, CUstream);

// While a stream captures, the allocation is a node of the graph, not memory that outlives it: the
// driver's own business.
CUresult allocate_async(CUdeviceptr* address, size_t bytes, CUstream stream, AllocAsync function,
                        CUstream same_stream) noexcept {
  Engine* known = engine_for_allocation();
  const TagId tag = known != nullptr ? allocation_tag(bytes) : kNoTag;
  if (tag == kNoTag || address == nullptr || bytes == 0 || is_capturing(same_stream)) {
    return retried_when_full([&] { return function(address, bytes, stream); });
  }
  StreamContext context(same_stream);
  return allocate_tagged(*known, tag, bytes, &same_stream, address,
                         [&] { return function(address, bytes, stream); });
}

// The program chose the pool, whose limits, figures, access and handles for other processes hold
// for its memory: it stays there, without a tag.
template <typename Call>
CUresult allocate_from_pool(std::size_t bytes, Call call) noexcept {
  const bool in_region = engine_for_allocation() != nullptr && allocation_tag(bytes) != kNoTag;
  if (in_region && first_time("memory pool")) {
    log().warn(
        "the program allocates from a memory pool (cudaMallocFromPoolAsync) inside a region: such "
        "memory gets no tag and does not sleep. Use cudaMallocAsync or cudaMalloc there");
  }
  return retried_when_full(call);
}

CUresult free_async(CUdeviceptr address, CUstream stream, FreeAsync function,
                    CUstream same_stream) noexcept {
  Engine* owner = owner_of(address);
  if (owner == nullptr) return function(address, stream);
  if (exiting()) return CUDA_SUCCESS;
  // As the driver answers for memory that is not the graph's own.
  if (is_capturing(same_stream)) return CUDA_ERROR_INVALID_VALUE;
  StreamContext context(same_stream);
  return owner->free_async(address, same_stream);
}

// --- Pointer attributes

template <typename T>
bool answer(void* data, T value) noexcept {
  *static_cast<T*>(data) = value;
  return true;
}

// Answers for a tag's block as for memory of cuMemAlloc, where the driver, which sees memory of
// cuMemCreate or, asleep, none at all, would answer otherwise. False: the driver's answer stands.
bool answer_for_block(const BlockInfo& block, CUpointer_attribute attribute, CUdeviceptr address,
                      void* data) noexcept {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      return answer(data, block.context);
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return answer<unsigned int>(data, CU_MEMORYTYPE_DEVICE);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return answer(data, address);
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return answer<unsigned int>(data, 0);
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return answer<int>(data, block.device);
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      return answer<unsigned int>(data, 0);
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      return answer(data, block.address);
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      return answer<size_t>(data, block.bytes);
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      return block.buffer_id != 0 && answer<unsigned long long>(data, block.buffer_id);
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
      return block.buffer_id != 0 && answer<unsigned int>(data, block.sync_memops ? 1 : 0);
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return answer<unsigned int>(data, block.asleep ? 0 : 1);
    default:
      return false;
  }
}

enum class Found : std::uint8_t { kElsewhere, kNoBlock, kBlock };

// A block around `address` that a pool handed out.
Found find_block(CUdeviceptr address, BlockInfo* block) noexcept {
  Engine* owner = owner_of(address);
  if (owner == nullptr) return Found::kElsewhere;
  return owner->find(address, block) ? Found::kBlock : Found::kNoBlock;
}

// Memory that the program mapped itself. The driver knows it as long as it is awake, and is asked
// first.
bool find_mapped(CUdeviceptr address, BlockInfo* block) noexcept {
  Engine* known = engine();
  return known != nullptr && known->mapped().find(address, block);
}

// An address that is nobody's.
constexpr CUdeviceptr kUnknownAddress = 1;

// As the driver answers for memory that was freed.
CUresult attributes_of_unknown(unsigned int count, CUpointer_attribute* attributes, void** data,
                               CUdeviceptr address) noexcept {
  const CUresult result = real::cuPointerGetAttributes(count, attributes, data, kUnknownAddress);
  if (result != CUDA_SUCCESS) return result;
  for (unsigned int i = 0; i < count; ++i) {
    if (attributes[i] == CU_POINTER_ATTRIBUTE_HOST_POINTER) answer(data[i], address);
  }
  return result;
}

// --- Contexts

// The device whose primary or other context `context` is, or -1.
int device_of(CUcontext context) noexcept {
  CUcontext popped = nullptr;
  if (real::cuCtxPushCurrent_v2(context) != CUDA_SUCCESS) return -1;
  const int device = current_device();
  real::cuCtxPopCurrent_v2(&popped);
  return device;
}

// Tagged memory follows. It does not follow by itself, being cuMemCreate's.
CUresult change_peer_access(CUcontext peer, bool enabled) noexcept {
  Engine* known = engine();
  CUcontext current = nullptr;
  if (known == nullptr || exiting() || real::cuCtxGetCurrent(&current) != CUDA_SUCCESS)
    return CUDA_SUCCESS;
  return known->set_peer_access(current, current_device(), peer, device_of(peer), enabled);
}

template <typename Call>
CUresult creating(CUcontext* context, CUdevice device, Call call) noexcept {
  const CUresult result = retried_when_full(device, call);
  Engine* known = engine();
  if (result == CUDA_SUCCESS && known != nullptr && !exiting())
    known->context_created(*context, device);
  return result;
}

// The device's primary context if it is active, else null. Its number of users stays as it is.
CUcontext primary_context(CUdevice device) noexcept {
  unsigned int flags = 0;
  int is_active = 0;
  CUcontext primary = nullptr;
  if (engine() == nullptr || exiting() ||
      real::cuDevicePrimaryCtxGetState(device, &flags, &is_active) != CUDA_SUCCESS ||
      is_active == 0 || real::cuDevicePrimaryCtxRetain(&primary, device) != CUDA_SUCCESS) {
    return nullptr;
  }
  real::cuDevicePrimaryCtxRelease_v2(device);
  return primary;
}

// With the context goes what was allocated in it. What the engine keeps there is given back before.
template <typename Call, typename Gone>
CUresult destroying(CUcontext context, Call call, Gone gone) noexcept {
  Engine* known = engine();
  if (context == nullptr || known == nullptr || exiting()) return call();
  known->context_going(context);
  const CUresult result = call();
  const bool is_gone = result == CUDA_SUCCESS && gone();
  known->context_gone(context, is_gone);
  if (is_gone) captures::context_destroyed(context);
  return result;
}

template <typename Call>
CUresult destroying(CUcontext context, Call call) noexcept {
  return destroying(context, call, [] { return true; });
}

template <typename Call>
CUresult resetting_primary(CUdevice device, Call call) noexcept {
  return destroying(primary_context(device), call);
}

// Only the last of its users takes the context down.
template <typename Call>
CUresult releasing_primary(CUdevice device, Call call) noexcept {
  const CUcontext primary = primary_context(device);
  const CUresult result = call();
  unsigned int flags = 0;
  int still_active = 1;
  if (result == CUDA_SUCCESS && primary != nullptr &&
      real::cuDevicePrimaryCtxGetState(device, &flags, &still_active) == CUDA_SUCCESS &&
      still_active == 0) {
    engine()->context_lost(primary, true);
    captures::context_destroyed(primary);
  }
  return result;
}

}  // namespace

// --- Initialisation and entry points

CUresult cuInit(unsigned int flags) {
  const CUresult result = real::cuInit(flags);
  if (result == CUDA_SUCCESS) {
    driver_initialised();
    unknown::say();
  }
  return result;
}

CUresult cuGetProcAddress(const char* symbol, void** function, int cuda_version, cuuint64_t flags) {
  const CUresult result = real::cuGetProcAddress(symbol, function, cuda_version, flags);
  if (result == CUDA_SUCCESS) hand_out(symbol, function, __builtin_return_address(0));
  return result;
}

CUresult cuGetProcAddress_v2(const char* symbol, void** function, int cuda_version,
                             cuuint64_t flags, CUdriverProcAddressQueryResult* status) {
  const CUresult result = real::cuGetProcAddress_v2(symbol, function, cuda_version, flags, status);
  if (result == CUDA_SUCCESS) hand_out(symbol, function, __builtin_return_address(0));
  return result;
}

// --- Allocation and release

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  Engine* known = engine_for_allocation();
  const TagId tag = known != nullptr ? allocation_tag(bytes) : kNoTag;
  if (tag == kNoTag || address == nullptr || bytes == 0) {
    return retried_when_full([&] { return real::cuMemAlloc_v2(address, bytes); });
  }
  return allocate_tagged(*known, tag, bytes, nullptr, address,
                         [&] { return real::cuMemAlloc_v2(address, bytes); });
}

CUresult cuMemAllocPitch_v2(CUdeviceptr* address, size_t* pitch, size_t width, size_t height,
                            unsigned int element_bytes) {
  constexpr size_t kRowAlignment = 512;  // the driver's own, on every device seen
  Engine* known = engine_for_allocation();
  size_t row = 0;
  size_t bytes = 0;
  const bool valid = address != nullptr && pitch != nullptr && width != 0 && height != 0 &&
                     (element_bytes == 4 || element_bytes == 8 || element_bytes == 16) &&
                     !__builtin_add_overflow(width, kRowAlignment - 1, &row) &&
                     !__builtin_mul_overflow(row &= ~(kRowAlignment - 1), height, &bytes);
  const TagId tag = known != nullptr && valid ? allocation_tag(bytes) : kNoTag;
  if (tag == kNoTag) {
    return retried_when_full(
        [&] { return real::cuMemAllocPitch_v2(address, pitch, width, height, element_bytes); });
  }
  bool tagged = true;
  const CUresult result = allocate_tagged(*known, tag, bytes, nullptr, address, [&] {
    tagged = false;
    return real::cuMemAllocPitch_v2(address, pitch, width, height, element_bytes);
  });
  if (result == CUDA_SUCCESS && tagged) *pitch = row;
  return result;
}

CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream stream) {
  return allocate_async(address, bytes, stream, &real::cuMemAllocAsync, stream);
}

CUresult cuMemAllocAsync_ptsz(CUdeviceptr* address, size_t bytes, CUstream stream) {
  return allocate_async(address, bytes, stream, &real::cuMemAllocAsync_ptsz, per_thread(stream));
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr* address, size_t bytes, CUmemoryPool pool,
                                 CUstream stream) {
  return allocate_from_pool(
      bytes, [&] { return real::cuMemAllocFromPoolAsync(address, bytes, pool, stream); });
}

CUresult cuMemAllocFromPoolAsync_ptsz(CUdeviceptr* address, size_t bytes, CUmemoryPool pool,
                                      CUstream stream) {
  return allocate_from_pool(
      bytes, [&] { return real::cuMemAllocFromPoolAsync_ptsz(address, bytes, pool, stream); });
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  Engine* owner = owner_of(address);
  if (owner == nullptr) return real::cuMemFree_v2(address);
  // The process's memory goes as a whole now.
  return exiting() ? CUDA_SUCCESS : owner->free(address);
}

CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  return free_async(address, stream, &real::cuMemFreeAsync, stream);
}

CUresult cuMemFreeAsync_ptsz(CUdeviceptr address, CUstream stream) {
  return free_async(address, stream, &real::cuMemFreeAsync_ptsz, per_thread(stream));
}

// --- Queries

CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  const CUresult result = real::cuMemGetInfo_v2(free_bytes, total_bytes);
  if (result == CUDA_SUCCESS) add_retained(free_bytes, *total_bytes);
  return result;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
  BlockInfo block;
  switch (find_block(address, &block)) {
    case Found::kElsewhere: {
      const CUresult result = real::cuMemGetAddressRange_v2(base, bytes, address);
      if (result == CUDA_SUCCESS || !find_mapped(address, &block)) return result;
      break;
    }
    case Found::kNoBlock:
      return CUDA_ERROR_NOT_FOUND;
    case Found::kBlock:
      break;
  }
  if (base != nullptr) *base = block.address;
  if (bytes != nullptr) *bytes = block.bytes;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr address) {
  BlockInfo block;
  const Found found = data == nullptr ? Found::kElsewhere : find_block(address, &block);
  if (found == Found::kElsewhere) {
    const CUresult result = real::cuPointerGetAttribute(data, attribute, address);
    const bool known = result != CUDA_SUCCESS && data != nullptr && find_mapped(address, &block);
    return known && answer_for_block(block, attribute, address, data) ? CUDA_SUCCESS : result;
  }
  if (found == Found::kNoBlock) return CUDA_ERROR_INVALID_VALUE;
  if (answer_for_block(block, attribute, address, data)) return CUDA_SUCCESS;
  return real::cuPointerGetAttribute(data, attribute, address);
}

CUresult cuPointerGetAttributes(unsigned int num_attributes, CUpointer_attribute* attributes,
                                void** data, CUdeviceptr address) {
  BlockInfo block;
  const Found found = find_block(address, &block);
  if (found == Found::kElsewhere) {
    // Of what it does not know the driver says so in its answers, and returns no error.
    const bool before = find_mapped(address, &block) && block.asleep;
    const CUresult result = real::cuPointerGetAttributes(num_attributes, attributes, data, address);
    if (result != CUDA_SUCCESS || !(before || (find_mapped(address, &block) && block.asleep))) {
      return result;
    }
    for (unsigned int i = 0; i < num_attributes; ++i) {
      answer_for_block(block, attributes[i], address, data[i]);
    }
    return result;
  }
  if (found == Found::kNoBlock) {
    return attributes_of_unknown(num_attributes, attributes, data, address);
  }
  const CUresult result = real::cuPointerGetAttributes(num_attributes, attributes, data, address);
  if (result != CUDA_SUCCESS) return result;
  for (unsigned int i = 0; i < num_attributes; ++i) {
    answer_for_block(block, attributes[i], address, data[i]);
  }
  return result;
}

// The driver takes SYNC_MEMOPS for memory of cuMemCreate and forgets it. The flag of the context
// does the same for all memory that is used in it, and outlasts sleeps.
CUresult cuPointerSetAttribute(const void* value, CUpointer_attribute attribute,
                               CUdeviceptr address) {
  const CUresult closed = gate::enter();
  if (closed != CUDA_SUCCESS) return closed;
  const CUresult result = real::cuPointerSetAttribute(value, attribute, address);
  BlockInfo block;
  if (result == CUDA_SUCCESS && attribute == CU_POINTER_ATTRIBUTE_SYNC_MEMOPS &&
      find_block(address, &block) == Found::kBlock) {
    const bool on = *static_cast<const unsigned int*>(value) != 0;
    unsigned int flags = 0;
    if (on && real::cuCtxGetFlags(&flags) == CUDA_SUCCESS)
      real::cuCtxSetFlags(flags | CU_CTX_SYNC_MEMOPS);
    engine()->set_sync_memops(address, on);
  }
  gate::leave();
  return result;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr address) {
  if (owner_of(address) == nullptr) return real::cuIpcGetMemHandle(handle, address);
  if (first_time("ipc")) {
    log().warn(
        "the program asked for an IPC handle of tagged memory; such memory cannot be shared that "
        "way. Exclude it from the region");
  }
  return CUDA_ERROR_INVALID_VALUE;  // as for all memory of cuMemCreate
}

// --- Contexts and peers

CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned int flags) {
  CUresult result = real::cuCtxEnablePeerAccess(peer, flags);
  if (result != CUDA_SUCCESS) return result;
  result = change_peer_access(peer, true);
  if (result != CUDA_SUCCESS) real::cuCtxDisablePeerAccess(peer);
  return result;
}

CUresult cuCtxDisablePeerAccess(CUcontext peer) {
  const CUresult result = real::cuCtxDisablePeerAccess(peer);
  return result == CUDA_SUCCESS ? change_peer_access(peer, false) : result;
}

CUresult cuCtxCreate_v2(CUcontext* context, unsigned int flags, CUdevice device) {
  return creating(context, device, [&] { return real::cuCtxCreate_v2(context, flags, device); });
}

CUresult cuCtxCreate_v3(CUcontext* context, CUexecAffinityParam* affinity, int num_params,
                        unsigned int flags, CUdevice device) {
  return creating(context, device, [&] {
    return real::cuCtxCreate_v3(context, affinity, num_params, flags, device);
  });
}

CUresult cuCtxCreate_v4(CUcontext* context, CUctxCreateParams* params, unsigned int flags,
                        CUdevice device) {
  return creating(context, device,
                  [&] { return real::cuCtxCreate_v4(context, params, flags, device); });
}

CUresult cuCtxDestroy_v2(CUcontext context) {
  return destroying(context, [&] { return real::cuCtxDestroy_v2(context); });
}

// With the last of its users a context goes, which was current.
CUresult cuCtxDetach(CUcontext context) {
  return destroying(
      context, [&] { return real::cuCtxDetach(context); },
      [&] {
        CUcontext current = nullptr;
        return real::cuCtxGetCurrent(&current) != CUDA_SUCCESS || current != context;
      });
}

#if CUDA_VERSION >= 12040
CUresult cuCtxFromGreenCtx(CUcontext* context, CUgreenCtx green) {
  const CUresult result = real::cuCtxFromGreenCtx(context, green);
  Engine* known = engine();
  if (result == CUDA_SUCCESS && known != nullptr && !exiting())
    known->green_context_created(*context, device_of(*context));
  return result;
}

CUresult cuGreenCtxDestroy(CUgreenCtx green) {
  CUcontext context = nullptr;
  if (real::cuCtxFromGreenCtx(&context, green) != CUDA_SUCCESS) context = nullptr;
  const int device = context != nullptr ? device_of(context) : -1;
  const auto destroy = [&] {
    return destroying(context, [&] { return real::cuGreenCtxDestroy(green); });
  };
  return device >= 0 ? releasing_primary(device, destroy) : destroy();
}
#endif

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  return releasing_primary(device, [&] { return real::cuDevicePrimaryCtxRelease(device); });
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  return releasing_primary(device, [&] { return real::cuDevicePrimaryCtxRelease_v2(device); });
}

CUresult cuDevicePrimaryCtxReset(CUdevice device) {
  return resetting_primary(device, [&] { return real::cuDevicePrimaryCtxReset(device); });
}

CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
  return resetting_primary(device, [&] { return real::cuDevicePrimaryCtxReset_v2(device); });
}
