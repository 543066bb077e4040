// A set of free address ranges with best-fit take. Used by pools for free parts of chunks and for
// free address space. Not thread-safe: its owner's lock protects it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace dormouse {

class Extents {
 public:
  using Address = std::uint64_t;

  // Adds [address, address + bytes), which must not overlap the set, and merges it with neighbours
  // that lie within [low, high). If there is no memory for it (std::bad_alloc), it and those
  // neighbours are no longer in the set.
  void insert(Address address, std::uint64_t bytes, Address low, Address high);

  // Takes `bytes` aligned to `alignment` (a power of two) out of the smallest range that holds
  // them.
  std::optional<Address> take(std::uint64_t bytes, std::uint64_t alignment);

  // Removes everything within [low, high); ranges never reach across a boundary that insert() was
  // told.
  void erase_within(Address low, Address high);

  // Whether exactly this range is in the set; whether any part of [low, high) is.
  bool has(Address address, std::uint64_t bytes) const;
  bool touches(Address low, Address high) const;

  // Calls visit(address, bytes) for each range, in address order.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    for (const auto& [address, bytes] : by_address_) visit(address, bytes);
  }

  void clear();
  std::uint64_t total() const noexcept { return total_; }
  bool empty() const noexcept { return by_address_.empty(); }
  std::uint64_t largest() const noexcept { return by_size_.empty() ? 0 : by_size_.rbegin()->first; }

 private:
  using ByAddress = std::map<Address, std::uint64_t>;

  void add(Address address, std::uint64_t bytes);
  ByAddress::iterator remove(ByAddress::iterator at);

  ByAddress by_address_;
  std::set<std::pair<std::uint64_t, Address>> by_size_;
  std::uint64_t total_ = 0;
};

}  // namespace dormouse
