// What threads see of PyTorch's allocator settings under the preloaded library, on a real libc10 of
// PyTorch 2.10 or later (its CPU build will do). Built and run by run.sh against an installed
// PyTorch, one process a case; regions are begun and ended through the C API.
#include <c10/core/AllocatorConfig.h>
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

namespace {

using Config = c10::CachingAllocator::AcceleratorAllocatorConfig;

template <typename Function>
Function library_function(const char* name) {
  auto function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  if (function == nullptr) {
    std::fprintf(stderr, "the library is not preloaded: %s is missing\n", name);
    std::exit(2);
  }
  return function;
}

class Region {
 public:
  explicit Region(const char* tag) {
    static const auto begin = library_function<int (*)(const char*)>("dormouse_region_begin");
    static const auto none = library_function<int (*)()>("dormouse_region_begin_none");
    tag == nullptr ? none() : begin(tag);
  }
  ~Region() {
    static const auto end = library_function<int (*)()>("dormouse_region_end");
    end();
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
};

constexpr const char* kNoTag = nullptr;

void set(const std::string& text) {
  c10::CachingAllocator::setAllocatorSettings(text);
}

bool expandable() {
  return Config::use_expandable_segments();
}

// Every other key of the object.
auto other_keys() {
  std::array<size_t, 18> divisions{};
  for (size_t i = 0; i < divisions.size(); ++i) {
    divisions[i] = Config::roundup_power2_divisions(size_t{1} << (19 + i));
  }
  return std::make_tuple(
      Config::large_segment_size(), Config::max_split_size(), Config::max_non_split_rounding_size(),
      Config::garbage_collection_threshold(), Config::pinned_use_background_threads(), divisions,
      Config::roundup_power2_divisions());
}

template <typename Function>
auto on_another_thread(Function function) {
  std::optional<decltype(function())> result;
  std::thread([&] { result = function(); }).join();
  return *result;
}

// 2.11 does not.
bool knows_keys() {
  return dlsym(dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD),
               "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig7getKeysB5cxx11Ev") != nullptr;
}

constexpr const char* kEverything =
    "expandable_segments:True,max_split_size_mb:200,garbage_collection_threshold:0.75,"
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8],max_non_split_rounding_mb:64,"
    "pinned_use_background_threads:True";

TEST(Accelerator, IsSuspendedInsideARegionAndOnThatThreadAlone) {
  set(kEverything);
  EXPECT_TRUE(expandable());
  {
    const Region region("weights");
    EXPECT_FALSE(expandable());
    EXPECT_TRUE(on_another_thread(expandable));
  }
  EXPECT_TRUE(expandable());
}

TEST(Accelerator, ReadsAllOtherKeysTheSameInsideAndOutside) {
  set(kEverything);
  const auto outside = other_keys();
  const Region region("weights");
  EXPECT_EQ(other_keys(), outside);
  EXPECT_EQ(Config::max_split_size(), size_t{200} << 20);
  EXPECT_EQ(Config::max_non_split_rounding_size(), size_t{64} << 20);
  EXPECT_EQ(on_another_thread(other_keys), outside);
}

TEST(Accelerator, FollowsTheEnvironmentThatItStartsWith) {
  // run.sh starts this case with PYTORCH_ALLOC_CONF=kEverything.
  const Region region("weights");
  EXPECT_FALSE(expandable());
  EXPECT_EQ(Config::max_split_size(), size_t{200} << 20);
  EXPECT_TRUE(on_another_thread(expandable));
  EXPECT_EQ(on_another_thread(other_keys), other_keys());
}

TEST(Accelerator, FollowsAChangeOfTheEnvironmentBeforeItsFirstUse) {
  setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:99", 1);
  const Region region("weights");
  EXPECT_FALSE(expandable());
  EXPECT_EQ(Config::max_split_size(), size_t{99} << 20);
  EXPECT_TRUE(on_another_thread(expandable));
}

TEST(Accelerator, KeepsKeysThatOnlyAnEarlierTextSet) {
  set("pinned_use_background_threads:True,expandable_segments:True");
  set("max_split_size_mb:64");  // resets neither
  EXPECT_TRUE(expandable());
  const auto outside = other_keys();
  const Region region("weights");
  EXPECT_FALSE(expandable());
  EXPECT_TRUE(Config::pinned_use_background_threads());
  EXPECT_EQ(other_keys(), outside);
}

TEST(Accelerator, AChangeInsideARegionReachesAllThreads) {
  set("expandable_segments:True");
  {
    const Region region("weights");
    set("expandable_segments:True,max_split_size_mb:512");
    EXPECT_FALSE(expandable());
    EXPECT_EQ(Config::max_split_size(), size_t{512} << 20);
    EXPECT_TRUE(on_another_thread(expandable));
    EXPECT_EQ(on_another_thread(Config::max_split_size), size_t{512} << 20);
  }
  EXPECT_TRUE(expandable());
  EXPECT_EQ(Config::max_split_size(), size_t{512} << 20);
}

TEST(Accelerator, TheLastWordIsTheUsers) {
  set("expandable_segments:True");
  {
    const Region region("weights");
    set("expandable_segments:False");
    EXPECT_FALSE(on_another_thread(expandable));
  }
  EXPECT_FALSE(expandable());
  {
    const Region region("weights");
    set("expandable_segments:True");
    EXPECT_FALSE(expandable());
  }
  EXPECT_TRUE(expandable());
}

// What a program reads inside a region is not what it asked for; writing it back changes nothing.
TEST(Accelerator, SettingsReadInsideARegionCanBeWrittenBack) {
  set("max_split_size_mb:64,expandable_segments:True,garbage_collection_threshold:0.5");
  {
    const Region region("weights");
    set(c10::CachingAllocator::getAllocatorSettings() + ",roundup_power2_divisions:4");
    EXPECT_FALSE(expandable());
    EXPECT_TRUE(on_another_thread(expandable));
  }
  EXPECT_TRUE(expandable());
  EXPECT_EQ(Config::max_split_size(), size_t{64} << 20);
  EXPECT_EQ(Config::garbage_collection_threshold(), 0.5);
  EXPECT_EQ(Config::roundup_power2_divisions(size_t{100} << 20), 4U);
}

TEST(Accelerator, OfNestedRegionsTheInnermostDecides) {
  set(kEverything);
  const Region weights("weights");
  {
    const Region none(kNoTag);
    EXPECT_TRUE(expandable());
    {
      const Region cache("kv_cache");
      EXPECT_FALSE(expandable());
    }
    EXPECT_TRUE(expandable());
  }
  EXPECT_FALSE(expandable());
}

TEST(Accelerator, ARegionThatExcludesMemoryChangesNothing) {
  set(kEverything);
  const Region none(kNoTag);
  EXPECT_TRUE(expandable());
}

TEST(Accelerator, AThreadThatEndsInsideARegionLeavesNoTrace) {
  set(kEverything);
  for (int i = 0; i < 100; ++i) {
    std::thread([] {
      new Region("weights");  // never ended
      EXPECT_FALSE(expandable());
    }).join();
    EXPECT_TRUE(expandable());
    EXPECT_TRUE(on_another_thread(expandable));
  }
}

TEST(Accelerator, ARejectedTextRaisesAsWithoutTheLibrary) {
  set(kEverything);
  EXPECT_ANY_THROW(set("expandable_segments:true"));
  EXPECT_EQ(std::uncaught_exceptions(), 0);
  const Region region("weights");
  EXPECT_ANY_THROW(set("max_split_size_mb:1"));
  EXPECT_FALSE(expandable());
  EXPECT_TRUE(on_another_thread(expandable));
}

// PyTorch has taken what stands before the fault.
TEST(Accelerator, AfterARejectedTextBothSeeTheSame) {
  set(kEverything);
  const Region region("weights");
  EXPECT_ANY_THROW(set("max_split_size_mb:77,garbage_collection_threshold:7"));
  EXPECT_EQ(on_another_thread(Config::max_split_size), size_t{77} << 20);
  EXPECT_EQ(other_keys(), on_another_thread(other_keys));
  EXPECT_FALSE(expandable());
  set("max_split_size_mb:78");
  EXPECT_EQ(other_keys(), on_another_thread(other_keys));
  EXPECT_EQ(Config::max_split_size(), size_t{78} << 20);
}

// Which keys there are differs between PyTorch's versions; 2.15 has two more than 2.14.
TEST(Accelerator, AfterARejectedTextWithAKeyThatOnlyPyTorchKnowsBothSeeTheSame) {
  Config::registerDeviceConfigParserHook([](const std::string&) {}, {"a_key_of_the_device"});
  if (!knows_keys()) GTEST_SKIP() << "this PyTorch does not tell its keys";
  set(kEverything);
  EXPECT_ANY_THROW(
      set("a_key_of_the_device:[a:1,b:2],max_split_size_mb:77,garbage_collection_threshold:7"));
  const Region region("weights");
  EXPECT_EQ(on_another_thread(Config::max_split_size), size_t{77} << 20);
  EXPECT_EQ(other_keys(), on_another_thread(other_keys));
  EXPECT_ANY_THROW(set("max_split_size_mb:78,nobodys_key:1,garbage_collection_threshold:0.5"));
  EXPECT_EQ(on_another_thread(Config::max_split_size), size_t{78} << 20);
  EXPECT_EQ(other_keys(), on_another_thread(other_keys));
  EXPECT_FALSE(expandable());
}

// A CPU build.
TEST(Accelerator, AfterARejectedTextWithAKeyThatNobodyKnowsBothSeeTheSame) {
  if (!knows_keys()) GTEST_SKIP() << "this PyTorch does not tell its keys";
  set(kEverything);
  EXPECT_ANY_THROW(set("nobodys_key:1,max_split_size_mb:77,garbage_collection_threshold:7"));
  const Region region("weights");
  EXPECT_EQ(on_another_thread(Config::max_split_size), size_t{77} << 20);
  EXPECT_EQ(other_keys(), on_another_thread(other_keys));
}

TEST(Accelerator, AMalformedEnvironmentRaisesAtFirstUseAndCanBeMended) {
  setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:88,expandable_segments:1", 1);
  const Region region("weights");
  EXPECT_ANY_THROW(expandable());
  EXPECT_ANY_THROW(expandable());
  setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:89", 1);
  EXPECT_FALSE(expandable());
  EXPECT_TRUE(on_another_thread(expandable));
  EXPECT_EQ(Config::max_split_size(), size_t{89} << 20);
  EXPECT_EQ(other_keys(), on_another_thread(other_keys));
}

// run.sh starts this case with DORMOUSE_REGIONS=weights{max_split_size_mb:300}: api
TEST(Accelerator, ARegionCanHaveSettingsOfItsOwn) {
  set(kEverything);
  {
    const Region region("weights");
    EXPECT_EQ(Config::max_split_size(), size_t{300} << 20);
    EXPECT_EQ(Config::garbage_collection_threshold(), 0.75);
    EXPECT_EQ(on_another_thread(Config::max_split_size), size_t{200} << 20);
    const Region cache("kv_cache");
    EXPECT_EQ(Config::max_split_size(), size_t{200} << 20);
    EXPECT_FALSE(expandable());
  }
  EXPECT_EQ(Config::max_split_size(), size_t{200} << 20);
  const Region region("weights");
  set("expandable_segments:True,garbage_collection_threshold:0.25");
  EXPECT_EQ(Config::max_split_size(), size_t{300} << 20);
  EXPECT_EQ(Config::garbage_collection_threshold(), 0.25);
}

// run.sh starts this case with DORMOUSE_REGIONS=weights{max_split_size_mb:300}: api
TEST(Accelerator, SettingsOfARegionThatPyTorchWouldRejectAreLeftOut) {
  set("expandable_segments:True");
  try {
    set("expandable_segments:True,large_segment_size_mb:1024");
  } catch (const std::exception&) {
    GTEST_SKIP() << "this PyTorch has no key that could stand against it";
  }
  const Region region("weights");
  EXPECT_FALSE(expandable());
  EXPECT_EQ(Config::large_segment_size(), size_t{1024} << 20);
  set("expandable_segments:True,large_segment_size_mb:64");
  EXPECT_EQ(Config::max_split_size(), size_t{300} << 20);
}

// --- Every key that a region can set. run.sh starts these cases with the table's values in the
// regions "all" and "none".

constexpr double kUnlimited = static_cast<double>(SIZE_MAX);
constexpr size_t kMiB = size_t{1} << 20;

double mebibytes(size_t bytes) {
  return bytes == SIZE_MAX ? kUnlimited : static_cast<double>(bytes) / kMiB;
}

// What a thread reads of each; nothing where this PyTorch has no such key.
template <typename C = Config>
std::optional<double> read_key(const std::string& key) {
  if (key == "garbage_collection_threshold") return C::garbage_collection_threshold();
  if (key == "max_non_split_rounding_mb") return mebibytes(C::max_non_split_rounding_size());
  if (key == "max_split_size_mb") return mebibytes(C::max_split_size());
  if (key == "pinned_use_background_threads") return C::pinned_use_background_threads();
  if (key == "roundup_power2_divisions") return C::roundup_power2_divisions(100 * kMiB);
  if constexpr (requires { C::large_segment_size(); }) {
    if (key == "large_segment_size_mb") return mebibytes(C::large_segment_size());
  }
  if constexpr (requires { C::pinned_max_cached_size(); }) {
    if (key == "pinned_max_cached_size_mb") return mebibytes(C::pinned_max_cached_size());
    if (key == "pinned_max_round_threshold_mb") return mebibytes(C::pinned_max_round_threshold());
  }
  return std::nullopt;
}

struct Key {
  const char* name;
  double without;     // what PyTorch has where nobody says anything
  double region;      // in the region "all"
  const char* users;  // what the user asks for, and then changes it to
  const char* changed;
};
constexpr Key kKeys[] = {
    {"garbage_collection_threshold", 0, 0.25, "0.75", "0.5"},
    {"large_segment_size_mb", 20, 32, "64", "48"},
    {"max_non_split_rounding_mb", 20, 128, "256", "512"},
    {"max_split_size_mb", kUnlimited, 300, "200", "400"},
    {"pinned_max_cached_size_mb", kUnlimited, 8, "16", "32"},
    {"pinned_max_round_threshold_mb", kUnlimited, 4, "64", "128"},
    {"pinned_use_background_threads", 0, 1, "False", "True"},
    {"roundup_power2_divisions", 0, 4, "8", "2"},
};

double number(const std::string& text) {
  return text == "True" || text == "False" ? text == "True" : std::stod(text);
}

// A text with one of the two for every key that this PyTorch has.
std::string text_of(const char* Key::*value) {
  std::string text = "expandable_segments:True";
  for (const Key& key : kKeys) {
    if (read_key(key.name)) text += std::string(",") + key.name + ":" + key.*value;
  }
  return text;
}

std::string logged() {
  std::ostringstream text;
  text << std::ifstream(std::getenv("DORMOUSE_LOG_FILE")).rdbuf();
  return text.str();
}

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++found;
  return found;
}

// The thread inside reads the region's values, one outside the user's. `value` is what the user
// has, null: said nothing.
void expect_each_sees_its_own(const char* Key::*value) {
  for (const Key& key : kKeys) {
    const auto outside = on_another_thread([&] { return read_key(key.name); });
    if (!outside) continue;
    EXPECT_EQ(*outside, value == nullptr ? key.without : number(key.*value)) << key.name;
    EXPECT_EQ(*read_key(key.name), key.region) << key.name << " inside";
  }
  EXPECT_FALSE(expandable());
}

void expect_the_users(const char* Key::*value) {
  for (const Key& key : kKeys) {
    const auto read = read_key(key.name);
    if (read) EXPECT_EQ(*read, value == nullptr ? key.without : number(key.*value)) << key.name;
  }
}

// TEST_REGION_KEYS has the keys of docs/regions.md, which tests/config holds to be those of the
// reader.
TEST(Accelerator, EveryKeyThatARegionCanSetIsTested) {
  std::istringstream keys(std::getenv("TEST_REGION_KEYS"));
  size_t known = 0;
  for (std::string name; keys >> name; ++known) {
    EXPECT_TRUE(std::any_of(std::begin(kKeys), std::end(kKeys), [&](const Key& key) {
      return key.name == name;
    })) << name;
  }
  EXPECT_EQ(known, std::size(kKeys));
}

// With a parser of a device, as every CUDA build has one, PyTorch raises at keys that it does not
// know. One that no header names is one that libc10 does not have.
TEST(Accelerator, EverySettingOfARegionIsReadOnItsThreadAlone) {
  Config::registerDeviceConfigParserHook([](const std::string&) {}, {"a_key_of_the_device"});
  expect_the_users(nullptr);
  {
    const Region region("all");
    expect_each_sees_its_own(nullptr);
    set(text_of(&Key::users));
    expect_each_sees_its_own(&Key::users);
  }
  expect_the_users(&Key::users);
  {
    const Region region("all");
    expect_each_sees_its_own(&Key::users);
    const Region none("none");
    EXPECT_FALSE(Config::pinned_use_background_threads());
    EXPECT_EQ(Config::max_split_size(), size_t{200} << 20);
  }
  set(text_of(&Key::changed));
  expect_the_users(&Key::changed);
  {
    const Region region("all");
    expect_each_sees_its_own(&Key::changed);
    const Region none("none");
    EXPECT_FALSE(Config::pinned_use_background_threads()) << "the user has it on by now";
    EXPECT_TRUE(on_another_thread(Config::pinned_use_background_threads));
  }
  expect_the_users(&Key::changed);
  EXPECT_TRUE(expandable());
  EXPECT_EQ(std::uncaught_exceptions(), 0);
  size_t unknown = 0;
  for (const Key& key : kKeys) {
    const size_t said = count(logged(), std::string(key.name) + " cannot be set for a region: " +
                                            "this PyTorch does not know it.");
    EXPECT_EQ(said, read_key(key.name) ? 0u : 1u) << key.name;
    unknown += said;
  }
  EXPECT_EQ(count(logged(), "PyTorch"), unknown) << logged();
}

// PyTorch 2.13 hands out cached blocks of pinned memory without asking for their size.
TEST(Accelerator, UnroundedPinnedBlocksNeedAPyTorchThatLooksAtTheirSize) {
  void* library = dlopen("libtorch_cpu.so", RTLD_NOW);
  if (library == nullptr) GTEST_SKIP() << "no libtorch_cpu that loads alone: " << dlerror();
  if (!read_key("pinned_max_cached_size_mb")) GTEST_SKIP() << "this PyTorch has no such keys";
  const auto version = reinterpret_cast<uint64_t (*)()>(dlsym(library, "aoti_torch_abi_version"));
  ASSERT_NE(version, nullptr);
  const bool looks = version() >> 48 >= (2 << 8 | 14);
  const Region region("all");
  for (const Key& key : kKeys) {
    const bool left_out = !looks && std::string(key.name).starts_with("pinned_max_");
    const auto read = read_key(key.name);
    if (read) EXPECT_EQ(*read, left_out ? key.without : key.region) << key.name;
    EXPECT_EQ(count(logged(), std::string(key.name) + " cannot be set for a region: "),
              left_out ? 1u : 0u)
        << logged();
  }
  EXPECT_FALSE(expandable());
  set("expandable_segments:True,max_split_size_mb:99");
  EXPECT_EQ(Config::max_split_size(), size_t{300} << 20);
  EXPECT_EQ(count(logged(), " cannot be set for a region: "), looks ? 0u : 2u) << logged();
}

// run.sh starts this case with DORMOUSE_REGIONS=weights: process
TEST(Accelerator, ATagOfTheWholeProcessSuspendsAllThreads) {
  set(kEverything);
  EXPECT_FALSE(expandable());
  EXPECT_FALSE(on_another_thread(expandable));
  EXPECT_EQ(Config::max_split_size(), size_t{200} << 20);
  const Region none(kNoTag);
  EXPECT_TRUE(expandable());
  EXPECT_FALSE(on_another_thread(expandable));
}

// Half of the threads inside, half outside, settings changed all the while by a ninth. They go on
// until that one has had its turns.
TEST(Accelerator, EightThreadsSeeWhatIsTheirsOverTenThousandRounds) {
  constexpr int kRounds = 10000;
  constexpr int kChanges = 11;
  set("expandable_segments:True,max_split_size_mb:100");
  std::atomic<int> running{8};
  std::atomic<int> wrong{0};
  std::atomic<int> changes{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kRounds || changes < kChanges; ++i) {
        if (t % 2 == 0) {
          const Region region(i % 3 == 0 ? "kv_cache" : "weights");
          if (expandable()) ++wrong;
          if (i % 5 == 0) {
            const Region none(kNoTag);
            if (!expandable()) ++wrong;
          }
          if (expandable()) ++wrong;
        } else if (!expandable()) {
          ++wrong;
        }
        if (!Config::pinned_use_background_threads() && running > 8) ++wrong;
      }
      --running;
    });
  }
  while (running > 0) {
    set("expandable_segments:True,max_split_size_mb:" + std::to_string(100 + (changes + 1) % 50));
    ++changes;
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(expandable());
  EXPECT_EQ(Config::max_split_size(), size_t(100 + changes % 50) << 20);
}

// What a look at the settings costs outside regions: the price of one allocation's reads is ten.
TEST(Accelerator, ALookOutsideRegionsCostsAtMostTwentyNanoseconds) {
  set(kEverything);
  const auto real = reinterpret_cast<void* (*)()>(
      dlsym(dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD),
            "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig8instanceEv"));
  ASSERT_NE(real, nullptr);
  const auto nanoseconds = [](auto function) {
    constexpr int kCalls = 1000000;
    double best = 1e9;
    for (int repeat = 0; repeat < 5; ++repeat) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < kCalls; ++i) {
        auto* volatile seen = function();
        (void)seen;
      }
      const std::chrono::duration<double, std::nano> time =
          std::chrono::steady_clock::now() - begin;
      best = std::min(best, time.count() / kCalls);
    }
    return best;
  };
  const double with = nanoseconds([] { return static_cast<void*>(&Config::instance()); });
  const double without = nanoseconds(real);
  RecordProperty("nanoseconds_with", std::to_string(with));
  std::printf("a look at the settings: %.1f ns, PyTorch's own %.1f ns\n", with, without);
  EXPECT_LE(with - without, 20);
}

}  // namespace
