// Runs our reader of PyTorch's allocator configuration (generation 2) against the real parser of an
// installed libc10.so over generated texts: same acceptance, same value of every field, after every
// text of a sequence. Then what the suspension of expandable segments relies on: the text that
// AllocConf gives with one key changed means the same to the real parser but for that key.
//
//   TEST_LIBC10=.../torch/lib/libc10.so   one or more, between colons; without it all is skipped
//   TEST_SEED=1 TEST_STRINGS=200000       what is generated
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <string>
#include <unordered_set>
#include <vector>

#include "config/alloc_conf.h"
#include "gtest/gtest.h"
#include "tests/config/alloc_conf_generator.h"

namespace dormouse::config {
namespace {

/// c10::CachingAllocator::AcceleratorAllocatorConfig of 2.13 to 2.15 as its public header lays it
/// out. The first test checks it against the library in hand by behaviour.
struct RealObject {
  std::atomic<size_t> large_segment_size;
  std::atomic<size_t> max_split_size;
  std::atomic<size_t> max_non_split_rounding_size;
  std::vector<size_t> roundup_power2_divisions;
  std::atomic<double> garbage_collection_threshold;
  std::atomic<bool> use_expandable_segments;
  std::atomic<bool> pinned_use_background_threads;
  size_t pinned_max_round_threshold;
  size_t pinned_max_cached_size;
  std::mutex last_allocator_settings_mutex;
  std::string last_allocator_settings;
};

constexpr char kClass[] = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig";

/// The functions of a libc10.so.
class RealLibrary {
 public:
  using Hook = std::function<void(const std::string&)>;

  explicit RealLibrary(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      error_ = dlerror();
      return;
    }
    find(library, "C1Ev", construct);
    find(library, "9parseArgsERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE", parse);
    find(library, "8instanceEv", instance);
    find(library, "19getConfigParserHookB5cxx11Ev", hook);
    find(library, "14getMutableKeysB5cxx11Ev", keys);
  }

  const std::string& error() const { return error_; }

  void (*construct)(void*) = nullptr;
  void (*parse)(void*, const std::string&) = nullptr;
  RealObject& (*instance)() = nullptr;
  Hook& (*hook)() = nullptr;
  std::unordered_set<std::string>& (*keys)() = nullptr;

 private:
  template <typename T>
  void find(void* library, const std::string& member, T& function) {
    function = reinterpret_cast<T>(dlsym(library, (kClass + member).c_str()));
    if (function == nullptr) error_ += kClass + member + " is not exported; ";
  }

  std::string error_;
};

/// A configuration object made by the real constructor.
class RealConfig {
 public:
  explicit RealConfig(const RealLibrary& library) : library_(library) {
    library_.construct(storage_);
  }
  ~RealConfig() { object().~RealObject(); }
  RealConfig(const RealConfig&) = delete;
  RealConfig& operator=(const RealConfig&) = delete;

  /// Whether the text is taken.
  bool parse(const std::string& text) {
    try {
      library_.parse(storage_, text);
      return true;
    } catch (...) {  // c10::Error, std::invalid_argument, std::out_of_range
      return false;
    }
  }

  AllocSettings settings() const { return settings_of(object()); }

  static AllocSettings settings_of(const RealObject& object) {
    AllocSettings settings;
    settings.large_segment_size = object.large_segment_size;
    settings.max_split_size = object.max_split_size;
    settings.max_non_split_rounding_size = object.max_non_split_rounding_size;
    for (size_t i = 0; i < settings.roundup_power2_divisions.size(); ++i) {
      settings.roundup_power2_divisions[i] = object.roundup_power2_divisions.at(i);
    }
    settings.garbage_collection_threshold = object.garbage_collection_threshold;
    settings.expandable_segments = object.use_expandable_segments;
    settings.pinned_use_background_threads = object.pinned_use_background_threads;
    settings.pinned_max_round_threshold = object.pinned_max_round_threshold;
    settings.pinned_max_cached_size = object.pinned_max_cached_size;
    return settings;
  }

 private:
  const RealObject& object() const {
    return *std::launder(reinterpret_cast<const RealObject*>(storage_));
  }
  RealObject& object() { return *std::launder(reinterpret_cast<RealObject*>(storage_)); }

  const RealLibrary& library_;
  alignas(64) unsigned char storage_[1024] = {};
};

std::string describe(const AllocSettings& settings) {
  std::string text = "large " + std::to_string(settings.large_segment_size) + " split " +
                     std::to_string(settings.max_split_size) + " rounding " +
                     std::to_string(settings.max_non_split_rounding_size) + " threshold " +
                     std::to_string(settings.garbage_collection_threshold) + " expandable " +
                     std::to_string(settings.expandable_segments) + " background " +
                     std::to_string(settings.pinned_use_background_threads) + " round " +
                     std::to_string(settings.pinned_max_round_threshold) + " cached " +
                     std::to_string(settings.pinned_max_cached_size) + " divisions";
  for (uint64_t division : settings.roundup_power2_divisions) {
    text += " " + std::to_string(division);
  }
  return text;
}

uint64_t number_from_environment(const char* name, uint64_t fallback) {
  const char* text = std::getenv(name);
  return text == nullptr ? fallback : std::strtoull(text, nullptr, 10);
}

/// An empty path where there is none.
std::vector<std::string> library_paths() {
  const char* text = std::getenv("TEST_LIBC10");
  std::vector<std::string> paths;
  std::istringstream list(text == nullptr ? "" : text);
  for (std::string path; std::getline(list, path, ':');) paths.push_back(path);
  return paths.empty() ? std::vector<std::string>{""} : paths;
}

class Differential : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (GetParam().empty()) GTEST_SKIP() << "TEST_LIBC10 names no libc10.so";
    library_ = std::make_unique<RealLibrary>(GetParam().c_str());
    ASSERT_EQ(library_->error(), "");
    // What a device's parser does when it registers; the real one then checks keys.
    library_->keys().insert({"backend", "release_lock_on_cudamalloc"});
    dialect_ = AllocDialect::g2_core();
    dialect_.known_keys.emplace();
    for (const std::string& key : library_->keys()) dialect_.known_keys->insert(key);
  }

  void TearDown() override {
    if (library_ != nullptr) library_->hook() = nullptr;
  }

  const AllocDialect& choose_dialect(bool device_registered) {
    library_->hook() = device_registered ? [](const std::string&) {} : RealLibrary::Hook();
    return device_registered ? dialect_ : core_;
  }

  std::unique_ptr<RealLibrary> library_;
  AllocDialect dialect_;
  const AllocDialect core_ = AllocDialect::g2_core();
};

INSTANTIATE_TEST_SUITE_P(Libc10, Differential, testing::ValuesIn(library_paths()));

TEST_P(Differential, the_objects_layout_is_the_known_one) {
  RealConfig real(*library_);
  EXPECT_EQ(describe(real.settings()), describe(AllocSettings()));
  ASSERT_TRUE(
      real.parse("large_segment_size_mb:30,max_split_size_mb:31,max_non_split_rounding_mb:32,"
                 "garbage_collection_threshold:0.25,roundup_power2_divisions:[1:2,2:4,>:8],"
                 "expandable_segments:True,pinned_use_background_threads:True,"
                 "pinned_max_round_threshold_mb:33,pinned_max_cached_size_mb:34"));
  AllocSettings expected;
  expected.large_segment_size = 30 << 20;
  expected.max_split_size = 31 << 20;
  expected.max_non_split_rounding_size = 32 << 20;
  expected.garbage_collection_threshold = 0.25;
  expected.roundup_power2_divisions.fill(8);
  expected.roundup_power2_divisions[0] = 2;
  expected.roundup_power2_divisions[1] = 4;
  expected.expandable_segments = true;
  expected.pinned_use_background_threads = true;
  expected.pinned_max_round_threshold = 33 << 20;
  expected.pinned_max_cached_size = 34 << 20;
  EXPECT_EQ(describe(real.settings()), describe(expected));
}

TEST_P(Differential, generated_texts_mean_the_same_to_both) {
  const uint64_t seed = number_from_environment("TEST_SEED", 20261124);
  const uint64_t strings = number_from_environment("TEST_STRINGS", 200'000);
  test::AllocConfGenerator generator(seed);
  uint64_t accepted = 0;
  uint64_t done = 0;
  while (done < strings) {
    const AllocDialect& dialect = choose_dialect(generator.once_in(2));
    RealConfig real(*library_);
    AllocSettings ours;
    std::string history;
    for (size_t length = 1 + generator.below(4); length > 0; --length, ++done) {
      const std::string text = generator.next();
      history += "\n  \"" + testing::PrintToString(text) + "\"";
      const bool real_takes = real.parse(text);
      const auto error = apply_alloc_conf(dialect, text, ours);
      accepted += real_takes ? 1 : 0;
      ASSERT_EQ(real_takes, !error.has_value()) << error.value_or("we take it") << history;
      ASSERT_EQ(describe(real.settings()), describe(ours)) << history;
      ASSERT_EQ(real.settings(), ours) << history;
    }
  }
  std::printf("seed %llu: %llu texts, %llu accepted\n", static_cast<unsigned long long>(seed),
              static_cast<unsigned long long>(done), static_cast<unsigned long long>(accepted));
  EXPECT_GT(accepted, done / 5) << "the generator makes too few valid texts to test values";
  EXPECT_LT(accepted, done * 4 / 5) << "the generator makes too few broken texts";
}

TEST_P(Differential, a_changed_key_is_all_that_a_change_changes) {
  const uint64_t seed = number_from_environment("TEST_SEED", 20261124) + 1;
  const uint64_t strings = number_from_environment("TEST_STRINGS", 200'000) / 2;
  test::AllocConfGenerator generator(seed);
  uint64_t changed = 0;
  for (uint64_t i = 0; i < strings; ++i) {
    const bool device_registered = generator.once_in(2);
    choose_dialect(device_registered);
    const std::string text = generator.next();
    RealConfig before(*library_);
    if (!before.parse(text)) continue;
    auto conf = AllocConf::read(Generation::kG2, text);
    ASSERT_TRUE(conf.ok()) << conf.error() << testing::PrintToString(text);
    AllocConf edited = *conf;

    RealConfig printed(*library_);
    ASSERT_TRUE(printed.parse(edited.print())) << testing::PrintToString(text);
    ASSERT_EQ(before.settings(), printed.settings()) << testing::PrintToString(text);

    edited.set("expandable_segments", "False");
    RealConfig after(*library_);
    ASSERT_TRUE(after.parse(edited.print())) << testing::PrintToString(text) << edited.print();
    AllocSettings expected = before.settings();
    expected.expandable_segments = false;
    ASSERT_EQ(describe(after.settings()), describe(expected))
        << testing::PrintToString(text) << " became " << edited.print();

    ++changed;
    if (!device_registered) continue;  // there keys may be marks, which remove() does not promise
    edited.remove("expandable_segments");
    RealConfig removed(*library_);
    ASSERT_TRUE(removed.parse(edited.print())) << testing::PrintToString(text) << edited.print();
    ASSERT_EQ(describe(removed.settings()), describe(expected))
        << testing::PrintToString(text) << " became " << edited.print();
  }
  std::printf("seed %llu: %llu accepted texts changed\n", static_cast<unsigned long long>(seed),
              static_cast<unsigned long long>(changed));
  EXPECT_GT(changed, strings / 5);
}

TEST_P(Differential, a_fresh_object_given_the_settings_text_is_a_copy) {
  test::AllocConfGenerator generator(number_from_environment("TEST_SEED", 20261124) + 2);
  const uint64_t strings = number_from_environment("TEST_STRINGS", 200'000) / 4;
  for (uint64_t i = 0; i < strings; ++i) {
    const AllocDialect& dialect = choose_dialect(generator.once_in(2));
    AllocSettings ours;
    bool all_taken = true;
    for (size_t length = 1 + generator.below(4); length > 0; --length) {
      all_taken &= !apply_alloc_conf(dialect, generator.next(), ours).has_value();
    }
    if (!all_taken) continue;
    RealConfig copy(*library_);
    const std::string text = alloc_conf_text(ours);
    ASSERT_TRUE(copy.parse(text)) << text;
    ASSERT_EQ(describe(copy.settings()), describe(ours)) << text;
  }
}

/// What the real instance() makes of an environment, in a process of its own: it reads it once.
bool real_instance_agrees(const RealLibrary& library, const std::vector<const char*>& values) {
  const pid_t child = fork();
  if (child == 0) {
    const auto& names = alloc_conf_variables(Generation::kG2);
    for (size_t i = 0; i < names.size(); ++i) {
      if (values[i] == nullptr) {
        unsetenv(names[i].c_str());
      } else {
        setenv(names[i].c_str(), values[i], 1);
      }
    }
    AllocSettings ours;
    const auto winner = winning_alloc_conf(Generation::kG2, ::getenv);
    const bool ok =
        !winner || !apply_alloc_conf(AllocDialect::g2_core(), winner->text, ours).has_value();
    const AllocSettings real = RealConfig::settings_of(library.instance());
    _exit(ok && real == ours ? 0 : 1);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST_P(Differential, the_same_environment_variable_wins) {
  const std::vector<std::vector<const char*>> choices = {
      {nullptr, "", "max_split_size_mb:100"},
      {nullptr, "", "max_split_size_mb:200"},
      {nullptr, "", "max_split_size_mb:300,expandable_segments:True"}};
  for (const char* cuda : choices[0]) {
    for (const char* hip : choices[1]) {
      for (const char* any : choices[2]) {
        EXPECT_TRUE(real_instance_agrees(*library_, {cuda, hip, any}))
            << (cuda ? cuda : "-") << " " << (hip ? hip : "-") << " " << (any ? any : "-");
      }
    }
  }
}

}  // namespace
}  // namespace dormouse::config
