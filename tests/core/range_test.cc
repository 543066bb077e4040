// Lists of ranges: joined, subtracted, cut to whole units.
#include "core/range.h"

#include <gtest/gtest.h>

namespace dormouse {
namespace {

TEST(RangeTest, NeighboursAreJoined) {
  Ranges ranges;
  append({0, 512}, &ranges);
  append({512, 512}, &ranges);
  append({2048, 512}, &ranges);
  EXPECT_EQ(ranges, (Ranges{{0, 1024}, {2048, 512}}));
}

TEST(RangeTest, WhatIsSubtractedMayReachAcrossRangesAndLieBesideThem) {
  const Ranges ranges = {{0, 100}, {200, 100}, {400, 100}};
  EXPECT_EQ(subtract(ranges, {}), ranges);
  EXPECT_EQ(subtract(ranges, {{100, 100}, {300, 100}, {600, 5}}), ranges);
  EXPECT_EQ(subtract(ranges, {{50, 400}}), (Ranges{{0, 50}, {450, 50}}));
  EXPECT_EQ(subtract(ranges, {{0, 10}, {20, 10}, {290, 10}}),
            (Ranges{{10, 10}, {30, 70}, {200, 90}, {400, 100}}));
  EXPECT_EQ(subtract(ranges, {{0, 500}}), Ranges{});
}

TEST(RangeTest, OnlyWholeUnitsStayInside) {
  EXPECT_EQ(round_inward({1, 1535}, 512), (Range{512, 1024}));
  EXPECT_EQ(round_inward({1, 600}, 512), Range{});
  EXPECT_TRUE((Range{10, 5}.contains(14)));
  EXPECT_FALSE((Range{10, 5}.contains(15)));
  EXPECT_FALSE((Range{10, 5}.contains(9)));
}

}  // namespace
}  // namespace dormouse
