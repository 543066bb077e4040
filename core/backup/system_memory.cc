// Reads /proc/meminfo (MemAvailable, kernel documentation filesystems/proc.rst) and the memory
// controller's files (admin-guide/cgroup-v2.rst: memory.max, memory.high, memory.current,
// memory.stat; cgroup-v1/memory.rst).
#include "core/backup/system_memory.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <climits>
#include <initializer_list>
#include <limits>

#include "core/control_groups.h"

namespace dormouse {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

std::uint64_t machine_available(const std::string& root) {
  const auto kib = value_in(root + "/proc/meminfo", "MemAvailable:");
  return kib ? *kib * 1024 : kUnlimited;
}

// What the group may still take: beyond memory.max it is killed, beyond memory.high it is slowed
// down until it stands still.
std::uint64_t group_available(const std::string& folder, std::initializer_list<const char*> limits,
                              const char* usage_name, const char* cache_key) {
  std::uint64_t limit = kUnlimited;
  for (const char* name : limits) limit = std::min(limit, number_in(folder + name).value_or(limit));
  if (limit == kUnlimited) return kUnlimited;
  std::uint64_t usage = number_in(folder + usage_name).value_or(0);
  usage -= std::min(value_in(folder + "memory.stat", cache_key).value_or(0), usage);
  return limit > usage ? limit - usage : 0;
}

}  // namespace

std::uint64_t available_host_memory(const std::string& root) {
  std::uint64_t least = machine_available(root);
  for_each_group(root, "memory", [&](const std::string& folder, bool v2) {
    const std::uint64_t left =
        v2 ? group_available(folder, {"memory.max", "memory.high"}, "memory.current",
                             "inactive_file")
           : group_available(folder, {"memory.limit_in_bytes"}, "memory.usage_in_bytes",
                             "total_inactive_file");
    least = std::min(least, left);
  });
  return least;
}

// mbind(2), without libnuma.
bool prefer_numa_node(void* begin, std::size_t bytes, int node) noexcept {
  constexpr int kWordBits = sizeof(unsigned long) * CHAR_BIT;
  std::array<unsigned long, 16> mask{};  // 1024 nodes, as many as the kernel has
  if (node < 0 || node >= static_cast<int>(mask.size()) * kWordBits) return false;
  mask[static_cast<std::size_t>(node / kWordBits)] = 1ul << (node % kWordBits);
  // The kernel leaves the last bit of the count out.
  return syscall(SYS_mbind, begin, bytes, MPOL_PREFERRED, mask.data(), mask.size() * kWordBits + 1,
                 0u) == 0;
}

}  // namespace dormouse
