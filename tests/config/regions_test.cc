#include "config/regions.h"

#include <chrono>
#include <map>
#include <random>
#include <set>

#include "config/alloc_conf.h"
#include "config/units.h"
#include "gtest/gtest.h"

namespace dormouse::config {
namespace {

Regions parse_clean(const std::string& text) {
  Regions regions = parse_regions(text);
  for (const Diagnostic& error : regions.errors) ADD_FAILURE() << text << ": " << error.text();
  for (const Diagnostic& warning : regions.warnings) ADD_FAILURE() << warning.text();
  return regions;
}

RegionItem parse_item(const std::string& text) {
  Regions regions = parse_clean(text);
  EXPECT_EQ(regions.items.size(), 1u) << text;
  return regions.items.empty() ? RegionItem() : regions.items[0];
}

/// Expects one error that contains `part` at `position`, and no item.
void expect_error(const std::string& text, const std::string& part, size_t position) {
  const Regions regions = parse_regions(text);
  ASSERT_EQ(regions.errors.size(), 1u) << text;
  EXPECT_NE(regions.errors[0].message.find(part), std::string::npos)
      << text << ": " << regions.errors[0].text();
  EXPECT_EQ(regions.errors[0].position, position) << text << ": " << regions.errors[0].text();
  EXPECT_TRUE(regions.items.empty()) << text;
  EXPECT_TRUE(regions.presets.empty()) << text;
}

TEST(RegionList, an_empty_text_is_an_empty_list) {
  for (const char* text : {"", " ", ";", " ; ;\n"}) {
    const Regions regions = parse_clean(text);
    EXPECT_TRUE(regions.items.empty());
    EXPECT_TRUE(regions.presets.empty());
  }
}

TEST(RegionList, every_kind_of_rule_is_read) {
  const RegionItem item = parse_item(
      "weights: nvtx(load*), nvtx(step?@my.*), nvtx(x@), python(a.b:C.d), process, size(>=20MiB), "
      "size(<2MiB), size(>=2MiB, <20MiB), thread(loader*), api");
  EXPECT_EQ(item.tag, "weights");
  EXPECT_EQ(item.policy, BackupPolicy::kHost);
  const std::vector<Rule> expected = {NvtxRule{"load*", std::nullopt},
                                      NvtxRule{"step?", "my.*"},
                                      NvtxRule{"x", ""},
                                      PythonRule{"a.b", "C.d"},
                                      ProcessRule{},
                                      SizeRule{20 * kMiB, std::nullopt},
                                      SizeRule{0, 2 * kMiB},
                                      SizeRule{2 * kMiB, 20 * kMiB},
                                      ThreadRule{"loader*"},
                                      ApiRule{}};
  EXPECT_EQ(item.rules, expected);
}

TEST(RegionList, an_item_without_rules_is_begun_by_the_program) {
  for (const char* text : {"weights", "weights:api", " weights ;", "weights: api()"}) {
    EXPECT_EQ(parse_item(text).rules, std::vector<Rule>{ApiRule{}}) << text;
  }
}

TEST(RegionList, policies_are_read_in_any_case) {
  EXPECT_EQ(parse_item("a=none").policy, BackupPolicy::kNone);
  EXPECT_EQ(parse_item("a = Disk : api").policy, BackupPolicy::kDisk);
  EXPECT_EQ(parse_item("a=host{priority:1}").policy, BackupPolicy::kHost);
}

TEST(RegionList, settings_keep_pytorchs_keys_and_take_priority_out) {
  const RegionItem item = parse_item(
      "w=disk{max_split_size_mb:512, priority:-3, roundup_power2_divisions:[256:1,>:4]}: process");
  EXPECT_EQ(item.priority, -3);
  const std::vector<std::pair<std::string, std::string>> expected = {
      {"max_split_size_mb", "512"}, {"roundup_power2_divisions", "[256:1,>:4]"}};
  EXPECT_EQ(item.settings, expected);
}

TEST(RegionList, a_dash_is_a_region_without_tag) {
  EXPECT_EQ(parse_item("-: thread(nccl*)").tag, "");
}

TEST(RegionList, white_space_and_line_breaks_do_not_matter) {
  const Regions spaced = parse_clean("\n a = none { priority : 2 } :\n  nvtx( x ) ,process ;\n b");
  const Regions dense = parse_clean("a=none{priority:2}:nvtx(x),process;b");
  EXPECT_EQ(spaced.items, dense.items);
}

TEST(RegionList, presets_are_collected_by_name) {
  const Regions regions = parse_clean("@vllm:replace ; weights; @SGLang; @vllm:replace");
  EXPECT_EQ(regions.presets, (std::vector<std::string>{"vllm:replace", "sglang"}));
  EXPECT_EQ(regions.items.size(), 1u);
}

TEST(RegionList, of_a_preset_and_its_variant_the_variant_holds) {
  for (const char* text : {"@vllm; @vllm:replace; @vllm", "@vllm:replace; @vllm"}) {
    const Regions regions = parse_regions(text);
    EXPECT_EQ(regions.presets, std::vector<std::string>{"vllm:replace"}) << text;
    EXPECT_TRUE(regions.errors.empty());
    ASSERT_EQ(regions.warnings.size(), 1u) << text;
    EXPECT_EQ(regions.warnings[0].message.substr(0, 34), "@vllm is ignored, since @vllm:repl");
    EXPECT_EQ(regions.warnings[0].position, text[5] == ';' ? 0u : 15u);
  }
}

TEST(RegionList, the_same_rule_for_two_tags_is_a_warning_and_the_first_holds) {
  for (const char* rule : {"nvtx(x)", "python(m:f)", "thread(t*)", "size(>=1MiB)"}) {
    const Regions regions =
        parse_regions("a: " + std::string(rule) + "; b: api, " + rule + "; a: " + rule);
    EXPECT_TRUE(regions.errors.empty());
    EXPECT_EQ(regions.items.size(), 3u);
    ASSERT_EQ(regions.warnings.size(), 2u) << rule;  // the third item repeats b's
    EXPECT_EQ(
        regions.warnings[0].message,
        rule +
            std::string(" is a rule of 'a' already: that one holds, and 'b' gets no region by it"));
  }
  EXPECT_TRUE(parse_regions("a: api; b: api; a: nvtx(x), nvtx(x); c: nvtx(x@)").warnings.empty());
  EXPECT_EQ(parse_regions("-: nvtx(x); a: nvtx(x)").warnings.size(), 1u);
}

TEST(RegionList, an_unknown_preset_is_an_error_that_lists_the_known_ones) {
  const Regions regions = parse_regions("@vlm; w", {"sglang", "vllm"});
  ASSERT_EQ(regions.errors.size(), 1u);
  EXPECT_NE(regions.errors[0].message.find("allowed are sglang or vllm"), std::string::npos);
  EXPECT_EQ(regions.items.size(), 1u);
}

TEST(RegionList, a_preset_without_its_at_is_explained) {
  const Regions regions = parse_regions("vllm", {"vllm"});
  ASSERT_EQ(regions.errors.size(), 1u);
  EXPECT_NE(regions.errors[0].message.find("write @vllm, or vllm: api"), std::string::npos);
  EXPECT_TRUE(parse_regions("vllm: api", {"vllm"}).errors.empty());
  const Regions variant = parse_regions("vllm:replace", {"vllm", "vllm:replace"});
  ASSERT_EQ(variant.errors.size(), 1u);
  EXPECT_NE(variant.errors[0].message.find("write @vllm:replace"), std::string::npos);
}

TEST(RegionList, patterns_keep_escapes_parentheses_and_commas) {
  EXPECT_EQ(parse_item("a: nvtx(f(x, y))").rules[0], (Rule{NvtxRule{"f(x, y)", std::nullopt}}));
  EXPECT_EQ(parse_item(R"(a: nvtx(f\)))").rules[0], (Rule{NvtxRule{R"(f\))", std::nullopt}}));
  EXPECT_EQ(parse_item(R"(a: nvtx(x\;y\@z))").rules[0],
            (Rule{NvtxRule{R"(x\;y\@z)", std::nullopt}}));
  EXPECT_EQ(parse_item("a: nvtx(u@v@w)").rules[0], (Rule{NvtxRule{"u@v", "w"}}));
  EXPECT_EQ(parse_item(R"(a: nvtx(x\ ))").rules[0], (Rule{NvtxRule{R"(x\ )", std::nullopt}}));
  EXPECT_EQ(parse_item("a: nvtx(größe*)").rules[0], (Rule{NvtxRule{"größe*", std::nullopt}}));
}

TEST(RegionList, a_malformed_item_is_dropped_and_the_others_stand) {
  const Regions regions = parse_regions("a: nvtx(x); b: nvtxx(y); c=none; d: nvtx(; e: process");
  ASSERT_EQ(regions.errors.size(), 2u);
  EXPECT_EQ(regions.errors[0].position, 15u);
  EXPECT_EQ(regions.errors[0].text().substr(0, 31), "DORMOUSE_REGIONS, character 16:");
  EXPECT_NE(regions.errors[0].message.find("did you mean nvtx?"), std::string::npos);
  ASSERT_EQ(regions.items.size(), 3u);
  EXPECT_EQ(regions.items[0].tag, "a");
  EXPECT_EQ(regions.items[1].tag, "c");
  EXPECT_EQ(regions.items[2].tag, "e");
}

TEST(RegionErrors, tags) {
  expect_error(": process", "a tag is missing", 0);
  expect_error("my tag: process", "'my tag' is not a tag", 0);
  expect_error("a,b", "is not a tag", 0);
  expect_error(".a", "is not a tag", 0);
  expect_error("--", "is not a tag", 0);
  expect_error(std::string(65, 'a'), "1 to 64 letters", 0);
  expect_error("nvtx(load*)", "rules follow a tag and ':'", 0);
}

TEST(RegionErrors, policies) {
  expect_error("a=", "'' is not a policy", 2);
  expect_error("a=discard", "write none", 2);
  expect_error("a=cpu: process", "write host", 2);
  expect_error("-=host: process", "has no policy", 1);
  expect_error("a: host", "write a=host", 3);
  expect_error("a=host b: api", "is not a policy", 2);
}

TEST(RegionErrors, rules) {
  expect_error("a:", "a rule is missing after ':'", 1);
  expect_error("a: nvtx(x),,api", "a rule is missing", 11);
  expect_error("a: nvtx", "write nvtx(load*)", 3);
  expect_error("a: nvtx()", "nvtx needs a pattern", 8);
  expect_error("a: nvtx load", "is not a rule", 3);
  expect_error("a: nvtx(\"load\")", "patterns take no quotes: write load", 8);
  expect_error(R"(a: nvtx(load\\\))", "has no closing ')'", 3);
  expect_error("a: nvtx(x", "has no closing ')'", 3);
  expect_error("a: nvtx(f(x), process", "has no closing ')'", 3);
  expect_error("a: nvtx(f))", "expected ',' or ';' after ')'", 10);
  expect_error("a: python(torch.load)", "has no ':' between module and function", 10);
  expect_error("a: python(torch:load())", "is not a dotted Python name", 16);
  expect_error("a: python(torch:)", "is not a dotted Python name", 16);
  expect_error("a: python(1a:f)", "is not a dotted Python name", 10);
  expect_error("a: size(20MiB)", "is not a comparison", 8);
  expect_error("a: size(>20MiB)", "is not a comparison", 8);
  expect_error("a: size(>=20Mb/s)", "unknown unit", 10);
  expect_error("a: size(>=2,>=3)", "one too many", 12);
  expect_error("a: size(>=2MiB,<1MiB)", "no size is in", 8);
  expect_error("a: size(<0)", "no size is in", 8);
  expect_error("a: process(1)", "takes nothing in parentheses", 11);
  expect_error("a: nvtx(x), b: nvtx(y)", "put ';' in front", 12);
  expect_error("a: thread()", "thread needs a pattern", 10);
}

TEST(RegionErrors, settings) {
  expect_error("a{priority:1", "'{' has no closing '}'", 1);
  expect_error("a{max_split_size_mb}", "expected ':'", 2);
  expect_error("a{max_split_size_mb:10}", "PyTorch would refuse this setting", 2);
  expect_error("a{max_split_size_mb:64,max_split_size_mb:64}", "is set twice", 2);
  expect_error("a{priority:high}", "a whole number from -1000 to 1000", 2);
  expect_error("a{priority:1001}", "a whole number from -1000 to 1000", 2);
  expect_error("a{priority:1,priority:2}", "set twice", 2);
  expect_error("-{priority:1}", "has no priority", 2);
  expect_error("-{max_split_size_mb:300}: nvtx(x)", "'-' is memory without one; leave", 2);
  expect_error("-{expandable_segments:False}: nvtx(x)", "leave expandable_segments out", 2);
  expect_error("a{expandable_segments:True}", "leave it out", 2);
  expect_error("a{} b", "expected '=', '{', ':' or ';'", 4);
}

TEST(RegionErrors, presets) {
  expect_error("@", "is not a preset", 0);
  expect_error("@vllm: process", "is not a preset", 0);
  expect_error("@vllm:a:b", "is not a preset", 0);
  expect_error("@vllm=none", "is not a preset", 0);
}

TEST(RegionList, items_of_one_tag_must_agree) {
  const Regions regions = parse_regions("a=none: api; b; a=disk: process; a: nvtx(x)");
  ASSERT_EQ(regions.errors.size(), 1u);
  EXPECT_EQ(regions.errors[0].position, 16u);
  EXPECT_NE(regions.errors[0].message.find("has the policy none already"), std::string::npos);
  ASSERT_EQ(regions.items.size(), 3u);
  EXPECT_EQ(regions.items[2].policy, BackupPolicy::kNone) << "named once, it holds for all";
}

TEST(RegionList, a_policy_named_later_holds_for_earlier_items_too) {
  const Regions regions = parse_clean("a: api; a=disk{priority:7}: process");
  EXPECT_EQ(regions.items[0].policy, BackupPolicy::kDisk);
  EXPECT_EQ(regions.items[0].priority, 7);
}

TEST(RegionList, priorities_of_one_tag_must_agree) {
  EXPECT_EQ(parse_regions("a{priority:1}; a{priority:2}").errors.size(), 1u);
  EXPECT_EQ(parse_regions("a{priority:1}; a{priority:1}").errors.size(), 0u);
}

TEST(RegionList, settings_of_one_tag_must_agree) {
  const Regions regions =
      parse_regions("a{max_split_size_mb:64}; b{max_split_size_mb:32}; a{max_split_size_mb:128}");
  ASSERT_EQ(regions.errors.size(), 1u);
  EXPECT_NE(regions.errors[0].message.find("has max_split_size_mb:64 already"), std::string::npos);
  EXPECT_TRUE(parse_regions("a{max_split_size_mb:64}; a{max_split_size_mb:64}").errors.empty());
}

TEST(RegionList, only_one_tag_can_have_the_whole_process) {
  const Regions regions = parse_regions("a: process; b: process; a: process");
  ASSERT_EQ(regions.errors.size(), 1u);
  EXPECT_NE(regions.errors[0].message.find("belongs to 'a' already"), std::string::npos);
  EXPECT_EQ(regions.items.size(), 2u);
}

TEST(RegionList, keys_that_a_region_cannot_have_are_left_out_with_one_warning) {
  for (const auto& [key, says] : std::initializer_list<std::pair<std::string, std::string>>{
           {"max_split_size", "did you mean max_split_size_mb?"},
           {"priorty", "did you mean priority?"},
           {"colour", "allowed are garbage_collection_threshold, "},
           {"backend", "reads it once, for the whole process"}}) {
    const Regions regions = parse_regions("a{large_segment_size_mb:64," + key + ":3}");
    EXPECT_TRUE(regions.errors.empty());
    ASSERT_EQ(regions.warnings.size(), 1u) << key;
    EXPECT_NE(regions.warnings[0].message.find(says), std::string::npos)
        << regions.warnings[0].message;
    EXPECT_NE(regions.warnings[0].message.find("ignored"), std::string::npos);
    ASSERT_EQ(regions.items.size(), 1u);
    EXPECT_EQ(regions.items[0].settings.size(), 1u);
  }
}

TEST(RegionList, every_key_of_pytorchs_is_a_setting_or_is_said_to_be_none) {
  const std::map<std::string, std::string> values = {
      {"garbage_collection_threshold", "0.5"},
      {"pinned_use_background_threads", "True"},
      {"roundup_power2_divisions", "4"},
  };
  std::set<std::string> settings;
  const AllocDialect pytorch = AllocDialect::g2_cuda();
  for (const std::string& key : *pytorch.known_keys) {
    if (key == "expandable_segments") continue;  // always off: an error of its own
    const std::string value = values.contains(key) ? values.at(key) : "64";
    const Regions regions = parse_regions("a{" + key + ":" + value + "}");
    EXPECT_TRUE(regions.errors.empty()) << regions.errors[0].message;
    ASSERT_EQ(regions.items.size(), 1u) << key;
    if (regions.warnings.empty()) {
      const std::vector<std::pair<std::string, std::string>> expected = {{key, value}};
      EXPECT_EQ(regions.items[0].settings, expected);
      settings.insert(key);
      continue;
    }
    EXPECT_TRUE(regions.items[0].settings.empty()) << key;
    EXPECT_EQ(regions.warnings.size(), 1u) << key;
    const bool once = key == "backend" || key == "per_process_memory_fraction";
    EXPECT_EQ(regions.warnings[0].message,
              key + " cannot differ between threads: PyTorch " +
                  (once ? "reads it once, for the whole process"
                        : "keeps it in one object that all threads read") +
                  ". It is ignored here; put it into PYTORCH_ALLOC_CONF (PYTORCH_CUDA_ALLOC_CONF "
                  "before 2.10)");
  }
  EXPECT_EQ(settings,
            std::set<std::string>(region_setting_keys().begin(), region_setting_keys().end()));
}

TEST(RegionErrors, values_of_settings_are_read_as_pytorch_reads_them) {
  for (const char* setting :
       {"garbage_collection_threshold:1", "large_segment_size_mb:10", "max_split_size_mb:10",
        "max_non_split_rounding_mb:10", "pinned_max_cached_size_mb:all",
        "pinned_max_round_threshold_mb:-", "pinned_use_background_threads:1",
        "pinned_use_background_threads:true", "roundup_power2_divisions:3"}) {
    expect_error("a{" + std::string(setting) + "}", "PyTorch would refuse this setting", 2);
  }
  parse_clean("a{pinned_max_cached_size_mb:0,pinned_use_background_threads:False}");
}

TEST(RegionList, an_item_that_is_dropped_gives_no_warning_beside_its_error) {
  for (const char* text : {"a{max_split_size:512}: nope", "b=none; b=disk{max_split_size:512}"}) {
    const Regions regions = parse_regions(text);
    EXPECT_EQ(regions.errors.size(), 1u) << text;
    EXPECT_TRUE(regions.warnings.empty()) << text;
  }
}

TEST(RegionList, a_thread_pattern_that_is_too_long_to_match_is_a_warning) {
  EXPECT_EQ(parse_regions("a: thread(sixteen-letters!)").warnings.size(), 1u);
  EXPECT_EQ(parse_regions("a: thread(fifteen-letter*s)").warnings.size(), 0u);
}

TEST(RegionPrinter, prints_in_one_form) {
  EXPECT_EQ(
      print_regions(parse_clean(
          "@vllm;a = host ; b=none{ priority:2 , max_split_size_mb: 512 }:nvtx( x@ y ),process "
          "; -:size(<2048KiB)")),
      "a: api; b=none{priority:2,max_split_size_mb:512}: nvtx(x@y), process; "
      "-: size(<2MiB); @vllm");
}

/// Texts from pieces of the grammar and marks at random: many are valid, most are not.
std::string random_text(std::mt19937_64& random) {
  constexpr const char* kPieces[] = {"a",
                                     "weights",
                                     "-",
                                     "=none",
                                     "=disk",
                                     ": ",
                                     "; ",
                                     ", ",
                                     "nvtx(x)",
                                     "process",
                                     "nvtx(a@b)",
                                     "nvtx(*@)",
                                     "thread(t*)",
                                     "size(>=2MiB)",
                                     "size(<1)",
                                     "api",
                                     "@vllm",
                                     "python(m:f)",
                                     "{priority:1}",
                                     "\\",
                                     "(",
                                     ")",
                                     "@",
                                     "{",
                                     "}",
                                     " ",
                                     "nvtx(\\))",
                                     ":",
                                     ";",
                                     "{max_split_size_mb:32,roundup_power2_divisions:[1:2,>:4]}"};
  std::string text;
  for (size_t count = random() % 12; count > 0; --count) {
    text += kPieces[random() % std::size(kPieces)];
  }
  return text;
}

TEST(RegionPrinter, reads_back_to_the_same) {
  std::mt19937_64 random(11);
  size_t items = 0;
  for (int i = 0; i < 200'000; ++i) {
    const std::string text = random_text(random);
    const Regions regions = parse_regions(text);
    const std::string printed = print_regions(regions);
    const Regions again = parse_regions(printed);
    ASSERT_TRUE(again.errors.empty()) << text << " -> " << printed << again.errors[0].text();
    ASSERT_EQ(again.items, regions.items) << text << " -> " << printed;
    ASSERT_EQ(again.presets, regions.presets) << text << " -> " << printed;
    for (const Diagnostic& error : regions.errors) {
      ASSERT_LE(error.position, text.size()) << text << ": " << error.text();
    }
    items += regions.items.size();
  }
  EXPECT_GT(items, 5'000u);
}

TEST(Glob, matches_whole_texts) {
  EXPECT_TRUE(glob_match("", ""));
  EXPECT_FALSE(glob_match("", "a"));
  EXPECT_TRUE(glob_match("abc", "abc"));
  EXPECT_FALSE(glob_match("abc", "abcd"));
  EXPECT_FALSE(glob_match("abc", "ab"));
  EXPECT_FALSE(glob_match("abc", "ABC"));
}

TEST(Glob, stars_take_any_text_and_question_marks_one_byte) {
  EXPECT_TRUE(glob_match("*", ""));
  EXPECT_TRUE(glob_match("**", "anything"));
  EXPECT_TRUE(glob_match("load*", "load"));
  EXPECT_TRUE(glob_match("*load", "reload"));
  EXPECT_TRUE(glob_match("a*b*c", "aXbYbZc"));
  EXPECT_FALSE(glob_match("a*b*c", "aXbYbZ"));
  EXPECT_TRUE(glob_match("a?c", "abc"));
  EXPECT_FALSE(glob_match("a?c", "ac"));
  EXPECT_FALSE(glob_match("?", ""));
  EXPECT_TRUE(glob_match("*?", "a"));
  EXPECT_FALSE(glob_match("*?", ""));
  EXPECT_TRUE(glob_match("[a]", "[a]"));
  EXPECT_FALSE(glob_match("[a]", "a"));
}

TEST(Glob, a_backslash_takes_the_next_byte_as_it_is) {
  EXPECT_TRUE(glob_match(R"(\*)", "*"));
  EXPECT_FALSE(glob_match(R"(\*)", "a"));
  EXPECT_TRUE(glob_match(R"(*\?*)", "why?no"));
  EXPECT_FALSE(glob_match(R"(*\?*)", "why"));
  EXPECT_TRUE(glob_match(R"(\a)", "a"));
  EXPECT_TRUE(glob_match(R"(\\)", R"(\)"));
  EXPECT_TRUE(glob_match(R"(a\)", R"(a\)")) << "one at the end stands for itself";
}

/// The definition, by recursion.
bool simple_match(std::string_view pattern, std::string_view text) {
  if (pattern.empty()) return text.empty();
  if (pattern[0] == '*') {
    return simple_match(pattern.substr(1), text) ||
           (!text.empty() && simple_match(pattern, text.substr(1)));
  }
  if (text.empty()) return false;
  if (pattern[0] == '\\' && pattern.size() > 1) {
    return pattern[1] == text[0] && simple_match(pattern.substr(2), text.substr(1));
  }
  return (pattern[0] == '?' || pattern[0] == text[0]) &&
         simple_match(pattern.substr(1), text.substr(1));
}

TEST(Glob, agrees_with_its_definition) {
  std::mt19937_64 random(13);
  const auto make = [&](std::string_view letters, size_t longest) {
    std::string text;
    for (size_t count = random() % longest; count > 0; --count) {
      text += letters[random() % letters.size()];
    }
    return text;
  };
  size_t matches = 0;
  for (int i = 0; i < 300'000; ++i) {
    const std::string pattern = make("ab*?\\", 9);
    const std::string text = make("ab*\\", 8);
    const bool expected = simple_match(pattern, text);
    ASSERT_EQ(glob_match(pattern, text), expected) << pattern << " on " << text;
    matches += expected ? 1 : 0;
  }
  EXPECT_GT(matches, 10'000u);
}

TEST(Glob, many_stars_do_not_take_exponential_time) {
  std::string pattern;
  for (int i = 0; i < 200; ++i) pattern += "*a";
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_FALSE(glob_match(pattern + "b", std::string(20'000, 'a')));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
}

}  // namespace
}  // namespace dormouse::config
