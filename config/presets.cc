// See presets.h.
#include "config/presets.h"

#include <algorithm>
#include <variant>

namespace dormouse::config {

namespace {

/// What the list's own items have settled for the tag holds for the preset's item.
void give_way(RegionItem& item, const std::vector<RegionItem>& own) {
  for (const RegionItem& other : own) {
    if (other.tag != item.tag) continue;
    item.policy = other.policy;
    item.priority = other.priority;
    return;
  }
}

/// The tags of the list that have what the preset keeps under this tag: by its name where the
/// preset is in the list, by the same Python function otherwise.
bool has_kept(const RegionItem& item, const Preset& preset, const PresetKept& kept, bool in_list) {
  if (in_list && item.tag == kept.tag) return true;
  for (const PresetRule& rule : preset.rules) {
    for (const RegionItem& theirs : parse_regions(rule.item).items) {
      if (theirs.tag != kept.tag || !std::holds_alternative<PythonRule>(theirs.rules[0])) continue;
      if (std::find(item.rules.begin(), item.rules.end(), theirs.rules[0]) != item.rules.end()) {
        return true;
      }
    }
  }
  return false;
}

void keep_content(Regions& regions, std::string_view tag, const PresetKept& kept) {
  for (RegionItem& item : regions.items) {
    if (item.tag == tag) item.policy = BackupPolicy::kHost;
  }
  regions.warnings.push_back({0, std::string(tag) + "=none is ignored: " + std::string(kept.why) +
                                     ". Its content is kept in host memory"});
}

void keep_what_cannot_be_lost(Regions& regions) {
  for (const Preset& preset : preset_table()) {
    const bool in_list = std::find(regions.presets.begin(), regions.presets.end(), preset.name) !=
                         regions.presets.end();
    for (const PresetKept& kept : preset.kept) {
      for (const RegionItem& item : regions.items) {
        if (item.policy == BackupPolicy::kNone && has_kept(item, preset, kept, in_list)) {
          keep_content(regions, std::string(item.tag), kept);
        }
      }
    }
  }
}

}  // namespace

const std::vector<Preset>& preset_table() {
  static const std::vector<Preset> table = {
#include "config/presets_table.inc"
  };
  return table;
}

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  for (const Preset& preset : preset_table()) names.emplace_back(preset.name);
  return names;
}

const Preset* find_preset(std::string_view name) {
  const auto& table = preset_table();
  const auto found = std::find_if(table.begin(), table.end(),
                                  [&](const Preset& preset) { return preset.name == name; });
  return found == table.end() ? nullptr : &*found;
}

std::string print_presets() {
  std::string result = "Presets of DORMOUSE_REGIONS\n";
  for (const Preset& preset : preset_table()) {
    result += "  @" + std::string(preset.name) + "  (" + std::string(preset.program) + ", " +
              std::string(preset.versions) + ")\n";
    result += "      " + std::string(preset.help) + "\n";
    for (const PresetRule& rule : preset.rules) {
      result += "      " + std::string(rule.item) + "\n";
      result += "          " + std::string(rule.help) + "\n";
    }
    for (const PresetTrigger& trigger : preset.triggers) {
      result += "      when " + std::string(trigger.module) + " is imported\n";
      result += "          " + std::string(trigger.help) + "\n";
    }
  }
  return result;
}

std::string print_presets_markdown() {
  std::string result =
      "## Presets\n\n"
      "One word in `DORMOUSE_REGIONS` for what a known program needs; [presets.md](presets.md) "
      "describes each.\n";
  for (const Preset& preset : preset_table()) {
    result += "\n### @" + std::string(preset.name) + "\n\n" + std::string(preset.program) + ", " +
              std::string(preset.versions) + ". " + std::string(preset.help) +
              "\n\n| rule | what it is |\n| --- | --- |\n";
    for (const PresetRule& rule : preset.rules) {
      result += "| `" + std::string(rule.item) + "` | " + std::string(rule.help) + " |\n";
    }
    for (const PresetKept& kept : preset.kept) {
      result +=
          "| `" + std::string(kept.tag) + "=none` | ignored: " + std::string(kept.why) + " |\n";
    }
    for (const PresetTrigger& trigger : preset.triggers) {
      result += "| when `" + std::string(trigger.module) + "` is imported | " +
                std::string(trigger.help) + " |\n";
    }
  }
  return result;
}

Regions parse_with_presets(std::string_view text, std::vector<ItemOrigin>* origins) {
  Regions regions = parse_regions(text, preset_names());
  const std::vector<RegionItem> own = regions.items;
  std::vector<ItemOrigin> found(own.size());
  for (const std::string& name : regions.presets) {
    for (const PresetRule& rule : find_preset(name)->rules) {
      for (RegionItem& item : parse_regions(rule.item).items) {
        give_way(item, own);
        regions.items.push_back(std::move(item));
        found.push_back({name, rule.of_some_versions});
      }
    }
  }
  keep_what_cannot_be_lost(regions);
  if (origins != nullptr) *origins = std::move(found);
  return regions;
}

}  // namespace dormouse::config
