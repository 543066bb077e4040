// Regions of the calling thread, and the rules on single allocations; see regions.h.
#include "shim/rules/regions.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "core/log.h"
#include "core/region.h"
#include "shim/process/process.h"
#include "shim/process/settings.h"
#include "shim/rules/spans.h"
#include "shim/torch/torch.h"

namespace dormouse::shim {
namespace {

bool rule_fits(const config::Rule& rule, std::size_t bytes, std::string_view thread) noexcept {
  if (const auto* size = std::get_if<config::SizeRule>(&rule)) {
    return bytes >= size->from && (!size->below || bytes < *size->below);
  }
  if (const auto* name = std::get_if<config::ThreadRule>(&rule)) {
    return config::glob_match(name->pattern, thread);
  }
  return false;
}

template <typename Kind>
bool has_rule(const Settings& current) noexcept {
  for (const config::RegionItem& item : current.regions.items) {
    for (const config::Rule& rule : item.rules) {
      if (std::holds_alternative<Kind>(rule)) return true;
    }
  }
  return false;
}

bool has_size_rules() noexcept {
  static const bool value = has_rule<config::SizeRule>(settings());
  return value;
}

// Most processes have nothing set: they need not read the options when a thread gets its name.
bool has_thread_rules() noexcept {
  static const bool value = [] {
    const char* regions = std::getenv("DORMOUSE_REGIONS");
    return regions != nullptr && std::strstr(regions, "thread") != nullptr && settings().enabled &&
           has_rule<config::ThreadRule>(settings());
  }();
  return value;
}

struct ThreadName {
  char text[16] = "";  // the kernel's limit
  ThreadName() noexcept { pthread_getname_np(pthread_self(), text, sizeof(text)); }
};

// The tag of the first rule that `fits`.
template <typename Fits>
std::optional<TagId> first_rule(const Settings& current, Fits fits) noexcept {
  for (std::size_t i = 0; i < current.regions.items.size(); ++i) {
    for (const config::Rule& rule : current.regions.items[i].rules) {
      if (fits(rule)) return current.region_tags[i];
    }
  }
  return std::nullopt;
}

std::optional<TagId> tag_by_name() noexcept {
  const ThreadName name;
  return first_rule(settings(), [&](const config::Rule& rule) {
    return std::holds_alternative<config::ThreadRule>(rule) && rule_fits(rule, 0, name.text);
  });
}

TagId tag_by_rules(std::size_t bytes) noexcept {
  const ThreadName name;
  return first_rule(settings(),
                    [&](const config::Rule& rule) { return rule_fits(rule, bytes, name.text); })
      .value_or(region::process_tag());
}

// What the calling thread's name has made of it.
struct ByName {
  std::optional<TagId> tag;
  SpanId span = 0;
};

thread_local ByName by_name;

}  // namespace

std::string tag_of_any_text(std::string_view text) {
  constexpr std::size_t kLongest = 64;
  if (text.empty()) return "default";
  std::string name(text.substr(0, kLongest));
  for (char& c : name) {
    if (!config::is_tag(std::string{'a', c})) c = '_';
  }
  if (!config::is_tag(name)) name[0] = '_';
  return name;
}

void region_begin(TagId tag) noexcept {
  if (!settings().enabled) return;
  say_warnings();
  if (!region::begin(tag) && first_time("regions too deep")) {
    log().warn(
        "regions are nested more than {} deep on one thread: deeper ones keep the tag of the "
        "innermost that counts. Is an end missing?",
        region::kMaxDepth);
  }
  torch::region_began(tag);
}

bool region_end() noexcept {
  if (region::depth() == 0) {
    if (settings().enabled && first_time("end without begin")) {
      log().warn("a region was ended on a thread that is in none; nothing was done");
    }
    return false;
  }
  const TagId tag = region::current();
  torch::region_ended(tag);
  region::end();
  if (Engine* current = engine(); current == nullptr) {
    look_for_calls_past_the_hooks();
  } else if (tag != kNoTag) {
    current->region_ended(tag);
  }
  return true;
}

TagId allocation_tag(std::size_t bytes) noexcept {
  static const bool by_rules = has_size_rules() || has_rule<config::ThreadRule>(settings());
  if (region::depth() != 0 || !by_rules) return region::current();
  return tag_by_rules(bytes);
}

void thread_renamed() noexcept {
  if (!has_thread_rules()) return;
  const std::optional<TagId> tag = tag_by_name();
  if (tag == by_name.tag) return;
  if (by_name.span != 0) end_span(by_name.span);
  by_name = {tag, 0};
  if (!tag) return;
  // Whoever holds the GIL may wait for this thread to be there.
  std::optional<torch::CallerIsolates> not_isolated;
  if (!torch::can_isolate_at_once()) not_isolated.emplace();
  by_name.span = begin_span(*tag);
}

void physical_memory_made() noexcept {
  if (region::depth() != 0 || !has_size_rules() || !first_time("size rules and mapped memory")) {
    return;
  }
  log().warn(
      "DORMOUSE_REGIONS: size(...) matches single allocations, but this program maps its memory in "
      "pieces (cuMemCreate): such memory stays untagged. Tag all of it with process, or name its "
      "code by nvtx(...), python(...) or thread(...); with PyTorch, expandable_segments:False has "
      "it "
      "make single allocations.");
}

}  // namespace dormouse::shim
