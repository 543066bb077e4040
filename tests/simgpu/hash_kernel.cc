// Dormouse's hash kernel (core/content_hash_ptx.h) for the simulation: its reference on the host.
#include <cstdio>
#include <cstdlib>

#include "core/content_hash.h"
#include "core/content_hash_ptx.h"
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

// The kernel loads words of 16 bytes: a device faults on others, and its context is lost.
void check_alignment(const dormouse::HashRange& range) {
  if (range.address % 16 == 0 && range.bytes % 16 == 0) return;
  std::fprintf(stderr, "simgpu: misaligned address: %zu bytes at %#llx\n",
               static_cast<std::size_t>(range.bytes),
               static_cast<unsigned long long>(range.address));
  std::abort();
}

void content_hash(const simgpu_launch& launch) {
  const auto* ranges = parameter<const dormouse::HashRange*>(launch, 0);
  auto* results = parameter<Result*>(launch, 1);
  for (unsigned block = 0; block < launch.grid[0]; ++block) {
    check_alignment(ranges[block]);
    const auto* data = reinterpret_cast<const void*>(ranges[block].address);
    const dormouse::ContentHash hash = dormouse::hash_on_host(data, ranges[block].bytes);
    results[block] = {hash.low, hash.high, hash.zero ? 0u : 1u, 0};
  }
}

const bool registered = register_kernel(dormouse::kContentHashKernel, content_hash);

}  // namespace
}  // namespace simgpu
