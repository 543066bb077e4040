// PyTorch's allocator configuration (PYTORCH_CUDA_ALLOC_CONF and its kin) in both generations:
// what PyTorch makes of a text, and how to change one key of it. For the shim's view of PyTorch and
// for region rules that set keys.
//
// Generation 1 is PyTorch 2.4 to 2.9, whose parser is in libc10_cuda; generation 2 is 2.10 and
// later, whose parser is in libc10 and hands the text on to libc10_cuda's. Relied on: PyTorch's
// c10/core/AllocatorConfig.{h,cpp} and c10/cuda/CUDAAllocatorConfig.{h,cpp}, and for generation 2
// the behaviour of libc10.so 2.13.0 and 2.15.0, against which tests/config/alloc_conf_differential
// runs.
//
// Nothing here throws. All functions are safe from any thread on different objects; numbers with a
// fraction are read by strtod in the process's locale, as PyTorch reads them.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "config/environment.h"
#include "config/result.h"

namespace dormouse::config {

enum class Generation { kG1, kG2 };

/// How one PyTorch reads.
struct AllocDialect {
  Generation generation = Generation::kG2;
  /// The keys that it knows; another key is rejected. Nothing: other keys pass and are ignored, as
  /// in generation 2 while no device's parser is registered (a CPU build). A generation 2 that does
  /// not know large_segment_size_mb does not reset max_non_split_rounding_mb either.
  std::optional<std::set<std::string>> known_keys;
  /// Whether the keys of libc10_cuda are read and checked too.
  bool device_keys = false;

  /// Every key of 2.4 to 2.9. Earlier versions of these know fewer.
  static AllocDialect g1();
  /// libc10 alone, no device's parser registered.
  static AllocDialect g2_core();
  /// libc10 and libc10_cuda, with the keys of every version up to 2.15; of keys that 2.15 has added
  /// the value is not checked.
  static AllocDialect g2_cuda();
};

/// What PyTorch's configuration objects hold. Sizes are in bytes unless the name says otherwise.
struct AllocSettings {
  static constexpr uint64_t kUnlimited = UINT64_MAX;

  uint64_t large_segment_size = 20 << 20;
  uint64_t max_split_size = kUnlimited;
  uint64_t max_non_split_rounding_size = 20 << 20;
  std::array<uint64_t, 16> roundup_power2_divisions{};
  double garbage_collection_threshold = 0;
  bool expandable_segments = false;
  bool pinned_use_background_threads = false;
  uint64_t pinned_max_round_threshold = kUnlimited;
  uint64_t pinned_max_cached_size = kUnlimited;

  // Keys of libc10_cuda.
  std::string backend = "native";
  bool release_lock_on_cudamalloc = false;
  bool pinned_use_cuda_host_register = false;
  uint64_t pinned_num_register_threads = 1;
  uint64_t pinned_reserve_segment_size_mb = 0;
  bool graph_capture_record_stream_reuse = false;
  double per_process_memory_fraction = 1;
  bool pinned_free_catch_all = false;
  bool throw_on_cudamalloc_oom = false;

  bool operator==(const AllocSettings&) const = default;
};

/// Does to `settings` what PyTorch does when it parses `text`: some keys first go back to their
/// defaults (max_split_size_mb, roundup_power2_divisions, garbage_collection_threshold, and in
/// generation 2 max_non_split_rounding_mb), all others keep what an earlier text gave them.
/// Returns why PyTorch raises an error, or nothing if it takes the text. After an error `settings`
/// is what PyTorch is left with: what stood before the fault is set.
[[nodiscard]] std::optional<std::string> apply_alloc_conf(const AllocDialect& dialect,
                                                          std::string_view text,
                                                          AllocSettings& settings);

/// The text that brings a fresh configuration object of libc10 to `settings` in generation 2: what
/// a copy of an object that was changed several times has to be given. Keys at their defaults and
/// libc10_cuda's keys are left out; a rounding size below the large segment's size, which only a
/// text that failed half-way can leave behind, has no text and is left out too.
std::string alloc_conf_text(const AllocSettings& settings);

/// A configuration as text that can be changed key by key: what is not touched, known or not, stays
/// as it was written (but white space, which PyTorch drops).
class AllocConf {
 public:
  struct Entry {
    std::string key;
    std::string value;  // with the brackets of a list
  };

  /// Reads the form, not the meaning: values and keys need not be ones that PyTorch takes. Fails
  /// where PyTorch would find no key and value, with a message that says what is missing.
  static Result<AllocConf> read(Generation generation, std::string_view text);

  /// In the order of the text, duplicates included; the last one counts.
  std::vector<Entry> entries() const;
  std::optional<std::string> get(std::string_view key) const;

  /// Gives the last occurrence of `key` the value, or adds the key (at the end; in front of a text
  /// that ends with a word in the place of a comma). `key` is a word; `value` is a word or a list
  /// in brackets.
  void set(std::string_view key, std::string_view value);

  /// Removes every occurrence. Only in a text whose keys are all words is nothing else changed.
  void remove(std::string_view key);

  std::string print() const;

 private:
  // Positions in tokens_: key, separator, value [value, end), then a separator if there is one.
  struct Span {
    size_t key;
    size_t value;
    size_t end;
    bool separated;
  };

  std::optional<std::string> find_spans();

  Generation generation_ = Generation::kG2;
  std::vector<std::string> tokens_;
  std::vector<Span> spans_;
};

/// The variables that PyTorch looks for, in the order in which it looks; the first that is set
/// wins, even if it is empty.
const std::vector<std::string>& alloc_conf_variables(Generation generation);

struct AllocConfVariable {
  std::string name;
  std::string text;
};

/// The variable that wins, or nothing if none is set.
std::optional<AllocConfVariable> winning_alloc_conf(Generation generation, const Lookup& lookup);

}  // namespace dormouse::config
