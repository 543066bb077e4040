// NVTX ranges as regions: what the process tells them. NVTX gets in by itself.
#pragma once

namespace dormouse::shim::nvtx {

// fork(): no other thread may be in the middle of a change of names or ranges; the child's locks
// are new.
void before_fork() noexcept;
void forked_in_parent() noexcept;
void forked_in_child() noexcept;

}  // namespace dormouse::shim::nvtx
