// PyTorch 2.10 and later: what a thread sees of PyTorch's allocator settings. c10's
// AcceleratorAllocatorConfig::instance() and parseArgs() are called across libraries, so the
// definitions in settings_per_thread.cc come first: outside a region they hand out PyTorch's own
// object, inside one a copy of it, made by PyTorch's own constructor and parser, in which
// expandable segments are off. For torch.cc alone.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/tags.h"

namespace dormouse::shim::torch {

// One way of seeing the settings: the user's own, or a copy with some keys changed.
struct View;

// What the calling thread sees; null is what the process sees, the user's own settings unless the
// whole process has a tag. Read on every look that PyTorch takes at its settings.
extern thread_local constinit View* this_view __attribute__((tls_model("initial-exec")));

// The view of a region with this tag; of kNoTag the user's own. Never null. Thread-safe; does not
// throw.
View* view_of(TagId tag) noexcept;

// The tag of allocations outside all regions has changed, and what threads with no view of their
// own see with it. May be called while the options are being read.
void process_tag_changed() noexcept;

// What the process sees, outside all regions; null: the user's own settings.
View* process_view() noexcept;

// Keys of PyTorch's allocator and their values.
using ViewChanges = std::vector<std::pair<std::string, std::string>>;

// What is set in it besides expandable segments. Constant.
const ViewChanges& changes_of(const View* view) noexcept;

// A region with this view has begun, or the process, whose view it is, uses CUDA: says once what
// PyTorch cannot do of its changes. Before that programs stay quiet that have PyTorch and no use
// for it.
void entered(View* view) noexcept;

// Whether PyTorch's settings have been seen to be of this generation.
bool accelerator_seen() noexcept;

// Whether expandable segments are off in it.
bool suspends(const View* view) noexcept;

// The calling thread's view, also while a call of PyTorch's parser is under way on it.
View* thread_view() noexcept;
void set_thread_view(View* view) noexcept;

void forget_accelerator_after_fork() noexcept;

}  // namespace dormouse::shim::torch
