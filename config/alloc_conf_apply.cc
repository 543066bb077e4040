// What PyTorch makes of a configuration; see alloc_conf.h. The two parsers follow PyTorch's token
// by token, faults included, because a text that works by accident there has to work here.
#include <bit>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstdlib>

#include "config/alloc_conf.h"
#include "config/alloc_conf_tokens.h"
#include "config/text.h"

namespace dormouse::config {

namespace {

using namespace alloc_conf;

constexpr uint64_t kMegabyte = uint64_t{1} << 20;
constexpr uint64_t kMostMegabytes = UINT64_MAX / kMegabyte;
constexpr uint64_t kG1SmallestSplit = 21;       // G1 takes sizes over 20 only
constexpr uint64_t kSmallestLargeSegment = 11;  // over 10
constexpr uint64_t kMostRegisterThreads = 128;

std::set<std::string> g1_keys() {
  return {
      "backend",
      "expandable_segments",
      "garbage_collection_threshold",
      "graph_capture_record_stream_reuse",
      "max_non_split_rounding_mb",
      "max_split_size_mb",
      "pinned_num_register_threads",
      "pinned_reserve_segment_size_mb",
      "pinned_use_background_threads",
      "pinned_use_cuda_host_register",
      "pinned_use_hip_host_register",
      "release_lock_on_cudamalloc",
      "release_lock_on_hipmalloc",
      "roundup_power2_divisions",
  };
}

std::set<std::string> g2_cuda_keys() {
  return {
      "backend",
      "expandable_segments",
      "expandable_segments_reserve",
      "expandable_segments_reserve_by_class",
      "garbage_collection_threshold",
      "graph_capture_record_stream_reuse",
      "large_segment_size_mb",
      "max_non_split_rounding_mb",
      "max_split_size_mb",
      "per_process_memory_fraction",
      "pinned_free_catch_all",
      "pinned_max_cached_size_mb",
      "pinned_max_round_threshold_mb",
      "pinned_num_register_threads",
      "pinned_reserve_segment_size_mb",
      "pinned_use_background_threads",
      "pinned_use_cuda_host_register",
      "pinned_use_hip_host_register",
      "release_lock_on_cudamalloc",
      "release_lock_on_hipmalloc",
      "roundup_power2_divisions",
      "throw_on_cudamalloc_oom",
  };
}

/// std::stoull without the exception.
std::optional<uint64_t> to_u64(const std::string& token) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(token.c_str(), &end, 10);
  if (end == token.c_str() || errno == ERANGE) return std::nullopt;
  return value;
}

/// std::stoi and the conversion to size_t that follows it in G1: a negative number becomes huge.
std::optional<uint64_t> to_int(const std::string& token) {
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(token.c_str(), &end, 10);
  if (end == token.c_str() || errno == ERANGE) return std::nullopt;
  if (value < INT_MIN || value > INT_MAX) return std::nullopt;
  return static_cast<uint64_t>(value);
}

/// std::stod without the exception.
std::optional<double> to_double(const std::string& token) {
  char* end = nullptr;
  errno = 0;
  const double value = std::strtod(token.c_str(), &end);
  if (end == token.c_str() || errno == ERANGE) return std::nullopt;
  return value;
}

/// Keeps the caller's errno, which the conversions above set.
class KeepErrno {
 public:
  KeepErrno() = default;
  ~KeepErrno() { errno = saved_; }
  KeepErrno(const KeepErrno&) = delete;
  KeepErrno& operator=(const KeepErrno&) = delete;

 private:
  int saved_ = errno;
};

Error bad_value(const std::string& key, const std::string& token, const std::string& allowed) {
  return key + ": " + in_quotes(token) + " is not " + allowed;
}

/// Applies one text to settings: one pass over the keys (libc10's, or all of G1), and in G2 another
/// over libc10_cuda's.
class Applier {
 public:
  Applier(const AllocDialect& dialect, const Tokens& tokens, AllocSettings& settings)
      : dialect_(dialect), reader_(dialect.generation, tokens), set_(settings) {}

  Error run() {
    set_.max_split_size = AllocSettings::kUnlimited;
    set_.roundup_power2_divisions.fill(0);
    set_.garbage_collection_threshold = 0;
    if (g2() && knows("large_segment_size_mb")) {
      if (Error error = large_segment_sizes()) return error;
      set_.max_non_split_rounding_size = set_.large_segment_size;
    }
    if (Error error = pass(&Applier::main_key)) return error;
    if (!g2() || !dialect_.device_keys) return std::nullopt;
    return pass(&Applier::device_only_key);
  }

 private:
  using KeyFunction = Error (Applier::*)(const std::string& key);

  bool g2() const { return dialect_.generation == Generation::kG2; }

  Error pass(KeyFunction function) {
    reader_.move_to(0);
    while (!reader_.at_end()) {
      const std::string key = reader_.token();
      if (Error error = (this->*function)(key)) return error;
      if (Error error = reader_.next_key()) return error;
    }
    return std::nullopt;
  }

  /// G2 looks for this key ahead of all others, and in the place of values too.
  Error large_segment_sizes() {
    for (reader_.move_to(0); !reader_.at_end(); reader_.advance()) {
      if (!reader_.is("large_segment_size_mb")) continue;
      if (Error error = megabytes(kSmallestLargeSegment, set_.large_segment_size)) return error;
    }
    return std::nullopt;
  }

  Error main_key(const std::string& key) {
    const uint64_t smallest = g2() ? set_.large_segment_size / kMegabyte : kG1SmallestSplit;
    if (key == "max_split_size_mb") return megabytes(smallest, set_.max_split_size);
    if (key == "max_non_split_rounding_mb" && knows(key)) {
      return megabytes(smallest, set_.max_non_split_rounding_size);
    }
    if (key == "garbage_collection_threshold") return collection_threshold();
    if (key == "roundup_power2_divisions") return divisions();
    if (key == "expandable_segments") return boolean(set_.expandable_segments);
    if (key == "pinned_use_background_threads" && knows(key)) {
      return boolean(set_.pinned_use_background_threads);
    }
    if (g2() && key == "pinned_max_round_threshold_mb" && knows(key)) {
      return megabytes(0, set_.pinned_max_round_threshold);
    }
    if (g2() && key == "pinned_max_cached_size_mb" && knows(key)) {
      return megabytes(0, set_.pinned_max_cached_size);
    }
    if (!g2() && dialect_.device_keys) {
      bool found = false;
      Error error = device_key(key, found);
      if (found) return error;
    }
    return other_key(key);
  }

  /// In the second pass of G2, keys that libc10 has read are passed over.
  Error device_only_key(const std::string& key) {
    bool found = false;
    Error error = device_key(key, found);
    return found ? error : other_key(key);
  }

  bool knows(const std::string& key) const {
    return !dialect_.known_keys || dialect_.known_keys->contains(key);
  }

  Error device_key(const std::string& key, bool& found) {
    found = knows(key);
    if (!found) return std::nullopt;
    if (key == "backend") return backend();
    if (key == "release_lock_on_cudamalloc" || key == "release_lock_on_hipmalloc") {
      return boolean(set_.release_lock_on_cudamalloc);
    }
    if (key == "pinned_use_cuda_host_register" || key == "pinned_use_hip_host_register") {
      return boolean(set_.pinned_use_cuda_host_register);
    }
    if (key == "graph_capture_record_stream_reuse") {
      return boolean(set_.graph_capture_record_stream_reuse);
    }
    if (key == "pinned_num_register_threads") return register_threads();
    if (key == "pinned_reserve_segment_size_mb") return reserve_segment_size();
    if (g2() && key == "per_process_memory_fraction") return memory_fraction();
    if (g2() && key == "pinned_free_catch_all") return boolean(set_.pinned_free_catch_all);
    if (g2() && key == "throw_on_cudamalloc_oom") return boolean(set_.throw_on_cudamalloc_oom);
    found = false;
    return std::nullopt;
  }

  Error other_key(const std::string& key) {
    if (!knows(key)) {
      const std::string meant =
          nearest(key, {dialect_.known_keys->begin(), dialect_.known_keys->end()});
      return in_quotes(key) + " is not a key of this PyTorch" +
             (meant.empty() ? "" : "; did you mean " + meant + "?");
    }
    if (Error error = reader_.value()) return error;
    return reader_.skip_value();
  }

  std::optional<uint64_t> number() const {
    const std::string& token = reader_.token();
    return g2() ? to_u64(token) : to_int(token);
  }

  Error megabytes(uint64_t smallest, uint64_t& bytes) {
    const std::string key = reader_.token();
    if (Error error = reader_.value()) return error;
    const auto value = number();
    if (!value || *value < smallest) {
      return bad_value(key, reader_.token(),
                       "a whole number of MiB from " + std::to_string(smallest) + " up");
    }
    bytes = std::min(*value, kMostMegabytes) * kMegabyte;
    return std::nullopt;
  }

  Error boolean(bool& field) {
    const std::string key = reader_.token();
    if (Error error = reader_.value()) return error;
    const std::string& token = reader_.token();
    if (token != "True" && token != "False") {
      return bad_value(key, token, "True or False (PyTorch takes no other spelling)");
    }
    field = token == "True";
    return std::nullopt;
  }

  Error collection_threshold() {
    const std::string key = reader_.token();
    if (Error error = reader_.value()) return error;
    const auto value = to_double(reader_.token());
    if (!value || !(*value > 0 && *value < 1)) {
      return bad_value(key, reader_.token(), "a number between 0 and 1");
    }
    set_.garbage_collection_threshold = *value;
    return std::nullopt;
  }

  Error divisions() {
    const std::string key = reader_.token();
    if (Error error = reader_.value()) return error;
    auto& divisions = set_.roundup_power2_divisions;
    if (!reader_.is("[")) {
      const auto value = number();
      if (!value || !std::has_single_bit(*value)) {
        return bad_value(key, reader_.token(),
                         "a power of two or a list such as [256:1,512:2,>:4]");
      }
      divisions.fill(*value);
      return std::nullopt;
    }
    bool first = true;
    size_t last_index = 0;
    return reader_.division_list([&](const std::string& boundary, const std::string& token) {
      return division(boundary, token, first, last_index);
    });
  }

  Error division(const std::string& boundary, const std::string& token, bool& first,
                 size_t& last_index) {
    auto& divisions = set_.roundup_power2_divisions;
    const auto value = number();
    if (!value || (*value != 0 && !std::has_single_bit(*value))) {
      return bad_value("roundup_power2_divisions", token, "a power of two, or 0 to switch off");
    }
    if (boundary == ">") {
      // G1 changes the last interval that was named, too.
      const size_t begin = g2() ? last_index + 1 : last_index;
      std::fill(divisions.begin() + static_cast<ptrdiff_t>(begin), divisions.end(), *value);
      return std::nullopt;
    }
    const auto megabytes = to_u64(boundary);
    if (!megabytes || !std::has_single_bit(*megabytes)) {
      return bad_value("roundup_power2_divisions", boundary, "a power of two (MiB) or >");
    }
    const size_t index = std::min<size_t>(std::bit_width(*megabytes) - 1, divisions.size() - 1);
    if (first) {
      std::fill(divisions.begin(), divisions.begin() + static_cast<ptrdiff_t>(index), *value);
    }
    first = false;
    divisions[index] = *value;
    last_index = index;
    return std::nullopt;
  }

  Error backend() {
    if (Error error = reader_.value()) return error;
    const std::string& token = reader_.token();
    if (token != "native" && token != "cudaMallocAsync" && token != "hipMallocAsync") {
      return bad_value("backend", token, "native or cudaMallocAsync");
    }
    set_.backend = token;
    return std::nullopt;
  }

  Error register_threads() {
    if (Error error = reader_.value()) return error;
    const auto value = number();
    if (!value || !std::has_single_bit(*value) || *value > kMostRegisterThreads) {
      return bad_value("pinned_num_register_threads", reader_.token(), "a power of two up to 128");
    }
    set_.pinned_num_register_threads = *value;
    return std::nullopt;
  }

  Error reserve_segment_size() {
    if (Error error = reader_.value()) return error;
    const auto value = number();
    if (!value || *value == 0) {
      return bad_value("pinned_reserve_segment_size_mb", reader_.token(),
                       "a whole number of MiB from 1 up");
    }
    set_.pinned_reserve_segment_size_mb = *value;
    return std::nullopt;
  }

  Error memory_fraction() {
    if (Error error = reader_.value()) return error;
    const auto value = to_double(reader_.token());
    if (!value || !(*value >= 0 && *value <= 1)) {
      return bad_value("per_process_memory_fraction", reader_.token(), "a number from 0 to 1");
    }
    set_.per_process_memory_fraction = *value;
    return std::nullopt;
  }

  const AllocDialect& dialect_;
  Reader reader_;
  AllocSettings& set_;
};

std::string megabyte_entry(std::string_view key, uint64_t bytes, uint64_t default_bytes) {
  if (bytes == default_bytes) return {};
  return std::string(key) + ":" + std::to_string(bytes / kMegabyte) + ",";
}

std::string number_text(double value) {
  char buffer[64];
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof buffer, value);
  return error == std::errc() ? std::string(buffer, end) : std::string();
}

}  // namespace

AllocDialect AllocDialect::g1() {
  return {Generation::kG1, g1_keys(), true};
}
AllocDialect AllocDialect::g2_core() {
  return {Generation::kG2, std::nullopt, false};
}
AllocDialect AllocDialect::g2_cuda() {
  return {Generation::kG2, g2_cuda_keys(), true};
}

std::optional<std::string> apply_alloc_conf(const AllocDialect& dialect, std::string_view text,
                                            AllocSettings& settings) {
  const KeepErrno keep_errno;
  return Applier(dialect, tokenize(dialect.generation, text), settings).run();
}

std::string alloc_conf_text(const AllocSettings& settings) {
  const AllocSettings fresh;
  std::string text = megabyte_entry("large_segment_size_mb", settings.large_segment_size,
                                    fresh.large_segment_size);
  text += megabyte_entry("max_split_size_mb", settings.max_split_size, fresh.max_split_size);
  if (settings.max_non_split_rounding_size > settings.large_segment_size) {
    text += megabyte_entry("max_non_split_rounding_mb", settings.max_non_split_rounding_size, 0);
  }
  if (settings.garbage_collection_threshold != 0) {
    text +=
        "garbage_collection_threshold:" + number_text(settings.garbage_collection_threshold) + ",";
  }
  if (settings.roundup_power2_divisions != fresh.roundup_power2_divisions) {
    text += "roundup_power2_divisions:[";
    for (size_t i = 0; i < settings.roundup_power2_divisions.size(); ++i) {
      text += (i == 0 ? "" : ",") + std::to_string(uint64_t{1} << i) + ":" +
              std::to_string(settings.roundup_power2_divisions[i]);
    }
    text += "],";
  }
  if (settings.expandable_segments) text += "expandable_segments:True,";
  if (settings.pinned_use_background_threads) text += "pinned_use_background_threads:True,";
  text += megabyte_entry("pinned_max_round_threshold_mb", settings.pinned_max_round_threshold,
                         fresh.pinned_max_round_threshold);
  text += megabyte_entry("pinned_max_cached_size_mb", settings.pinned_max_cached_size,
                         fresh.pinned_max_cached_size);
  if (!text.empty()) text.pop_back();
  return text;
}

}  // namespace dormouse::config
