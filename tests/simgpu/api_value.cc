// Exported functions of the simulated driver: operations of a stream on single values in memory.
#include <atomic>
#include <thread>

#include "tests/simgpu/api_support.h"

namespace simgpu {
namespace {

// Checks that the stream's device may use the value now; the worker checks again when it gets
// there.
CUresult check_value(uintptr_t address, size_t bytes, int device, bool write) {
  SIMGPU_REQUIRE(address % bytes == 0);
  auto held = memory().hold();
  Place place;
  SIMGPU_TRY(memory().place(address, bytes, device, write, &place));
  SIMGPU_REQUIRE(place != Place::kPageable);
  return CUDA_SUCCESS;
}

template <typename Value>
bool holds(Value seen, Value value, unsigned condition) {
  using Signed = std::make_signed_t<Value>;
  switch (condition) {
    case CU_STREAM_WAIT_VALUE_EQ:
      return seen == value;
    case CU_STREAM_WAIT_VALUE_AND:
      return (seen & value) != 0;
    case CU_STREAM_WAIT_VALUE_NOR:
      return static_cast<Value>(~(seen | value)) != 0;
    default:  // greater or equal, around the end of the numbers
      return static_cast<Signed>(seen - value) >= 0;
  }
}

// Looks at the value until it fits. The layout is held only for each look, so that others go on
// meanwhile.
template <typename Value>
CUresult wait_for(uintptr_t address, Value value, unsigned condition, int device) {
  for (;;) {
    if (check_value(address, sizeof(Value), device, false) != CUDA_SUCCESS) {
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    auto seen = std::atomic_ref<Value>(*reinterpret_cast<Value*>(address)).load();
    if (holds(seen, value, condition)) return CUDA_SUCCESS;
    std::this_thread::yield();
  }
}

template <typename Value>
CUresult write_to(uintptr_t address, Value value, int device) {
  if (check_value(address, sizeof(Value), device, true) != CUDA_SUCCESS) {
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  std::atomic_ref<Value>(*reinterpret_cast<Value*>(address)).store(value);
  return CUDA_SUCCESS;
}

template <typename Value>
CUresult submit_wait(CUstream handle, CUdeviceptr address, Value value, unsigned flags) {
  constexpr unsigned kConditions = 3;
  // Flushing remote writes has nothing to do here.
  unsigned condition = flags & ~static_cast<unsigned>(CU_STREAM_WAIT_VALUE_FLUSH);
  SIMGPU_REQUIRE(condition <= kConditions);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(handle, &context, &stream));
  int device = stream->context()->device();
  SIMGPU_TRY(check_value(address, sizeof(Value), device, false));
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_BATCH_MEM_OP;
  work.action = [=] { return wait_for<Value>(address, value, condition, device); };
  return simulation().submit(stream, std::move(work), nullptr);
}

template <typename Value>
CUresult submit_write(CUstream handle, CUdeviceptr address, Value value, unsigned flags) {
  SIMGPU_REQUIRE((flags & ~static_cast<unsigned>(CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER)) == 0);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(handle, &context, &stream));
  int device = stream->context()->device();
  SIMGPU_TRY(check_value(address, sizeof(Value), device, true));
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_BATCH_MEM_OP;
  work.action = [=] { return write_to<Value>(address, value, device); };
  return simulation().submit(stream, std::move(work), nullptr);
}

CUresult submit_batch(CUstream stream, unsigned count, const CUstreamBatchMemOpParams* operations,
                      unsigned flags) {
  constexpr unsigned kMost = 256;
  SIMGPU_REQUIRE(operations != nullptr && count <= kMost && flags == 0);
  for (unsigned i = 0; i < count; ++i) {
    const auto& wait = operations[i].waitValue;
    const auto& write = operations[i].writeValue;
    switch (operations[i].operation) {
      case CU_STREAM_MEM_OP_WAIT_VALUE_32:
        SIMGPU_TRY(submit_wait<uint32_t>(stream, wait.address, wait.value, wait.flags));
        break;
      case CU_STREAM_MEM_OP_WAIT_VALUE_64:
        SIMGPU_TRY(submit_wait<uint64_t>(stream, wait.address, wait.value64, wait.flags));
        break;
      case CU_STREAM_MEM_OP_WRITE_VALUE_32:
        SIMGPU_TRY(submit_write<uint32_t>(stream, write.address, write.value, write.flags));
        break;
      case CU_STREAM_MEM_OP_WRITE_VALUE_64:
        SIMGPU_TRY(submit_write<uint64_t>(stream, write.address, write.value64, write.flags));
        break;
      case CU_STREAM_MEM_OP_FLUSH_REMOTE_WRITES:
      case CU_STREAM_MEM_OP_BARRIER:
        break;
      default:
        return CUDA_ERROR_INVALID_VALUE;
    }
  }
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

// The forms without _v2 are those of drivers in which an administrator had to allow them; they do
// the same.

SIMGPU_API CUresult CUDAAPI cuStreamWaitValue32(CUstream stream, CUdeviceptr addr, cuuint32_t value,
                                                unsigned int flags) {
  SIMGPU_ENTER(cuStreamWaitValue32);
  return submit_wait<cuuint32_t>(stream, addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWaitValue32_ptsz(CUstream stream, CUdeviceptr addr,
                                                     cuuint32_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWaitValue32);
  return submit_wait<cuuint32_t>(per_thread(stream), addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr addr,
                                                   cuuint32_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWaitValue32);
  return submit_wait<cuuint32_t>(stream, addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWaitValue32_v2_ptsz(CUstream stream, CUdeviceptr addr,
                                                        cuuint32_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWaitValue32);
  return submit_wait<cuuint32_t>(per_thread(stream), addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWaitValue64(CUstream stream, CUdeviceptr addr, cuuint64_t value,
                                                unsigned int flags) {
  SIMGPU_ENTER(cuStreamWaitValue64);
  return submit_wait<cuuint64_t>(stream, addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWaitValue64_ptsz(CUstream stream, CUdeviceptr addr,
                                                     cuuint64_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWaitValue64);
  return submit_wait<cuuint64_t>(per_thread(stream), addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWaitValue64_v2(CUstream stream, CUdeviceptr addr,
                                                   cuuint64_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWaitValue64);
  return submit_wait<cuuint64_t>(stream, addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWaitValue64_v2_ptsz(CUstream stream, CUdeviceptr addr,
                                                        cuuint64_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWaitValue64);
  return submit_wait<cuuint64_t>(per_thread(stream), addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWriteValue32(CUstream stream, CUdeviceptr addr,
                                                 cuuint32_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWriteValue32);
  return submit_write<cuuint32_t>(stream, addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWriteValue32_ptsz(CUstream stream, CUdeviceptr addr,
                                                      cuuint32_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWriteValue32);
  return submit_write<cuuint32_t>(per_thread(stream), addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr addr,
                                                    cuuint32_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWriteValue32);
  return submit_write<cuuint32_t>(stream, addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWriteValue32_v2_ptsz(CUstream stream, CUdeviceptr addr,
                                                         cuuint32_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWriteValue32);
  return submit_write<cuuint32_t>(per_thread(stream), addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWriteValue64(CUstream stream, CUdeviceptr addr,
                                                 cuuint64_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWriteValue64);
  return submit_write<cuuint64_t>(stream, addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWriteValue64_ptsz(CUstream stream, CUdeviceptr addr,
                                                      cuuint64_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWriteValue64);
  return submit_write<cuuint64_t>(per_thread(stream), addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWriteValue64_v2(CUstream stream, CUdeviceptr addr,
                                                    cuuint64_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWriteValue64);
  return submit_write<cuuint64_t>(stream, addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamWriteValue64_v2_ptsz(CUstream stream, CUdeviceptr addr,
                                                         cuuint64_t value, unsigned int flags) {
  SIMGPU_ENTER(cuStreamWriteValue64);
  return submit_write<cuuint64_t>(per_thread(stream), addr, value, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamBatchMemOp(CUstream stream, unsigned int count,
                                               CUstreamBatchMemOpParams* paramArray,
                                               unsigned int flags) {
  SIMGPU_ENTER(cuStreamBatchMemOp);
  return submit_batch(stream, count, paramArray, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamBatchMemOp_ptsz(CUstream stream, unsigned int count,
                                                    CUstreamBatchMemOpParams* paramArray,
                                                    unsigned int flags) {
  SIMGPU_ENTER(cuStreamBatchMemOp);
  return submit_batch(per_thread(stream), count, paramArray, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamBatchMemOp_v2(CUstream stream, unsigned int count,
                                                  CUstreamBatchMemOpParams* paramArray,
                                                  unsigned int flags) {
  SIMGPU_ENTER(cuStreamBatchMemOp);
  return submit_batch(stream, count, paramArray, flags);
}

SIMGPU_API CUresult CUDAAPI cuStreamBatchMemOp_v2_ptsz(CUstream stream, unsigned int count,
                                                       CUstreamBatchMemOpParams* paramArray,
                                                       unsigned int flags) {
  SIMGPU_ENTER(cuStreamBatchMemOp);
  return submit_batch(per_thread(stream), count, paramArray, flags);
}
