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
