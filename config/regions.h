// The grammar of DORMOUSE_REGIONS: which allocations get which tag. For the shim, which turns the
// rules into triggers, and the command line, which checks a text before a program gets it.
//
//   list     items separated by `;`
//   item     tag[=policy][{key:value,...}][: rule, rule, ...]    or    @preset
//   tag      1 to 64 letters, digits and _ . / - (none of - . / in front), or `-` alone: a region
//            without a tag, whose memory stays the program's
//   policy   host (default), none (the content is discarded) or disk: where the content is kept
//   {...}    for a tag: settings of PyTorch's allocator for exactly its regions, of
//            region_setting_keys() and as PyTorch writes them, and priority:N (-1000 to 1000,
//            default 0): of two tags the lower one sleeps first and wakes last
//   rule     nvtx(PATTERN)            an NVTX range with a matching name, in any domain
//            nvtx(PATTERN@DOMAIN)     in a domain with a matching name; nothing after @ is the
//                                     domain that has no name
//            python(module:qualname)  a call of that Python function, method or context manager
//            process                  all threads, from start to exit
//            size(>=SIZE), size(<SIZE), size(>=SIZE,<SIZE)   single allocations by size
//            thread(PATTERN)          threads with a matching name, from then on
//            api                      nothing: the program begins it itself; the same as no rule
//   preset   a named set of rules, with or without a variant: @vllm, @vllm:replace
//
// Patterns: * is any text, ? any one byte, \ takes the next character as it is. Inside a pattern,
// `;` and `@` that are part of the name, and parentheses that do not come in pairs, need a \ too.
// White space around everything is ignored. Items of one tag add up; they must agree on policy and
// priority where they name these. Where the same rule has two tags, the first one's holds, and of a
// preset and its variant the variant. docs/regions.md is the page for users.
//
//   weights: nvtx(load_model*); kv_cache=none: python(vllm.v1.worker:init_cache); -: thread(nccl*)
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace dormouse::config {

enum class BackupPolicy { kHost, kNone, kDisk };
std::string_view name_of(BackupPolicy policy);

/// Patterns are kept as written, for glob_match.
struct NvtxRule {
  std::string pattern;
  std::optional<std::string> domain;  // nothing: any domain
  bool operator==(const NvtxRule&) const = default;
};
struct PythonRule {
  std::string module;
  std::string qualname;
  bool operator==(const PythonRule&) const = default;
};
struct ProcessRule {
  bool operator==(const ProcessRule&) const = default;
};
/// Allocations of at least `from` and less than `below` bytes.
struct SizeRule {
  uint64_t from = 0;
  std::optional<uint64_t> below;
  bool operator==(const SizeRule&) const = default;
};
struct ThreadRule {
  std::string pattern;
  bool operator==(const ThreadRule&) const = default;
};
struct ApiRule {
  bool operator==(const ApiRule&) const = default;
};
using Rule = std::variant<NvtxRule, PythonRule, ProcessRule, SizeRule, ThreadRule, ApiRule>;

/// An item, with the policy and the priority that all items of its tag share.
struct RegionItem {
  std::string tag;  // empty: no tag
  BackupPolicy policy = BackupPolicy::kHost;
  int priority = 0;
  /// PyTorch's keys and values, in the order written.
  std::vector<std::pair<std::string, std::string>> settings;
  std::vector<Rule> rules;  // never empty: ApiRule where none is written
  bool operator==(const RegionItem&) const = default;
};

/// What is wrong, and where: the position of a byte in the text, from 0.
struct Diagnostic {
  size_t position = 0;
  std::string message;

  /// "DORMOUSE_REGIONS, character 12: ...".
  std::string text() const;
};

struct Regions {
  std::vector<RegionItem> items;
  std::vector<std::string> presets;  // "sglang", "vllm:replace"; each once
  /// One for each item that was dropped.
  std::vector<Diagnostic> errors;
  /// About items that stand but may not do what was meant.
  std::vector<Diagnostic> warnings;
};

/// Reads a list. A malformed item is dropped with one error; the other items stand. `known_presets`
/// are full names (vllm:replace); where it is not empty, other presets are errors, and a preset
/// written without its @ is explained.
Regions parse_regions(std::string_view text, const std::vector<std::string>& known_presets = {});

/// What a tag has to be.
inline constexpr std::string_view kTagForm =
    "a tag is 1 to 64 letters, digits and _ . / - and begins with none of - . /";
/// Whether a rule can name it.
bool is_tag(std::string_view text);

/// The keys of PyTorch's allocator that can be set for a region: those that it reads at each
/// allocation, from an object that a thread can have for itself.
std::span<const std::string_view> region_setting_keys();

/// The items and presets as a text that parse_regions reads back to the same.
std::string print_regions(const Regions& regions);
std::string print_rule(const Rule& rule);

/// Whether all of `text` matches `pattern`: * is any text, ? any byte, \ takes the next byte as it
/// is. Takes time proportional to the product of the lengths at most, and allocates nothing.
bool glob_match(std::string_view pattern, std::string_view text);

}  // namespace dormouse::config
