#include "tests/simgpu/physical.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "tests/simgpu/settings.h"

namespace simgpu {
namespace {

// What new memory holds under SIMGPU_POISON.
constexpr int kPoison = 0xA5;

int open_memory_file(int device) {
  // The name tells an importing process the device.
  return memfd_create(("simgpu-device-" + std::to_string(device)).c_str(), MFD_CLOEXEC);
}

bool poison(int fd, off_t offset, size_t size) {
  void* view = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
  if (view == MAP_FAILED) return false;
  std::memset(view, kPoison, size);
  return munmap(view, size) == 0;
}

}  // namespace

DeviceMemory::DeviceMemory(int ordinal, size_t capacity) : ordinal_(ordinal), capacity_(capacity) {}

bool DeviceMemory::charge(size_t bytes) {
  size_t used = used_.load();
  do {
    if (bytes > capacity_ || used > capacity_ - bytes) return false;
  } while (!used_.compare_exchange_weak(used, used + bytes));
  return true;
}

bool DeviceMemory::open() {
  if (fd_ < 0) fd_ = open_memory_file(ordinal_);
  return fd_ >= 0;
}

CUresult Physical::create(DeviceMemory& memory, size_t size, const CUmemAllocationProp& prop,
                          bool exportable, std::shared_ptr<Physical>* out) {
  if (!memory.charge(size)) return CUDA_ERROR_OUT_OF_MEMORY;
  auto block = std::make_shared<Physical>();
  block->memory = &memory;
  block->device = memory.ordinal();
  block->size = size;
  block->prop = prop;
  if (exportable) {
    block->fd = open_memory_file(memory.ordinal());
    block->owns_fd = block->fd >= 0;
    if (block->fd < 0 || ftruncate(block->fd, static_cast<off_t>(size)) != 0) {
      return CUDA_ERROR_OPERATING_SYSTEM;
    }
  } else {
    off_t end = memory.end_ + static_cast<off_t>(size);
    if (!memory.open() || ftruncate(memory.fd_, end) != 0) return CUDA_ERROR_OPERATING_SYSTEM;
    block->fd = memory.fd_;
    block->offset = memory.end_;
    memory.end_ = end;
  }
  if (settings().poison && !poison(block->fd, block->offset, size)) {
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  *out = std::move(block);
  return CUDA_SUCCESS;
}

CUresult Physical::adopt(int fd, off_t offset, size_t size, int device,
                         std::shared_ptr<Physical>* out) {
  int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (own < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  auto block = std::make_shared<Physical>();
  block->device = device;
  block->size = size;
  block->fd = own;
  block->offset = offset;
  block->owns_fd = true;
  block->prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  block->prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  block->prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  *out = std::move(block);
  return CUDA_SUCCESS;
}

Physical::~Physical() {
  if (memory != nullptr) memory->refund(size);
  if (owns_fd) {
    close(fd);
  } else if (fd >= 0) {
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, static_cast<off_t>(size));
  }
}

bool Physical::map(void* address, size_t bytes, int protection) const {
  void* at = mmap(address, bytes, protection, MAP_SHARED | MAP_FIXED, fd, offset);
  if (at == MAP_FAILED) return false;
  // A forked child has no CUDA and must not see, let alone change, the parent's device memory.
  madvise(at, bytes, MADV_DONTFORK);
  madvise(at, bytes, MADV_DONTDUMP);
  return true;
}

}  // namespace simgpu
