// What torch_memory_saver's functions have set that others must know of. For the hooks.
#pragma once

#include <cstdint>

namespace dormouse::shim::tms {

// Free device memory that an allocation in a region begun by set_memory_margin_bytes()'s caller
// must leave, in bytes; 0: none. The allocation fails with out of memory otherwise.
std::uint64_t memory_margin_bytes() noexcept;

}  // namespace dormouse::shim::tms
