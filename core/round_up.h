// Sizes in whole units. For core's own sources.
#pragma once

#include <cstdint>

namespace dormouse {

// The smallest multiple of `unit` (not 0) that is not below `bytes`.
constexpr std::uint64_t round_up(std::uint64_t bytes, std::uint64_t unit) noexcept {
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace dormouse
