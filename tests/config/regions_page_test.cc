// docs/regions.md says what the reader does: its examples, messages, rules, settings and presets.
#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "config/alloc_conf.h"
#include "config/presets.h"

namespace dormouse::config {
namespace {

const std::string& page() {
  static const std::string text = [] {
    std::ostringstream content;
    content << std::ifstream("docs/regions.md").rdbuf();
    return content.str();
  }();
  return text;
}

std::vector<std::string> lines() {
  std::vector<std::string> result;
  std::istringstream stream(page());
  for (std::string line; std::getline(stream, line);) result.push_back(line);
  return result;
}

std::vector<Diagnostic> problems_of(const std::string& text) {
  const Regions regions = parse_with_presets(text);
  std::vector<Diagnostic> problems = regions.errors;
  problems.insert(problems.end(), regions.warnings.begin(), regions.warnings.end());
  return problems;
}

/// What stands in the first cell between backticks, and the second cell, of the rows of the table
/// under this head.
std::vector<std::pair<std::string, std::string>> rows_under(const std::string& head) {
  std::vector<std::pair<std::string, std::string>> rows;
  bool inside = false;
  for (const std::string& line : lines()) {
    if (line == head) {
      inside = true;
    } else if (inside && line.starts_with("| `")) {
      const size_t end = line.find("` | ");
      rows.emplace_back(line.substr(3, end - 3), line.substr(end + 4, line.size() - end - 6));
    } else if (inside && !line.starts_with("| ---")) {
      break;
    }
  }
  return rows;
}

TEST(RegionsPage, EveryExampleIsReadWithoutAWord) {
  constexpr std::string_view kBegin = "    DORMOUSE_REGIONS='";
  size_t examples = 0;
  for (const std::string& line : lines()) {
    if (!line.starts_with(kBegin)) continue;
    ASSERT_TRUE(line.ends_with("'")) << line;
    const std::string text = line.substr(kBegin.size(), line.size() - kBegin.size() - 1);
    for (const Diagnostic& problem : problems_of(text)) ADD_FAILURE() << text << problem.text();
    const Regions regions = parse_with_presets(text);
    EXPECT_FALSE(regions.items.empty()) << text;
    ++examples;
  }
  EXPECT_GE(examples, 10u);
}

TEST(RegionsPage, EveryMessageIsSaidOnce) {
  const auto rows = rows_under("| written | message |");
  EXPECT_GE(rows.size(), 15u);
  for (const auto& [text, message] : rows) {
    const std::vector<Diagnostic> problems = problems_of(text);
    ASSERT_EQ(problems.size(), 1u) << text;
    EXPECT_NE(problems[0].message.find(message), std::string::npos) << problems[0].text();
  }
}

TEST(RegionsPage, TheSettingsAreThoseThatARegionCanHave) {
  std::set<std::string> written;
  for (const auto& [key, meaning] : rows_under("| key | |")) written.insert(key);
  const std::set<std::string> known(region_setting_keys().begin(), region_setting_keys().end());
  EXPECT_EQ(written, known);
}

TEST(RegionsPage, EveryOtherKeyOfPyTorchsIsSaidToBelongToTheProcess) {
  std::set<std::string> written(region_setting_keys().begin(), region_setting_keys().end());
  const std::string head = "| key for the whole process | why it cannot differ between threads |";
  for (const auto& [first, rest] : rows_under(head)) {
    std::istringstream names(first + "`, `");
    for (std::string name; std::getline(names, name, '`');) {
      if (name.empty() || name == ", ") continue;
      EXPECT_TRUE(written.insert(name).second) << name;
    }
  }
  EXPECT_EQ(written, AllocDialect::g2_cuda().known_keys);
}

TEST(RegionsPage, ThePoliciesAreThoseThatThereAre) {
  const auto rows = rows_under("| policy | the content, while the memory sleeps |");
  ASSERT_EQ(rows.size(), 3u);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(rows[i].first, name_of(static_cast<BackupPolicy>(i)));
  }
}

TEST(RegionsPage, EveryRuleThatTheReaderOffersIsInTheGrammarAndInTheTable) {
  const std::string offered = parse_regions("a: nothing").errors.at(0).message;
  const size_t begin = offered.find("allowed are ") + 12;
  std::string list = offered.substr(begin);
  list.replace(list.find(" and "), 5, ", ");
  size_t rules = 0;
  for (size_t at = 0; at < list.size(); ++rules) {
    const size_t end = std::min(list.find(", ", at), list.size());
    const std::string rule = list.substr(at, end - at);
    EXPECT_NE(page().find("`" + rule + "`"), std::string::npos) << rule;
    const std::string grammar = page().substr(page().find("    rule  "), 220);
    EXPECT_NE(grammar.find(rule), std::string::npos) << rule;
    at = end + 2;
  }
  EXPECT_EQ(rules, 8u);
}

TEST(RegionsPage, EveryPresetIsNamed) {
  for (const std::string& name : preset_names()) {
    EXPECT_NE(page().find("`@" + name + "`"), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace dormouse::config
