// What is asked of memory that the program maps itself; see mapped_memory.h.
#include <algorithm>

#include "core/memory/block_info.h"
#include "core/memory/mapped_memory.h"
#include "core/memory/pool.h"

namespace dormouse {

bool MappedMemory::retain(CUdeviceptr address, CUmemGenericAllocationHandle* handle) noexcept {
  if (!any() || handle == nullptr) return false;
  MutexLock lock(mutex_);
  Mapping* mapping = mapping_at(address);
  if (mapping == nullptr) return false;
  ++mapping->of->references;
  *handle = mapping->of->name();
  return true;
}

bool MappedMemory::properties(CUmemGenericAllocationHandle name,
                              CUmemAllocationProp* properties) noexcept {
  if (!any() || properties == nullptr) return false;
  MutexLock lock(mutex_);
  const Handle* handle = known(name);
  if (handle == nullptr) return false;
  *properties = handle->properties;
  return true;
}

bool MappedMemory::find(CUdeviceptr address, BlockInfo* out) noexcept {
  if (!any()) return false;
  MutexLock lock(mutex_);
  const Mapping* mapping = mapping_at(address);
  Block block;
  if (mapping == nullptr || mapping->chunk == nullptr ||
      !mapping->pool->find(address, &out->address, &block, &out->asleep)) {
    return false;
  }
  // On its way to sleep it may be unmapped already.
  out->asleep = mapping->pool->state_of(*mapping->chunk) != ChunkState::kAwake;
  out->bytes = block.bytes;
  out->tag = mapping->of->tag;
  out->device = mapping->pool->options().ordinal;
  out->context = block.context;
  return true;
}

bool MappedMemory::access(CUdeviceptr address, const CUmemLocation& location,
                          unsigned long long* flags) noexcept {
  if (!any()) return false;
  MutexLock lock(mutex_);
  const Mapping* mapping = mapping_at(address);
  if (mapping == nullptr || mapping->chunk == nullptr) return false;
  *flags = CU_MEM_ACCESS_FLAGS_PROT_NONE;
  for (const CUmemAccessDesc& each : mapping->access) {
    if (same(each.location, location)) *flags = each.flags;
  }
  return true;
}

void MappedMemory::add_figures(TagStats* stats) {
  if (!any()) return;
  MutexLock lock(mutex_);
  for (const auto& [name, handle] : handles_) {
    const bool counts = handle->parked != nullptr || handle->held != Holder::kNobody;
    if (!counts || handle->properties.location.id != stats->device) continue;
    const Tag tag = engine_.tag_table().get(handle->tag);
    if (tag.name != stats->tag || tag.backup != stats->backup) continue;
    if (handle->held != Holder::kNobody) {
      stats->mapped += handle->bytes;
      add_held(&stats->held, handle->held, handle->bytes);
    }
    if (handle->parked == nullptr) continue;
    if (handle->parked->image != nullptr) stats->backed_up += handle->parked->image->held_bytes();
    if (handle->parked->disk_image != nullptr)
      stats->on_disk += handle->parked->disk_image->held_bytes();
  }
}

std::uint64_t MappedMemory::discard_unmapped(const std::vector<std::string>& tags) {
  if (!any()) return 0;
  MutexLock lock(mutex_);
  std::uint64_t dropped = 0;
  for (const auto& [name, handle] : handles_) {
    const bool named =
        tags.empty() || std::find(tags.begin(), tags.end(),
                                  engine_.tag_table().get(handle->tag).name) != tags.end();
    if (handle->parked == nullptr || !named) continue;
    if (const Image* backup = handle->parked->backup()) {
      for (const ContentUnit& unit : backup->content()) dropped += unit.bytes;
    }
    handle->parked->drop_backup();
    handle->parked->discarded = true;
  }
  return dropped;
}

bool MappedMemory::any_asleep(CUdeviceptr address, std::size_t bytes) noexcept {
  if (!any()) return false;
  MutexLock lock(mutex_);
  for (auto at = first_after(address); at != mappings_.end() && at->first < end_of(address, bytes);
       ++at) {
    const Mapping& mapping = at->second;
    if (mapping.chunk != nullptr && mapping.pool->state_of(*mapping.chunk) != ChunkState::kAwake) {
      return true;
    }
  }
  return false;
}

}  // namespace dormouse
