// Every way into a region ends here: the C API, the peers' ABI, NVTX, Python triggers. Adds to
// core's thread stack what a process with PyTorch needs: suspension of expandable segments,
// isolation of cached blocks. And the tag of a single allocation, for the hooks.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "core/tags.h"

namespace dormouse::shim {

// Begins a region on the calling thread (kNoTag: one that excludes memory). Never fails; a problem
// is logged once. With DORMOUSE=off nothing is done.
void region_begin(TagId tag) noexcept;

// Ends the innermost region of the calling thread. False, and logged once, if there is none. With
// DORMOUSE=off there is none, and nothing is logged.
bool region_end() noexcept;

// For programs that know tags of other forms than ours: the text with _ in place of what a tag
// cannot have, "default" for nothing. Throws bad_alloc.
std::string tag_of_any_text(std::string_view text);

// The tag of an allocation of `bytes` on the calling thread: the innermost region's; outside
// regions that of the first rule on size or thread name that fits; else the process's. No lock, no
// allocation.
TagId allocation_tag(std::size_t bytes) noexcept;

// The calling thread has got a name: while a rule fits it, the thread is inside a region. Isolated
// only where the thread holds Python's GIL, since it must not wait here.
void thread_renamed() noexcept;

// The program has made physical memory to map itself (cuMemCreate). Rules on sizes do not see what
// becomes of it; one message says so.
void physical_memory_made() noexcept;

}  // namespace dormouse::shim
