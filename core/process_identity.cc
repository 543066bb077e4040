// See process_identity.h.
#include "core/process_identity.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

namespace dormouse {

std::optional<std::uint64_t> start_ticks_of(const std::string& process) {
  std::string text;
  if (!std::getline(std::ifstream("/proc/" + process + "/stat"), text)) return std::nullopt;
  // The second field is the name in parentheses, which may hold anything; the start is the 22nd.
  const std::size_t name_end = text.rfind(')');
  if (name_end == text.npos) return std::nullopt;
  std::istringstream fields(text.substr(name_end + 1));
  std::string skipped;
  for (int field = 3; field < 22; ++field) fields >> skipped;
  std::uint64_t ticks = 0;
  return fields >> ticks ? std::optional(ticks) : std::nullopt;
}

ProcessIdentity own_identity() {
  ProcessIdentity self;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), self.boot_id);
  std::erase(self.boot_id, '-');
  struct stat found {};
  if (stat("/proc/self/ns/pid", &found) == 0) self.pid_namespace = found.st_ino;
  self.pid = static_cast<std::uint64_t>(getpid());
  self.start_ticks = start_ticks_of("self").value_or(0);
  return self;
}

}  // namespace dormouse
