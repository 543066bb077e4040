// Regions: the per-thread stack of tags that says what an allocation on this thread gets. No lock,
// no allocation, no CUDA: the hooks ask it on every allocation of the program.
#pragma once

#include <cstddef>

#include "core/tags.h"

namespace dormouse::region {

// How deep regions can nest on one thread. Deeper ones are counted, so that their ends still match,
// but keep the tag of the deepest that fits.
inline constexpr std::size_t kMaxDepth = 64;

// Begins a region on the calling thread; kNoTag begins one that excludes memory. False if nested
// deeper than kMaxDepth.
bool begin(TagId tag) noexcept;

// Ends the innermost region of the calling thread. False (and nothing done) if there is none.
bool end() noexcept;

// The tag that an allocation on the calling thread gets now: the innermost region's, else the
// process's.
TagId current() noexcept;

// How many regions the calling thread is inside of.
std::size_t depth() noexcept;

// The tag of allocations outside every region, on all threads; kNoTag at first.
void set_process_tag(TagId tag) noexcept;
TagId process_tag() noexcept;

// Forgets the calling thread's regions (a forked child starts clean).
void reset_thread() noexcept;

}  // namespace dormouse::region
