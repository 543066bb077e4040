#include "tests/simgpu/memory.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "tests/simgpu/settings.h"

namespace simgpu {
namespace {

// Small allocations start at multiples of this, as the real driver's do.
constexpr size_t kSmallAlignment = 512;

const size_t kHostPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

size_t round_up(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

bool is_power_of_two(size_t value) {
  return value != 0 && (value & (value - 1)) == 0;
}

// The entry of a map from start to something with a size that holds `address`, or end().
template <typename Map, typename SizeOf>
typename Map::iterator holder(Map& map, uintptr_t address, SizeOf size_of) {
  auto next = map.upper_bound(address);
  if (next == map.begin()) return map.end();
  auto entry = std::prev(next);
  return address < entry->first + size_of(entry->second) ? entry : map.end();
}

template <typename Map>
typename Map::iterator holder(Map& map, uintptr_t address) {
  return holder(map, address, [](const auto& value) { return value.size; });
}

// Whether every page of the range is mapped in this process.
bool is_mapped(uintptr_t address, size_t size) {
  uintptr_t begin = address / kHostPage * kHostPage;
  size_t pages = (round_up(address + size, kHostPage) - begin) / kHostPage;
  std::vector<unsigned char> resident(pages);
  return mincore(reinterpret_cast<void*>(begin), pages * kHostPage, resident.data()) == 0;
}

std::string line(const char* what, uintptr_t address, size_t size) {
  char text[128];
  std::snprintf(text, sizeof(text), "%s 0x%llx size %zu", what,
                static_cast<unsigned long long>(address), size);
  return text;
}

int protection_of(const std::vector<CUmemAccess_flags>& access) {
  int protection = PROT_NONE;
  for (CUmemAccess_flags flags : access) {
    if (flags & CU_MEM_ACCESS_FLAGS_PROT_READ) protection |= PROT_READ;
    if (flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) protection |= PROT_WRITE;
  }
  return protection;
}

// The content of a CUipcMemHandle, which is an opaque 64 bytes. The exporting process keeps the
// descriptor open.
struct IpcContent {
  char magic[8];
  int32_t process;
  int32_t descriptor;
  int32_t device;
  int32_t padding;
  uint64_t file_offset;  // of the pages that hold the allocation
  uint64_t pages_size;
  uint64_t block_offset;  // of the allocation in these pages
  uint64_t block_size;
};
static_assert(sizeof(IpcContent) <= sizeof(CUipcMemHandle));
constexpr char kIpcMagic[8] = {'s', 'i', 'm', 'g', 'p', 'u', '1', 0};

}  // namespace

Memory::Memory(const std::vector<size_t>& capacities) {
  for (size_t i = 0; i < capacities.size(); ++i) {
    devices_.push_back(std::make_unique<DeviceMemory>(static_cast<int>(i), capacities[i]));
  }
}

CUresult Memory::check_prop(const CUmemAllocationProp& prop) const {
  if (prop.type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
  if (prop.location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  if (prop.location.id < 0 || prop.location.id >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  if (prop.win32HandleMetaData != nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (prop.requestedHandleTypes != 0 &&
      prop.requestedHandleTypes != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult Memory::create(size_t size, const CUmemAllocationProp& prop,
                        CUmemGenericAllocationHandle* handle) {
  if (CUresult result = check_prop(prop); result != CUDA_SUCCESS) return result;
  if (size == 0 || size % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(layout_mutex_);
  drop_closed_exports();
  std::shared_ptr<Physical> physical;
  bool exportable = prop.requestedHandleTypes != 0;
  CUresult result =
      Physical::create(*devices_[prop.location.id], size, prop, exportable, &physical);
  if (result != CUDA_SUCCESS) return result;
  *handle = next_handle_++;
  handles_[*handle] = {std::move(physical), 1};
  return CUDA_SUCCESS;
}

CUresult Memory::release(CUmemGenericAllocationHandle handle) {
  std::lock_guard lock(layout_mutex_);
  if (multicasts_.erase(handle) != 0) return CUDA_SUCCESS;
  auto entry = handles_.find(handle);
  if (entry == handles_.end()) return CUDA_ERROR_INVALID_VALUE;
  if (--entry->second.references == 0) handles_.erase(entry);
  return CUDA_SUCCESS;
}

CUmemGenericAllocationHandle Memory::handle_of(const std::shared_ptr<Physical>& physical) {
  for (auto& [id, handle] : handles_) {
    if (handle.physical == physical) {
      ++handle.references;
      return id;
    }
  }
  handles_[next_handle_] = {physical, 1};
  return next_handle_++;
}

CUresult Memory::retain(uintptr_t address, CUmemGenericAllocationHandle* handle) {
  std::lock_guard lock(layout_mutex_);
  auto mapping = holder(mappings_, address);
  if (mapping == mappings_.end()) return CUDA_ERROR_INVALID_VALUE;
  *handle = handle_of(mapping->second.physical);
  return CUDA_SUCCESS;
}

CUresult Memory::properties(CUmemGenericAllocationHandle handle, CUmemAllocationProp* prop) {
  std::lock_guard lock(layout_mutex_);
  auto entry = handles_.find(handle);
  if (entry == handles_.end()) return CUDA_ERROR_INVALID_VALUE;
  *prop = entry->second.physical->prop;
  return CUDA_SUCCESS;
}

CUresult Memory::export_handle(CUmemGenericAllocationHandle handle, int* fd) {
  std::lock_guard lock(layout_mutex_);
  auto entry = handles_.find(handle);
  if (entry == handles_.end()) return CUDA_ERROR_INVALID_VALUE;
  const Physical& physical = *entry->second.physical;
  if (physical.prop.requestedHandleTypes != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *fd = fcntl(physical.fd, F_DUPFD_CLOEXEC, 3);
  return *fd < 0 ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_SUCCESS;
}

CUresult Memory::import_handle(int fd, CUmemGenericAllocationHandle* handle) {
  struct stat file;
  if (fstat(fd, &file) != 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(layout_mutex_);
  auto same_file = [&](const std::shared_ptr<Physical>& physical) {
    struct stat other;
    return physical->owns_fd && fstat(physical->fd, &other) == 0 && other.st_ino == file.st_ino &&
           other.st_dev == file.st_dev;
  };
  auto add = [&](std::shared_ptr<Physical> physical) {
    *handle = next_handle_++;
    handles_[*handle] = {std::move(physical), 1};
    return CUDA_SUCCESS;
  };
  for (const auto& [address, mapping] : mappings_) {
    if (same_file(mapping.physical)) return add(mapping.physical);
  }
  for (const auto& [id, entry] : handles_) {
    if (same_file(entry.physical)) return add(entry.physical);
  }
  // Another process's memory: the file's name tells the device.
  char path[64];
  char name[64] = {};
  std::snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
  int device = -1;
  if (readlink(path, name, sizeof(name) - 1) < 0 ||
      std::sscanf(name, "/memfd:simgpu-device-%d", &device) != 1 || device < 0 ||
      device >= device_count()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::shared_ptr<Physical> physical;
  CUresult result = Physical::adopt(fd, 0, static_cast<size_t>(file.st_size), device, &physical);
  return result == CUDA_SUCCESS ? add(std::move(physical)) : result;
}

std::shared_ptr<Physical> Memory::physical_at(uintptr_t address, size_t size) {
  if (auto it = holder(allocations_, address); it != allocations_.end()) {
    // Rounded to whole pages, as programs ask, it may reach beyond the allocation.
    uintptr_t end = it->second.mapped_at + it->second.physical->size;
    return size != 0 && size <= end - address ? it->second.physical : nullptr;
  }
  auto it = holder(mappings_, address);
  bool inside = it != mappings_.end() && size != 0 && size <= it->first + it->second.size - address;
  return inside ? it->second.physical : nullptr;
}

CUresult Memory::export_range(uintptr_t address, size_t size, int* fd) {
  if (address % kHostPage != 0 || size % kHostPage != 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(layout_mutex_);
  std::shared_ptr<Physical> physical = physical_at(address, size);
  if (physical == nullptr) return CUDA_ERROR_INVALID_VALUE;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return CUDA_ERROR_OPERATING_SYSTEM;
  *fd = ends[0];
  exported_.push_back({ends[1], std::move(physical)});
  return CUDA_SUCCESS;
}

// A pipe's end tells when the last descriptor of the other end has been closed.
void Memory::drop_closed_exports() {
  std::erase_if(exported_, [](const Exported& each) {
    pollfd other{each.witness, 0, 0};
    if (poll(&other, 1, 0) != 1 || (other.revents & POLLERR) == 0) return false;
    close(each.witness);
    return true;
  });
}

size_t Memory::used(int device) {
  std::lock_guard lock(layout_mutex_);
  drop_closed_exports();
  return devices_[device]->used();
}

CUresult Memory::create_multicast(size_t size, CUmemGenericAllocationHandle* handle) {
  if (size == 0 || size % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(layout_mutex_);
  *handle = next_handle_++;
  multicasts_[*handle] = {size, {}};
  return CUDA_SUCCESS;
}

CUresult Memory::bind_multicast(CUmemGenericAllocationHandle multicast, size_t offset,
                                CUmemGenericAllocationHandle handle, size_t size) {
  std::lock_guard lock(layout_mutex_);
  auto object = multicasts_.find(multicast);
  auto entry = handles_.find(handle);
  if (object == multicasts_.end() || entry == handles_.end() || size == 0 ||
      size > entry->second.physical->size || offset + size > object->second.size) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  object->second.bound[offset] = {size, entry->second.physical};
  return CUDA_SUCCESS;
}

CUresult Memory::bind_multicast_range(CUmemGenericAllocationHandle multicast, size_t offset,
                                      uintptr_t address, size_t size) {
  std::lock_guard lock(layout_mutex_);
  auto object = multicasts_.find(multicast);
  std::shared_ptr<Physical> physical = physical_at(address, size);
  if (object == multicasts_.end() || physical == nullptr || offset + size > object->second.size) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  object->second.bound[offset] = {size, std::move(physical)};
  return CUDA_SUCCESS;
}

CUresult Memory::unbind_multicast(CUmemGenericAllocationHandle multicast, size_t offset,
                                  size_t size) {
  std::lock_guard lock(layout_mutex_);
  auto object = multicasts_.find(multicast);
  if (object == multicasts_.end()) return CUDA_ERROR_INVALID_VALUE;
  auto bound = object->second.bound.find(offset);
  if (bound == object->second.bound.end() || bound->second.first != size) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  object->second.bound.erase(bound);
  return CUDA_SUCCESS;
}

CUresult Memory::set_sync_memops(uintptr_t address, bool on) {
  std::lock_guard lock(layout_mutex_);
  if (auto it = holder(allocations_, address); it != allocations_.end()) {
    it->second.sync_memops = on;
    return CUDA_SUCCESS;
  }
  bool mapped = holder(mappings_, address) != mappings_.end();
  return mapped || holder(host_, address) != host_.end() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult Memory::reserve(size_t size, size_t alignment, uintptr_t hint, uintptr_t* address) {
  if (size == 0 || size % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  if (alignment != 0 && !is_power_of_two(alignment)) return CUDA_ERROR_INVALID_VALUE;
  if (hint % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(layout_mutex_);
  *address = addresses_.take(size, std::max(alignment, kGranularity), hint);
  if (*address == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  reservations_[*address] = size;
  return CUDA_SUCCESS;
}

CUresult Memory::unreserve(uintptr_t address, size_t size) {
  std::lock_guard lock(layout_mutex_);
  auto reservation = reservations_.find(address);
  if (reservation == reservations_.end() || reservation->second != size) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto mapping = mappings_.lower_bound(address);
  if (mapping != mappings_.end() && mapping->first < address + size) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!addresses_.give_back(address, size)) return CUDA_ERROR_OPERATING_SYSTEM;
  reservations_.erase(reservation);
  return CUDA_SUCCESS;
}

CUresult Memory::map(uintptr_t address, size_t size, size_t offset,
                     CUmemGenericAllocationHandle handle) {
  if (size == 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(layout_mutex_);
  auto entry = handles_.find(handle);
  if (entry == handles_.end()) return CUDA_ERROR_INVALID_VALUE;
  // A part of a handle cannot be mapped.
  if (size != entry->second.physical->size || offset != 0) return CUDA_ERROR_NOT_SUPPORTED;
  if (address % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  auto reservation = holder(reservations_, address, [](size_t bytes) { return bytes; });
  if (reservation == reservations_.end() ||
      address + size > reservation->first + reservation->second) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto next = mappings_.lower_bound(address);
  bool taken = next != mappings_.end() && next->first < address + size;
  if (taken || holder(mappings_, address) != mappings_.end()) return CUDA_ERROR_INVALID_VALUE;
  const std::shared_ptr<Physical>& physical = entry->second.physical;
  if (!physical->map(reinterpret_cast<void*>(address), size, PROT_NONE)) {
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  std::vector<CUmemAccess_flags> access(devices_.size(), CU_MEM_ACCESS_FLAGS_PROT_NONE);
  mappings_[address] = {size, physical, std::move(access), next_buffer_id_++};
  return CUDA_SUCCESS;
}

bool Memory::whole_mappings(uintptr_t address, size_t size, Mappings::iterator* first,
                            Mappings::iterator* last) {
  *first = mappings_.find(address);
  uintptr_t end = address;
  Mappings::iterator mapping = *first;
  while (mapping != mappings_.end() && mapping->first == end && end < address + size) {
    end += mapping->second.size;
    ++mapping;
  }
  *last = mapping;
  return size != 0 && end == address + size;
}

CUresult Memory::unmap(uintptr_t address, size_t size) {
  std::lock_guard lock(layout_mutex_);
  Mappings::iterator first, last;
  if (!whole_mappings(address, size, &first, &last)) return CUDA_ERROR_INVALID_VALUE;
  if (!AddressSpace::clear(address, size)) return CUDA_ERROR_OPERATING_SYSTEM;
  mappings_.erase(first, last);
  return CUDA_SUCCESS;
}

CUresult Memory::set_access(uintptr_t address, size_t size, const CUmemAccessDesc* desc,
                            size_t count) {
  if (count == 0) return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < count; ++i) {
    const CUmemLocation& location = desc[i].location;
    if (location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
    if (location.id < 0 || location.id >= device_count()) return CUDA_ERROR_INVALID_VALUE;
    if (desc[i].flags != CU_MEM_ACCESS_FLAGS_PROT_NONE &&
        desc[i].flags != CU_MEM_ACCESS_FLAGS_PROT_READ &&
        desc[i].flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  std::lock_guard lock(layout_mutex_);
  Mappings::iterator first, last;
  if (!whole_mappings(address, size, &first, &last)) return CUDA_ERROR_INVALID_VALUE;
  for (auto mapping = first; mapping != last; ++mapping) {
    const int own = mapping->second.physical->device;
    for (size_t i = 0; i < count && !settings().peers; ++i) {
      if (desc[i].location.id != own) return CUDA_ERROR_NOT_SUPPORTED;
    }
    std::vector<CUmemAccess_flags> access = mapping->second.access;
    for (size_t i = 0; i < count; ++i) access[desc[i].location.id] = desc[i].flags;
    void* at = reinterpret_cast<void*>(mapping->first);
    if (mprotect(at, mapping->second.size, protection_of(access)) != 0) {
      return CUDA_ERROR_OPERATING_SYSTEM;
    }
    mapping->second.access = std::move(access);
  }
  return CUDA_SUCCESS;
}

CUresult Memory::get_access(uintptr_t address, const CUmemLocation& location,
                            unsigned long long* flags) {
  if (location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  if (location.id < 0 || location.id >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  std::lock_guard lock(layout_mutex_);
  auto mapping = holder(mappings_, address);
  if (mapping == mappings_.end()) return CUDA_ERROR_INVALID_VALUE;
  *flags = mapping->second.access[location.id];
  return CUDA_SUCCESS;
}

CUresult Memory::allocate(Context* context, int device, size_t size, const AllocationTraits& traits,
                          uintptr_t* address) {
  if (size == 0) return CUDA_ERROR_INVALID_VALUE;
  if (size > devices_[device]->capacity()) return CUDA_ERROR_OUT_OF_MEMORY;
  std::lock_guard lock(layout_mutex_);
  drop_closed_exports();
  Allocation allocation{size, nullptr, context, next_buffer_id_, traits};
  CUresult result = size < kGranularity ? place_small(context, device, size, &allocation, address)
                                        : place_large(device, size, &allocation, address);
  if (result != CUDA_SUCCESS) return result;
  ++next_buffer_id_;
  allocations_[*address] = std::move(allocation);
  return CUDA_SUCCESS;
}

CUresult Memory::place_large(int device, size_t size, Allocation* allocation, uintptr_t* address) {
  size_t bytes = round_up(size, kGranularity);
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  std::shared_ptr<Physical> physical;
  CUresult result = Physical::create(*devices_[device], bytes, prop, false, &physical);
  if (result != CUDA_SUCCESS) return result;
  uintptr_t at = addresses_.take(bytes, kGranularity, 0);
  if (at == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  if (!physical->map(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE)) {
    addresses_.give_back(at, bytes);
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  allocation->physical = std::move(physical);
  allocation->mapped_at = at;
  *address = at;
  return CUDA_SUCCESS;
}

CUresult Memory::place_small(Context* context, int device, size_t size, Allocation* allocation,
                             uintptr_t* address) {
  size_t bytes = round_up(size, kSmallAlignment);
  auto put = [&](uintptr_t base, SmallPage& page) {
    size_t offset = 0;
    for (const auto& [start, length] : page.used) {
      if (start - offset >= bytes) break;
      offset = start + length;
    }
    if (offset + bytes > kGranularity) return false;
    page.used[offset] = bytes;
    allocation->physical = page.physical;
    allocation->mapped_at = base;
    *address = base + offset;
    return true;
  };
  for (auto& [base, page] : small_pages_) {
    if (page.context == context && page.physical->device == device && put(base, page)) {
      return CUDA_SUCCESS;
    }
  }
  Allocation page{};
  uintptr_t base = 0;
  CUresult result = place_large(device, kGranularity, &page, &base);
  if (result != CUDA_SUCCESS) return result;
  auto& fresh = small_pages_[base] = {std::move(page.physical), context, {}};
  put(base, fresh);
  return CUDA_SUCCESS;
}

CUresult Memory::check_free(uintptr_t address) {
  std::lock_guard lock(layout_mutex_);
  auto allocation = allocations_.find(address);
  bool free_able = allocation != allocations_.end() && !allocation->second.freeing &&
                   !allocation->second.imported;
  return free_able ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult Memory::begin_free(uintptr_t address) {
  if (CUresult result = check_free(address); result != CUDA_SUCCESS) return result;
  std::lock_guard lock(layout_mutex_);
  auto allocation = allocations_.find(address);
  if (allocation == allocations_.end() || allocation->second.freeing) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  allocation->second.freeing = true;
  return CUDA_SUCCESS;
}

CUresult Memory::free(uintptr_t address) {
  std::lock_guard lock(layout_mutex_);
  auto allocation = allocations_.find(address);
  if (allocation == allocations_.end() || allocation->second.imported) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return drop(allocation);
}

CUresult Memory::drop(std::map<uintptr_t, Allocation>::iterator allocation) {
  uintptr_t base = allocation->second.mapped_at;
  auto page = small_pages_.find(base);
  if (page != small_pages_.end()) {
    page->second.used.erase(allocation->first - base);
    if (page->second.used.empty()) {
      if (!addresses_.give_back(base, kGranularity)) return CUDA_ERROR_OPERATING_SYSTEM;
      small_pages_.erase(page);
    }
  } else if (!addresses_.give_back(base, allocation->second.physical->size)) {
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  allocations_.erase(allocation);
  return CUDA_SUCCESS;
}

CUresult Memory::ipc_export(uintptr_t address, CUipcMemHandle* handle) {
  std::lock_guard lock(layout_mutex_);
  auto allocation = holder(allocations_, address);
  if (allocation == allocations_.end() || allocation->second.imported ||
      allocation->second.traits.pool != nullptr || allocation->second.traits.managed) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const Physical& physical = *allocation->second.physical;
  IpcContent content{};
  std::memcpy(content.magic, kIpcMagic, sizeof(kIpcMagic));
  content.process = getpid();
  content.descriptor = physical.fd;
  content.device = physical.device;
  content.file_offset = static_cast<uint64_t>(physical.offset);
  content.pages_size = physical.size;
  content.block_offset = allocation->first - allocation->second.mapped_at;
  content.block_size = allocation->second.size;
  std::memset(handle, 0, sizeof(*handle));
  std::memcpy(handle, &content, sizeof(content));
  return CUDA_SUCCESS;
}

CUresult Memory::ipc_open(Context* context, const CUipcMemHandle& handle, uintptr_t* address) {
  IpcContent content;
  std::memcpy(&content, &handle, sizeof(content));
  if (std::memcmp(content.magic, kIpcMagic, sizeof(kIpcMagic)) != 0 || content.device < 0 ||
      content.device >= device_count()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (content.process == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/fd/%d", content.process, content.descriptor);
  int fd = ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return CUDA_ERROR_MAP_FAILED;
  std::shared_ptr<Physical> physical;
  CUresult result = Physical::adopt(fd, static_cast<off_t>(content.file_offset), content.pages_size,
                                    content.device, &physical);
  ::close(fd);
  if (result != CUDA_SUCCESS) return result;
  std::lock_guard lock(layout_mutex_);
  uintptr_t base = addresses_.take(physical->size, kGranularity, 0);
  if (base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  if (!physical->map(reinterpret_cast<void*>(base), physical->size, PROT_READ | PROT_WRITE)) {
    addresses_.give_back(base, physical->size);
    return CUDA_ERROR_MAP_FAILED;
  }
  *address = base + content.block_offset;
  Allocation opened{content.block_size, std::move(physical), context, next_buffer_id_++, {}};
  opened.imported = true;
  opened.mapped_at = base;
  allocations_[*address] = std::move(opened);
  return CUDA_SUCCESS;
}

CUresult Memory::ipc_close(uintptr_t address) {
  std::lock_guard lock(layout_mutex_);
  auto allocation = allocations_.find(address);
  if (allocation == allocations_.end() || !allocation->second.imported) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return drop(allocation);
}

bool Memory::pin(size_t bytes) {
  if (bytes > settings().pin_limit || pinned_ > settings().pin_limit - bytes) return false;
  pinned_ += bytes;
  return true;
}

bool Memory::overlaps_host(uintptr_t address, size_t size) const {
  auto next = host_.lower_bound(address);
  if (next != host_.end() && next->first < address + size) return true;
  if (next == host_.begin()) return false;
  auto previous = std::prev(next);
  return previous->first + previous->second.size > address;
}

CUresult Memory::host_allocate(Context* context, size_t size, unsigned flags, void** address) {
  constexpr unsigned kKnown =
      CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;
  if ((flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
  *address = nullptr;
  if (size == 0) return CUDA_SUCCESS;
  std::lock_guard lock(layout_mutex_);
  size_t bytes = round_up(size, kHostPage);
  if (bytes < size || !pin(bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) {
    pinned_ -= bytes;
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  host_[reinterpret_cast<uintptr_t>(at)] = {size, bytes, false, flags, context, next_buffer_id_++};
  *address = at;
  return CUDA_SUCCESS;
}

CUresult Memory::host_free(void* address) {
  std::lock_guard lock(layout_mutex_);
  auto range = host_.find(reinterpret_cast<uintptr_t>(address));
  if (range == host_.end() || range->second.registered) return CUDA_ERROR_INVALID_VALUE;
  if (munmap(address, range->second.pinned) != 0) return CUDA_ERROR_OPERATING_SYSTEM;
  pinned_ -= range->second.pinned;
  host_.erase(range);
  return CUDA_SUCCESS;
}

CUresult Memory::host_register(Context* context, void* address, size_t size, unsigned flags) {
  constexpr unsigned kKnown = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP |
                              CU_MEMHOSTREGISTER_IOMEMORY | CU_MEMHOSTREGISTER_READ_ONLY;
  uintptr_t start = reinterpret_cast<uintptr_t>(address);
  if (address == nullptr || size == 0 || start + size < start || (flags & ~kKnown) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (size > settings().register_limit) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(layout_mutex_);
  if (auto range = holder(host_, start); range != host_.end() && !range->second.registered) {
    return CUDA_ERROR_INVALID_VALUE;  // allocated pinned
  }
  if (overlaps_host(start, size)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  if (addresses_.contains(start) || !is_mapped(start, size)) return CUDA_ERROR_INVALID_VALUE;
  size_t bytes = round_up(start + size, kHostPage) - start / kHostPage * kHostPage;
  if (!pin(bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  // Pinning brings every page into memory. A kernel that does not know the advice leaves them as
  // they are, which changes nothing that a program can see but the time.
  madvise(reinterpret_cast<void*>(start / kHostPage * kHostPage), bytes,
          (flags & CU_MEMHOSTREGISTER_READ_ONLY) ? MADV_POPULATE_READ : MADV_POPULATE_WRITE);
  host_[start] = {size, bytes, true, flags, context, next_buffer_id_++};
  return CUDA_SUCCESS;
}

CUresult Memory::host_unregister(void* address) {
  std::lock_guard lock(layout_mutex_);
  uintptr_t start = reinterpret_cast<uintptr_t>(address);
  auto range = holder(host_, start);
  if (range == host_.end()) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  if (range->first != start || !range->second.registered) return CUDA_ERROR_INVALID_VALUE;
  pinned_ -= range->second.pinned;
  host_.erase(range);
  return CUDA_SUCCESS;
}

void Memory::free_all_of(Context* context) {
  std::lock_guard lock(layout_mutex_);
  for (auto it = allocations_.begin(); it != allocations_.end();) {
    auto allocation = it++;
    if (allocation->second.context == context) drop(allocation);
  }
  for (auto it = host_.begin(); it != host_.end();) {
    auto range = it++;
    if (range->second.context != context) continue;
    if (!range->second.registered) {
      munmap(reinterpret_cast<void*>(range->first), range->second.pinned);
    }
    pinned_ -= range->second.pinned;
    host_.erase(range);
  }
}

std::optional<RangeInfo> Memory::find(uintptr_t address) {
  std::shared_lock lock(layout_mutex_);
  RangeInfo info{};
  auto fill = [&info](RangeKind kind, uintptr_t base, const auto& range) {
    info.kind = kind;
    info.base = info.outer_base = base;
    info.size = info.outer_size = range.size;
    info.buffer_id = range.buffer_id;
  };
  if (auto it = holder(allocations_, address); it != allocations_.end()) {
    fill(RangeKind::kAllocation, it->first, it->second);
    info.device = it->second.physical->device;
    info.context = it->second.context;
    info.managed = it->second.traits.managed;
    info.sync_memops = it->second.sync_memops;
    info.imported = it->second.imported;
    info.pool = it->second.traits.pool;
    return info;
  }
  if (auto it = holder(mappings_, address); it != mappings_.end()) {
    fill(RangeKind::kMapping, it->first, it->second);
    auto reservation = holder(reservations_, address, [](size_t bytes) { return bytes; });
    info.outer_base = reservation->first;
    info.outer_size = reservation->second;
    info.device = it->second.physical->device;
    info.handle_types = static_cast<unsigned>(it->second.physical->prop.requestedHandleTypes);
    return info;
  }
  if (auto it = holder(host_, address); it != host_.end()) {
    fill(it->second.registered ? RangeKind::kHostRegistration : RangeKind::kHostAllocation,
         it->first, it->second);
    info.device = -1;
    info.context = it->second.context;
    info.flags = it->second.flags;
    return info;
  }
  return std::nullopt;
}

CUresult Memory::place(uintptr_t address, size_t size, int device, bool write, Place* place) {
  *place = Place::kDevice;
  if (auto it = holder(allocations_, address); it != allocations_.end()) {
    bool inside = size <= it->first + it->second.size - address;
    return inside ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  }
  if (auto it = holder(mappings_, address); it != mappings_.end()) {
    uintptr_t end = it->first;
    CUmemAccess_flags wanted =
        write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ;
    for (; it != mappings_.end() && it->first == end && end < address + size; ++it) {
      if ((it->second.access[device] & wanted) != wanted) return CUDA_ERROR_INVALID_VALUE;
      end += it->second.size;
    }
    return end >= address + size ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  }
  if (addresses_.contains(address)) return CUDA_ERROR_INVALID_VALUE;
  auto it = holder(host_, address);
  bool pinned = it != host_.end() && size <= it->first + it->second.size - address;
  *place = pinned ? Place::kPinned : Place::kPageable;
  return CUDA_SUCCESS;
}

int Memory::device_of(uintptr_t address, CUmemoryPool* pool) {
  auto it = holder(allocations_, address);
  if (it == allocations_.end() || it->second.traits.managed) return -1;
  *pool = it->second.traits.pool;
  return it->second.physical->device;
}

size_t Memory::pinned() {
  std::shared_lock lock(layout_mutex_);
  return pinned_;
}

void Memory::live(simgpu_live_counts* counts) {
  std::shared_lock lock(layout_mutex_);
  counts->handles = handles_.size() + multicasts_.size();
  counts->mappings = mappings_.size();
  counts->reservations = reservations_.size();
  counts->allocations = allocations_.size();
  auto registered = [](const auto& entry) { return entry.second.registered; };
  counts->registrations =
      static_cast<size_t>(std::count_if(host_.begin(), host_.end(), registered));
  counts->host = host_.size() - counts->registrations;
}

std::vector<std::string> Memory::describe_live() {
  std::shared_lock lock(layout_mutex_);
  std::vector<std::string> lines;
  for (const auto& [id, handle] : handles_) {
    lines.push_back(line("handle", id, handle.physical->size));
  }
  for (const auto& [at, mapping] : mappings_) lines.push_back(line("mapping", at, mapping.size));
  for (const auto& [at, size] : reservations_) lines.push_back(line("reservation", at, size));
  for (const auto& [at, allocation] : allocations_) {
    lines.push_back(line("allocation", at, allocation.size));
  }
  for (const auto& [at, range] : host_) {
    lines.push_back(line(range.registered ? "registration" : "host allocation", at, range.size));
  }
  return lines;
}

}  // namespace simgpu
