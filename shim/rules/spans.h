// Regions that do not have to nest: begun and ended by their number, in any order, with the regions
// of others between them. For NVTX ranges (whose domains overlap) and torch_memory_saver's thread
// state.
#pragma once

#include <cstdint>

#include "core/tags.h"

namespace dormouse::shim {

// 0 is not a span.
using SpanId = std::uint64_t;

// Begins a region of `tag` on the calling thread, inside the present ones. 0, and no region,
// without memory for it.
SpanId begin_span(TagId tag) noexcept;

// Ends it, on the thread that began it; regions that began later stay as they are. False if it has
// ended already.
bool end_span(SpanId span) noexcept;

}  // namespace dormouse::shim
