// Two copies of libc10 in one process, under the preloaded library. Run by run.sh, one process a
// case; COPIES names the files, separated by colons.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

namespace {

template <typename Function>
Function function_of(void* handle, const char* name) {
  auto function = reinterpret_cast<Function>(dlsym(handle, name));
  EXPECT_NE(function, nullptr) << name;
  return function;
}

struct Copy {
  explicit Copy(const std::string& file) : handle(dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    EXPECT_NE(handle, nullptr) << dlerror();
  }
  void* handle;
  long (*seen)() = function_of<long (*)()>(handle, "copy_seen");
  bool (*expandable)() = function_of<bool (*)()>(handle, "expandable_seen");
  long (*parse)(const char*) = function_of<long (*)(const char*)>(handle, "texts_parsed");
};

class Copies : public testing::Test {
 protected:
  const std::string files = std::getenv("COPIES");
  Copy first{files.substr(0, files.find(':'))};
  Copy second{files.substr(files.find(':') + 1)};
  int (*begin)(const char*) = function_of<int (*)(const char*)>(nullptr, "dormouse_region_begin");
  int (*end)() = function_of<int (*)()>(nullptr, "dormouse_region_end");
};

using SwitchedOff = Copies;

TEST_F(Copies, EachSeesItsOwnSettings) {
  EXPECT_EQ(second.seen(), 2);
  EXPECT_EQ(first.seen(), 1);
  EXPECT_EQ(second.seen(), 2);
  EXPECT_EQ(first.parse("expandable_segments:False"), 1);
  EXPECT_EQ(second.parse("expandable_segments:True"), 1);
  EXPECT_FALSE(first.expandable());
  EXPECT_TRUE(second.expandable());
}

TEST_F(Copies, TheFirstThatIsUsedIsTheOneThatRegionsSuspend) {
  EXPECT_TRUE(second.expandable());
  EXPECT_TRUE(first.expandable());
  begin("weights");
  EXPECT_FALSE(second.expandable());
  EXPECT_EQ(second.seen(), 2);
  EXPECT_TRUE(first.expandable());
  EXPECT_EQ(first.seen(), 1);
  end();
  EXPECT_TRUE(second.expandable());
}

TEST_F(SwitchedOff, EachSeesItsOwnSettings) {
  EXPECT_EQ(first.seen(), 1);
  EXPECT_EQ(second.seen(), 2);
  begin("weights");
  EXPECT_TRUE(first.expandable());
  EXPECT_TRUE(second.expandable());
  end();
  EXPECT_EQ(first.parse("expandable_segments:False"), 1);
  EXPECT_EQ(second.parse("expandable_segments:True"), 1);
  EXPECT_FALSE(first.expandable());
  EXPECT_TRUE(second.expandable());
}

}  // namespace
