// The thread's stack of tags; see region.h. Plain data in static thread-local storage: nothing to
// construct when a thread begins and nothing to destroy when it ends, so a thread that dies inside
// a region leaves no trace.
#include "core/region.h"

#include <atomic>

namespace dormouse::region {
namespace {

struct Stack {
  std::size_t depth;
  TagId tags[kMaxDepth];
};

thread_local Stack stack __attribute__((tls_model("initial-exec")));
std::atomic<TagId> base_tag{kNoTag};

}  // namespace

bool begin(TagId tag) noexcept {
  const std::size_t depth = stack.depth++;
  if (depth >= kMaxDepth) return false;
  stack.tags[depth] = tag;
  return true;
}

bool end() noexcept {
  if (stack.depth == 0) return false;
  --stack.depth;
  return true;
}

TagId current() noexcept {
  const std::size_t depth = stack.depth;
  if (__builtin_expect(depth == 0, 1)) return base_tag.load(std::memory_order_relaxed);
  return stack.tags[(depth <= kMaxDepth ? depth : kMaxDepth) - 1];
}

std::size_t depth() noexcept {
  return stack.depth;
}

void set_process_tag(TagId tag) noexcept {
  base_tag.store(tag, std::memory_order_relaxed);
}

TagId process_tag() noexcept {
  return base_tag.load(std::memory_order_relaxed);
}

void reset_thread() noexcept {
  stack.depth = 0;
}

}  // namespace dormouse::region
