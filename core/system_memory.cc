// Reads /proc/meminfo (MemAvailable, kernel documentation filesystems/proc.rst) and the memory
// controller's files (admin-guide/cgroup-v2.rst: memory.max, memory.current, memory.stat;
// cgroup-v1/memory.rst).
#include "core/system_memory.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <climits>
#include <fstream>
#include <limits>
#include <sstream>

namespace dormouse {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

bool read_number(const std::string& path, std::uint64_t* out) {
  std::ifstream file(path);
  return static_cast<bool>(file >> *out);  // "max" is not a number: no limit
}

// The value behind `key` in a file of "key value" lines.
std::uint64_t read_keyed(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  std::uint64_t value = 0;
  std::string rest;
  while (file >> name >> value) {
    if (name == key) return value;
    std::getline(file, rest);
  }
  return 0;
}

std::uint64_t machine_available(const std::string& root) {
  const std::uint64_t kib = read_keyed(root + "/proc/meminfo", "MemAvailable:");
  return kib == 0 ? kUnlimited : kib * 1024;
}

std::uint64_t group_available(const std::string& folder, const char* limit_name,
                              const char* usage_name, const char* cache_key) {
  std::uint64_t limit = 0;
  std::uint64_t usage = 0;
  if (!read_number(folder + limit_name, &limit) || !read_number(folder + usage_name, &usage)) {
    return kUnlimited;
  }
  const std::uint64_t droppable = std::min(read_keyed(folder + "memory.stat", cache_key), usage);
  usage -= droppable;
  return limit > usage ? limit - usage : 0;
}

// The smallest over a group and all its parents.
template <typename Available>
std::uint64_t over_parents(const std::string& mount, std::string path, Available&& available) {
  std::uint64_t least = kUnlimited;
  while (true) {
    least = std::min(least, available(mount + path + "/"));
    const std::size_t slash = path.find_last_of('/');
    if (slash == std::string::npos) return least;
    path.resize(slash);
  }
}

}  // namespace

std::uint64_t available_host_memory(const std::string& root) {
  std::uint64_t least = machine_available(root);
  std::ifstream groups(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line)) {
    // hierarchy-ID:controllers:path
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers.empty()) {
      least = std::min(
          least, over_parents(root + "/sys/fs/cgroup", path, [](const std::string& folder) {
            return group_available(folder, "memory.max", "memory.current", "inactive_file");
          }));
    } else if (controllers == "memory") {
      least = std::min(
          least, over_parents(root + "/sys/fs/cgroup/memory", path, [](const std::string& folder) {
            return group_available(folder, "memory.limit_in_bytes", "memory.usage_in_bytes",
                                   "total_inactive_file");
          }));
    }
  }
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
