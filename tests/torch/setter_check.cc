// PyTorch 2.4 to 2.9 under the preloaded library, on a real libc10_cuda: its settings are one
// object of the process, so that regions are counted. Built by run.sh against an installed or
// unpacked PyTorch with the form of std::string that it was built with (hence no GoogleTest), one
// case a process: setter_check NAME. Loads the simulated or real libcudart, and needs no GPU.
#include <c10/cuda/CUDAAllocatorConfig.h>
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <limits>
#include <string>
#include <thread>

namespace {

using Config = c10::cuda::CUDACachingAllocator::CUDAAllocatorConfig;

int failures = 0;

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::fprintf(stderr, "line %d: %s is false\n", __LINE__, #condition); \
      ++failures;                                                           \
    }                                                                       \
  } while (false)

template <typename Function>
Function library_function(const char* name) {
  auto function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  if (function == nullptr) {
    std::fprintf(stderr, "the library is not preloaded: %s is missing\n", name);
    std::exit(2);
  }
  return function;
}

void begin(const char* tag) {
  library_function<int (*)(const char*)>("dormouse_region_begin")(tag);
}
void begin_none() {
  library_function<int (*)()>("dormouse_region_begin_none")();
}
void end() {
  library_function<int (*)()>("dormouse_region_end")();
}

void set(const std::string& text) {
  c10::cuda::CUDACachingAllocator::setAllocatorSettings(text);
}
bool expandable() {
  return Config::expandable_segments();
}
size_t split_mb() {
  return Config::max_split_size() >> 20;
}

constexpr const char* kUsers =
    "max_split_size_mb:200,expandable_segments:True,garbage_collection_threshold:0.75";

void whole_configuration_is_written() {
  set(kUsers);
  CHECK(expandable());
  begin("weights");
  CHECK(!expandable());
  CHECK(split_mb() == 200);
  CHECK(Config::garbage_collection_threshold() == 0.75);
  end();
  CHECK(expandable());
  CHECK(split_mb() == 200);
  CHECK(Config::garbage_collection_threshold() == 0.75);
}

void the_environment_is_what_the_user_asked_for() {
  setenv("PYTORCH_CUDA_ALLOC_CONF", kUsers, 1);
  begin("weights");
  CHECK(!expandable());
  CHECK(split_mb() == 200);
  end();
  CHECK(expandable());
  CHECK(split_mb() == 200);
}

void regions_are_counted_over_all_threads() {
  set(kUsers);
  std::promise<void> begun, may_end;
  std::thread other([&] {
    begin("kv_cache");
    begun.set_value();
    may_end.get_future().wait();
    end();
  });
  begun.get_future().wait();
  begin("weights");
  begin("inner");
  end();
  CHECK(!expandable());
  end();
  CHECK(!expandable());
  may_end.set_value();
  other.join();
  CHECK(expandable());
}

void a_region_without_tag_lets_go() {
  set(kUsers);
  begin("weights");
  begin_none();
  CHECK(expandable());
  begin("kv_cache");
  CHECK(!expandable());
  end();
  CHECK(expandable());
  end();
  CHECK(!expandable());
  end();
  CHECK(expandable());
}

void the_last_word_is_the_programs() {
  set(kUsers);
  begin("weights");
  set("expandable_segments:True,max_split_size_mb:300");
  CHECK(!expandable());
  CHECK(split_mb() == 300);
  end();
  CHECK(expandable());
  CHECK(split_mb() == 300);
  begin("weights");
  set("expandable_segments:False,max_split_size_mb:400");
  end();
  CHECK(!expandable());
  CHECK(split_mb() == 400);
  begin("weights");
  set("expandable_segments:True");
  CHECK(!expandable());
  end();
  CHECK(expandable());
}

void a_text_without_the_key_keeps_what_was() {
  set("expandable_segments:True");
  set("max_split_size_mb:64");
  CHECK(expandable());
  begin("weights");
  CHECK(!expandable());
  CHECK(split_mb() == 64);
  set("max_split_size_mb:65");
  CHECK(!expandable());
  end();
  CHECK(expandable());
  CHECK(split_mb() == 65);
}

void nothing_is_written_where_nothing_is_to_be_suspended() {
  set("max_split_size_mb:64");
  begin("weights");
  CHECK(Config::last_allocator_settings() == "max_split_size_mb:64");
  end();
  CHECK(Config::last_allocator_settings() == "max_split_size_mb:64");
}

void a_thread_that_ends_inside_a_region_is_not_counted_any_more() {
  set(kUsers);
  std::thread([] {
    begin("weights");
    CHECK(!expandable());
  }).join();
  CHECK(expandable());
}

void a_rejected_text_raises_and_changes_nothing() {
  set(kUsers);
  begin("weights");
  bool raised = false;
  try {
    set("expandable_segments:maybe");
  } catch (const std::exception&) {
    raised = true;
  }
  CHECK(raised);
  CHECK(std::uncaught_exceptions() == 0);
  CHECK(!expandable());
  end();
  CHECK(expandable());
}

// What the library found is what the program calls.
void the_function_called_is_the_one_found() {
  void* library = dlopen("libc10_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  CHECK(library != nullptr);
  Dl_info stands_in{};
  CHECK(dladdr(reinterpret_cast<void*>(&c10::cuda::CUDACachingAllocator::setAllocatorSettings),
               &stands_in) != 0);
  CHECK(stands_in.dli_fname != nullptr && std::strstr(stands_in.dli_fname, "dormouse") != nullptr);
}

void many_threads_agree() {
  set(kUsers);
  std::thread threads[8];
  for (std::thread& thread : threads) {
    thread = std::thread([] {
      for (int i = 0; i < 1000; ++i) {
        begin("weights");
        if (expandable()) ++failures;
        end();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(expandable());
  CHECK(split_mb() == 200);
}

// run.sh starts this case with DORMOUSE_REGIONS=weights{max_split_size_mb:300}: api
void settings_of_a_region_hold_for_all_while_it_is_open() {
  set(kUsers);
  begin("kv_cache");
  CHECK(!expandable());
  CHECK(split_mb() == 200);
  std::promise<void> begun, may_end;
  std::thread other([&] {
    begin("weights");
    begun.set_value();
    may_end.get_future().wait();
    end();
  });
  begun.get_future().wait();
  CHECK(split_mb() == 300);
  CHECK(Config::garbage_collection_threshold() == 0.75);
  CHECK(!expandable());
  may_end.set_value();
  other.join();
  CHECK(split_mb() == 200);
  CHECK(!expandable());
  end();
  CHECK(expandable());
}

// run.sh starts this case with DORMOUSE_REGIONS=weights{max_split_size_mb:300}: api
void settings_of_a_region_hold_without_expandable_segments_too() {
  begin("weights");
  CHECK(split_mb() == 300);
  set("garbage_collection_threshold:0.5");
  CHECK(split_mb() == 300);
  CHECK(Config::garbage_collection_threshold() == 0.5);
  end();
  CHECK(Config::max_split_size() == std::numeric_limits<size_t>::max());
  CHECK(Config::garbage_collection_threshold() == 0.5);
  CHECK(!expandable());
}

// run.sh starts this case with
// DORMOUSE_REGIONS=a{max_split_size_mb:300}: api; b{max_split_size_mb:400}: api; c: api
void of_two_regions_with_settings_the_last_one_counts() {
  set(kUsers);
  begin("a");
  begin("b");
  CHECK(split_mb() == 400);
  end();
  CHECK(split_mb() == 300);
  begin("c");
  CHECK(split_mb() == 200);
  end();
  CHECK(split_mb() == 300);
  end();
  CHECK(split_mb() == 200);
  CHECK(expandable());
}

// What this version reads of the two keys that came after 2.4; nothing in one that has none.
template <typename C = Config>
size_t rounding_mb(size_t otherwise) {
  if constexpr (requires { C::max_non_split_rounding_size(); }) {
    return C::max_non_split_rounding_size() >> 20;
  }
  return otherwise;
}
template <typename C = Config>
bool background_threads(bool otherwise) {
  if constexpr (requires { C::pinned_use_background_threads(); }) {
    return C::pinned_use_background_threads();
  }
  return otherwise;
}

// How often the log says that this PyTorch does not know the key.
int said_of(const std::string& key) {
  std::FILE* file = std::fopen(std::getenv("DORMOUSE_LOG_FILE"), "r");
  CHECK(file != nullptr);
  int said = 0;
  char line[1024];
  while (file != nullptr && std::fgets(line, sizeof line, file) != nullptr) {
    said +=
        std::strstr(line, (key + " cannot be set for a region: this PyTorch").c_str()) != nullptr;
  }
  if (file != nullptr) std::fclose(file);
  return said;
}

// run.sh starts this case with DORMOUSE_REGIONS=unknown{large_segment_size_mb:32,
// max_non_split_rounding_mb:64,pinned_max_cached_size_mb:8,max_split_size_mb:300}: api;
// nothing{pinned_max_round_threshold_mb:8}: api
void a_key_that_this_version_does_not_know_is_left_out_alone() {
  const bool has_rounding = rounding_mb(0) == rounding_mb(1);
  set(std::string(kUsers) + (has_rounding ? ",max_non_split_rounding_mb:32" : ""));
  for (int round = 0; round < 2; ++round) {
    begin("unknown");
    CHECK(split_mb() == 300);
    CHECK(rounding_mb(64) == 64);
    CHECK(Config::garbage_collection_threshold() == 0.75);
    CHECK(!expandable());
    // Has no setting that this version knows: those of the other thread hold.
    std::thread([] {
      begin("nothing");
      CHECK(split_mb() == 300);
      end();
    }).join();
    end();
    CHECK(split_mb() == 200);
    CHECK(rounding_mb(32) == 32);
    CHECK(expandable());
  }
  CHECK(std::uncaught_exceptions() == 0);
  CHECK(said_of("large_segment_size_mb") == 1);
  CHECK(said_of("pinned_max_cached_size_mb") == 1);
  CHECK(said_of("pinned_max_round_threshold_mb") == 1);
  CHECK(said_of("max_non_split_rounding_mb") == (has_rounding ? 0 : 1));
}

// run.sh starts this case with DORMOUSE_REGIONS=weights{pinned_use_background_threads:True,
// max_split_size_mb:300}: api; other{max_split_size_mb:400}: api; plain: api
void pinned_memorys_background_thread_goes_back_to_what_the_user_has() {
  begin("weights");
  CHECK(background_threads(true));
  CHECK(split_mb() == 300);
  begin("other");
  CHECK(!background_threads(false));
  CHECK(split_mb() == 400);
  end();
  CHECK(background_threads(true));
  end();
  CHECK(!background_threads(false));
  const bool known = background_threads(true) == background_threads(false);
  CHECK(said_of("pinned_use_background_threads") == (known ? 0 : 1));
  set(kUsers);
  begin("weights");
  CHECK(background_threads(true));
  begin("plain");
  CHECK(!background_threads(false));
  CHECK(!expandable());
  end();
  set("max_split_size_mb:64");
  CHECK(background_threads(true));
  end();
  CHECK(!background_threads(false));
  CHECK(split_mb() == 64);
  if (!known) return;
  set("pinned_use_background_threads:True");
  begin("other");
  CHECK(background_threads(true));
  end();
  CHECK(background_threads(true));
}

// run.sh starts this case with DORMOUSE_REGIONS=weights: process
void a_tag_of_the_whole_process_suspends_from_the_first_use_of_cuda() {
  setenv("PYTORCH_CUDA_ALLOC_CONF", kUsers, 1);
  auto* init =
      reinterpret_cast<int (*)(unsigned)>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuInit"));
  CHECK(init != nullptr && init(0) == 0);
  CHECK(!expandable());
  CHECK(split_mb() == 200);
  std::thread([] { CHECK(!expandable()); }).join();
  set("expandable_segments:True,max_split_size_mb:77");
  CHECK(!expandable());
  CHECK(split_mb() == 77);
  begin("kv_cache");
  CHECK(!expandable());
  end();
  CHECK(!expandable());
}

// run.sh starts this case with DORMOUSE_REGIONS=weights: thread(loader*)
void a_thread_whose_name_fits_suspends_for_its_life() {
  set(kUsers);
  std::thread([] {
    CHECK(expandable());
    pthread_setname_np(pthread_self(), "loader 0");
    CHECK(!expandable());
    CHECK(split_mb() == 200);
  }).join();
  CHECK(expandable());
}

std::promise<void> initialising;

void begin_a_region_while_a_library_is_loaded() {
  initialising.set_value();
  // Meanwhile the other thread's first region with a key that has to be looked for begins.
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  begin("plain");
  set(kUsers);
  end();
}

void a_library_that_begins_a_region_as_it_loads_waits_for_nobody() {
  set(kUsers);
  alarm(60);  // two threads that wait for each other
  std::promise<void> warm;
  // Looked up here: dlsym would wait for the initialiser's end.
  const auto begin_now = library_function<int (*)(const char*)>("dormouse_region_begin");
  const auto end_now = library_function<int (*)()>("dormouse_region_end");
  std::thread other([&] {
    begin_now("plain");  // a thread's first region has the dynamic linker do something anyway
    end_now();
    warm.set_value();
    initialising.get_future().wait();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    begin_now("weights");
    CHECK(!expandable());
    end_now();
  });
  warm.get_future().wait();
  const char* plugin = std::getenv("SETTER_PLUGIN");
  if (plugin == nullptr || dlopen(plugin, RTLD_NOW) == nullptr) std::exit(2);
  other.join();
  CHECK(expandable());
}

struct Case {
  const char* name;
  void (*run)();
};

#define CASE(name) \
  { #name, &name }
constexpr Case kCases[] = {
    CASE(whole_configuration_is_written),
    CASE(the_environment_is_what_the_user_asked_for),
    CASE(regions_are_counted_over_all_threads),
    CASE(a_region_without_tag_lets_go),
    CASE(the_last_word_is_the_programs),
    CASE(a_text_without_the_key_keeps_what_was),
    CASE(nothing_is_written_where_nothing_is_to_be_suspended),
    CASE(a_thread_that_ends_inside_a_region_is_not_counted_any_more),
    CASE(a_rejected_text_raises_and_changes_nothing),
    CASE(the_function_called_is_the_one_found),
    CASE(many_threads_agree),
    CASE(settings_of_a_region_hold_for_all_while_it_is_open),
    CASE(settings_of_a_region_hold_without_expandable_segments_too),
    CASE(of_two_regions_with_settings_the_last_one_counts),
    CASE(a_key_that_this_version_does_not_know_is_left_out_alone),
    CASE(pinned_memorys_background_thread_goes_back_to_what_the_user_has),
    CASE(a_tag_of_the_whole_process_suspends_from_the_first_use_of_cuda),
    CASE(a_thread_whose_name_fits_suspends_for_its_life),
    CASE(a_library_that_begins_a_region_as_it_loads_waits_for_nobody),
};

}  // namespace

// run.sh makes a library whose initialiser calls this, under the dynamic linker's lock.
extern "C" __attribute__((visibility("default"))) void setter_check_initialiser() {
  begin_a_region_while_a_library_is_loaded();
}

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const Case& each : kCases) std::puts(each.name);
    return 0;
  }
  for (const Case& each : kCases) {
    if (std::strcmp(each.name, argv[1]) == 0) {
      each.run();
      return failures == 0 ? 0 : 1;
    }
  }
  return 2;
}
