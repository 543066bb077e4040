// See control_groups.h. The files: admin-guide/cgroup-v2.rst, scheduler/sched-bwc.rst.
#include "core/control_groups.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>

#include "core/descriptor.h"

namespace dormouse {
namespace {

std::optional<std::uint64_t> to_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} ? std::optional(value) : std::nullopt;
}

// The line up to the next end of line, which goes from `text` with it.
std::string_view next_line(std::string_view* text) {
  const std::string_view line = text->substr(0, text->find('\n'));
  text->remove_prefix(std::min(line.size() + 1, text->size()));
  return line;
}

bool names(std::string_view controllers, std::string_view wanted) {
  for (std::size_t at = 0; at <= controllers.size();) {
    const std::size_t end = std::min(controllers.find(',', at), controllers.size());
    if (controllers.substr(at, end - at) == wanted) return true;
    at = end + 1;
  }
  return false;
}

}  // namespace

std::string text_of(const std::string& path) {
  std::string text;
  const UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.is_open()) return text;
  std::array<char, 4096> buffer;
  ssize_t got = 0;
  while ((got = read(fd.get(), buffer.data(), buffer.size())) > 0 || (got < 0 && errno == EINTR)) {
    if (got > 0) text.append(buffer.data(), static_cast<std::size_t>(got));
  }
  return got < 0 ? std::string() : text;
}

std::optional<std::uint64_t> number_in(const std::string& path) {
  return to_number(text_of(path));
}

std::optional<std::uint64_t> value_in(const std::string& path, std::string_view key) {
  const std::string text = text_of(path);
  for (std::string_view rest = text; !rest.empty();) {
    std::string_view line = next_line(&rest);
    const std::size_t end = line.find(' ');
    if (end == line.npos || line.substr(0, end) != key) continue;
    line.remove_prefix(std::min(line.find_first_not_of(' ', end), line.size()));
    return to_number(line);
  }
  return std::nullopt;
}

void for_each_group(const std::string& root, std::string_view controller,
                    const std::function<void(const std::string& folder, bool v2)>& visit) {
  const std::string groups = text_of(root + "/proc/self/cgroup");
  for (std::string_view rest = groups; !rest.empty();) {
    const std::string_view line = next_line(&rest);
    // hierarchy-ID:controllers:path
    const std::size_t first = line.find(':');
    const std::size_t second = first == line.npos ? first : line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string_view controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && !names(controllers, controller)) continue;
    const std::string mount =
        root + "/sys/fs/cgroup" + (v2 ? std::string() : "/" + std::string(controller));
    std::string path(line.substr(second + 1));
    if (path == "/") path.clear();
    while (true) {
      visit(mount + path + "/", v2);
      const std::size_t slash = path.find_last_of('/');
      if (slash == std::string::npos) break;
      path.resize(slash);
    }
  }
}

std::optional<unsigned> processor_quota(const std::string& root) {
  std::optional<unsigned> least;
  for_each_group(root, "cpu", [&](const std::string& folder, bool v2) {
    std::optional<std::uint64_t> quota, period;
    if (v2) {
      const std::string limit = text_of(folder + "cpu.max");  // quota, or "max", and period
      const std::size_t space = limit.find(' ');
      if (space == limit.npos) return;
      quota = to_number(limit);
      period = to_number(std::string_view(limit).substr(space + 1));
    } else {
      quota = number_in(folder + "cpu.cfs_quota_us");  // -1, which is no number here: no limit
      period = number_in(folder + "cpu.cfs_period_us");
    }
    if (!quota || !period || *period == 0) return;
    const auto processors =
        static_cast<unsigned>(std::clamp<std::uint64_t>((*quota + *period - 1) / *period, 1, 1u << 16));
    least = std::min(least.value_or(processors), processors);
  });
  return least;
}

}  // namespace dormouse
