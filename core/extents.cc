// Free ranges, kept both by address (to merge) and by size (to find the best fit); see extents.h.
#include "core/extents.h"

namespace dormouse {

void Extents::add(Address address, std::uint64_t bytes) {
  const auto added = by_address_.emplace(address, bytes).first;
  try {
    by_size_.emplace(bytes, address);
  } catch (...) {
    by_address_.erase(added);
    throw;
  }
  total_ += bytes;
}

Extents::ByAddress::iterator Extents::remove(ByAddress::iterator at) {
  by_size_.erase({at->second, at->first});
  total_ -= at->second;
  return by_address_.erase(at);
}

void Extents::insert(Address address, std::uint64_t bytes, Address low, Address high) {
  if (bytes == 0) return;
  auto next = by_address_.lower_bound(address);
  if (next != by_address_.end() && next->first == address + bytes && address + bytes < high) {
    bytes += next->second;
    next = remove(next);
  }
  if (next != by_address_.begin() && address > low) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == address) {
      address = previous->first;
      bytes += previous->second;
      remove(previous);
    }
  }
  add(address, bytes);
}

std::optional<Extents::Address> Extents::take(std::uint64_t bytes, std::uint64_t alignment) {
  for (auto at = by_size_.lower_bound({bytes, 0}); at != by_size_.end(); ++at) {
    const auto [size, begin] = *at;
    const Address aligned = (begin + alignment - 1) & ~(alignment - 1);
    const std::uint64_t front = aligned - begin;
    if (front + bytes > size) continue;
    remove(by_address_.find(begin));
    if (front != 0) add(begin, front);
    if (front + bytes != size) add(aligned + bytes, size - front - bytes);
    return aligned;
  }
  return std::nullopt;
}

void Extents::erase_within(Address low, Address high) {
  for (auto at = by_address_.lower_bound(low); at != by_address_.end() && at->first < high;) {
    at = remove(at);
  }
}

bool Extents::has(Address address, std::uint64_t bytes) const {
  const auto at = by_address_.find(address);
  return at != by_address_.end() && at->second == bytes;
}

bool Extents::touches(Address low, Address high) const {
  const auto at = by_address_.lower_bound(high);
  if (at == by_address_.begin()) return false;
  const auto last = std::prev(at);
  return last->first + last->second > low;
}

void Extents::clear() {
  by_address_.clear();
  by_size_.clear();
  total_ = 0;
}

}  // namespace dormouse
