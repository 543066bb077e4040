#include "core/extents.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace dormouse {
namespace {

TEST(Extents, TakesTheBestFit) {
  Extents extents;
  extents.insert(0, 1000, 0, 1000);
  extents.insert(5000, 100, 5000, 6000);
  EXPECT_EQ(extents.take(80, 1), 5000u);
  EXPECT_EQ(extents.take(80, 1), 0u);
  EXPECT_EQ(extents.total(), 1100u - 160u);
}

TEST(Extents, MergesNeighboursWithinTheBoundsOnly) {
  Extents extents;
  extents.insert(0, 100, 0, 200);
  extents.insert(100, 100, 0, 200);
  EXPECT_EQ(extents.largest(), 200u);
  extents.insert(200, 100, 200, 300);
  EXPECT_EQ(extents.largest(), 200u) << "a border separates them";
  EXPECT_EQ(extents.take(300, 1), std::nullopt);
}

TEST(Extents, AlignsAndGivesBothRestsBack) {
  Extents extents;
  extents.insert(10, 1000, 0, 2000);
  EXPECT_EQ(extents.take(100, 256), 256u);
  EXPECT_EQ(extents.total(), 900u);
  EXPECT_EQ(extents.take(246, 1), 10u);
}

TEST(Extents, ErasesWithin) {
  Extents extents;
  extents.insert(0, 100, 0, 100);
  extents.insert(200, 100, 200, 300);
  extents.erase_within(150, 300);
  EXPECT_EQ(extents.total(), 100u);
}

TEST(Extents, NeverHandsOutAByteTwice) {
  Extents extents;
  constexpr std::size_t kSize = 4096;
  extents.insert(0, kSize, 0, kSize);
  std::vector<bool> used(kSize, false);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> taken;
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2 == 0) {
      const std::uint64_t bytes = 1 + random() % 200;
      const auto at = extents.take(bytes, std::uint64_t{1} << random() % 5);
      if (!at) continue;
      for (std::uint64_t b = *at; b < *at + bytes; ++b) {
        ASSERT_FALSE(used[b]);
        used[b] = true;
      }
      taken.push_back({*at, bytes});
    } else if (!taken.empty()) {
      std::swap(taken[random() % taken.size()], taken.back());
      const auto [at, bytes] = taken.back();
      taken.pop_back();
      for (std::uint64_t b = at; b < at + bytes; ++b) used[b] = false;
      extents.insert(at, bytes, 0, kSize);
    }
    std::uint64_t live = 0;
    for (const auto& [at, bytes] : taken) live += bytes;
    ASSERT_EQ(extents.total(), kSize - live);
  }
  for (const auto& [at, bytes] : taken) extents.insert(at, bytes, 0, kSize);
  EXPECT_EQ(extents.largest(), kSize);
}

}  // namespace
}  // namespace dormouse
