// Fuzzes the grammar of region rules: no text may do harm, and what is printed reads back the same.
#include <random>
#include <string>
#include <string_view>

#include "config/regions.h"
#include "tests/fuzz/target.h"

namespace dormouse::fuzz {

std::string make_input(uint64_t seed) {
  constexpr const char* kPieces[] = {"weights",
                                     "kv_cache",
                                     "-",
                                     "=none",
                                     "=disk",
                                     "=host",
                                     ": ",
                                     "; ",
                                     ", ",
                                     "nvtx(load*)",
                                     "process",
                                     "nvtx(a@b)",
                                     "nvtx(*@)",
                                     "thread(t?)",
                                     "size(>=2MiB)",
                                     "size(<1)",
                                     "api",
                                     "@vllm:replace",
                                     "\\",
                                     "python(a.b:c)",
                                     "{priority:1}",
                                     "(",
                                     ")",
                                     "@",
                                     "{max_split_size_mb:32,roundup_power2_divisions:[1:2,>:4]}",
                                     "}",
                                     "nvtx(f\\))"};
  std::mt19937_64 random(seed);
  std::string text;
  for (size_t count = random() % 14; count > 0; --count) {
    text += kPieces[random() % std::size(kPieces)];
  }
  return text;
}

void check_regions(std::string_view text) {
  using namespace dormouse::config;
  const Regions regions = parse_regions(text);
  for (const Diagnostic& error : regions.errors) {
    require(error.position <= text.size(), "an error stands inside the text");
    require(!error.message.empty(), "an error has a message");
  }
  const Regions again = parse_regions(print_regions(regions));
  require(again.errors.empty(), "what is printed has no error");
  require(again.items == regions.items, "the items read back the same");
  require(again.presets == regions.presets, "the presets read back the same");
  for (const RegionItem& item : regions.items) {
    require(!item.rules.empty(), "an item has a rule");
    for (const Rule& rule : item.rules) {
      if (const auto* nvtx = std::get_if<NvtxRule>(&rule)) glob_match(nvtx->pattern, text);
    }
  }
}

}  // namespace dormouse::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  dormouse::fuzz::check_regions({reinterpret_cast<const char*>(data), size});
  return 0;
}
