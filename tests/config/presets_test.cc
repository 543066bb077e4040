// The presets' table, and how a list is read with them.
#include "config/presets.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace dormouse::config {
namespace {

TEST(Presets, every_row_reads_without_a_fault_and_is_explained) {
  for (const Preset& preset : preset_table()) {
    EXPECT_FALSE(preset.program.empty()) << preset.name;
    EXPECT_FALSE(preset.help.empty()) << preset.name;
    EXPECT_FALSE(preset.rules.empty()) << preset.name;
    EXPECT_FALSE(preset.versions.empty()) << preset.name;
    for (const PresetTrigger& trigger : preset.triggers) {
      EXPECT_FALSE(trigger.module.empty() || trigger.help.empty()) << preset.name;
    }
    EXPECT_EQ(find_preset(preset.name), &preset);
    for (const PresetRule& rule : preset.rules) {
      const Regions regions = parse_regions(rule.item, preset_names());
      EXPECT_TRUE(regions.errors.empty()) << rule.item << ": " << regions.errors[0].text();
      EXPECT_TRUE(regions.warnings.empty()) << rule.item;
      EXPECT_TRUE(regions.presets.empty()) << rule.item;
      EXPECT_EQ(regions.items.size(), 1u) << rule.item;
      EXPECT_FALSE(rule.help.empty()) << rule.item;
    }
  }
  EXPECT_EQ(find_preset("no such"), nullptr);
}

TEST(Presets, all_of_the_table_is_printed) {
  for (const std::string& text : {print_presets(), print_presets_markdown()}) {
    for (const Preset& preset : preset_table()) {
      EXPECT_NE(text.find("@" + std::string(preset.name)), std::string::npos);
      for (const std::string_view part : {preset.program, preset.versions, preset.help}) {
        EXPECT_NE(text.find(part), std::string::npos) << part;
      }
      for (const PresetTrigger& trigger : preset.triggers) {
        EXPECT_NE(text.find(trigger.module), std::string::npos) << trigger.module;
        EXPECT_NE(text.find(trigger.help), std::string::npos) << trigger.help;
      }
      for (const PresetRule& rule : preset.rules) {
        EXPECT_NE(text.find(rule.item), std::string::npos) << rule.item;
        EXPECT_NE(text.find(rule.help), std::string::npos) << rule.help;
      }
    }
  }
}

TEST(Presets, the_items_come_behind_the_lists_own) {
  std::vector<ItemOrigin> from;
  const Regions regions = parse_with_presets("mine: process; @sglang; last: api", &from);
  ASSERT_TRUE(regions.errors.empty());
  ASSERT_EQ(regions.items.size(), 5u);
  std::vector<std::string> presets;
  for (const ItemOrigin& each : from) presets.push_back(each.preset);
  EXPECT_EQ(presets, (std::vector<std::string>{"", "", "sglang", "sglang", "sglang"}));
  EXPECT_EQ(regions.items[1].tag, "last");
  EXPECT_EQ(regions.items[2].tag, "weights");
}

TEST(Presets, a_preset_named_twice_counts_once) {
  const Regions regions = parse_with_presets("@sglang; @sglang");
  EXPECT_EQ(regions.items.size(), 3u);
  EXPECT_EQ(regions.presets, (std::vector<std::string>{"sglang"}));
}

TEST(Presets, policy_and_priority_of_the_list_hold_for_the_presets_items) {
  const Regions regions = parse_with_presets("@sglang; kv_cache=none{priority:5}");
  ASSERT_EQ(regions.items.size(), 4u);
  EXPECT_TRUE(regions.warnings.empty());
  for (const RegionItem& item : regions.items) {
    const bool cache = item.tag == "kv_cache";
    EXPECT_EQ(item.policy, cache ? BackupPolicy::kNone : BackupPolicy::kHost);
    EXPECT_EQ(item.priority, cache ? 5 : 0);
  }
}

TEST(Presets, content_that_the_program_cannot_lose_is_kept) {
  for (const char* text :
       {"@vllm; kv_cache=none", "@vllm:replace; kv_cache=none", "@vllm:server; kv_cache=none",
        "kv_cache=none: python(vllm.v1.worker.gpu_worker:Worker.initialize_from_config)",
        "cache=none: nvtx(x), python(vllm.v1.worker.gpu_worker:Worker.initialize_from_config)"}) {
    const Regions regions = parse_with_presets(text);
    EXPECT_TRUE(regions.errors.empty()) << text;
    ASSERT_EQ(regions.warnings.size(), 1u) << text;
    EXPECT_NE(regions.warnings[0].message.find("=none is ignored"), std::string::npos) << text;
    for (const RegionItem& item : regions.items) {
      EXPECT_EQ(item.policy, BackupPolicy::kHost) << text << ": " << item.tag;
    }
  }
  EXPECT_TRUE(parse_with_presets("kv_cache=none: python(vllm:f)").warnings.empty());
}

TEST(Presets, an_unknown_one_is_an_error_and_adds_nothing) {
  const Regions regions = parse_with_presets("@vlm; a: process");
  ASSERT_EQ(regions.errors.size(), 1u);
  EXPECT_NE(regions.errors[0].message.find("vllm:replace"), std::string::npos);
  EXPECT_EQ(regions.items.size(), 1u);
}

}  // namespace
}  // namespace dormouse::config
