// Exported functions of the simulated driver: copies and fills, each in the varieties for the
// legacy and for the per-thread default stream.
#include "tests/simgpu/copy.h"

namespace simgpu {
namespace {

Side device_side(CUdeviceptr pointer) {
  return {pointer, 0, 0, true, -1};
}
Side any_side(CUdeviceptr pointer) {
  return {pointer, 0, 0, false, -1};
}
Side host_side(const void* pointer) {
  return {reinterpret_cast<uintptr_t>(pointer), 0, 0, false, -1};
}

CUresult linear(const Side& to, const Side& from, size_t bytes, CUstream stream, bool wait) {
  Copy copy;
  copy.to = to;
  copy.from = from;
  copy.width = bytes;
  return issue(copy, stream, wait);
}

CUresult linear_peer(CUdeviceptr to, CUcontext to_context, CUdeviceptr from, CUcontext from_context,
                     size_t bytes, CUstream stream, bool wait) {
  Context* to_owner = simulation().find_context(to_context);
  Context* from_owner = simulation().find_context(from_context);
  if (to_owner == nullptr || from_owner == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return linear({to, 0, 0, true, to_owner->device()}, {from, 0, 0, true, from_owner->device()},
                bytes, stream, wait);
}

// A side of a 2D or 3D copy. Arrays are not simulated.
CUresult make_side(CUmemorytype type, const void* host, CUdeviceptr device, size_t x, size_t y,
                   size_t z, size_t pitch, size_t rows, size_t width, Side* side) {
  if (type == CU_MEMORYTYPE_ARRAY) return CUDA_ERROR_NOT_SUPPORTED;
  SIMGPU_REQUIRE(type == CU_MEMORYTYPE_HOST || type == CU_MEMORYTYPE_DEVICE ||
                 type == CU_MEMORYTYPE_UNIFIED);
  if (pitch == 0) pitch = x + width;
  SIMGPU_REQUIRE(pitch >= x + width);
  bool is_host = type == CU_MEMORYTYPE_HOST;
  uintptr_t base = is_host ? reinterpret_cast<uintptr_t>(host) : device;
  SIMGPU_REQUIRE(base != 0);
  side->pitch = pitch;
  side->slice = pitch * rows;
  side->base = base + z * side->slice + y * pitch + x;
  side->device = type == CU_MEMORYTYPE_DEVICE;
  return CUDA_SUCCESS;
}

CUresult plane(const CUDA_MEMCPY2D* p, CUstream stream, bool wait) {
  SIMGPU_REQUIRE(p != nullptr);
  if (p->WidthInBytes == 0 || p->Height == 0) return CUDA_SUCCESS;
  Copy copy;
  copy.width = p->WidthInBytes;
  copy.height = p->Height;
  SIMGPU_TRY(make_side(p->srcMemoryType, p->srcHost, p->srcDevice, p->srcXInBytes, p->srcY, 0,
                       p->srcPitch, 0, copy.width, &copy.from));
  SIMGPU_TRY(make_side(p->dstMemoryType, p->dstHost, p->dstDevice, p->dstXInBytes, p->dstY, 0,
                       p->dstPitch, 0, copy.width, &copy.to));
  return issue(copy, stream, wait);
}

// CUDA_MEMCPY3D and CUDA_MEMCPY3D_PEER have the same fields where it matters.
template <typename Params>
CUresult make_volume(const Params& p, Copy* copy) {
  SIMGPU_REQUIRE(p.srcLOD == 0 && p.dstLOD == 0);
  SIMGPU_REQUIRE(p.Depth <= 1 ||
                 (p.srcHeight >= p.srcY + p.Height && p.dstHeight >= p.dstY + p.Height));
  copy->width = p.WidthInBytes;
  copy->height = p.Height;
  copy->depth = p.Depth;
  SIMGPU_TRY(make_side(p.srcMemoryType, p.srcHost, p.srcDevice, p.srcXInBytes, p.srcY, p.srcZ,
                       p.srcPitch, p.srcHeight, copy->width, &copy->from));
  return make_side(p.dstMemoryType, p.dstHost, p.dstDevice, p.dstXInBytes, p.dstY, p.dstZ,
                   p.dstPitch, p.dstHeight, copy->width, &copy->to);
}

template <typename Params>
CUresult volume(const Params* p, int to_device, int from_device, CUstream stream, bool wait) {
  if (p->WidthInBytes == 0 || p->Height == 0 || p->Depth == 0) return CUDA_SUCCESS;
  Copy copy;
  SIMGPU_TRY(make_volume(*p, &copy));
  copy.from.on = from_device;
  copy.to.on = to_device;
  return issue(copy, stream, wait);
}

CUresult volume(const CUDA_MEMCPY3D* p, CUstream stream, bool wait) {
  SIMGPU_REQUIRE(p != nullptr);
  return volume(p, -1, -1, stream, wait);
}

CUresult volume_peer(const CUDA_MEMCPY3D_PEER* p, CUstream stream, bool wait) {
  SIMGPU_REQUIRE(p != nullptr);
  Context* to = simulation().find_context(p->dstContext);
  Context* from = simulation().find_context(p->srcContext);
  if (to == nullptr || from == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return volume(p, to->device(), from->device(), stream, wait);
}

CUresult batch(const CUdeviceptr* to, const CUdeviceptr* from, const size_t* sizes, size_t count,
               CUstream stream) {
  SIMGPU_REQUIRE(to != nullptr && from != nullptr && sizes != nullptr && count != 0);
  // The real function takes no default stream either.
  SIMGPU_REQUIRE(stream != nullptr && stream != CU_STREAM_LEGACY);
  for (size_t i = 0; i < count; ++i) {
    SIMGPU_TRY(linear(any_side(to[i]), any_side(from[i]), sizes[i], stream, false));
  }
  return CUDA_SUCCESS;
}

CUresult batch(const CUDA_MEMCPY3D_BATCH_OP* operations, size_t count, CUstream stream) {
  SIMGPU_REQUIRE(operations != nullptr && count != 0);
  SIMGPU_REQUIRE(stream != nullptr && stream != CU_STREAM_LEGACY);
  for (size_t i = 0; i < count; ++i) {
    const CUDA_MEMCPY3D_BATCH_OP& each = operations[i];
    if (each.src.type != CU_MEMCPY_OPERAND_TYPE_POINTER ||
        each.dst.type != CU_MEMCPY_OPERAND_TYPE_POINTER) {
      return CUDA_ERROR_NOT_SUPPORTED;  // arrays
    }
    SIMGPU_REQUIRE(each.extent.width != 0 && each.extent.height != 0 && each.extent.depth != 0);
    const auto side = [&](const CUmemcpy3DOperand& operand) {
      const size_t pitch =
          operand.op.ptr.rowLength != 0 ? operand.op.ptr.rowLength : each.extent.width;
      const size_t rows =
          operand.op.ptr.layerHeight != 0 ? operand.op.ptr.layerHeight : each.extent.height;
      return Side{operand.op.ptr.ptr, pitch, pitch * rows, false, -1};
    };
    const Copy copy{side(each.dst), side(each.src), each.extent.width, each.extent.height,
                    each.extent.depth};
    SIMGPU_TRY(issue(copy, stream, false));
  }
  return CUDA_SUCCESS;
}

CUresult fill(CUdeviceptr to, size_t pitch, size_t element, uint32_t value, size_t width,
              size_t height, CUstream stream, bool wait) {
  Fill request;
  request.to = device_side(to);
  request.to.pitch = pitch;
  request.element = element;
  request.value = value;
  request.width = width;
  request.height = height;
  return issue(request, stream, wait);
}

}  // namespace

CUresult volume_of(const CUDA_MEMCPY3D& params, Copy* copy) {
  SIMGPU_REQUIRE(params.WidthInBytes != 0 && params.Height != 0 && params.Depth != 0);
  return make_volume(params, copy);
}

}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

// Copies of one stretch.

SIMGPU_API CUresult CUDAAPI cuMemcpy(CUdeviceptr dst, CUdeviceptr src, size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpy);
  return linear(any_side(dst), any_side(src), ByteCount, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy_ptds(CUdeviceptr dst, CUdeviceptr src, size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpy);
  return linear(any_side(dst), any_side(src), ByteCount, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t ByteCount,
                                          CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyAsync);
  return linear(any_side(dst), any_side(src), ByteCount, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyAsync_ptsz(CUdeviceptr dst, CUdeviceptr src, size_t ByteCount,
                                               CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyAsync);
  return linear(any_side(dst), any_side(src), ByteCount, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyHtoD_v2(CUdeviceptr dstDevice, const void* srcHost,
                                            size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpyHtoD);
  return linear(device_side(dstDevice), host_side(srcHost), ByteCount, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyHtoD_v2_ptds(CUdeviceptr dstDevice, const void* srcHost,
                                                 size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpyHtoD);
  return linear(device_side(dstDevice), host_side(srcHost), ByteCount, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyHtoDAsync_v2(CUdeviceptr dstDevice, const void* srcHost,
                                                 size_t ByteCount, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyHtoDAsync);
  return linear(device_side(dstDevice), host_side(srcHost), ByteCount, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyHtoDAsync_v2_ptsz(CUdeviceptr dstDevice, const void* srcHost,
                                                      size_t ByteCount, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyHtoDAsync);
  return linear(device_side(dstDevice), host_side(srcHost), ByteCount, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyDtoH_v2(void* dstHost, CUdeviceptr srcDevice,
                                            size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpyDtoH);
  return linear(host_side(dstHost), device_side(srcDevice), ByteCount, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyDtoH_v2_ptds(void* dstHost, CUdeviceptr srcDevice,
                                                 size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpyDtoH);
  return linear(host_side(dstHost), device_side(srcDevice), ByteCount, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyDtoHAsync_v2(void* dstHost, CUdeviceptr srcDevice,
                                                 size_t ByteCount, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyDtoHAsync);
  return linear(host_side(dstHost), device_side(srcDevice), ByteCount, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyDtoHAsync_v2_ptsz(void* dstHost, CUdeviceptr srcDevice,
                                                      size_t ByteCount, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyDtoHAsync);
  return linear(host_side(dstHost), device_side(srcDevice), ByteCount, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyDtoD_v2(CUdeviceptr dstDevice, CUdeviceptr srcDevice,
                                            size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpyDtoD);
  return linear(device_side(dstDevice), device_side(srcDevice), ByteCount, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyDtoD_v2_ptds(CUdeviceptr dstDevice, CUdeviceptr srcDevice,
                                                 size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpyDtoD);
  return linear(device_side(dstDevice), device_side(srcDevice), ByteCount, CU_STREAM_PER_THREAD,
                true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyDtoDAsync_v2(CUdeviceptr dstDevice, CUdeviceptr srcDevice,
                                                 size_t ByteCount, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyDtoDAsync);
  return linear(device_side(dstDevice), device_side(srcDevice), ByteCount, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyDtoDAsync_v2_ptsz(CUdeviceptr dstDevice, CUdeviceptr srcDevice,
                                                      size_t ByteCount, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyDtoDAsync);
  return linear(device_side(dstDevice), device_side(srcDevice), ByteCount, per_thread(hStream),
                false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyPeer(CUdeviceptr dstDevice, CUcontext dstContext,
                                         CUdeviceptr srcDevice, CUcontext srcContext,
                                         size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpyPeer);
  return linear_peer(dstDevice, dstContext, srcDevice, srcContext, ByteCount, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyPeer_ptds(CUdeviceptr dstDevice, CUcontext dstContext,
                                              CUdeviceptr srcDevice, CUcontext srcContext,
                                              size_t ByteCount) {
  SIMGPU_ENTER(cuMemcpyPeer);
  return linear_peer(dstDevice, dstContext, srcDevice, srcContext, ByteCount, CU_STREAM_PER_THREAD,
                     true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyPeerAsync(CUdeviceptr dstDevice, CUcontext dstContext,
                                              CUdeviceptr srcDevice, CUcontext srcContext,
                                              size_t ByteCount, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyPeerAsync);
  return linear_peer(dstDevice, dstContext, srcDevice, srcContext, ByteCount, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyPeerAsync_ptsz(CUdeviceptr dstDevice, CUcontext dstContext,
                                                   CUdeviceptr srcDevice, CUcontext srcContext,
                                                   size_t ByteCount, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyPeerAsync);
  return linear_peer(dstDevice, dstContext, srcDevice, srcContext, ByteCount, per_thread(hStream),
                     false);
}

// Copies of rows and slices.

SIMGPU_API CUresult CUDAAPI cuMemcpy2D_v2(const CUDA_MEMCPY2D* pCopy) {
  SIMGPU_ENTER(cuMemcpy2D);
  return plane(pCopy, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy2D_v2_ptds(const CUDA_MEMCPY2D* pCopy) {
  SIMGPU_ENTER(cuMemcpy2D);
  return plane(pCopy, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy2DUnaligned_v2(const CUDA_MEMCPY2D* pCopy) {
  SIMGPU_ENTER(cuMemcpy2DUnaligned);
  return plane(pCopy, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy2DUnaligned_v2_ptds(const CUDA_MEMCPY2D* pCopy) {
  SIMGPU_ENTER(cuMemcpy2DUnaligned);
  return plane(pCopy, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* pCopy, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpy2DAsync);
  return plane(pCopy, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy2DAsync_v2_ptsz(const CUDA_MEMCPY2D* pCopy, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpy2DAsync);
  return plane(pCopy, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3D_v2(const CUDA_MEMCPY3D* pCopy) {
  SIMGPU_ENTER(cuMemcpy3D);
  return volume(pCopy, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3D_v2_ptds(const CUDA_MEMCPY3D* pCopy) {
  SIMGPU_ENTER(cuMemcpy3D);
  return volume(pCopy, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DAsync_v2(const CUDA_MEMCPY3D* pCopy, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpy3DAsync);
  return volume(pCopy, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DAsync_v2_ptsz(const CUDA_MEMCPY3D* pCopy, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpy3DAsync);
  return volume(pCopy, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DPeer(const CUDA_MEMCPY3D_PEER* pCopy) {
  SIMGPU_ENTER(cuMemcpy3DPeer);
  return volume_peer(pCopy, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DPeer_ptds(const CUDA_MEMCPY3D_PEER* pCopy) {
  SIMGPU_ENTER(cuMemcpy3DPeer);
  return volume_peer(pCopy, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DPeerAsync(const CUDA_MEMCPY3D_PEER* pCopy, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpy3DPeerAsync);
  return volume_peer(pCopy, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DPeerAsync_ptsz(const CUDA_MEMCPY3D_PEER* pCopy,
                                                     CUstream hStream) {
  SIMGPU_ENTER(cuMemcpy3DPeerAsync);
  return volume_peer(pCopy, per_thread(hStream), false);
}

// Fills.

SIMGPU_API CUresult CUDAAPI cuMemsetD8_v2(CUdeviceptr dstDevice, unsigned char uc, size_t N) {
  SIMGPU_ENTER(cuMemsetD8);
  return fill(dstDevice, 0, 1, uc, N, 1, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD8_v2_ptds(CUdeviceptr dstDevice, unsigned char uc, size_t N) {
  SIMGPU_ENTER(cuMemsetD8);
  return fill(dstDevice, 0, 1, uc, N, 1, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr dstDevice, unsigned char uc, size_t N,
                                            CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD8Async);
  return fill(dstDevice, 0, 1, uc, N, 1, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD8Async_ptsz(CUdeviceptr dstDevice, unsigned char uc, size_t N,
                                                 CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD8Async);
  return fill(dstDevice, 0, 1, uc, N, 1, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D8_v2(CUdeviceptr dstDevice, size_t dstPitch,
                                            unsigned char uc, size_t Width, size_t Height) {
  SIMGPU_ENTER(cuMemsetD2D8);
  return fill(dstDevice, dstPitch, 1, uc, Width, Height, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D8_v2_ptds(CUdeviceptr dstDevice, size_t dstPitch,
                                                 unsigned char uc, size_t Width, size_t Height) {
  SIMGPU_ENTER(cuMemsetD2D8);
  return fill(dstDevice, dstPitch, 1, uc, Width, Height, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D8Async(CUdeviceptr dstDevice, size_t dstPitch,
                                              unsigned char uc, size_t Width, size_t Height,
                                              CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD2D8Async);
  return fill(dstDevice, dstPitch, 1, uc, Width, Height, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D8Async_ptsz(CUdeviceptr dstDevice, size_t dstPitch,
                                                   unsigned char uc, size_t Width, size_t Height,
                                                   CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD2D8Async);
  return fill(dstDevice, dstPitch, 1, uc, Width, Height, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD16_v2(CUdeviceptr dstDevice, unsigned short us, size_t N) {
  SIMGPU_ENTER(cuMemsetD16);
  return fill(dstDevice, 0, 2, us, N, 1, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD16_v2_ptds(CUdeviceptr dstDevice, unsigned short us,
                                                size_t N) {
  SIMGPU_ENTER(cuMemsetD16);
  return fill(dstDevice, 0, 2, us, N, 1, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD16Async(CUdeviceptr dstDevice, unsigned short us, size_t N,
                                             CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD16Async);
  return fill(dstDevice, 0, 2, us, N, 1, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD16Async_ptsz(CUdeviceptr dstDevice, unsigned short us,
                                                  size_t N, CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD16Async);
  return fill(dstDevice, 0, 2, us, N, 1, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D16_v2(CUdeviceptr dstDevice, size_t dstPitch,
                                             unsigned short us, size_t Width, size_t Height) {
  SIMGPU_ENTER(cuMemsetD2D16);
  return fill(dstDevice, dstPitch, 2, us, Width, Height, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D16_v2_ptds(CUdeviceptr dstDevice, size_t dstPitch,
                                                  unsigned short us, size_t Width, size_t Height) {
  SIMGPU_ENTER(cuMemsetD2D16);
  return fill(dstDevice, dstPitch, 2, us, Width, Height, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D16Async(CUdeviceptr dstDevice, size_t dstPitch,
                                               unsigned short us, size_t Width, size_t Height,
                                               CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD2D16Async);
  return fill(dstDevice, dstPitch, 2, us, Width, Height, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D16Async_ptsz(CUdeviceptr dstDevice, size_t dstPitch,
                                                    unsigned short us, size_t Width, size_t Height,
                                                    CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD2D16Async);
  return fill(dstDevice, dstPitch, 2, us, Width, Height, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD32_v2(CUdeviceptr dstDevice, unsigned int ui, size_t N) {
  SIMGPU_ENTER(cuMemsetD32);
  return fill(dstDevice, 0, 4, ui, N, 1, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD32_v2_ptds(CUdeviceptr dstDevice, unsigned int ui, size_t N) {
  SIMGPU_ENTER(cuMemsetD32);
  return fill(dstDevice, 0, 4, ui, N, 1, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD32Async(CUdeviceptr dstDevice, unsigned int ui, size_t N,
                                             CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD32Async);
  return fill(dstDevice, 0, 4, ui, N, 1, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD32Async_ptsz(CUdeviceptr dstDevice, unsigned int ui, size_t N,
                                                  CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD32Async);
  return fill(dstDevice, 0, 4, ui, N, 1, per_thread(hStream), false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D32_v2(CUdeviceptr dstDevice, size_t dstPitch,
                                             unsigned int ui, size_t Width, size_t Height) {
  SIMGPU_ENTER(cuMemsetD2D32);
  return fill(dstDevice, dstPitch, 4, ui, Width, Height, nullptr, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D32_v2_ptds(CUdeviceptr dstDevice, size_t dstPitch,
                                                  unsigned int ui, size_t Width, size_t Height) {
  SIMGPU_ENTER(cuMemsetD2D32);
  return fill(dstDevice, dstPitch, 4, ui, Width, Height, CU_STREAM_PER_THREAD, true);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D32Async(CUdeviceptr dstDevice, size_t dstPitch,
                                               unsigned int ui, size_t Width, size_t Height,
                                               CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD2D32Async);
  return fill(dstDevice, dstPitch, 4, ui, Width, Height, hStream, false);
}

SIMGPU_API CUresult CUDAAPI cuMemsetD2D32Async_ptsz(CUdeviceptr dstDevice, size_t dstPitch,
                                                    unsigned int ui, size_t Width, size_t Height,
                                                    CUstream hStream) {
  SIMGPU_ENTER(cuMemsetD2D32Async);
  return fill(dstDevice, dstPitch, 4, ui, Width, Height, per_thread(hStream), false);
}

// Batches: the attributes say when sources may be read; the simulation reads them in stream order,
// which suits every choice.

SIMGPU_API CUresult CUDAAPI cuMemcpyBatchAsync(CUdeviceptr* dsts, CUdeviceptr* srcs, size_t* sizes,
                                               size_t count, CUmemcpyAttributes*, size_t*, size_t,
                                               size_t* failIdx, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyBatchAsync);
  CUresult result = batch(dsts, srcs, sizes, count, hStream);
  if (result != CUDA_SUCCESS && failIdx != nullptr) *failIdx = SIZE_MAX;
  return result;
}

SIMGPU_API CUresult CUDAAPI cuMemcpyBatchAsync_ptsz(CUdeviceptr* dsts, CUdeviceptr* srcs,
                                                    size_t* sizes, size_t count,
                                                    CUmemcpyAttributes* attrs, size_t* attrsIdxs,
                                                    size_t numAttrs, size_t* failIdx,
                                                    CUstream hStream) {
  return cuMemcpyBatchAsync(dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, failIdx, hStream);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DBatchAsync(size_t numOps, CUDA_MEMCPY3D_BATCH_OP* opList,
                                                 size_t* failIdx, unsigned long long,
                                                 CUstream hStream) {
  SIMGPU_ENTER(cuMemcpy3DBatchAsync);
  CUresult result = batch(opList, numOps, hStream);
  if (result != CUDA_SUCCESS && failIdx != nullptr) *failIdx = SIZE_MAX;
  return result;
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DBatchAsync_ptsz(size_t numOps, CUDA_MEMCPY3D_BATCH_OP* opList,
                                                      size_t* failIdx, unsigned long long flags,
                                                      CUstream hStream) {
  return cuMemcpy3DBatchAsync(numOps, opList, failIdx, flags, hStream);
}

#if CUDA_VERSION >= 13000
SIMGPU_API CUresult CUDAAPI cuMemcpy3DBatchAsync_v2(size_t numOps, CUDA_MEMCPY3D_BATCH_OP* opList,
                                                    unsigned long long, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpy3DBatchAsync);
  return batch(opList, numOps, hStream);
}

SIMGPU_API CUresult CUDAAPI cuMemcpy3DBatchAsync_v2_ptsz(size_t numOps,
                                                         CUDA_MEMCPY3D_BATCH_OP* opList,
                                                         unsigned long long flags,
                                                         CUstream hStream) {
  return cuMemcpy3DBatchAsync_v2(numOps, opList, flags, hStream);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyBatchAsync_v2(CUdeviceptr* dsts, CUdeviceptr* srcs,
                                                  size_t* sizes, size_t count, CUmemcpyAttributes*,
                                                  size_t*, size_t, CUstream hStream) {
  SIMGPU_ENTER(cuMemcpyBatchAsync);
  return batch(dsts, srcs, sizes, count, hStream);
}

SIMGPU_API CUresult CUDAAPI cuMemcpyBatchAsync_v2_ptsz(CUdeviceptr* dsts, CUdeviceptr* srcs,
                                                       size_t* sizes, size_t count,
                                                       CUmemcpyAttributes* attrs, size_t* attrsIdxs,
                                                       size_t numAttrs, CUstream hStream) {
  return cuMemcpyBatchAsync_v2(dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, hStream);
}
#endif
