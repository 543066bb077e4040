#include "config/options.h"

#include <map>
#include <set>

#include "gtest/gtest.h"

namespace dormouse::config {
namespace {

using Variables = std::map<std::string, std::string>;

/// Parses an environment made of these variables; the warnings are in `warnings`.
class OptionsTest : public testing::Test {
 protected:
  ParsedOptions parse(const Variables& variables,
                      std::span<const DeprecatedName> deprecated = deprecated_names()) {
    warnings.clear();
    const auto lookup = [&](const char* name) -> const char* {
      const auto found = variables.find(name);
      return found == variables.end() ? nullptr : found->second.c_str();
    };
    return parse_options(lookup, warnings, deprecated);
  }

  void check_names(const std::vector<std::string>& entries,
                   std::span<const DeprecatedName> deprecated = deprecated_names()) {
    std::vector<const char*> environment;
    for (const std::string& entry : entries) environment.push_back(entry.c_str());
    environment.push_back(nullptr);
    check_unknown_names(environment.data(), warnings, deprecated);
  }

  void expect_one_warning(const std::vector<std::string>& parts) const {
    ASSERT_EQ(warnings.size(), 1u);
    for (const std::string& part : parts) {
      EXPECT_NE(warnings[0].find(part), std::string::npos) << warnings[0];
    }
  }

  std::vector<std::string> warnings;
};

TEST_F(OptionsTest, an_empty_environment_gives_the_defaults_without_warnings) {
  const Options options = parse({}).options;
  EXPECT_TRUE(warnings.empty());
  EXPECT_TRUE(options.enabled);
  EXPECT_EQ(options.regions, "");
  EXPECT_EQ(options.gate, Gate::kWait);
  EXPECT_EQ(options.log_level, LogLevel::kWarn);
  EXPECT_TRUE(options.control);
  EXPECT_EQ(options.chunk_size, 256 * kMiB);
  EXPECT_EQ(options.retain, 32 * kMiB);
  EXPECT_EQ(options.host_limit, 0u);
  EXPECT_TRUE(options.keep_backup.is_always());
  EXPECT_EQ(options.copy_threads, 0);
  EXPECT_FALSE(options.prepare);
  EXPECT_TRUE(options.hash);
  EXPECT_FALSE(options.verify);
  EXPECT_EQ(options.torch, Torch::kAuto);
}

TEST_F(OptionsTest, every_type_is_read) {
  const Options options = parse({{"DORMOUSE", "Off"},
                                 {"DORMOUSE_REGIONS", " weights: nvtx(load*) "},
                                 {"DORMOUSE_LOG_LEVEL", "DEBUG"},
                                 {"DORMOUSE_CHUNK_SIZE", "1 GiB"},
                                 {"DORMOUSE_COPY_THREADS", "16"},
                                 {"DORMOUSE_KEEP_BACKUP", "5min"},
                                 {"DORMOUSE_DISK_DIR", "/var/tmp/x y"},
                                 {"DORMOUSE_GATE", "fail"},
                                 {"DORMOUSE_TORCH", "off"}})
                              .options;
  EXPECT_TRUE(warnings.empty());
  EXPECT_FALSE(options.enabled);
  EXPECT_EQ(options.regions, "weights: nvtx(load*)");
  EXPECT_EQ(options.log_level, LogLevel::kDebug);
  EXPECT_EQ(options.chunk_size, kGiB);
  EXPECT_EQ(options.copy_threads, 16);
  EXPECT_EQ(options.keep_backup.time(), std::chrono::minutes(5));
  EXPECT_EQ(options.disk_dir, "/var/tmp/x y");
  EXPECT_EQ(options.gate, Gate::kFail);
  EXPECT_EQ(options.torch, Torch::kOff);
}

TEST_F(OptionsTest, switches_take_the_usual_words) {
  for (const char* word : {"1", "on", "true", "yes", "TRUE", " On "}) {
    EXPECT_TRUE(parse({{"DORMOUSE_VERIFY", word}}).options.verify) << word;
  }
  for (const char* word : {"0", "off", "false", "no", "False"}) {
    EXPECT_FALSE(parse({{"DORMOUSE_HASH", word}}).options.hash) << word;
  }
  parse({{"DORMOUSE_HASH", "2"}});
  expect_one_warning({"DORMOUSE_HASH", "'2'", "on or off", "the default on holds"});
}

TEST_F(OptionsTest, how_long_backups_are_kept_takes_words_and_times) {
  EXPECT_TRUE(parse({{"DORMOUSE_KEEP_BACKUP", "Always"}}).options.keep_backup.is_always());
  EXPECT_TRUE(parse({{"DORMOUSE_KEEP_BACKUP", "never"}}).options.keep_backup.is_never());
  EXPECT_TRUE(parse({{"DORMOUSE_KEEP_BACKUP", "0"}}).options.keep_backup.is_never());
  EXPECT_TRUE(warnings.empty());
  parse({{"DORMOUSE_KEEP_BACKUP", "forever"}});
  expect_one_warning({"DORMOUSE_KEEP_BACKUP", "'forever'", "always, never or a time"});
  parse({{"DORMOUSE_KEEP_BACKUP", "5"}});
  expect_one_warning({"has no unit"});
}

TEST_F(OptionsTest, a_bad_value_is_one_warning_with_name_value_and_what_is_allowed) {
  struct Case {
    const char* name;
    const char* value;
    const char* allowed;
  };
  for (const Case& bad : std::initializer_list<Case>{
           {"DORMOUSE", "maybe", "on or off"},
           {"DORMOUSE_LOG_LEVEL", "verbose", "off, error, warn, info or debug"},
           {"DORMOUSE_GATE", "block", "wait, wake or fail"},
           {"DORMOUSE_CHUNK_SIZE", "1MiB", "from 2MiB to 4GiB, a multiple of 2MiB"},
           {"DORMOUSE_CHUNK_SIZE", "8GiB", "it is too large"},
           {"DORMOUSE_CHUNK_SIZE", "3MiB", "it is not a multiple of 2MiB"},
           {"DORMOUSE_RETAIN", "lots", "a size such as 512MiB"},
           {"DORMOUSE_HOST_LIMIT", "-1", "is negative"},
           {"DORMOUSE_COPY_THREADS", "4.5", "a whole number from 0 to 1024"},
           {"DORMOUSE_COPY_THREADS", "1025", "a whole number from 0 to 1024"},
           {"DORMOUSE_COPY_THREADS", "99999999999999", "a whole number from 0 to 1024"},
           {"DORMOUSE_SOCKET_DIR", "run/x", "an absolute path"},
           {"DORMOUSE_DISK_DIR", "~/x", "write the home directory out"},
           {"DORMOUSE_TORCH", "on", "auto or off"}}) {
    const ParsedOptions parsed = parse({{bad.name, bad.value}});
    expect_one_warning({bad.name, bad.value, bad.allowed, "the default"});
    EXPECT_EQ(print_options(parsed), print_options(parse({}))) << "the default holds";
  }
}

TEST_F(OptionsTest, bad_values_of_several_options_are_one_warning_each) {
  const Options options =
      parse({{"DORMOUSE_HASH", "x"}, {"DORMOUSE_GATE", "y"}, {"DORMOUSE_RETAIN", "1GiB"}}).options;
  EXPECT_EQ(warnings.size(), 2u);
  EXPECT_EQ(options.retain, kGiB);
}

TEST_F(OptionsTest, checks_without_hashes_are_said_to_be_none) {
  const ParsedOptions parsed = parse({{"DORMOUSE_VERIFY", "on"}, {"DORMOUSE_HASH", "off"}});
  expect_one_warning({"DORMOUSE_VERIFY=on", "DORMOUSE_HASH=off", "leave one of the two out"});
  EXPECT_TRUE(parsed.options.verify);
  EXPECT_FALSE(parsed.options.hash);
  parse({{"DORMOUSE_VERIFY", "on"}});
  EXPECT_TRUE(warnings.empty());
  parse({{"DORMOUSE_VERIFY", "off"}, {"DORMOUSE_HASH", "off"}});
  EXPECT_TRUE(warnings.empty());
}

TEST_F(OptionsTest, a_variable_set_to_nothing_counts_as_not_set) {
  const ParsedOptions parsed = parse({{"DORMOUSE_HASH", ""}, {"DORMOUSE_RETAIN", "  "}});
  EXPECT_TRUE(warnings.empty());
  EXPECT_TRUE(parsed.options.hash);
  for (const OptionValue& value : parsed.values) EXPECT_EQ(value.source, Source::kDefault);
}

TEST_F(OptionsTest, the_table_says_where_each_value_came_from) {
  const ParsedOptions parsed = parse({{"DORMOUSE_RETAIN", "1024MiB"}});
  ASSERT_EQ(parsed.values.size(), option_table().size());
  for (size_t i = 0; i < parsed.values.size(); ++i) {
    const bool set = option_table()[i].environment == "DORMOUSE_RETAIN";
    EXPECT_EQ(parsed.values[i].source, set ? Source::kEnvironment : Source::kDefault);
    EXPECT_EQ(parsed.values[i].value, set ? "1GiB" : option_table()[i].default_value);
  }
  const std::string table = print_options(parsed);
  EXPECT_NE(table.find("  DORMOUSE_RETAIN         1GiB     environment\n"), std::string::npos)
      << table;
}

TEST_F(OptionsTest, every_row_is_complete_and_named_once) {
  std::set<std::string> names;
  std::set<std::string> groups;
  std::string group;
  for (const OptionInfo& info : option_table()) {
    EXPECT_TRUE(names.insert(info.environment).second) << info.environment;
    EXPECT_TRUE(info.environment.starts_with("DORMOUSE")) << info.environment;
    EXPECT_FALSE(info.allowed.empty()) << info.environment;
    EXPECT_TRUE(info.help.ends_with('.')) << info.environment;
    if (info.group != group) {
      EXPECT_TRUE(groups.insert(info.group).second) << "rows of a group stand together";
    }
    group = info.group;
  }
  EXPECT_GE(names.size(), 20u);
}

TEST_F(OptionsTest, every_default_is_a_value_that_its_row_allows) {
  for (const OptionInfo& info : option_table()) {
    const ParsedOptions parsed = parse({{info.environment, info.default_value}});
    EXPECT_TRUE(warnings.empty()) << warnings[0];
    for (size_t i = 0; i < parsed.values.size(); ++i) {
      EXPECT_EQ(parsed.values[i].value, option_table()[i].default_value);
    }
  }
}

TEST_F(OptionsTest, an_unknown_name_is_a_warning_with_the_nearest_known_one) {
  check_names({"DORMOUSE_REGION=x"});
  expect_one_warning({"'DORMOUSE_REGION'", "did you mean DORMOUSE_REGIONS?"});
  warnings.clear();
  check_names({"dormouse_regions=x"});
  expect_one_warning({"'dormouse_regions'", "did you mean DORMOUSE_REGIONS?"});
  warnings.clear();
  check_names({"DORMOUSE_WHATEVER_THIS_IS_FOR"});
  expect_one_warning({"`dormouse options` lists them"});
}

TEST_F(OptionsTest, known_names_and_other_programs_variables_are_not_mentioned) {
  check_names({"DORMOUSE=1", "DORMOUSE_REGIONS=DORMOUSE_X=1", "PATH=/bin", "DORMANT=1", "", "="});
  check_unknown_names(nullptr, warnings);
  EXPECT_TRUE(warnings.empty());
}

TEST_F(OptionsTest, the_variable_that_only_the_command_reads_is_known) {
  check_names({"DORMOUSE_LIBRARY=/usr/lib/libdormouse.so"});
  EXPECT_TRUE(warnings.empty());
}

constexpr DeprecatedName kOldNames[] = {{"DORMOUSE_OLD_RETAIN", "DORMOUSE_RETAIN"}};

TEST_F(OptionsTest, an_old_name_works_with_a_warning_that_names_the_new_one) {
  const ParsedOptions parsed = parse({{"DORMOUSE_OLD_RETAIN", "1GiB"}}, kOldNames);
  expect_one_warning({"DORMOUSE_OLD_RETAIN is the old name of DORMOUSE_RETAIN"});
  EXPECT_EQ(parsed.options.retain, kGiB);
  EXPECT_NE(print_options(parsed).find("environment (DORMOUSE_OLD_RETAIN)"), std::string::npos);
  warnings.clear();
  check_names({"DORMOUSE_OLD_RETAIN=1GiB"}, kOldNames);
  EXPECT_TRUE(warnings.empty());
}

TEST_F(OptionsTest, the_new_name_wins_over_the_old_one) {
  const ParsedOptions parsed =
      parse({{"DORMOUSE_OLD_RETAIN", "1GiB"}, {"DORMOUSE_RETAIN", "2GiB"}}, kOldNames);
  expect_one_warning({"the old name is ignored"});
  EXPECT_EQ(parsed.options.retain, 2 * kGiB);
}

TEST_F(OptionsTest, the_markdown_has_a_row_for_every_option) {
  const std::string markdown = print_options_markdown();
  for (const OptionInfo& info : option_table()) {
    const std::string row = "| `" + info.environment + "` | ";
    EXPECT_NE(markdown.find(row), std::string::npos) << row;
  }
}

}  // namespace
}  // namespace dormouse::config
