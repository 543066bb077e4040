#include "config/alloc_conf.h"

#include <cerrno>
#include <map>

#include "gtest/gtest.h"
#include "tests/config/alloc_conf_generator.h"

namespace dormouse::config {
namespace {

constexpr uint64_t kMegabyte = 1 << 20;

/// Applies texts one after the other; each must be taken.
AllocSettings apply_all(const AllocDialect& dialect, const std::vector<std::string>& texts) {
  AllocSettings settings;
  for (const std::string& text : texts) {
    const auto error = apply_alloc_conf(dialect, text, settings);
    EXPECT_FALSE(error.has_value()) << text << ": " << *error;
  }
  return settings;
}

std::optional<std::string> error_of(const AllocDialect& dialect, const std::string& text) {
  AllocSettings settings;
  return apply_alloc_conf(dialect, text, settings);
}

void expect_error(const AllocDialect& dialect, const std::string& text, const std::string& part) {
  const auto error = error_of(dialect, text);
  ASSERT_TRUE(error.has_value()) << text;
  EXPECT_NE(error->find(part), std::string::npos) << text << ": " << *error;
}

const std::vector<AllocDialect>& both() {
  static const std::vector<AllocDialect> dialects = {AllocDialect::g1(), AllocDialect::g2_cuda()};
  return dialects;
}

TEST(AllocConf, both_generations_read_the_common_keys) {
  for (const AllocDialect& dialect : both()) {
    const AllocSettings settings =
        apply_all(dialect, {"max_split_size_mb:512, garbage_collection_threshold: 0.8,"
                            "roundup_power2_divisions:4,expandable_segments:True,"
                            "pinned_use_background_threads:True,pinned_num_register_threads:8,"
                            "release_lock_on_cudamalloc:True,pinned_use_cuda_host_register:True,"
                            "backend:cudaMallocAsync,max_non_split_rounding_mb:64"});
    EXPECT_EQ(settings.max_split_size, 512 * kMegabyte);
    EXPECT_EQ(settings.max_non_split_rounding_size, 64 * kMegabyte);
    EXPECT_EQ(settings.garbage_collection_threshold, 0.8);
    EXPECT_EQ(settings.roundup_power2_divisions[0], 4u);
    EXPECT_EQ(settings.roundup_power2_divisions[15], 4u);
    EXPECT_TRUE(settings.expandable_segments);
    EXPECT_TRUE(settings.pinned_use_background_threads);
    EXPECT_EQ(settings.pinned_num_register_threads, 8u);
    EXPECT_TRUE(settings.release_lock_on_cudamalloc);
    EXPECT_TRUE(settings.pinned_use_cuda_host_register);
    EXPECT_EQ(settings.backend, "cudaMallocAsync");
  }
}

TEST(AllocConf, each_text_resets_some_keys_and_leaves_others) {
  for (const AllocDialect& dialect : both()) {
    const AllocSettings settings =
        apply_all(dialect, {"max_split_size_mb:512,garbage_collection_threshold:0.8,"
                            "roundup_power2_divisions:4,expandable_segments:True,"
                            "pinned_use_background_threads:True",
                            ""});
    EXPECT_EQ(settings.max_split_size, AllocSettings::kUnlimited);
    EXPECT_EQ(settings.garbage_collection_threshold, 0);
    EXPECT_EQ(settings.roundup_power2_divisions[3], 0u);
    EXPECT_TRUE(settings.expandable_segments);
    EXPECT_TRUE(settings.pinned_use_background_threads);
  }
}

TEST(AllocConf, the_rounding_size_is_reset_by_the_second_generation_only) {
  const std::vector<std::string> texts = {"max_non_split_rounding_mb:64", ""};
  EXPECT_EQ(apply_all(AllocDialect::g1(), texts).max_non_split_rounding_size, 64 * kMegabyte);
  EXPECT_EQ(apply_all(AllocDialect::g2_cuda(), texts).max_non_split_rounding_size, 20 * kMegabyte);
}

TEST(AllocConf, the_last_of_two_equal_keys_counts) {
  for (const AllocDialect& dialect : both()) {
    EXPECT_FALSE(apply_all(dialect, {"expandable_segments:True,expandable_segments:False"})
                     .expandable_segments);
  }
}

TEST(AllocConf, switches_take_two_spellings_only) {
  for (const AllocDialect& dialect : both()) {
    for (const char* value : {"true", "1", "TRUE", "on", ""}) {
      EXPECT_TRUE(error_of(dialect, std::string("expandable_segments:") + value)) << value;
    }
    expect_error(dialect, "expandable_segments:true", "True or False");
  }
}

TEST(AllocConf, unknown_keys_are_refused_with_the_nearest_known_one) {
  for (const AllocDialect& dialect : both()) {
    expect_error(dialect, "expandable_segment:True", "did you mean expandable_segments?");
    expect_error(dialect, "Max_Split_Size_MB:512", "did you mean max_split_size_mb?");
    expect_error(dialect, "zzz:1", "'zzz' is not a key of this PyTorch");
  }
}

TEST(AllocConf, without_a_devices_parser_the_second_generation_ignores_unknown_keys) {
  EXPECT_TRUE(
      apply_all(AllocDialect::g2_core(), {"zzz:[1:2,x],expandable_segments:True,backend:whatever"})
          .expandable_segments);
  EXPECT_EQ(apply_all(AllocDialect::g2_core(), {"backend:whatever"}).backend, "native");
}

TEST(AllocConf, the_second_generation_takes_any_separator_and_drops_all_white_space) {
  const AllocDialect g2 = AllocDialect::g2_cuda();
  EXPECT_TRUE(apply_all(g2, {"expandable_segments,True"}).expandable_segments);
  EXPECT_TRUE(apply_all(g2, {"expand able_seg\tments:\nTr ue"}).expandable_segments);
  EXPECT_EQ(apply_all(g2, {"max_split_size_mb[100]expandable_segments[True"}).max_split_size,
            100 * kMegabyte);
  EXPECT_TRUE(error_of(AllocDialect::g1(), "expandable_segments,True"));
  EXPECT_TRUE(error_of(AllocDialect::g1(), "expandable_segments:\tTrue"));
  EXPECT_FALSE(error_of(AllocDialect::g1(), "expandable_seg ments : Tr ue").has_value());
}

TEST(AllocConf, a_trailing_comma_passes_and_a_leading_one_does_not) {
  for (const AllocDialect& dialect : both()) {
    EXPECT_FALSE(error_of(dialect, "expandable_segments:True,"));
    EXPECT_TRUE(error_of(dialect, ",expandable_segments:True"));
    EXPECT_TRUE(error_of(dialect, "expandable_segments:True,,max_split_size_mb:100"));
  }
}

TEST(AllocConf, missing_values_are_refused) {
  for (const AllocDialect& dialect : both()) {
    for (const char* text :
         {"max_split_size_mb", "max_split_size_mb:", "roundup_power2_divisions:[1",
          "roundup_power2_divisions:[1:", "garbage_collection_threshold:"}) {
      EXPECT_TRUE(error_of(dialect, text)) << text;
    }
  }
}

TEST(AllocConf, the_smallest_split_differs_by_one) {
  EXPECT_TRUE(error_of(AllocDialect::g1(), "max_split_size_mb:20"));
  EXPECT_FALSE(error_of(AllocDialect::g1(), "max_split_size_mb:21"));
  EXPECT_FALSE(error_of(AllocDialect::g2_cuda(), "max_split_size_mb:20"));
  EXPECT_TRUE(error_of(AllocDialect::g2_cuda(), "max_split_size_mb:19"));
}

TEST(AllocConf, the_large_segments_size_is_read_ahead_of_the_sizes_that_depend_on_it) {
  const AllocDialect g2 = AllocDialect::g2_cuda();
  const AllocSettings settings =
      apply_all(g2, {"max_split_size_mb:12,large_segment_size_mb:12", ""});
  EXPECT_EQ(settings.large_segment_size, 12 * kMegabyte) << "it stays";
  EXPECT_EQ(settings.max_non_split_rounding_size, 12 * kMegabyte);
  expect_error(g2, "max_split_size_mb:30,large_segment_size_mb:40", "from 40 up");
  expect_error(g2, "large_segment_size_mb:10", "from 11 up");
}

TEST(AllocConf, numbers_are_read_as_their_generation_reads_them) {
  const AllocDialect g2 = AllocDialect::g2_cuda();
  const uint64_t most = UINT64_MAX / kMegabyte * kMegabyte;
  EXPECT_EQ(apply_all(g2, {"max_split_size_mb:64MB"}).max_split_size, 64 * kMegabyte);
  EXPECT_EQ(apply_all(g2, {"max_split_size_mb:-1"}).max_split_size, most);
  EXPECT_EQ(apply_all(g2, {"max_split_size_mb:18446744073709551615"}).max_split_size, most);
  EXPECT_TRUE(error_of(g2, "max_split_size_mb:18446744073709551616"));
  EXPECT_TRUE(error_of(g2, "max_split_size_mb:0x40"));
  EXPECT_EQ(apply_all(AllocDialect::g1(), {"max_split_size_mb:-1"}).max_split_size, most);
  EXPECT_TRUE(error_of(AllocDialect::g1(), "max_split_size_mb:2147483648"));
  for (const AllocDialect& dialect : both()) {
    for (const char* value : {"0", "1", "1.0", "-0.1", "nan", "inf", "1e-400", "x"}) {
      EXPECT_TRUE(error_of(dialect, std::string("garbage_collection_threshold:") + value)) << value;
    }
    EXPECT_EQ(
        apply_all(dialect, {"garbage_collection_threshold:0x1p-1"}).garbage_collection_threshold,
        0.5);
  }
}

TEST(AllocConf, division_lists_fill_the_intervals_around_those_they_name) {
  const auto g2 =
      apply_all(AllocDialect::g2_cuda(), {"roundup_power2_divisions:[256:1,512:2,1024:4,>:8]"})
          .roundup_power2_divisions;
  for (size_t i = 0; i <= 8; ++i) EXPECT_EQ(g2[i], 1u);
  EXPECT_EQ(g2[9], 2u);
  EXPECT_EQ(g2[10], 4u);
  for (size_t i = 11; i < 16; ++i) EXPECT_EQ(g2[i], 8u);
  const auto g1 =
      apply_all(AllocDialect::g1(), {"roundup_power2_divisions:[256:1,512:2,1024:4,>:8]"})
          .roundup_power2_divisions;
  EXPECT_EQ(g1[9], 2u);
  EXPECT_EQ(g1[10], 8u) << "the first generation overwrites the last interval that was named";
}

TEST(AllocConf, division_lists_with_faults) {
  for (const AllocDialect& dialect : both()) {
    EXPECT_FALSE(error_of(dialect, "roundup_power2_divisions:[]"));
    EXPECT_FALSE(error_of(dialect, "roundup_power2_divisions:[256:0]"));
    EXPECT_FALSE(error_of(dialect, "roundup_power2_divisions:[256:1,]"));
    EXPECT_FALSE(error_of(dialect, "roundup_power2_divisions:[1048576:2]"));
    EXPECT_TRUE(error_of(dialect, "roundup_power2_divisions:[256:3]"));
    EXPECT_TRUE(error_of(dialect, "roundup_power2_divisions:[255:1]"));
    EXPECT_TRUE(error_of(dialect, "roundup_power2_divisions:[0:1]"));
    EXPECT_TRUE(error_of(dialect, "roundup_power2_divisions:0"));
    EXPECT_TRUE(error_of(dialect, "roundup_power2_divisions:[256:1"));
  }
  EXPECT_TRUE(error_of(AllocDialect::g2_cuda(), "roundup_power2_divisions:["));
  EXPECT_TRUE(error_of(AllocDialect::g2_cuda(), "roundup_power2_divisions:[256:1,"));
  EXPECT_FALSE(error_of(AllocDialect::g1(), "roundup_power2_divisions:["));
  EXPECT_FALSE(error_of(AllocDialect::g1(), "roundup_power2_divisions:[256:1,"));
}

TEST(AllocConf, device_keys_are_checked) {
  for (const AllocDialect& dialect : both()) {
    expect_error(dialect, "backend:cudamallocasync", "native or cudaMallocAsync");
    expect_error(dialect, "pinned_num_register_threads:3", "a power of two up to 128");
    expect_error(dialect, "pinned_num_register_threads:256", "a power of two up to 128");
    expect_error(dialect, "pinned_reserve_segment_size_mb:0", "from 1 up");
    expect_error(dialect, "release_lock_on_hipmalloc:1", "True or False");
  }
  const AllocDialect g2 = AllocDialect::g2_cuda();
  expect_error(g2, "per_process_memory_fraction:1.1", "a number from 0 to 1");
  EXPECT_EQ(apply_all(g2, {"per_process_memory_fraction:0"}).per_process_memory_fraction, 0);
  expect_error(AllocDialect::g1(), "per_process_memory_fraction:0.5", "is not a key");
}

TEST(AllocConf, a_dialect_with_fewer_keys_refuses_the_others) {
  AllocDialect old = AllocDialect::g1();
  old.known_keys->erase("pinned_use_background_threads");
  EXPECT_TRUE(error_of(old, "pinned_use_background_threads:True"));
  EXPECT_FALSE(error_of(AllocDialect::g1(), "pinned_use_background_threads:True"));
}

TEST(AllocConf, what_stood_before_a_fault_is_in_force) {
  for (const AllocDialect& dialect : both()) {
    AllocSettings settings = apply_all(dialect, {"max_split_size_mb:100"});
    EXPECT_TRUE(apply_alloc_conf(dialect, "expandable_segments:True,zzz:1,max_split_size_mb:200",
                                 settings));
    EXPECT_TRUE(settings.expandable_segments);
    EXPECT_EQ(settings.max_split_size, AllocSettings::kUnlimited);
  }
}

TEST(AllocConf, errno_is_left_alone) {
  errno = 42;
  EXPECT_TRUE(error_of(AllocDialect::g2_cuda(), "garbage_collection_threshold:1e-400"));
  EXPECT_EQ(errno, 42);
}

// Editing.

std::string set_false(Generation generation, const std::string& text) {
  auto conf = AllocConf::read(generation, text);
  if (!conf) return "error: " + conf.error();
  AllocConf edited = *conf;
  edited.set("expandable_segments", "False");
  return edited.print();
}

TEST(AllocConfEdit, one_key_changes_and_all_else_stays) {
  for (const Generation generation : {Generation::kG1, Generation::kG2}) {
    EXPECT_EQ(set_false(generation, ""), "expandable_segments:False");
    EXPECT_EQ(set_false(generation, "expandable_segments:True"), "expandable_segments:False");
    EXPECT_EQ(set_false(generation, "a_new_key:[1,x:2], expandable_segments: True,b:c"),
              "a_new_key:[1,x:2],expandable_segments:False,b:c");
    EXPECT_EQ(set_false(generation, "max_split_size_mb:512"),
              "max_split_size_mb:512,expandable_segments:False");
    EXPECT_EQ(set_false(generation, "max_split_size_mb:512,"),
              "max_split_size_mb:512,expandable_segments:False");
    EXPECT_EQ(set_false(generation, "roundup_power2_divisions:[256:1,>:4],x:1"),
              "roundup_power2_divisions:[256:1,>:4],x:1,expandable_segments:False");
  }
}

TEST(AllocConfEdit, of_two_equal_keys_the_last_one_is_changed) {
  EXPECT_EQ(set_false(Generation::kG2, "expandable_segments:False,expandable_segments:True,a:b"),
            "expandable_segments:False,expandable_segments:False,a:b");
}

TEST(AllocConfEdit, a_list_that_the_first_generation_takes_unclosed_is_closed) {
  EXPECT_EQ(set_false(Generation::kG1, "roundup_power2_divisions:[256:1,"),
            "roundup_power2_divisions:[256:1,],expandable_segments:False");
}

TEST(AllocConfEdit, a_word_in_the_place_of_a_comma_does_not_grow_into_the_key) {
  EXPECT_EQ(set_false(Generation::kG2, "roundup_power2_divisions:[1:2]foo"),
            "expandable_segments:False,roundup_power2_divisions:[1:2]foo");
  // Found by the differential test: the word is the value of a key that is read ahead of all.
  EXPECT_EQ(set_false(Generation::kG2, "x:]12,large_segment_size_mb:64"),
            "expandable_segments:False,x:]12,large_segment_size_mb:64");
}

TEST(AllocConfEdit, wrong_separators_of_the_second_generation_stay) {
  EXPECT_EQ(set_false(Generation::kG2, "expandable_segments,True:max_split_size_mb]64"),
            "expandable_segments,False:max_split_size_mb]64");
}

TEST(AllocConfEdit, texts_without_keys_and_values_are_refused) {
  for (const Generation generation : {Generation::kG1, Generation::kG2}) {
    for (const char* text : {"a", "a:", "a:[1", ","}) {
      EXPECT_FALSE(AllocConf::read(generation, text).ok()) << text;
    }
  }
  EXPECT_FALSE(AllocConf::read(Generation::kG1, "a,b").ok());
  EXPECT_TRUE(AllocConf::read(Generation::kG2, "a,b").ok());
  EXPECT_EQ(AllocConf::read(Generation::kG1, "a:").error(), "the value of 'a' is missing");
}

TEST(AllocConfEdit, entries_and_get_show_what_is_there) {
  const auto conf = AllocConf::read(Generation::kG2, "a:1,b:[x,y],a:2");
  ASSERT_TRUE(conf.ok());
  ASSERT_EQ(conf->entries().size(), 3u);
  EXPECT_EQ(conf->entries()[1].value, "[x,y]");
  EXPECT_EQ(conf->get("a"), "2");
  EXPECT_EQ(conf->get("c"), std::nullopt);
}

TEST(AllocConfEdit, remove_takes_every_occurrence) {
  const auto removed = [](const std::string& text) {
    AllocConf conf = *AllocConf::read(Generation::kG2, text);
    conf.remove("a");
    return conf.print();
  };
  EXPECT_EQ(removed("a:1"), "");
  EXPECT_EQ(removed("a:1,"), "");
  EXPECT_EQ(removed("a:1,a:2"), "");
  EXPECT_EQ(removed("a:1,b:2,a:3,c:[4],a:5"), "b:2,c:[4]");
  EXPECT_EQ(removed("b:2,a:3"), "b:2");
  EXPECT_EQ(removed("b:2"), "b:2");
}

/// Whatever PyTorch takes can be changed, and only the changed key changes.
void expect_edits_to_hold(AllocDialect dialect, const std::string& text) {
  AllocSettings before;
  if (apply_alloc_conf(dialect, text, before)) return;
  const std::string edited = set_false(dialect.generation, text);
  AllocSettings after;
  const auto error = apply_alloc_conf(dialect, edited, after);
  ASSERT_FALSE(error.has_value()) << text << " became " << edited << ": " << *error;
  before.expandable_segments = false;
  ASSERT_EQ(before, after) << text << " became " << edited;
}

TEST(AllocConfEdit, holds_for_generated_texts_in_every_dialect) {
  test::AllocConfGenerator generator(17);
  AllocDialect any_g1 = AllocDialect::g1();
  any_g1.known_keys.reset();
  for (int i = 0; i < 100'000; ++i) {
    const std::string text = generator.next();
    for (const AllocDialect& dialect :
         {AllocDialect::g1(), any_g1, AllocDialect::g2_core(), AllocDialect::g2_cuda()}) {
      expect_edits_to_hold(dialect, text);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(AllocConfText, brings_a_fresh_object_to_the_same_settings) {
  EXPECT_EQ(alloc_conf_text(AllocSettings()), "");
  AllocSettings settings;
  settings.expandable_segments = true;
  settings.garbage_collection_threshold = 0.1;
  settings.large_segment_size = 30 * kMegabyte;
  settings.max_non_split_rounding_size = 30 * kMegabyte;
  EXPECT_EQ(alloc_conf_text(settings),
            "large_segment_size_mb:30,garbage_collection_threshold:0.1,expandable_segments:True");
  test::AllocConfGenerator generator(19);
  for (int i = 0; i < 50'000; ++i) {
    AllocSettings made;
    if (apply_alloc_conf(AllocDialect::g2_core(), generator.next(), made)) continue;
    ASSERT_EQ(apply_all(AllocDialect::g2_core(), {alloc_conf_text(made)}), made);
  }
}

TEST(AllocConfVariable, each_generation_has_its_own_precedence) {
  std::map<std::string, std::string> variables;
  const auto lookup = [&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
  EXPECT_FALSE(winning_alloc_conf(Generation::kG2, lookup));
  variables["PYTORCH_ALLOC_CONF"] = "a:1";
  EXPECT_FALSE(winning_alloc_conf(Generation::kG1, lookup)) << "unknown to it";
  EXPECT_EQ(winning_alloc_conf(Generation::kG2, lookup)->text, "a:1");
  variables["PYTORCH_HIP_ALLOC_CONF"] = "a:2";
  EXPECT_EQ(winning_alloc_conf(Generation::kG2, lookup)->name, "PYTORCH_HIP_ALLOC_CONF");
  variables["PYTORCH_CUDA_ALLOC_CONF"] = "";
  EXPECT_EQ(winning_alloc_conf(Generation::kG2, lookup)->text, "") << "empty, it still wins";
  EXPECT_EQ(winning_alloc_conf(Generation::kG1, lookup)->name, "PYTORCH_CUDA_ALLOC_CONF");
}

}  // namespace
}  // namespace dormouse::config
