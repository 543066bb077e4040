// Which process this is, for names of files that outlive it. Needs nothing else of core.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace dormouse {

// A process, told apart from a later one with its number and from those of other kernels and
// containers.
struct ProcessIdentity {
  std::string boot_id;              // of the kernel since its start, without dashes
  std::uint64_t pid_namespace = 0;  // the inode of its PID namespace
  std::uint64_t pid = 0;
  std::uint64_t start_ticks = 0;  // when it started, in clock ticks since boot
  bool operator==(const ProcessIdentity&) const = default;
};

// The calling process; what /proc does not tell stays empty.
ProcessIdentity own_identity();

// When a process started, in clock ticks since boot: a number, or "self". Nothing if there is no
// such process or /proc does not tell.
std::optional<std::uint64_t> start_ticks_of(const std::string& process);

}  // namespace dormouse
