// See alloc_conf_generator.h.
#include "tests/config/alloc_conf_generator.h"

#include <array>
#include <string_view>

namespace dormouse::config::test {

namespace {

constexpr std::array<const char*, 10> kSizeKeys = {
    "max_split_size_mb",           "max_split_size_mb",
    "max_non_split_rounding_mb",   "large_segment_size_mb",
    "large_segment_size_mb",       "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",   "pinned_reserve_segment_size_mb",
    "pinned_num_register_threads", "max_non_split_rounding_mb"};
constexpr std::array<const char*, 9> kBooleanKeys = {"expandable_segments",
                                                     "expandable_segments",
                                                     "expandable_segments",
                                                     "pinned_use_background_threads",
                                                     "release_lock_on_cudamalloc",
                                                     "pinned_use_cuda_host_register",
                                                     "graph_capture_record_stream_reuse",
                                                     "pinned_free_catch_all",
                                                     "throw_on_cudamalloc_oom"};
constexpr std::array<const char*, 8> kOtherKeys = {"backend",
                                                   "some_new_key",
                                                   "Max_Split_Size_MB",
                                                   "use_uvm",
                                                   "expandable_segment",
                                                   "x",
                                                   "per_process_memory_fraction",
                                                   ">"};
constexpr std::array<const char*, 40> kNumbers = {"0",
                                                  "1",
                                                  "2",
                                                  "4",
                                                  "8",
                                                  "10",
                                                  "11",
                                                  "12",
                                                  "16",
                                                  "19",
                                                  "20",
                                                  "21",
                                                  "22",
                                                  "32",
                                                  "64",
                                                  "100",
                                                  "128",
                                                  "129",
                                                  "256",
                                                  "512",
                                                  "1024",
                                                  "4096",
                                                  "32768",
                                                  "65536",
                                                  "131072",
                                                  "-1",
                                                  "+64",
                                                  "0x40",
                                                  "1e3",
                                                  "64MB",
                                                  "64.5",
                                                  "abc",
                                                  "17592186044415",
                                                  "17592186044416",
                                                  "18446744073709551615",
                                                  "18446744073709551616",
                                                  "9223372036854775808",
                                                  "2147483647",
                                                  "2147483648",
                                                  "-2147483649"};
constexpr std::array<const char*, 22> kFractions = {"0.8",
                                                    "0.5",
                                                    "0.6",
                                                    "0",
                                                    "1",
                                                    "1.0",
                                                    "0.999999999999999999",
                                                    "-0.1",
                                                    "1e-3",
                                                    ".5",
                                                    "5.",
                                                    "0x1p-1",
                                                    "nan",
                                                    "inf",
                                                    "1e-400",
                                                    "1e-310",
                                                    "1e400",
                                                    "0.5x",
                                                    "x",
                                                    "True",
                                                    "0.30000000000000004",
                                                    "2.2250738585072014e-308"};

template <typename T>
const char* pick(AllocConfGenerator& generator, const T& items) {
  return items[generator.below(items.size())];
}

}  // namespace

char AllocConfGenerator::mark() {
  return ",:[]"[below(4)];
}

std::string AllocConfGenerator::number() {
  return pick(*this, kNumbers);
}

std::string AllocConfGenerator::fraction() {
  if (once_in(3)) return "0." + std::to_string(below(1'000'000));
  return pick(*this, kFractions);
}

std::string AllocConfGenerator::boolean() {
  constexpr std::array<const char*, 9> kBooleans = {"True",  "False", "True", "False", "True",
                                                    "False", "true",  "1",    "TRUE"};
  return pick(*this, kBooleans);
}

std::string AllocConfGenerator::list() {
  std::string text = "[";
  const size_t count = below(6);
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) text += ",";
    const uint64_t boundary = uint64_t{1} << below(20);
    text += once_in(4) ? ">" : once_in(8) ? number() : std::to_string(boundary);
    text += ":";
    text += once_in(6) ? number() : std::to_string(uint64_t{1} << below(6));
  }
  if (once_in(8)) text += ",";
  return once_in(20) ? text : text + "]";
}

std::string AllocConfGenerator::entry() {
  std::string key;
  std::string value;
  switch (below(8)) {
    case 0:
    case 1:
      key = pick(*this, kSizeKeys);
      value = once_in(4) ? number() : std::to_string(20 + below(3000));
      break;
    case 2:
    case 3:
    case 4:
      key = pick(*this, kBooleanKeys);
      value = boolean();
      break;
    case 5:
      key = once_in(6) ? "per_process_memory_fraction" : "garbage_collection_threshold";
      value = fraction();
      break;
    case 6:
      key = "roundup_power2_divisions";
      value = once_in(3) ? std::to_string(uint64_t{1} << below(8)) : list();
      break;
    default:
      key = pick(*this, kOtherKeys);
      value = once_in(3) ? list() : once_in(2) ? "native" : number();
  }
  const std::string space = once_in(10) ? " " : once_in(30) ? "\t" : "";
  return key + space + ":" + space + value;
}

std::string AllocConfGenerator::mutate(std::string text) {
  constexpr std::string_view kCharacters = ",:[] \t\n\v>01248aTFe_-+.\x85\xa0";
  for (size_t rounds = 1 + below(3); rounds > 0; --rounds) {
    const size_t at = below(text.size() + 1);
    switch (below(6)) {
      case 0:
        text.insert(at, 1, kCharacters[below(kCharacters.size())]);
        break;
      case 1:
        if (at < text.size()) text.erase(at, 1 + below(3));
        break;
      case 2:
        if (at < text.size()) text[at] = mark();
        break;
      case 3:
        text.resize(at);
        break;
      case 4:
        text.insert(at, text.substr(below(text.size() + 1), below(30)));
        break;
      default:
        // Another mark in the place of one.
        if (const size_t found = text.find_first_of(",:[]", at); found != std::string::npos) {
          text[found] = mark();
        }
    }
  }
  return text;
}

std::string AllocConfGenerator::next() {
  std::string text;
  for (size_t count = below(5); count > 0; --count) text += entry() + ",";
  if (!text.empty() && !once_in(10)) text.pop_back();
  return once_in(3) ? mutate(std::move(text)) : text;
}

}  // namespace dormouse::config::test
