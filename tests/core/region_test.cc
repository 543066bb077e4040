#include "core/region.h"

#include <gtest/gtest.h>

#include <thread>

namespace dormouse::region {
namespace {

TEST(Region, NestsAndEndsInOrder) {
  EXPECT_EQ(current(), kNoTag);
  EXPECT_TRUE(begin(1));
  EXPECT_TRUE(begin(2));
  EXPECT_EQ(current(), 2);
  EXPECT_TRUE(begin(kNoTag));
  EXPECT_EQ(current(), kNoTag) << "a region can say no tag";
  EXPECT_TRUE(end());
  EXPECT_EQ(current(), 2);
  EXPECT_TRUE(end());
  EXPECT_TRUE(end());
  EXPECT_EQ(current(), kNoTag);
}

TEST(Region, AnEndWithoutABeginDoesNothing) {
  EXPECT_FALSE(end());
  EXPECT_EQ(depth(), 0u);
}

TEST(Region, BelongsToItsThread) {
  begin(3);
  std::thread([] {
    EXPECT_EQ(current(), kNoTag);
    begin(4);  // and dies inside it
  }).join();
  EXPECT_EQ(current(), 3);
  end();
}

TEST(Region, TheProcessTagHoldsOutsideAllRegions) {
  set_process_tag(7);
  EXPECT_EQ(current(), 7);
  begin(kNoTag);
  EXPECT_EQ(current(), kNoTag);
  end();
  std::thread([] { EXPECT_EQ(current(), 7); }).join();
  set_process_tag(kNoTag);
}

TEST(Region, DeeperThanTheStackIsCountedSoThatEndsMatch) {
  for (std::size_t i = 0; i < kMaxDepth; ++i) EXPECT_TRUE(begin(static_cast<TagId>(i)));
  EXPECT_FALSE(begin(1000));
  EXPECT_EQ(current(), static_cast<TagId>(kMaxDepth - 1));
  EXPECT_EQ(depth(), kMaxDepth + 1);
  for (std::size_t i = 0; i < kMaxDepth + 1; ++i) EXPECT_TRUE(end());
  EXPECT_FALSE(end());
}

}  // namespace
}  // namespace dormouse::region
