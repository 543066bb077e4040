#include "core/backup/content_hash.h"

#include <cstring>
#include <random>
#include <set>

#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

std::vector<std::uint64_t> random_words(std::size_t bytes, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint64_t> words(bytes / 8);
  for (std::uint64_t& word : words) word = random();
  return words;
}

TEST(ContentHash, EverySingleBitMatters) {
  constexpr std::size_t kBytes = 8192;
  std::vector<std::uint64_t> words = random_words(kBytes, 1);
  std::set<std::pair<std::uint64_t, std::uint64_t>> seen;
  const ContentHash base = hash_on_host(words.data(), kBytes);
  seen.insert({base.low, base.high});
  for (std::size_t word = 0; word < words.size(); ++word) {
    for (int bit = 0; bit < 64; ++bit) {
      words[word] ^= std::uint64_t{1} << bit;
      const ContentHash hash = hash_on_host(words.data(), kBytes);
      EXPECT_NE(hash.low, base.low);
      EXPECT_NE(hash.high, base.high);
      seen.insert({hash.low, hash.high});
      words[word] ^= std::uint64_t{1} << bit;
    }
  }
  EXPECT_EQ(seen.size(), words.size() * 64 + 1) << "no two of them are equal";
}

TEST(ContentHash, SwappedPlacesAndLengthsMatter) {
  std::vector<std::uint64_t> words = random_words(65536, 2);
  const ContentHash base = hash_on_host(words.data(), 65536);
  std::swap(words[0], words[512]);  // the same lane
  EXPECT_NE(hash_on_host(words.data(), 65536), base);
  std::swap(words[0], words[512]);
  std::swap(words[0], words[2]);  // neighbouring lanes
  EXPECT_NE(hash_on_host(words.data(), 65536), base);
  std::vector<std::uint64_t> zeros(1024, 0);
  EXPECT_NE(hash_on_host(zeros.data(), 4096), hash_on_host(zeros.data(), 8192));
}

TEST(ContentHash, KnowsZeros) {
  std::vector<std::uint64_t> words(4096, 0);
  EXPECT_TRUE(hash_on_host(words.data(), 32768).zero);
  words[4095] = 1;
  EXPECT_FALSE(hash_on_host(words.data(), 32768).zero);
}

using ContentHasherTest = SimulatedEngine;

TEST_F(ContentHasherTest, HashesManyRangesInBatchesAsOnTheHost) {
  const CUdeviceptr block = allocate(weights, 32 * kMiB);
  fill(block, 32 * kMiB, 5);
  DeviceKernels kernels(simulated_driver());
  ContentHasher hasher(simulated_driver(), kernels);
  Ranges ranges;
  for (std::uint64_t at = 0; at < 32 * kMiB; at += 1536) {
    ranges.push_back({block + at, std::min<std::uint64_t>(1536, 32 * kMiB - at)});
  }
  ASSERT_GT(ranges.size(), 16384u) << "more than one batch";
  std::vector<ContentHash> hashes;
  ASSERT_EQ(hasher.hash(context, ranges, &hashes), CUDA_SUCCESS);
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    ASSERT_EQ(hashes[i], hash_on_host(reinterpret_cast<void*>(ranges[i].begin), ranges[i].bytes));
  }
}

}  // namespace
}  // namespace dormouse
