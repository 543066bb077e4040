// Refused copies of tagged memory; see copies.h.
#include "shim/hooks/copies.h"

#include "shim/hooks/support.h"

namespace dormouse::shim {
namespace {

// Makes a context current for its lifetime.
class Current {
 public:
  explicit Current(CUcontext context) noexcept
      : pushed_(real::cuCtxPushCurrent_v2(context) == CUDA_SUCCESS) {}
  ~Current() {
    CUcontext popped = nullptr;
    if (pushed_) real::cuCtxPopCurrent_v2(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const bool pushed_;
};

// Streams 0, 1 and 2 are names for the default streams of the current context.
bool is_default(CUstream stream) noexcept {
  return reinterpret_cast<std::uintptr_t>(stream) <= 2;
}

// `later` goes on once `earlier`, of `context`, has come so far.
CUresult follow(CUstream earlier, CUcontext context, CUstream later) noexcept {
  CUevent event = nullptr;
  CUresult result = CUDA_SUCCESS;
  {
    const Current current(context);
    result = real::cuEventCreate(&event, static_cast<unsigned int>(CU_EVENT_DISABLE_TIMING));
    if (result != CUDA_SUCCESS) return result;
    result = real::cuEventRecord(event, earlier);
  }
  if (result == CUDA_SUCCESS) result = real::cuStreamWaitEvent(later, event, 0u);
  real::cuEventDestroy_v2(event);
  return result;
}

}  // namespace

RefusedCopy::RefusedCopy(CUstream stream) noexcept
    : engine_(exiting() ? nullptr : engine()), stream_(stream) {
  if (engine_ == nullptr) return;
  real::cuCtxGetCurrent(&context_);
  if (!is_default(stream)) real::cuStreamGetCtx(stream, &context_);
  const Current current(context_);
  device_ = current_device();
}

void RefusedCopy::add(CUdeviceptr address) noexcept {
  BlockInfo block;
  if (engine_ == nullptr || device_ < 0 || !engine_->find(address, &block)) return;
  if (block.device == device_ || block.device >= 64) return;
  others_ |= std::uint64_t{1} << block.device;
  owner_ = block.context;
}

bool RefusedCopy::gave_access() noexcept {
  bool all = others_ != 0;
  for (int device = 0; device < 64; ++device) {
    if ((others_ >> device & 1) != 0) all = engine_->reach_by_copies(device_, device) && all;
  }
  return all;
}

bool RefusedCopy::replaceable() const noexcept {
  return others_ != 0 && (others_ & (others_ - 1)) == 0 && !is_capturing(stream_);
}

// Null for host memory, and where the driver does not tell.
CUcontext RefusedCopy::context_of(CUdeviceptr address) noexcept {
  BlockInfo block;
  if (engine_->find(address, &block)) return block.context;
  unsigned int type = 0;
  CUcontext context = nullptr;
  if (real::cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address) !=
          CUDA_SUCCESS ||
      type != CU_MEMORYTYPE_DEVICE ||
      real::cuPointerGetAttribute(&context, CU_POINTER_ATTRIBUTE_CONTEXT, address) !=
          CUDA_SUCCESS) {
    return nullptr;
  }
  return context;
}

CUresult RefusedCopy::between(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) noexcept {
  CUcontext to_context = context_of(to);
  CUcontext from_context = context_of(from);
  if (to_context == nullptr || from_context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return real::cuMemcpyPeerAsync(to, to_context, from, from_context, bytes, stream_);
}

CUresult RefusedCopy::between(const CUDA_MEMCPY3D& volume) noexcept {
  const auto may_be_device = [](CUmemorytype type) {
    return type == CU_MEMORYTYPE_DEVICE || type == CU_MEMORYTYPE_UNIFIED;
  };
  if (!may_be_device(volume.srcMemoryType) || !may_be_device(volume.dstMemoryType))
    return CUDA_ERROR_INVALID_VALUE;
  CUDA_MEMCPY3D_PEER peer{};
  peer.srcXInBytes = volume.srcXInBytes;
  peer.srcY = volume.srcY;
  peer.srcZ = volume.srcZ;
  peer.srcMemoryType = CU_MEMORYTYPE_DEVICE;
  peer.srcDevice = volume.srcDevice;
  peer.srcContext = context_of(volume.srcDevice);
  peer.srcPitch = volume.srcPitch;
  peer.srcHeight = volume.srcHeight;
  peer.dstXInBytes = volume.dstXInBytes;
  peer.dstY = volume.dstY;
  peer.dstZ = volume.dstZ;
  peer.dstMemoryType = CU_MEMORYTYPE_DEVICE;
  peer.dstDevice = volume.dstDevice;
  peer.dstContext = context_of(volume.dstDevice);
  peer.dstPitch = volume.dstPitch;
  peer.dstHeight = volume.dstHeight;
  peer.WidthInBytes = volume.WidthInBytes;
  peer.Height = volume.Height;
  peer.Depth = volume.Depth;
  if (peer.srcContext == nullptr || peer.dstContext == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return real::cuMemcpy3DPeerAsync(&peer, stream_);
}

CUresult RefusedCopy::one_by_one(const CUdeviceptr* to, const CUdeviceptr* from,
                                 const std::size_t* bytes, std::size_t count) noexcept {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  for (std::size_t i = 0; i < count; ++i) {
    result = real::cuMemcpyAsync(to[i], from[i], bytes[i], stream_);
    if (result == CUDA_ERROR_INVALID_VALUE)
      result = CopyAgain{&real::cuMemcpyAsync, false}(to[i], from[i], bytes[i], stream_);
    if (result != CUDA_SUCCESS) break;
  }
  return result;
}

#if CUDA_VERSION >= 12080
namespace {

// False for an array's.
bool volume_of(const CUDA_MEMCPY3D_BATCH_OP& operation, CUDA_MEMCPY3D* volume) noexcept {
  if (operation.src.type != CU_MEMCPY_OPERAND_TYPE_POINTER ||
      operation.dst.type != CU_MEMCPY_OPERAND_TYPE_POINTER) {
    return false;
  }
  const auto& from = operation.src.op.ptr;
  const auto& to = operation.dst.op.ptr;
  const CUextent3D& extent = operation.extent;
  *volume = {};
  volume->srcMemoryType = CU_MEMORYTYPE_UNIFIED;
  volume->srcDevice = from.ptr;
  volume->srcPitch = from.rowLength != 0 ? from.rowLength : extent.width;
  volume->srcHeight = from.layerHeight != 0 ? from.layerHeight : extent.height;
  volume->dstMemoryType = CU_MEMORYTYPE_UNIFIED;
  volume->dstDevice = to.ptr;
  volume->dstPitch = to.rowLength != 0 ? to.rowLength : extent.width;
  volume->dstHeight = to.layerHeight != 0 ? to.layerHeight : extent.height;
  volume->WidthInBytes = extent.width;
  volume->Height = extent.height;
  volume->Depth = extent.depth;
  return true;
}

}  // namespace

void add_operations(RefusedCopy& copy, const CUDA_MEMCPY3D_BATCH_OP* operations,
                    std::size_t count) noexcept {
  for (std::size_t i = 0; operations != nullptr && i < count; ++i) {
    for (const CUmemcpy3DOperand* side : {&operations[i].src, &operations[i].dst}) {
      if (side->type == CU_MEMCPY_OPERAND_TYPE_POINTER) copy.add(side->op.ptr.ptr);
    }
  }
}

CUresult RefusedCopy::one_by_one(const CUDA_MEMCPY3D_BATCH_OP* operations,
                                 std::size_t count) noexcept {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  for (std::size_t i = 0; i < count; ++i) {
    CUDA_MEMCPY3D volume;
    if (!volume_of(operations[i], &volume)) return CUDA_ERROR_INVALID_VALUE;
    result = real::cuMemcpy3DAsync_v2(&volume, stream_);
    if (result == CUDA_ERROR_INVALID_VALUE)
      result = CopyAgain{&real::cuMemcpy3DAsync_v2, false}(&volume, stream_);
    if (result != CUDA_SUCCESS) break;
  }
  return result;
}
#else
// What an operation has in it is not known.
void add_operations(RefusedCopy&, const CUDA_MEMCPY3D_BATCH_OP*, std::size_t) noexcept {}
CUresult RefusedCopy::one_by_one(const CUDA_MEMCPY3D_BATCH_OP*, std::size_t) noexcept {
  return CUDA_ERROR_INVALID_VALUE;
}
#endif

CUDA_MEMCPY3D volume_of(const CUDA_MEMCPY2D& plane) noexcept {
  CUDA_MEMCPY3D volume{};
  volume.srcXInBytes = plane.srcXInBytes;
  volume.srcY = plane.srcY;
  volume.srcMemoryType = plane.srcMemoryType;
  volume.srcDevice = plane.srcDevice;
  volume.srcPitch = plane.srcPitch;
  volume.srcHeight = plane.srcY + plane.Height;
  volume.dstXInBytes = plane.dstXInBytes;
  volume.dstY = plane.dstY;
  volume.dstMemoryType = plane.dstMemoryType;
  volume.dstDevice = plane.dstDevice;
  volume.dstPitch = plane.dstPitch;
  volume.dstHeight = plane.dstY + plane.Height;
  volume.WidthInBytes = plane.WidthInBytes;
  volume.Height = plane.Height;
  volume.Depth = 1;
  return volume;
}

CUstream RefusedCopy::begin() noexcept {
  if (real::cuCtxPushCurrent_v2(owner_) != CUDA_SUCCESS) return nullptr;
  CUresult result = real::cuStreamCreate(&ours_, static_cast<unsigned int>(CU_STREAM_NON_BLOCKING));
  if (result == CUDA_SUCCESS) {
    result = follow(stream_, context_, ours_);
    if (result == CUDA_SUCCESS) return ours_;
    real::cuStreamDestroy_v2(ours_);
  }
  CUcontext popped = nullptr;
  real::cuCtxPopCurrent_v2(&popped);
  return nullptr;
}

CUresult RefusedCopy::end(CUresult result) noexcept {
  CUcontext popped = nullptr;
  real::cuCtxPopCurrent_v2(&popped);
  if (result == CUDA_SUCCESS) {
    const Current current(context_);
    if (follow(ours_, owner_, stream_) != CUDA_SUCCESS) result = real::cuStreamSynchronize(ours_);
  }
  real::cuStreamDestroy_v2(ours_);
  return result;
}

bool RefusedCopy::begin_waiting() noexcept {
  return real::cuStreamSynchronize(stream_) == CUDA_SUCCESS &&
         real::cuCtxPushCurrent_v2(owner_) == CUDA_SUCCESS;
}

CUresult RefusedCopy::end_waiting(CUresult result) noexcept {
  CUcontext popped = nullptr;
  if (result == CUDA_SUCCESS) result = real::cuStreamSynchronize(stream_);  // of this context
  real::cuCtxPopCurrent_v2(&popped);
  return result;
}

}  // namespace dormouse::shim
