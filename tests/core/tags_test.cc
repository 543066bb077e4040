#include "core/tags.h"

#include <gtest/gtest.h>

namespace dormouse {
namespace {

TEST(Tags, TheSameNameWithAnotherPolicyIsAnotherTag) {
  TagTable tags;
  const TagId host = tags.intern("weights", Backup::kHost);
  const TagId none = tags.intern("weights", Backup::kNone);
  EXPECT_NE(host, none);
  EXPECT_EQ(tags.intern("weights", Backup::kNone), none);
  EXPECT_EQ(tags.intern("weights"), host) << "a bare name means the first";
  EXPECT_EQ(tags.names(), std::vector<std::string>{"weights"});
  EXPECT_EQ(tags.get(none).backup, Backup::kNone);
}

TEST(Tags, ANewBareNameKeepsItsContentOnTheHost) {
  TagTable tags;
  EXPECT_EQ(tags.get(tags.intern("x")).backup, Backup::kHost);
}

TEST(Tags, BadNamesAreNoTags) {
  TagTable tags;
  EXPECT_EQ(tags.intern("", Backup::kHost), kNoTag);
  EXPECT_EQ(tags.intern("with space", Backup::kHost), kNoTag);
  EXPECT_EQ(tags.intern(std::string(65, 'a'), Backup::kHost), kNoTag);
  EXPECT_FALSE(tags.known(""));
  EXPECT_TRUE(tags.get(99).name.empty());
}

}  // namespace
}  // namespace dormouse
