// See spans.h. The regions of a thread are a stack; a span knows its place in it. To take one out,
// those above it are taken off and put back.
#include "shim/rules/spans.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "core/region.h"
#include "shim/rules/regions.h"

namespace dormouse::shim {
namespace {

struct Span {
  SpanId id;
  std::size_t depth;  // of the thread's regions, this one included
};

using Spans = std::vector<Span>;  // by depth

std::atomic<SpanId> last_id{0};
thread_local std::unique_ptr<Spans> this_thread;

// Regions that others ended, or that a fork left behind.
void drop_ended(Spans& spans) noexcept {
  while (!spans.empty() && spans.back().depth > region::depth()) spans.pop_back();
}

// The regions above `depth`, the innermost first, taken off.
std::vector<TagId> take_off(std::size_t depth) {
  std::vector<TagId> tags;
  tags.reserve(region::depth() - depth);
  while (region::depth() > depth) {
    tags.push_back(region::current());
    region_end();
  }
  return tags;
}

}  // namespace

SpanId begin_span(TagId tag) noexcept {
  try {
    if (this_thread == nullptr) this_thread = std::make_unique<Spans>();
    drop_ended(*this_thread);
    const SpanId id = last_id.fetch_add(1, std::memory_order_relaxed) + 1;
    this_thread->push_back({id, region::depth() + 1});
    region_begin(tag);
    return id;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

bool end_span(SpanId id) noexcept {
  if (this_thread == nullptr) return false;
  Spans& spans = *this_thread;
  drop_ended(spans);
  const auto span =
      std::find_if(spans.begin(), spans.end(), [&](const Span& each) { return each.id == id; });
  if (span == spans.end()) return false;
  try {
    const std::vector<TagId> above = take_off(span->depth);
    region_end();
    for (auto tag = above.rbegin(); tag != above.rend(); ++tag) region_begin(*tag);
  } catch (const std::bad_alloc&) {
    return false;
  }
  for (auto later = spans.erase(span); later != spans.end(); ++later) --later->depth;
  return true;
}

}  // namespace dormouse::shim
