// See regions.h. One Item parser per item; it stops at the first fault.
#include "config/regions.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <set>

#include "config/alloc_conf.h"
#include "config/region_rules.h"
#include "config/text.h"
#include "config/units.h"

namespace dormouse::config {

namespace {

using namespace regions;

constexpr size_t kLongestTag = 64;
constexpr size_t kLongestThreadName = 15;  // Linux cuts longer names
constexpr int kLargestPriority = 1000;
constexpr std::array<std::string_view, 8> kSettingKeys = {
    "garbage_collection_threshold",  "large_segment_size_mb",
    "max_non_split_rounding_mb",     "max_split_size_mb",
    "pinned_max_cached_size_mb",     "pinned_max_round_threshold_mb",
    "pinned_use_background_threads", "roundup_power2_divisions"};
/// Of the keys that no region can have: when the allocator is chosen, and when that of a device is
/// made.
constexpr std::array<std::string_view, 2> kReadOnce = {"backend", "per_process_memory_fraction"};

BackupPolicy read_policy(const Piece& piece) {
  const std::string word = to_lower(piece.text);
  const auto found = std::find(kPolicyNames.begin(), kPolicyNames.end(), word);
  if (found != kPolicyNames.end()) return static_cast<BackupPolicy>(found - kPolicyNames.begin());
  using Pair = std::pair<std::string_view, std::string_view>;
  constexpr std::array<Pair, 8> kOtherWords = {{{"discard", "none"},
                                                {"drop", "none"},
                                                {"cpu", "host"},
                                                {"ram", "host"},
                                                {"memory", "host"},
                                                {"ssd", "disk"},
                                                {"file", "disk"},
                                                {"nvme", "disk"}}};
  const auto other = std::find_if(kOtherWords.begin(), kOtherWords.end(),
                                  [&](const Pair& pair) { return pair.first == word; });
  fail(piece, in_quotes(piece.text) +
                  " is not a policy; allowed are host (the content is kept in host " +
                  "memory), none (it is discarded) and disk" +
                  (other == kOtherWords.end() ? "" : "; write " + std::string(other->second)));
}

void check_tag(const Piece& piece) {
  const std::string_view tag = piece.text;
  if (tag == "-" || is_tag(tag)) return;
  if (tag.empty()) fail(piece, "a tag is missing; " + std::string(kTagForm));
  const bool rule = tag.find('(') != std::string_view::npos;
  fail(piece, in_quotes(tag) + " is not a tag; " +
                  (rule ? "rules follow a tag and ':', such as weights: nvtx(load*)"
                        : std::string(kTagForm)));
}

/// What one item says; policy and priority only where it names them.
struct Item {
  Piece piece;
  RegionItem region;
  std::optional<BackupPolicy> policy;
  std::optional<int> priority;
};

class ItemReader {
 public:
  ItemReader(const Piece& piece, const std::vector<std::string>& known_presets,
             std::vector<Diagnostic>& warnings)
      : known_presets_(known_presets), warnings_(warnings), rest_(piece) {
    item_.piece = piece;
  }

  /// Throws Fault.
  Item read() {
    check_forgotten_at();
    read_tag();
    if (rest_.text.starts_with('=')) read_equals();
    if (rest_.text.starts_with('{')) read_settings();
    if (rest_.text.starts_with(':')) {
      read_rules();
    } else if (!rest_.empty()) {
      fail(rest_, "expected '=', '{', ':' or ';' after the tag but found " + in_quotes(rest_.text));
    }
    if (item_.region.rules.empty()) item_.region.rules.emplace_back(ApiRule{});
    return std::move(item_);
  }

 private:
  const std::string& tag() const { return item_.region.tag; }
  bool no_tag() const { return tag().empty(); }

  Piece take_until(std::string_view marks) {
    const size_t end = std::min(rest_.text.find_first_of(marks), rest_.text.size());
    const Piece taken = trimmed(rest_.first(end));
    rest_ = trimmed(rest_.from(end));
    return taken;
  }

  void read_tag() {
    const Piece tag = take_until("={:");
    check_tag(tag);
    if (tag.text != "-") item_.region.tag = tag.text;
  }

  void read_equals() {
    const Piece equals = rest_;
    rest_ = trimmed(rest_.from(1));
    const Piece policy = take_until("{:");
    if (no_tag()) fail(equals, "memory without a tag has no policy; write '-' alone");
    item_.policy = read_policy(policy);
  }

  void read_settings() {
    const size_t close = rest_.text.find('}');
    if (close == std::string_view::npos) fail(rest_, "'{' has no closing '}'");
    const Piece inside = rest_.middle(1, close);
    rest_ = trimmed(rest_.from(close + 1));
    std::string text(inside.text);
    std::replace_if(text.begin(), text.end(), is_space, ' ');
    const Result<AllocConf> conf = AllocConf::read(Generation::kG1, text);
    if (!conf) {
      fail(inside, "in {...}: " + conf.error() + "; write {key:value,key:value}");
    }
    for (const AllocConf::Entry& entry : conf->entries()) read_setting(inside, entry);
  }

  void read_setting(const Piece& inside, const AllocConf::Entry& entry) {
    if (!keys_.insert(entry.key).second) fail(inside, in_quotes(entry.key) + " is set twice");
    if (entry.key == "priority") return read_priority(inside, entry.value);
    if (no_tag()) {
      fail(inside, "settings hold for the memory of a tag, and '-' is memory without one; leave " +
                       entry.key + " out");
    }
    if (entry.key == "expandable_segments") {
      fail(inside, "expandable_segments is always off inside a region with a tag; leave it out");
    }
    const auto& known = region_setting_keys();
    if (std::find(known.begin(), known.end(), entry.key) == known.end()) {
      return leave_out(inside, entry.key);
    }
    AllocSettings scratch;
    if (auto error =
            apply_alloc_conf(AllocDialect::g2_cuda(), entry.key + ":" + entry.value, scratch)) {
      fail(inside, "PyTorch would refuse this setting: " + *error);
    }
    item_.region.settings.emplace_back(entry.key, entry.value);
  }

  void leave_out(const Piece& inside, const std::string& key) {
    std::vector<std::string> allowed(region_setting_keys().begin(), region_setting_keys().end());
    allowed.emplace_back("priority");
    const std::string meant = nearest(key, allowed);
    const bool of_process = AllocDialect::g2_cuda().known_keys->contains(key);
    const bool read_once = std::find(kReadOnce.begin(), kReadOnce.end(), key) != kReadOnce.end();
    warnings_.push_back(
        {inside.position, of_process
                              ? key + " cannot differ between threads: PyTorch " +
                                    (read_once ? "reads it once, for the whole process"
                                               : "keeps it in one object that all threads read") +
                                    ". It is ignored here; put it into PYTORCH_ALLOC_CONF "
                                    "(PYTORCH_CUDA_ALLOC_CONF before 2.10)"
                              : in_quotes(key) + " is not a setting of a region and is ignored; " +
                                    (meant.empty() ? "allowed are " + one_of(allowed)
                                                   : "did you mean " + meant + "?")});
  }

  void read_priority(const Piece& inside, const std::string& text) {
    int value = 0;
    const char* end = text.data() + text.size();
    const auto result = std::from_chars(text.data(), end, value);
    if (result.ec != std::errc() || result.ptr != end || value > kLargestPriority ||
        value < -kLargestPriority) {
      fail(inside, "priority: " + in_quotes(text) + " is not a whole number from -1000 to 1000");
    }
    if (no_tag()) fail(inside, "memory without a tag never sleeps and has no priority");
    item_.priority = value;
  }

  void read_rules() {
    const Piece colon = rest_;
    rest_ = trimmed(rest_.from(1));
    if (rest_.empty()) {
      fail(colon,
           "a rule is missing after ':'; write api, or leave the ':' out, for a region that "
           "the program begins itself");
    }
    std::vector<Piece> parts = split(rest_, ',', true);
    if (parts.size() > 1 && trimmed(parts.back()).empty()) parts.pop_back();
    for (const Piece& part : parts) {
      const Piece rule = trimmed(part);
      if (rule.empty()) fail(part, std::string("a rule is missing; ") + kRulesAllowed);
      item_.region.rules.push_back(read_rule(rule, no_tag() ? "TAG" : tag()));
      check_thread_name(rule, item_.region.rules.back());
    }
  }

  void check_thread_name(const Piece& piece, const Rule& rule) {
    const auto* thread = std::get_if<ThreadRule>(&rule);
    if (thread == nullptr || shortest_match(thread->pattern) <= kLongestThreadName) return;
    warnings_.push_back({piece.position, "no thread matches " + in_quotes(thread->pattern) +
                                             ": thread names have at most 15 characters"});
  }

  void check_forgotten_at() {
    const std::string word = to_lower(item_.piece.text);
    const auto& known = known_presets_;
    if (std::find(known.begin(), known.end(), word) == known.end()) return;
    const bool could_be_tag = word.find(':') == std::string::npos;
    fail(item_.piece, in_quotes(word) + " is a preset: write @" + word +
                          (could_be_tag ? ", or " + word + ": api for a tag of that name" : ""));
  }

  const std::vector<std::string>& known_presets_;
  std::vector<Diagnostic>& warnings_;
  Piece rest_;
  Item item_;
  std::set<std::string> keys_;  // in {...}
};

std::string read_preset(const Piece& piece, const std::vector<std::string>& known) {
  const Piece name = trimmed(piece.from(1));
  const bool good = !name.empty() && name.text.front() != ':' && name.text.back() != ':' &&
                    std::count(name.text.begin(), name.text.end(), ':') <= 1 &&
                    std::all_of(name.text.begin(), name.text.end(), [](char c) {
                      return is_letter(c) || is_digit(c) || c == '_' || c == '-' || c == ':';
                    });
  if (!good) {
    fail(piece,
         in_quotes(piece.text) + " is not a preset; write @name or @name:variant and nothing else");
  }
  const std::string result = to_lower(name.text);
  if (!known.empty() && std::find(known.begin(), known.end(), result) == known.end()) {
    fail(piece, "there is no preset " + in_quotes(result) + "; allowed are " + one_of(known));
  }
  return result;
}

struct PresetAt {
  std::string name;
  size_t position;
};

/// Each once. A preset and its variant are about the same program: the variant holds.
void take_presets(const std::vector<PresetAt>& presets, Regions& regions) {
  std::set<std::string> seen;
  for (const PresetAt& preset : presets) {
    if (!seen.insert(preset.name).second) continue;
    const auto variant = std::find_if(presets.begin(), presets.end(), [&](const PresetAt& other) {
      return other.name.starts_with(preset.name + ":");
    });
    if (variant == presets.end()) {
      regions.presets.push_back(preset.name);
      continue;
    }
    regions.warnings.push_back(
        {preset.position, "@" + preset.name + " is ignored, since @" + variant->name +
                              " is there too and takes precedence; leave one of them out"});
  }
}

/// Brings the items of each tag to agree, and drops those that do not.
class Merger {
 public:
  explicit Merger(Regions& regions) : regions_(regions) {}

  void add(Item item) {
    if (const auto problem = conflict(item)) {
      regions_.errors.push_back({item.piece.position, *problem});
      return;
    }
    if (item.policy) policies_.emplace(item.region.tag, *item.policy);
    if (item.priority) priorities_.emplace(item.region.tag, *item.priority);
    if (is_process(item)) process_tag_ = item.region.tag;
    warn_of_rules_that_come_too_late(item);
    regions_.items.push_back(std::move(item.region));
  }

  void finish() {
    for (RegionItem& item : regions_.items) {
      if (const auto found = policies_.find(item.tag); found != policies_.end()) {
        item.policy = found->second;
      }
      if (const auto found = priorities_.find(item.tag); found != priorities_.end()) {
        item.priority = found->second;
      }
    }
  }

 private:
  static bool is_process(const Item& item) {
    return std::any_of(item.region.rules.begin(), item.region.rules.end(),
                       [](const Rule& rule) { return std::holds_alternative<ProcessRule>(rule); });
  }

  std::optional<std::string> conflict(const Item& item) const {
    const std::string& tag = item.region.tag;
    const auto policy = policies_.find(tag);
    if (item.policy && policy != policies_.end() && policy->second != *item.policy) {
      return "the tag " + in_quotes(tag) + " has the policy " +
             std::string(name_of(policy->second)) + " already and cannot have " +
             std::string(name_of(*item.policy)) + " too; use another tag";
    }
    const auto priority = priorities_.find(tag);
    if (item.priority && priority != priorities_.end() && priority->second != *item.priority) {
      return "the tag " + in_quotes(tag) + " has the priority " + std::to_string(priority->second) +
             " already";
    }
    for (const auto& [key, value] : item.region.settings) {
      for (const RegionItem& other : regions_.items) {
        for (const auto& [known, before] : other.settings) {
          if (other.tag != tag || known != key || before == value) continue;
          return "the tag " + in_quotes(tag) + " has " + key + ":" + before + " already";
        }
      }
    }
    if (is_process(item) && process_tag_ && *process_tag_ != tag) {
      return "the whole process belongs to " + quoted(*process_tag_) +
             " already; only one tag can have the rule process";
    }
    return std::nullopt;
  }

  /// Of two tags with the same rule the first has what it names.
  void warn_of_rules_that_come_too_late(const Item& item) {
    for (const RegionItem& other : regions_.items) {
      if (other.tag == item.region.tag) continue;
      for (const Rule& rule : item.region.rules) {
        if (std::holds_alternative<ApiRule>(rule)) continue;
        if (std::find(other.rules.begin(), other.rules.end(), rule) == other.rules.end()) continue;
        regions_.warnings.push_back(
            {item.piece.position, print_rule(rule) + " is a rule of " + quoted(other.tag) +
                                      " already: that one holds, and " + quoted(item.region.tag) +
                                      " gets no region by it"});
      }
    }
  }

  static std::string quoted(const std::string& tag) { return tag.empty() ? "'-'" : in_quotes(tag); }

  Regions& regions_;
  std::map<std::string, BackupPolicy> policies_;
  std::map<std::string, int> priorities_;
  std::optional<std::string> process_tag_;
};

std::string print_item(const RegionItem& item) {
  std::string text = item.tag.empty() ? "-" : item.tag;
  if (item.policy != BackupPolicy::kHost) text += "=" + std::string(name_of(item.policy));
  std::string settings;
  if (item.priority != 0) settings += "priority:" + std::to_string(item.priority) + ",";
  for (const auto& [key, value] : item.settings) settings += key + ":" + value + ",";
  if (!settings.empty()) {
    settings.pop_back();
    text += "{" + settings + "}";
  }
  text += ": ";
  for (size_t i = 0; i < item.rules.size(); ++i) {
    text += (i == 0 ? "" : ", ") + print_rule(item.rules[i]);
  }
  return text;
}

}  // namespace

std::span<const std::string_view> region_setting_keys() {
  return kSettingKeys;
}

bool is_tag(std::string_view text) {
  return !text.empty() && text.size() <= kLongestTag &&
         std::string_view("-./").find(text[0]) == std::string_view::npos &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return is_letter(c) || is_digit(c) || c == '_' || c == '.' || c == '/' || c == '-';
         });
}

std::string_view name_of(BackupPolicy policy) {
  return kPolicyNames[static_cast<size_t>(policy)];
}

std::string Diagnostic::text() const {
  return "DORMOUSE_REGIONS, character " + std::to_string(position + 1) + ": " + message;
}

Regions parse_regions(std::string_view text, const std::vector<std::string>& known_presets) {
  Regions regions;
  Merger merger(regions);
  std::vector<PresetAt> presets;
  for (const Piece& part : split({text, 0}, ';', false)) {
    const Piece piece = trimmed(part);
    if (piece.empty()) continue;
    const size_t errors_before = regions.errors.size();
    const size_t warnings_before = regions.warnings.size();
    try {
      if (piece.text.front() == '@') {
        presets.push_back({read_preset(piece, known_presets), piece.position});
      } else {
        merger.add(ItemReader(piece, known_presets, regions.warnings).read());
      }
    } catch (const Fault& fault) {
      regions.errors.push_back({fault.position, fault.message});
    }
    if (regions.errors.size() > errors_before) regions.warnings.resize(warnings_before);
  }
  merger.finish();
  take_presets(presets, regions);
  return regions;
}

std::string print_regions(const Regions& regions) {
  std::string text;
  for (const RegionItem& item : regions.items) {
    text += (text.empty() ? "" : "; ") + print_item(item);
  }
  for (const std::string& preset : regions.presets) text += (text.empty() ? "@" : "; @") + preset;
  return text;
}

}  // namespace dormouse::config
