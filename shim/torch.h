// The view of PyTorch: suspension of its expandable segments and isolation of its cached blocks for the calling
// thread. Called by regions.cc alone; does nothing in a process without PyTorch or with DORMOUSE_TORCH=off.
#pragma once

#include "core/tags.h"

namespace dormouse::shim::torch {

// The calling thread entered a region: suspend, and enter the tag's private pool. `outermost` and nesting are handled
// by the caller calling these in matched pairs, innermost first out. Never throws.
void region_began(TagId tag) noexcept;
void region_ended(TagId tag) noexcept;

// True while the calling thread's view of PyTorch's settings has expandable segments off.
bool suspended() noexcept;

void forget_after_fork() noexcept;

}  // namespace dormouse::shim::torch
