// Regions of the calling thread, and the rules on single allocations; see regions.h.
#include "shim/regions.h"

#include <pthread.h>

#include <atomic>
#include <string_view>
#include <variant>

#include "core/log.h"
#include "core/region.h"
#include "shim/runtime.h"
#include "shim/torch.h"

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

// Whether any rule is about single allocations.
bool has_allocation_rules(const Settings& current) noexcept {
  for (const config::RegionItem& item : current.regions.items) {
    for (const config::Rule& rule : item.rules) {
      if (std::holds_alternative<config::SizeRule>(rule) ||
          std::holds_alternative<config::ThreadRule>(rule)) {
        return true;
      }
    }
  }
  return false;
}

TagId tag_by_rules(const Settings& current, std::size_t bytes) noexcept {
  char name[16] = "";  // the kernel's limit
  pthread_getname_np(pthread_self(), name, sizeof(name));
  for (std::size_t i = 0; i < current.regions.items.size(); ++i) {
    for (const config::Rule& rule : current.regions.items[i].rules) {
      if (rule_fits(rule, bytes, name)) return current.region_tags[i];
    }
  }
  return region::process_tag();
}

}  // namespace

void region_begin(TagId tag) noexcept {
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
    if (first_time("end without begin")) {
      log().warn("a region was ended on a thread that is in none; nothing was done");
    }
    return false;
  }
  const TagId tag = region::current();
  torch::region_ended(tag);
  region::end();
  if (Engine* current = engine(); current != nullptr && tag != kNoTag) current->region_ended(tag);
  return true;
}

TagId allocation_tag(std::size_t bytes) noexcept {
  static const bool by_rules = has_allocation_rules(settings());
  if (region::depth() != 0 || !by_rules) return region::current();
  return tag_by_rules(settings(), bytes);
}

}  // namespace dormouse::shim
