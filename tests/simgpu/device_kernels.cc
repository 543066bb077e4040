// Dormouse's kernels (core/backup/device_kernels_ptx.h) for the simulation: their references on the
// host.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/backup/content_hash.h"
#include "core/backup/device_kernels_ptx.h"
#include "tests/simgpu/kernels.h"

namespace simgpu {
namespace {

// As the kernel writes it.
struct Result {
  uint64_t low;
  uint64_t high;
  uint64_t nonzero;
  uint64_t unused;
};

// The kernels load words of 16 bytes: a device faults on others, and its context is lost.
void check_alignment(std::uint64_t address, std::uint64_t bytes) {
  if (address % 16 == 0 && bytes % 16 == 0) return;
  std::fprintf(stderr, "simgpu: misaligned address: %zu bytes at %#llx\n",
               static_cast<std::size_t>(bytes), static_cast<unsigned long long>(address));
  std::abort();
}

void content_hash(const simgpu_launch& launch) {
  const auto* ranges = parameter<const dormouse::Range*>(launch, 0);
  auto* results = parameter<Result*>(launch, 1);
  for (unsigned block = 0; block < launch.grid[0]; ++block) {
    check_alignment(ranges[block].begin, ranges[block].bytes);
    const auto* data = reinterpret_cast<const void*>(ranges[block].begin);
    const dormouse::ContentHash hash = dormouse::hash_on_host(data, ranges[block].bytes);
    results[block] = {hash.low, hash.high, hash.zero ? 0u : 1u, 0};
  }
}

void copy(const simgpu_launch& launch) {
  const auto to = parameter<std::uint64_t>(launch, 0);
  const auto from = parameter<std::uint64_t>(launch, 1);
  const auto bytes = parameter<std::uint64_t>(launch, 2);
  check_alignment(to, bytes);
  check_alignment(from, bytes);
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
}

const bool registered = register_kernel(dormouse::kContentHashKernel, content_hash) &&
                        register_kernel(dormouse::kCopyKernel, copy);

}  // namespace
}  // namespace simgpu
