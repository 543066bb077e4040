#include "tests/simgpu/copy.h"

#include <cstring>
#include <memory>
#include <vector>

#include "tests/simgpu/pool.h"

namespace simgpu {
namespace {

size_t span(const Side& side, size_t width, size_t height, size_t depth) {
  return (depth - 1) * side.slice + (height - 1) * side.pitch + width;
}

// Places both sides. Memory must be held.
CUresult place(const Copy& copy, int device, Place* to, Place* from) {
  auto check = [&](const Side& side, bool write, Place* place) -> CUresult {
    size_t bytes = span(side, copy.width, copy.height, copy.depth);
    SIMGPU_TRY(memory().place(side.base, bytes, side.on < 0 ? device : side.on, write, place));
    return side.device && *place == Place::kPageable ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  };
  SIMGPU_TRY(check(copy.to, true, to));
  return check(copy.from, false, from);
}

void move(const Copy& copy) {
  for (size_t z = 0; z < copy.depth; ++z) {
    for (size_t y = 0; y < copy.height; ++y) {
      uintptr_t to = copy.to.base + z * copy.to.slice + y * copy.to.pitch;
      uintptr_t from = copy.from.base + z * copy.from.slice + y * copy.from.pitch;
      std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), copy.width);
    }
  }
}

// Runs on the stream's thread. Memory that was unmapped, freed or closed meanwhile is an illegal
// address.
CUresult run(const Copy& copy, int device) {
  auto held = memory().hold();
  Place to, from;
  if (place(copy, device, &to, &from) != CUDA_SUCCESS) return CUDA_ERROR_ILLEGAL_ADDRESS;
  move(copy);
  return CUDA_SUCCESS;
}

// A copy of the source's content as it is now.
std::shared_ptr<std::vector<char>> stage(Copy* copy) {
  auto staged = std::make_shared<std::vector<char>>(copy->width * copy->height * copy->depth);
  Copy gather = *copy;
  gather.to.base = reinterpret_cast<uintptr_t>(staged->data());
  gather.to.pitch = copy->width;
  gather.to.slice = copy->width * copy->height;
  move(gather);
  copy->from = gather.to;
  copy->from.device = false;
  return staged;
}

// Unlike a copy, a fill needs access: another device's memory must be a peer's, or of a pool that
// gives it. Memory must be held.
bool may_fill(uintptr_t address, Context* context) {
  CUmemoryPool pool = nullptr;
  const int owner = memory().device_of(address, &pool);
  if (owner < 0 || owner == context->device()) return true;
  if (pool == nullptr) return simulation().is_peer(context, owner);
  return pools().access(pool, context->device()) == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
}

void fill_row(uintptr_t row, const Fill& fill) {
  void* at = reinterpret_cast<void*>(row);
  if (fill.element == 1) {
    std::memset(at, static_cast<int>(fill.value & 0xff), fill.width);
  } else if (fill.element == 2) {
    std::fill_n(static_cast<uint16_t*>(at), fill.width, static_cast<uint16_t>(fill.value));
  } else {
    std::fill_n(static_cast<uint32_t*>(at), fill.width, fill.value);
  }
}

CUresult run(const Fill& fill, int device) {
  auto held = memory().hold();
  Place to;
  size_t bytes = span(fill.to, fill.width * fill.element, fill.height, 1);
  if (memory().place(fill.to.base, bytes, device, true, &to) != CUDA_SUCCESS) {
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  for (size_t y = 0; y < fill.height; ++y) fill_row(fill.to.base + y * fill.to.pitch, fill);
  return CUDA_SUCCESS;
}

CUresult finish(const CompletionPtr& done, Context* context) {
  if (done == nullptr) return CUDA_SUCCESS;  // captured
  done->wait();
  return context->error();
}

}  // namespace

Work work_of(const Copy& copy, int device) {
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_MEMCPY;
  work.action = [copy, device] { return run(copy, device); };
  work.check = [copy, device] {
    auto held = memory().hold();
    Place to, from;
    return place(copy, device, &to, &from);
  };
  return work;
}

Work work_of(const Fill& fill, int device) {
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_MEMSET;
  work.action = [fill, device] { return run(fill, device); };
  work.check = [fill, device] {
    auto held = memory().hold();
    Place to;
    const size_t bytes = span(fill.to, fill.width * fill.element, fill.height, 1);
    return memory().place(fill.to.base, bytes, device, true, &to);
  };
  return work;
}

CUresult issue(Copy copy, CUstream handle, bool wait) {
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(handle, &context, &stream));
  if (copy.width == 0 || copy.height == 0 || copy.depth == 0) return CUDA_SUCCESS;
  SIMGPU_REQUIRE(copy.to.base != 0 && copy.from.base != 0);
  int device = stream->context()->device();
  Place to, from;
  {
    auto held = memory().hold();
    SIMGPU_TRY(place(copy, device, &to, &from));
  }
  std::shared_ptr<std::vector<char>> staged;
  bool captured = simulation().is_capturing(stream);
  if (!captured && !wait && from == Place::kPageable && to != Place::kPageable) {
    staged = stage(&copy);
  }
  Work work = work_of(copy, device);
  if (staged != nullptr) work.action = [copy, device, staged] { return run(copy, device); };
  CompletionPtr done;
  SIMGPU_TRY(simulation().submit(stream, std::move(work), &done));
  bool on_device = to == Place::kDevice && from == Place::kDevice;
  bool must_wait = wait ? !on_device : to == Place::kPageable;
  return must_wait ? finish(done, stream->context()) : CUDA_SUCCESS;
}

CUresult issue(const Fill& fill, CUstream handle, bool wait) {
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(handle, &context, &stream));
  if (fill.width == 0 || fill.height == 0) return CUDA_SUCCESS;
  SIMGPU_REQUIRE(fill.to.base != 0 && fill.to.base % fill.element == 0 &&
                 fill.to.pitch % fill.element == 0);
  SIMGPU_REQUIRE(fill.height == 1 || fill.to.pitch >= fill.width * fill.element);
  int device = stream->context()->device();
  Place to;
  {
    auto held = memory().hold();
    size_t bytes = span(fill.to, fill.width * fill.element, fill.height, 1);
    SIMGPU_TRY(memory().place(fill.to.base, bytes, device, true, &to));
    SIMGPU_REQUIRE(may_fill(fill.to.base, stream->context()));
  }
  SIMGPU_REQUIRE(to != Place::kPageable);
  CompletionPtr done;
  SIMGPU_TRY(simulation().submit(stream, work_of(fill, device), &done));
  return wait && to == Place::kPinned ? finish(done, stream->context()) : CUDA_SUCCESS;
}

}  // namespace simgpu
