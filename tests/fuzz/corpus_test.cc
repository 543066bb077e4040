// Runs the fuzz target that it is linked with over generated inputs and random changes of them.
#include <random>

#include "gtest/gtest.h"
#include "tests/fuzz/target.h"

namespace dormouse::fuzz {
namespace {

void run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

std::string change(std::string text, std::mt19937_64& random) {
  for (size_t rounds = 1 + random() % 4; rounds > 0; --rounds) {
    const size_t at = random() % (text.size() + 1);
    switch (random() % 4) {
      case 0:
        text.insert(at, 1, static_cast<char>(random()));
        break;
      case 1:
        if (at < text.size()) text[at] = static_cast<char>(random());
        break;
      case 2:
        text.erase(at, random() % 4);
        break;
      default:
        text.insert(at, text.substr(random() % (text.size() + 1), random() % 20));
    }
  }
  return text;
}

TEST(Fuzz, holds_for_edge_cases) {
  run("");
  for (int byte = 0; byte < 256; ++byte) {
    run(std::string(1, static_cast<char>(byte)));
    run(std::string(3, static_cast<char>(byte)));
    run(std::string(5000, static_cast<char>(byte)));
  }
}

TEST(Fuzz, holds_for_generated_inputs) {
  for (uint64_t seed = 0; seed < 20'000; ++seed) run(make_input(seed));
}

TEST(Fuzz, holds_for_changed_inputs) {
  std::mt19937_64 random(23);
  for (uint64_t seed = 0; seed < 40'000; ++seed) run(change(make_input(seed), random));
}

}  // namespace
}  // namespace dormouse::fuzz
