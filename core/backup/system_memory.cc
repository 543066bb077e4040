// Reads /proc/meminfo (MemAvailable, kernel documentation filesystems/proc.rst) and the memory
// controller's files (admin-guide/cgroup-v2.rst: memory.max, memory.current, memory.stat;
// cgroup-v1/memory.rst).
#include "core/backup/system_memory.h"

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <climits>
#include <limits>
#include <optional>
#include <string_view>

namespace dormouse {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

// What the file holds; empty if it cannot be read. Not by a stream: those swallow std::bad_alloc,
// and what could not be read would be no limit.
std::string text_of(const std::string& path) {
  std::string text;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return text;
  std::array<char, 4096> buffer;
  ssize_t got = 0;
  try {
    while ((got = read(fd, buffer.data(), buffer.size())) > 0 || (got < 0 && errno == EINTR)) {
      if (got > 0) text.append(buffer.data(), static_cast<std::size_t>(got));
    }
  } catch (...) {
    close(fd);
    throw;
  }
  close(fd);
  return got < 0 ? std::string() : text;
}

bool to_number(std::string_view text, std::uint64_t* out) {
  return std::from_chars(text.data(), text.data() + text.size(), *out).ec == std::errc{};
}

bool read_number(const std::string& path, std::uint64_t* out) {
  return to_number(text_of(path), out);  // "max" is not a number: no limit
}

// The line up to the next end of line, which goes from `text` with it.
std::string_view next_line(std::string_view* text) {
  const std::string_view line = text->substr(0, text->find('\n'));
  text->remove_prefix(std::min(line.size() + 1, text->size()));
  return line;
}

// The value behind `key` in a file of "key value" lines, or nothing.
std::optional<std::uint64_t> read_keyed(const std::string& path, std::string_view key) {
  const std::string text = text_of(path);
  for (std::string_view rest = text; !rest.empty();) {
    std::string_view line = next_line(&rest);
    const std::size_t end = line.find(' ');
    if (end == line.npos || line.substr(0, end) != key) continue;
    line.remove_prefix(std::min(line.find_first_not_of(' ', end), line.size()));
    std::uint64_t value = 0;
    return to_number(line, &value) ? std::optional(value) : std::nullopt;
  }
  return std::nullopt;
}

std::uint64_t machine_available(const std::string& root) {
  const auto kib = read_keyed(root + "/proc/meminfo", "MemAvailable:");
  return kib ? *kib * 1024 : kUnlimited;
}

std::uint64_t group_available(const std::string& folder, const char* limit_name,
                              const char* usage_name, const char* cache_key) {
  std::uint64_t limit = 0;
  std::uint64_t usage = 0;
  if (!read_number(folder + limit_name, &limit) || !read_number(folder + usage_name, &usage)) {
    return kUnlimited;
  }
  const std::uint64_t droppable =
      std::min(read_keyed(folder + "memory.stat", cache_key).value_or(0), usage);
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
  const std::string groups = text_of(root + "/proc/self/cgroup");
  for (std::string_view rest = groups; !rest.empty();) {
    const std::string_view line = next_line(&rest);
    // hierarchy-ID:controllers:path
    const std::size_t first = line.find(':');
    const std::size_t second = first == line.npos ? first : line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string_view controllers = line.substr(first + 1, second - first - 1);
    std::string path(line.substr(second + 1));
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
