#include "config/units.h"

#include <random>

#include "gtest/gtest.h"

namespace dormouse::config {
namespace {

using std::chrono::hours;
using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

void expect_size(const char* text, uint64_t bytes) {
  const auto size = parse_size(text);
  ASSERT_TRUE(size.ok()) << text << ": " << size.error();
  EXPECT_EQ(*size, bytes) << text;
}

template <typename T>
void expect_error(const Result<T>& result, const std::string& part) {
  EXPECT_FALSE(result.ok());
  EXPECT_NE(result.error().find(part), std::string::npos) << result.error();
}

TEST(Size, takes_bytes_and_binary_units_in_any_spelling) {
  expect_size("0", 0);
  expect_size("4096", 4096);
  expect_size("4096B", 4096);
  expect_size("512 MiB", 512 * kMiB);
  expect_size("  20GiB\t", 20 * kGiB);
  expect_size("20gib", 20 * kGiB);
  expect_size("20GB", 20 * kGiB);
  expect_size("20G", 20 * kGiB);
  expect_size("3k", 3 * kKiB);
  expect_size("2TiB", 2 * kTiB);
  expect_size("007KiB", 7 * kKiB);
}

TEST(Size, takes_fractions_of_units_exactly) {
  expect_size("1.5GiB", 1536 * kMiB);
  expect_size("0.1KiB", 102);
  expect_size("0.25 TiB", 256 * kGiB);
  expect_size("0.000000000000000000000001TiB", 0);
}

TEST(Size, takes_the_largest_and_refuses_one_more) {
  expect_size("18446744073709551615", UINT64_MAX);
  expect_size("16777215TiB", 16777215 * kTiB);
  expect_error(parse_size("18446744073709551616"), "is too large");
  expect_error(parse_size("16777216TiB"), "is too large");
  expect_error(parse_size("16777215.99999999999999TiB1"), "unknown unit");
  expect_error(parse_size("99999999999999999999999999999999999999999999999999GiB"), "too large");
}

TEST(Size, refuses_garbage_and_says_what_is_allowed) {
  for (const char* text : {"", " ", "GiB", "abc", "-1", "+1", "1,024", "1 2", "20 Gib x", "0x10",
                           "1e9", "1.", ".5GiB", "1.5", "20Gi", "20GiBs", "inf", "1..5GiB"}) {
    const auto size = parse_size(text);
    EXPECT_FALSE(size.ok()) << text;
    EXPECT_NE(size.error().find("such as 512MiB"), std::string::npos) << size.error();
  }
  expect_error(parse_size("-1GiB"), "is negative");
  expect_error(parse_size("20Gi"), "unknown unit 'Gi'");
  expect_error(parse_size("1.5"), "fraction of a byte");
}

TEST(Size, prints_the_largest_exact_unit) {
  EXPECT_EQ(format_size(0), "0");
  EXPECT_EQ(format_size(1000), "1000");
  EXPECT_EQ(format_size(1536 * kMiB), "1536MiB");
  EXPECT_EQ(format_size(256 * kMiB), "256MiB");
  EXPECT_EQ(format_size(4 * kGiB), "4GiB");
  EXPECT_EQ(format_size(UINT64_MAX), "18446744073709551615");
}

TEST(Size, reads_back_what_it_prints) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 10'000; ++i) {
    const uint64_t bytes = random() >> (random() % 64) << (random() % 64);
    const auto size = parse_size(format_size(bytes));
    ASSERT_TRUE(size.ok()) << size.error();
    ASSERT_EQ(*size, bytes);
  }
}

void expect_duration(const char* text, Duration expected) {
  const auto duration = parse_duration(text);
  ASSERT_TRUE(duration.ok()) << text << ": " << duration.error();
  EXPECT_EQ(*duration, expected) << text;
}

TEST(DurationText, takes_units_from_nanoseconds_to_days) {
  expect_duration("0", Duration{0});
  expect_duration("0.0", Duration{0});
  expect_duration("7ns", Duration{7});
  expect_duration("500us", Duration{500'000});
  expect_duration("500ms", milliseconds(500));
  expect_duration("2 s", seconds(2));
  expect_duration("1.5s", milliseconds(1500));
  expect_duration("5min", minutes(5));
  expect_duration("5MIN", minutes(5));
  expect_duration("2h", hours(2));
  expect_duration("1d", hours(24));
}

TEST(DurationText, refuses_numbers_without_unit_and_the_ambiguous_m) {
  expect_error(parse_duration("5"), "has no unit");
  expect_error(parse_duration("5m"), "write min for minutes or ms for milliseconds");
  expect_error(parse_duration("5 weeks"), "unknown unit 'weeks'");
  expect_error(parse_duration("-5s"), "is negative");
  expect_error(parse_duration(""), "is not a duration");
  expect_error(parse_duration("s"), "such as 500ms");
}

TEST(DurationText, refuses_what_does_not_fit) {
  expect_duration("9223372036854775807ns", Duration::max());
  expect_error(parse_duration("9223372036854775808ns"), "is too long");
  expect_error(parse_duration("106752d"), "at most 106751d");
  expect_duration("106751d", hours(24) * 106751);
}

TEST(DurationText, reads_back_what_it_prints) {
  EXPECT_EQ(format_duration(seconds(90)), "90s");
  EXPECT_EQ(format_duration(seconds(120)), "2min");
  EXPECT_EQ(format_duration(milliseconds(1500)), "1500ms");
  EXPECT_EQ(format_duration(Duration{0}), "0s");
  EXPECT_EQ(format_duration(-seconds(2)), "-2s");
  EXPECT_EQ(format_duration(Duration::min()), "-9223372036854775808ns");
  std::mt19937_64 random(8);
  for (int i = 0; i < 10'000; ++i) {
    const Duration duration{static_cast<int64_t>(random() >> (1 + random() % 63))};
    const auto read = parse_duration(format_duration(duration));
    ASSERT_TRUE(read.ok()) << read.error();
    ASSERT_EQ(*read, duration);
  }
}

}  // namespace
}  // namespace dormouse::config
