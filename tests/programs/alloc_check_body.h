// alloc_check: allocates blocks of several sizes, fills, copies, verifies and frees them, and
// prints a checksum that is the same whatever interface and device it ran on. Each alloc_check_*.cc
// gives it one way to reach CUDA.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <vector>

#include "tests/programs/check.h"

namespace programs {

// `Gpu` has: start(), allocate(bytes) -> pointer as uint64_t, release(pointer), to_device(pointer,
// host, bytes), to_host(host, pointer, bytes), on_device(to, from, bytes), set(pointer, byte,
// bytes), synchronize(). Errors end the program.
template <typename Gpu>
int alloc_check(Gpu& gpu) {
  const size_t sizes[] = {1, 511, 4096, 1 << 20, (2 << 20) - 1, 2 << 20, (5 << 20) + 3, 24 << 20};
  struct Block {
    uint64_t pointer;
    std::vector<unsigned char> content;
  };
  gpu.start();
  std::vector<Block> blocks;
  uint64_t sum = checksum({});
  for (int round = 0; round < 3; ++round) {
    for (size_t size : sizes) {
      Block block{gpu.allocate(size),
                  pattern(size, static_cast<uint32_t>(blocks.size() + 100 * round))};
      gpu.to_device(block.pointer, block.content.data(), size);
      blocks.push_back(std::move(block));
    }
    // Every second block gets its content by way of the device, up to half of it replaced.
    for (size_t i = 0; i + 1 < blocks.size(); i += 2) {
      size_t half = std::min(blocks[i].content.size() / 2, blocks[i + 1].content.size());
      gpu.set(blocks[i].pointer, 0x5c, half);
      gpu.on_device(blocks[i + 1].pointer, blocks[i].pointer, half);
      std::memset(blocks[i].content.data(), 0x5c, half);
      std::memset(blocks[i + 1].content.data(), 0x5c, half);
    }
    gpu.synchronize();
    // Half of the blocks stay for the next round, so that addresses are used again between live
    // ones.
    std::vector<Block> kept;
    for (size_t i = 0; i < blocks.size(); ++i) {
      std::vector<unsigned char> seen(blocks[i].content.size());
      gpu.to_host(seen.data(), blocks[i].pointer, seen.size());
      if (seen != blocks[i].content) {
        std::fprintf(stderr, "block %zu of %zu bytes differs in round %d\n", i, seen.size(), round);
        return 1;
      }
      sum = checksum(seen, sum);
      if (i % 3 == 0 && round < 2) {
        kept.push_back(std::move(blocks[i]));
      } else {
        gpu.release(blocks[i].pointer);
      }
    }
    blocks = std::move(kept);
  }
  for (Block& block : blocks) gpu.release(block.pointer);
  std::printf("checksum %016" PRIx64 "\n", sum);
  return 0;
}

}  // namespace programs
