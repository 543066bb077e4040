// The page for Prometheus: every line is in its format, every figure is there, labels are escaped.
#include "core/control/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>
#include <set>
#include <sstream>

namespace dormouse::control {
namespace {

using testing::HasSubstr;

TagStats example() {
  TagStats tag;
  tag.tag = "weights";
  tag.backup = Backup::kHost;
  tag.device = 1;
  tag.allocated = 1000;
  tag.mapped = 2097152;
  tag.asleep = 17179869184;
  tag.sleeps = 3;
  tag.last_sleep.seconds = 0.25;
  tag.last_wake.unix_time = 1700000000.5;
  tag.last_wake.differing_bytes = 262144;
  return tag;
}

TEST(Metrics, HasEachFigureWithItsLabels) {
  const std::string page = format_metrics({example()}, {}, {true, 7}, "1.2.3", 1234.5);
  const std::string labels = "{tag=\"weights\",device=\"1\",backup=\"host\"} ";
  EXPECT_THAT(page, HasSubstr("\ndormouse_allocated_bytes" + labels + "1000"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_asleep_bytes" + labels + "17179869184"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_sleeps_total" + labels + "3"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_last_sleep_seconds" + labels + "0.25\n"));
  EXPECT_THAT(page,
              HasSubstr("\ndormouse_last_wake_timestamp_seconds" + labels + "1700000000.5\n"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_last_wake_differing_bytes" + labels + "262144\n"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_gate_closed 1\n"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_gate_waiting_threads 7\n"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_build_info{version=\"1.2.3\"} 1\n"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_process_start_time_seconds 1234.5\n"));
}

TEST(Metrics, ShowsTheRunningOperation) {
  Progress progress;
  progress.active = true;
  progress.operation = "wake";
  progress.done_bytes = 5;
  progress.total_bytes = 9;
  const std::string page = format_metrics({}, progress, {}, "", 0);
  EXPECT_THAT(page, HasSubstr("\ndormouse_operation_active{operation=\"wake\"} 1\n"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_operation_active{operation=\"sleep\"} 0\n"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_operation_done_bytes 5\n"));
  EXPECT_THAT(page, HasSubstr("\ndormouse_operation_total_bytes 9\n"));
}

TEST(Metrics, EveryLineIsInTheFormatAndEverySampleHasAFamily) {
  const std::regex help("# HELP (dormouse_[a-z_]+) [A-Z1].+");
  const std::regex type("# TYPE (dormouse_[a-z_]+) (gauge|counter)");
  const std::regex sample(
      R"re((dormouse_[a-z_]+)(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+]+)re");
  std::set<std::string> families;
  std::string family;
  std::istringstream page(format_metrics({example(), example()}, {}, {}, "1", 1));
  std::smatch match;
  for (std::string line; std::getline(page, line);) {
    if (std::regex_match(line, match, help)) {
      family = match[1];
      EXPECT_TRUE(families.insert(family).second) << family << " appears twice";
    } else if (std::regex_match(line, match, type)) {
      EXPECT_EQ(match[1], family);
      EXPECT_EQ(match[2] == "counter", family.ends_with("_total")) << family;
    } else {
      ASSERT_TRUE(std::regex_match(line, match, sample)) << line;
      EXPECT_EQ(match[1], family);
    }
  }
  EXPECT_GE(families.size(), 25u);
}

TEST(Metrics, EscapesLabels) {
  EXPECT_THAT(format_metrics({}, {}, {}, "a\\b\"c\nd", 0),
              HasSubstr("version=\"a\\\\b\\\"c\\nd\""));
}

}  // namespace
}  // namespace dormouse::control
