// The parts of the command that need no process: figures, tables, what `run` makes of its
// arguments.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "cli/doctor.h"
#include "cli/run.h"
#include "cli/text.h"
#include "tests/control/scratch.h"

namespace dormouse::cli {
namespace {

using testing::HasSubstr;

TEST(HumanSize, HasThreeOrFourDigits) {
  EXPECT_EQ(human_size(0), "0");
  EXPECT_EQ(human_size(1), "1 B");
  EXPECT_EQ(human_size(1023), "1023 B");
  EXPECT_EQ(human_size(1536), "1.5 KiB");
  EXPECT_EQ(human_size(20ull << 30), "20.0 GiB");
  EXPECT_EQ(human_size(640ull << 30), "640 GiB");
  EXPECT_EQ(human_size(UINT64_MAX), "16384 PiB");
}

TEST(HumanRate, CountsInPowersOf1000) {
  EXPECT_EQ(human_rate(55'000'000'000, 1), "55.0 GB/s");
  EXPECT_EQ(human_rate(1, 0), "-");
}

TEST(HumanTime, ChoosesItsUnit) {
  EXPECT_EQ(human_time(0.0032), "3.2 ms");
  EXPECT_EQ(human_time(1.254), "1.25 s");
  EXPECT_EQ(human_time(125), "2 min 5 s");
  EXPECT_EQ(human_time(7260), "2 h 1 min");
}

TEST(HumanAgo, CountsWholeSeconds) {
  EXPECT_EQ(human_ago(0), "just now");
  EXPECT_EQ(human_ago(0.9), "just now");
  EXPECT_EQ(human_ago(5.7), "5 s ago");
  EXPECT_EQ(human_ago(125), "2 min 5 s ago");
}

TEST(Clipped, KeepsTerminalsSafe) {
  EXPECT_EQ(clipped("python serve.py", 60), "python serve.py");
  EXPECT_EQ(clipped("python serve.py", 10), "python ...");
  EXPECT_EQ(clipped("a\033[31mb\n", 60), "a?[31mb?");
  EXPECT_EQ(clipped("ab\xc3\xa4\xc3\xa4\xc3\xa4\xc3\xa4", 6), "ab...") << "not half a letter";
}

TEST(TableTest, AlignsItsColumns) {
  Table table({"PID", "NAME"}, {true, false});
  table.add({"7", "a"});
  table.add({"12345", "bc"});
  EXPECT_EQ(table.print(), "  PID  NAME\n    7  a\n12345  bc\n");
}

TEST(HostMemoryText, KnowsGroupsOfBothVersionsAndTheirParents) {
  const control::Scratch root;
  const auto write = [&](const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root / path).parent_path());
    std::ofstream(root / path) << text;
  };
  EXPECT_THAT(host_memory_text(root.path()), HasSubstr("unknown"));
  write("proc/meminfo", "MemFree: 1 kB\nMemAvailable: 41943040 kB\n");
  EXPECT_THAT(host_memory_text(root.path()), HasSubstr("40.0 GiB available"));
  write("proc/self/cgroup", "4:memory:/jobs/one\n0::/outer/inner\n");
  write("sys/fs/cgroup/outer/memory.max", "21474836480\n");
  write("sys/fs/cgroup/outer/memory.current", "0\n");
  EXPECT_THAT(host_memory_text(root.path()), HasSubstr("20.0 GiB available"));
  write("sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes", "10737418240\n");
  write("sys/fs/cgroup/memory/jobs/one/memory.usage_in_bytes", "2147483648\n");
  EXPECT_THAT(host_memory_text(root.path()), HasSubstr("8.0 GiB available"));
}

TEST(PreloadWith, PutsTheLibraryInFrontOfWhatWasThere) {
  EXPECT_EQ(preload_with("", "/x/libdormouse.so"), "/x/libdormouse.so");
  EXPECT_EQ(preload_with("/usr/lib/libjemalloc.so", "/x/d.so"), "/x/d.so:/usr/lib/libjemalloc.so");
  EXPECT_EQ(preload_with("a.so b.so", "/x/d.so"), "/x/d.so:a.so:b.so");
}

TEST(PreloadWith, AddsNothingTwice) {
  EXPECT_EQ(preload_with("/x/d.so", "/x/d.so"), "/x/d.so");
  EXPECT_EQ(preload_with("a.so /x/d.so:b.so", "/x/d.so"), "/x/d.so:a.so:b.so");
  EXPECT_EQ(preload_with("/y/x/d.so", "x/d.so"), "x/d.so:/y/x/d.so") << "another path";
}

TEST(ReadOption, TakesNamesInAnySpelling) {
  std::string error;
  for (const char* text : {"DORMOUSE_LOG_LEVEL=debug", "log-level=debug", "LOG_LEVEL=debug",
                           "dormouse_log_level=debug"}) {
    const auto variable = read_option(text, error);
    ASSERT_TRUE(variable.has_value()) << text << ": " << error;
    EXPECT_EQ(variable->first, "DORMOUSE_LOG_LEVEL");
    EXPECT_EQ(variable->second, "debug");
  }
  EXPECT_EQ(read_option("regions=a: nvtx(b=c)", error)->second, "a: nvtx(b=c)");
}

TEST(ReadOption, RefusesWhatTheLibraryWouldOnlyWarnAbout) {
  std::string error;
  EXPECT_FALSE(read_option("colour=red", error).has_value());
  EXPECT_THAT(error, HasSubstr("colour"));
  EXPECT_FALSE(read_option("log-level=loud", error).has_value());
  EXPECT_THAT(error, HasSubstr("DORMOUSE_LOG_LEVEL"));
  EXPECT_THAT(error, HasSubstr("loud"));
  EXPECT_THAT(error, testing::Not(HasSubstr("default"))) << "nothing runs with it";
  EXPECT_FALSE(read_option("socket-dir=~/x; the default y", error).has_value());
  EXPECT_THAT(error, testing::EndsWith("(~ is not expanded here, write the home directory out)"));
  EXPECT_FALSE(read_option("log-level", error).has_value());
  EXPECT_FALSE(read_option("=x", error).has_value());
}

TEST(CheckRegions, TellsErrorsFromGoodRules) {
  std::vector<std::string> warnings;
  EXPECT_TRUE(check_regions("weights: nvtx(load*); kv_cache=none", warnings).empty());
  EXPECT_TRUE(check_regions("", warnings).empty());
  const auto errors = check_regions("weights: nvxt(load*)", warnings);
  ASSERT_EQ(errors.size(), 1u);
  EXPECT_THAT(errors[0], HasSubstr("DORMOUSE_REGIONS"));
}

TEST(FindLibrary, TakesTheFirstThatExists) {
  const control::Scratch scratch;
  std::ofstream(scratch / "given.so") << "x";
  std::ofstream(scratch / "variable.so") << "x";
  std::string looked_at;
  setenv("DORMOUSE_LIBRARY", (scratch / "variable.so").c_str(), 1);
  EXPECT_EQ(find_library(scratch / "given.so", looked_at), scratch / "given.so");
  EXPECT_EQ(find_library("", looked_at), scratch / "variable.so");
  EXPECT_EQ(find_library(scratch / "none.so", looked_at), std::nullopt);
  EXPECT_EQ(looked_at, scratch / "none.so");
  unsetenv("DORMOUSE_LIBRARY");
  EXPECT_EQ(find_library("", looked_at), std::nullopt);
  EXPECT_THAT(looked_at, HasSubstr("/lib/libdormouse.so"));
}

}  // namespace
}  // namespace dormouse::cli
