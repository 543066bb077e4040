// See chunk_store.h.
#include "core/memory/chunk_store.h"

#include <algorithm>
#include <new>
#include <utility>

#include "core/log.h"
#include "core/memory/mapped_memory.h"

namespace dormouse {
namespace {

CUmemAccessDesc access_for(int device, CUmemAccess_flags flags) {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = flags;
  return access;
}

}  // namespace

ChunkStore::ChunkStore(const Driver& driver, const PoolOptions& options,
                       RegisterReservation register_reservation)
    : driver_(driver),
      options_(options),
      register_reservation_(std::move(register_reservation)),
      peers_(options.peers) {}

// The engine of a process is never destroyed; tests destroy theirs and look for leaks.
ChunkStore::~ChunkStore() {
  for (auto& [address, chunk] : chunks_) {
    if (chunk->handle == 0) continue;
    Chunk& mapped = *chunk;
    give_back([&] { return unmap(mapped); });
  }
  chunks_.clear();
  for (const Range& each : reservations_) {
    give_back([&] { return driver_.cuMemAddressFree(each.begin, each.bytes); });
  }
}

Chunk* ChunkStore::at(CUdeviceptr address) const {
  auto at = chunks_.upper_bound(address);
  if (at == chunks_.begin()) return nullptr;
  Chunk* chunk = std::prev(at)->second.get();
  return address < chunk->end() ? chunk : nullptr;
}

CUresult ChunkStore::make(std::size_t bytes, Chunk** out) {
  auto chunk = std::make_unique<Chunk>();
  chunk->sequence = options_.next_sequence->fetch_add(1);
  chunk->bytes = bytes;
  CUresult result = reserve(bytes, &chunk->address);
  if (result != CUDA_SUCCESS) return result;
  // What may run out of host memory comes before there is device memory to lose.
  Chunk& made = *chunk;
  try {
    std::lock_guard lock(access_mutex_);
    chunks_.emplace(made.address, nullptr).first->second = std::move(chunk);
  } catch (const std::bad_alloc&) {
    return_address(made);
    throw;
  }
  bool gone = true;
  result = create(made);
  if (result == CUDA_SUCCESS) {
    result = map(made);
    if (result != CUDA_SUCCESS) {
      release_handle(made);
    } else {
      result = set_access(made.address, made.bytes);
      // A mapping that cannot be undone keeps its addresses, and its memory until the process ends.
      if (result != CUDA_SUCCESS) gone = give_back([&] { return unmap(made); }) == CUDA_SUCCESS;
    }
  }
  if (result != CUDA_SUCCESS) {
    if (gone) return_address(made);
    erase(made.address);
    return result;
  }
  *out = &made;
  return CUDA_SUCCESS;
}

void ChunkStore::erase(CUdeviceptr address) noexcept {
  std::lock_guard lock(access_mutex_);
  chunks_.erase(address);
}

CUresult ChunkStore::reserve(std::size_t bytes, CUdeviceptr* out) {
  auto address = addresses_.take(bytes, options_.granularity);
  if (!address) {
    std::size_t reserved =
        round_up(std::max<std::size_t>(bytes, options_.device_bytes), options_.granularity);
    CUdeviceptr begin = 0;
    reservations_.reserve(reservations_.size() + 1);
    CUresult result = driver_.cuMemAddressReserve(&begin, reserved, options_.granularity, 0, 0);
    if (result != CUDA_SUCCESS && reserved > bytes) {
      reserved = round_up(bytes, options_.granularity);  // a limit on address space (ulimit -v)
      result = driver_.cuMemAddressReserve(&begin, reserved, options_.granularity, 0, 0);
    }
    if (result != CUDA_SUCCESS) return result;
    result = register_reservation_({begin, reserved});
    if (result != CUDA_SUCCESS) {
      driver_.cuMemAddressFree(begin, reserved);
      return result;
    }
    reservations_.push_back({begin, reserved});
    addresses_.insert(begin, reserved, begin, begin + reserved);
    address = addresses_.take(bytes, options_.granularity);
    if (!address) return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *out = *address;
  return CUDA_SUCCESS;
}

// Free addresses are merged within their reservation alone: a mapping cannot reach across two.
void ChunkStore::return_address(const Chunk& chunk) noexcept {
  for (const Range& each : reservations_) {
    if (!each.contains(chunk.address)) continue;
    try {
      addresses_.insert(chunk.address, chunk.bytes, each.begin, each.end());
    } catch (const std::bad_alloc&) {
      // These addresses are not used again.
    }
    return;
  }
}

bool ChunkStore::release(Chunk& chunk) noexcept {
  if (chunk.handle != 0 && unmap(chunk) != CUDA_SUCCESS) return false;
  forget(chunk);
  return true;
}

void ChunkStore::forget(Chunk& chunk) noexcept {
  return_address(chunk);
  erase(chunk.address);
}

Chunk& ChunkStore::adopt(std::unique_ptr<Chunk>& chunk) {
  std::lock_guard lock(access_mutex_);
  const auto at = chunks_.emplace(chunk->address, nullptr).first;
  at->second = std::move(chunk);
  at->second->sequence = options_.next_sequence->fetch_add(1);
  return *at->second;
}

std::unique_ptr<Chunk> ChunkStore::disown(Chunk& chunk) noexcept {
  std::lock_guard lock(access_mutex_);
  const auto at = chunks_.find(chunk.address);
  std::unique_ptr<Chunk> taken = std::move(at->second);
  chunks_.erase(at);
  return taken;
}

CUresult ChunkStore::unmap(Chunk& chunk) noexcept {
  {
    std::lock_guard lock(access_mutex_);
    const CUresult result = driver_.cuMemUnmap(chunk.address, chunk.bytes);
    if (result != CUDA_SUCCESS) return result;
    chunk.accessible = false;
  }
  release_handle(chunk);
  return CUDA_SUCCESS;
}

void ChunkStore::release_handle(Chunk& chunk) const noexcept {
  const CUresult result = give_back([&] { return driver_.cuMemRelease(chunk.handle); });
  if (result != CUDA_SUCCESS) {
    log().error(
        "cuMemRelease of {} bytes of tag {} failed with {}: this memory is lost until the process "
        "ends",
        chunk.bytes, options_.info.name, error_name(driver_, result));
  }
  chunk.handle = 0;
}

CUresult ChunkStore::create(Chunk& chunk) const noexcept {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = options_.device;
  properties.allocFlags.gpuDirectRDMACapable = options_.gpu_direct_rdma ? 1 : 0;
  if (chunk.program != nullptr) properties = chunk.program->properties;
  const CUresult result = driver_.cuMemCreate(&chunk.handle, chunk.bytes, &properties, 0);
  if (result != CUDA_SUCCESS) chunk.handle = 0;
  return result;
}

CUresult ChunkStore::map(const Chunk& chunk) const noexcept {
  return driver_.cuMemMap(chunk.address, chunk.bytes, 0, chunk.handle, 0);
}

CUresult ChunkStore::set_access(CUdeviceptr begin, std::size_t bytes) noexcept {
  std::lock_guard lock(access_mutex_);
  try {
    std::vector<CUmemAccessDesc> access{
        access_for(options_.device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE)};
    for (int peer : peers_) access.push_back(access_for(peer, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
    const CUresult result = driver_.cuMemSetAccess(begin, bytes, access.data(), access.size());
    if (result != CUDA_SUCCESS) return result;
  } catch (const std::bad_alloc&) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  for (auto at = chunks_.find(begin); at != chunks_.end() && at->first < begin + bytes; ++at)
    at->second->accessible = true;
  return CUDA_SUCCESS;
}

CUresult ChunkStore::set_program_access(const Chunk& chunk) const noexcept {
  const std::vector<CUmemAccessDesc>& access = chunk.program->access;
  return driver_.cuMemSetAccess(chunk.address, chunk.bytes, access.data(), access.size());
}

CUresult ChunkStore::set_peer_access(int device, bool enabled) {
  std::lock_guard lock(access_mutex_);
  const auto known = std::find(peers_.begin(), peers_.end(), device);
  if ((known != peers_.end()) == enabled) return CUDA_SUCCESS;
  peers_.reserve(peers_.size() + 1);
  const CUmemAccessDesc with = access_for(device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  const CUmemAccessDesc without = access_for(device, CU_MEM_ACCESS_FLAGS_PROT_NONE);
  for (auto at = chunks_.begin(); at != chunks_.end(); ++at) {
    const auto change = [&](const Chunk& chunk, const CUmemAccessDesc& access) {
      if (!chunk.accessible || chunk.program != nullptr) return CUDA_SUCCESS;
      return driver_.cuMemSetAccess(chunk.address, chunk.bytes, &access, 1);
    };
    const CUresult result = change(*at->second, enabled ? with : without);
    if (result == CUDA_SUCCESS) continue;
    while (at != chunks_.begin()) (void)change(*(--at)->second, enabled ? without : with);
    return result;
  }
  if (enabled) {
    peers_.push_back(device);
  } else {
    peers_.erase(std::find(peers_.begin(), peers_.end(), device));
  }
  return CUDA_SUCCESS;
}

std::vector<int> ChunkStore::peers() const {
  std::lock_guard lock(access_mutex_);
  return peers_;
}

}  // namespace dormouse
