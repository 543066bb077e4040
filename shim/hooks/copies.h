// Copies of tagged memory that the driver refuses and would not refuse for cudaMalloc's: memory of
// cuMemCreate can be copied only by devices that were given access to it, cudaMalloc's by every
// device. A refused copy is done again: with access where the devices can reach each other, else by
// the device that the memory is on. For hooks.cc alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/sleep/engine.h"
#include "shim/hooks/hooks.h"

namespace dormouse::shim {

// One refused copy, and what to do about it. `stream` is where it was to run.
class RefusedCopy {
 public:
  explicit RefusedCopy(CUstream stream) noexcept;
  RefusedCopy(const RefusedCopy&) = delete;
  RefusedCopy& operator=(const RefusedCopy&) = delete;

  // A side of the copy, or another one.
  void add(CUdeviceptr address) noexcept;

  // True if there is tagged memory of another device than the copy's, and that device has access to
  // it now.
  bool gave_access() noexcept;
  // Whether it can be done in another way. A capture would record what replaces the copy.
  bool replaceable() const noexcept;

  // From one device's memory to another's. CUDA_ERROR_INVALID_VALUE if it is not such a copy.
  CUresult between(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) noexcept;
  CUresult between(const CUDA_MEMCPY3D& volume) noexcept;
  // The copies of a batch, one after the other: each can be of another kind.
  CUresult one_by_one(const CUdeviceptr* to, const CUdeviceptr* from, const std::size_t* bytes,
                      std::size_t count) noexcept;
  CUresult one_by_one(const CUDA_MEMCPY3D_BATCH_OP* operations, std::size_t count) noexcept;

  // With the memory's own device. In stream order: on the stream that begin() returns (null if it
  // failed), which is waited for in the copy's stream after end(). Else between the two.
  CUstream begin() noexcept;
  CUresult end(CUresult result) noexcept;
  bool begin_waiting() noexcept;
  CUresult end_waiting(CUresult result) noexcept;

 private:
  CUcontext context_of(CUdeviceptr address) noexcept;

  Engine* engine_;
  const CUstream stream_;
  CUcontext context_ = nullptr;  // of stream_
  int device_ = -1;              // of context_
  std::uint64_t others_ = 0;     // devices with tagged memory in the copy, but device_: a bit each
  CUcontext owner_ = nullptr;    // of a block there
  CUstream ours_ = nullptr;      // in owner_
};

// What the arguments of a copy say, by their types.
inline void find_stream(CUstream stream, CUstream* found) noexcept {
  *found = stream;
}
template <typename Other>
void find_stream(const Other&, CUstream*) noexcept {}

inline CUstream replaced(CUstream, CUstream by) noexcept {
  return by;
}
template <typename Other>
Other replaced(Other argument, CUstream) noexcept {
  return argument;
}

inline void add_sides(RefusedCopy& copy, CUdeviceptr address) noexcept {
  copy.add(address);
}
template <typename Parameters>
void add_both(RefusedCopy& copy, const Parameters* parameters) noexcept {
  if (parameters == nullptr) return;
  if (parameters->srcMemoryType != CU_MEMORYTYPE_HOST) copy.add(parameters->srcDevice);
  if (parameters->dstMemoryType != CU_MEMORYTYPE_HOST) copy.add(parameters->dstDevice);
}
inline void add_sides(RefusedCopy& copy, const CUDA_MEMCPY2D* parameters) noexcept {
  add_both(copy, parameters);
}
inline void add_sides(RefusedCopy& copy, const CUDA_MEMCPY3D* parameters) noexcept {
  add_both(copy, parameters);
}
inline void add_sides(RefusedCopy& copy, const CUDA_MEMCPY3D_PEER* parameters) noexcept {
  add_both(copy, parameters);
}
template <typename Other>
void add_sides(RefusedCopy&, const Other&) noexcept {}

void add_operations(RefusedCopy& copy, const CUDA_MEMCPY3D_BATCH_OP* operations,
                    std::size_t count) noexcept;

template <typename... Rest>
void add_lists(RefusedCopy& copy, CUdeviceptr* to, CUdeviceptr* from, std::size_t*,
               std::size_t count, const Rest&...) noexcept {
  for (std::size_t i = 0; to != nullptr && from != nullptr && i < count; ++i) {
    copy.add(to[i]);
    copy.add(from[i]);
  }
}
template <typename... Rest>
void add_lists(RefusedCopy& copy, std::size_t count, CUDA_MEMCPY3D_BATCH_OP* operations,
               const Rest&...) noexcept {
  add_operations(copy, operations, count);
}
template <typename... Rest>
void add_lists(RefusedCopy& copy, CUDA_MEMCPY3D_BATCH_OP* operation, const Rest&...) noexcept {
  add_operations(copy, operation, 1);
}
inline void add_lists(RefusedCopy&, ...) noexcept {}

CUDA_MEMCPY3D volume_of(const CUDA_MEMCPY2D& plane) noexcept;

template <typename... Rest>
CUresult between(RefusedCopy& copy, CUdeviceptr to, CUdeviceptr from, std::size_t bytes,
                 const Rest&...) noexcept {
  return copy.between(to, from, bytes);
}
template <typename... Rest>
CUresult between(RefusedCopy& copy, const CUDA_MEMCPY2D* plane, const Rest&...) noexcept {
  return copy.between(volume_of(*plane));
}
template <typename... Rest>
CUresult between(RefusedCopy& copy, const CUDA_MEMCPY3D* volume, const Rest&...) noexcept {
  return copy.between(*volume);
}
template <typename... Rest>
CUresult between(RefusedCopy& copy, CUdeviceptr* to, CUdeviceptr* from, std::size_t* bytes,
                 std::size_t count, const Rest&...) noexcept {
  return copy.one_by_one(to, from, bytes, count);
}
template <typename... Rest>
CUresult between(RefusedCopy& copy, std::size_t count, CUDA_MEMCPY3D_BATCH_OP* operations,
                 const Rest&...) noexcept {
  return copy.one_by_one(operations, count);
}
template <typename... Rest>
CUresult between(RefusedCopy& copy, CUDA_MEMCPY3D_BATCH_OP* operation, const Rest&...) noexcept {
  return copy.one_by_one(operation, 1);
}
inline CUresult between(RefusedCopy&, ...) noexcept {
  return CUDA_ERROR_INVALID_VALUE;
}

// The answer of a copy that the driver refused with CUDA_ERROR_INVALID_VALUE, which leaves nothing
// done. `per_thread`: a function of the per-thread default stream.
template <typename... Parameters>
struct CopyAgain {
  CUresult (*real)(Parameters...);
  bool per_thread;

  CUresult operator()(Parameters... arguments) const noexcept {
    CUstream stream = nullptr;
    (find_stream(arguments, &stream), ...);
    if (per_thread && stream == nullptr) stream = CU_STREAM_PER_THREAD;
    RefusedCopy copy(stream);
    (add_sides(copy, arguments), ...);
    add_lists(copy, arguments...);
    if (copy.gave_access()) return real(arguments...);
    if (!copy.replaceable()) return CUDA_ERROR_INVALID_VALUE;
    const CUresult result = between(copy, arguments...);
    if (result != CUDA_ERROR_INVALID_VALUE) return result;
    if constexpr ((std::is_same_v<Parameters, CUstream> || ...)) {
      const CUstream ours = copy.begin();
      return ours == nullptr ? CUDA_ERROR_INVALID_VALUE
                             : copy.end(real(replaced(arguments, ours)...));
    } else {
      return copy.begin_waiting() ? copy.end_waiting(real(arguments...)) : CUDA_ERROR_INVALID_VALUE;
    }
  }
};

}  // namespace dormouse::shim
