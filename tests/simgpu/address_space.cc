#include "tests/simgpu/address_space.h"

#include <sys/mman.h>

#include <algorithm>

namespace simgpu {
namespace {

// Bytes of one arena. Small enough for the address space that thread sanitizer leaves.
constexpr size_t kArena = size_t{256} << 30;

uintptr_t round_up(uintptr_t value, size_t alignment) {
  return (value + alignment - 1) & ~(alignment - 1);
}

void* map_inaccessible(uintptr_t address, size_t size, int flags) {
  void* at = reinterpret_cast<void*>(address);
  void* result =
      mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
  if (result != MAP_FAILED) madvise(result, size, MADV_DONTDUMP);
  return result;
}

}  // namespace

uintptr_t AddressSpace::take(size_t size, size_t alignment, uintptr_t hint) {
  if (hint != 0 && hint % alignment == 0) {
    if (!contains(hint)) grow(size, hint);
    auto range = free_.upper_bound(hint);
    if (range != free_.begin()) {
      --range;
      if (hint + size <= range->first + range->second) return carve(range, hint, size);
    }
  }
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (auto range = free_.begin(); range != free_.end(); ++range) {
      uintptr_t start = round_up(range->first, alignment);
      if (start + size <= range->first + range->second) return carve(range, start, size);
    }
    if (!grow(size + alignment, 0)) break;
  }
  return 0;
}

uintptr_t AddressSpace::carve(std::map<uintptr_t, size_t>::iterator range, uintptr_t start,
                              size_t size) {
  uintptr_t begin = range->first;
  uintptr_t end = begin + range->second;
  free_.erase(range);
  if (start > begin) free_[begin] = start - begin;
  if (start + size < end) free_[start + size] = end - start - size;
  return start;
}

bool AddressSpace::grow(size_t size, uintptr_t hint) {
  if (hint != 0) {
    size_t bytes = round_up(size, kGranularity);
    if (map_inaccessible(hint, bytes, MAP_FIXED_NOREPLACE) == MAP_FAILED) return false;
    arenas_.emplace_back(hint, bytes);
    insert_free(hint, bytes);
    return true;
  }
  for (size_t bytes = std::max(kArena, round_up(size, kGranularity)); bytes >= size; bytes /= 2) {
    void* base = map_inaccessible(0, bytes, 0);
    if (base == MAP_FAILED) continue;
    arenas_.emplace_back(reinterpret_cast<uintptr_t>(base), bytes);
    insert_free(reinterpret_cast<uintptr_t>(base), bytes);
    return true;
  }
  return false;
}

void AddressSpace::insert_free(uintptr_t address, size_t size) {
  auto next = free_.lower_bound(address);
  if (next != free_.end() && address + size == next->first) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == address) {
      previous->second += size;
      return;
    }
  }
  free_[address] = size;
}

bool AddressSpace::clear(uintptr_t address, size_t size) {
  return map_inaccessible(address, size, MAP_FIXED) != MAP_FAILED;
}

bool AddressSpace::give_back(uintptr_t address, size_t size) {
  if (!clear(address, size)) return false;
  insert_free(address, size);
  return true;
}

bool AddressSpace::contains(uintptr_t address) const {
  return std::any_of(arenas_.begin(), arenas_.end(), [&](const auto& arena) {
    return address >= arena.first && address < arena.first + arena.second;
  });
}

}  // namespace simgpu
