#include "config/text.h"

#include "gtest/gtest.h"

namespace dormouse::config {
namespace {

TEST(Text, quotes_for_messages_without_control_characters_or_endless_length) {
  EXPECT_EQ(in_quotes("a b"), "'a b'");
  EXPECT_EQ(in_quotes("a\n\x1b"), "'a\\x0a\\x1b'");
  EXPECT_EQ(in_quotes(std::string(1000, 'x')), "'" + std::string(60, 'x') + "...'");
}

TEST(Text, lists_words) {
  EXPECT_EQ(one_of({}), "");
  EXPECT_EQ(one_of({"a"}), "a");
  EXPECT_EQ(one_of({"a", "b"}), "a or b");
  EXPECT_EQ(one_of({"a", "b", "c"}), "a, b or c");
}

TEST(Text, measures_edits_whatever_the_case) {
  EXPECT_EQ(edit_distance("", ""), 0u);
  EXPECT_EQ(edit_distance("abc", ""), 3u);
  EXPECT_EQ(edit_distance("abc", "ABC"), 0u);
  EXPECT_EQ(edit_distance("abc", "acb"), 1u);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3u);
}

TEST(Text, suggests_only_what_is_near) {
  const std::vector<std::string> words = {"nvtx", "python", "process"};
  EXPECT_EQ(nearest("ntvx", words), "nvtx");
  EXPECT_EQ(nearest("proces", words), "process");
  EXPECT_EQ(nearest("elephant", words), "");
  EXPECT_EQ(nearest(std::string(100'000, 'x'), words), "");
}

TEST(Text, ListItemsAreWhatIsBetweenCommas) {
  const std::vector<std::string> two = {"a", "b"};
  EXPECT_EQ(list_items("a,b"), two);
  EXPECT_EQ(list_items(",a,,b,"), two);
  EXPECT_TRUE(list_items("").empty());
  EXPECT_TRUE(list_items(",").empty());
}

}  // namespace
}  // namespace dormouse::config
