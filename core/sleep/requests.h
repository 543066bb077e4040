// What can be asked of an engine, and how it is set up.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dormouse {

struct EngineOptions {
  // Blocks of less than 8 MiB, and less than half of it, share chunks of at most this size.
  std::size_t max_chunk_bytes = std::size_t{256} << 20;
  std::size_t retain_bytes = std::size_t{32} << 20;  // empty physical memory a pool keeps for reuse
  std::uint64_t host_limit_bytes = 0;  // host memory for backups; 0: what the machine has
  bool keep_backups = true;            // keep backups after waking
  std::chrono::milliseconds keep_backups_for{0};  // with keep_backups: for how long; 0 = for ever
  unsigned copy_threads = 0;                      // 0: by the number of processors
  bool huge_pages = true;
  std::size_t piece_bytes = std::size_t{64}
                            << 20;                 // host memory is touched and registered in these
  std::size_t stage_bytes = std::size_t{2} << 30;  // hashed or mapped at a time, beside the copies
  bool hash = true;                                // copy only what changed since the last backup
  bool verify = false;                             // check each wake against the hashes
  bool kernel_copies = true;  // a kernel may copy beside the copy engine (behind a closed gate)
  bool prepare = false;       // get host memory ready in the background
  std::uint64_t prepare_limit_bytes = 0;  // 0 = no limit beyond host_limit_bytes
  // For Backup::kDisk, and for what exceeds the host's memory or its limit; empty: neither. An
  // existing directory that belongs to the user and that others may not write to.
  std::string disk_directory;
  // What messages call these two settings, such as an environment variable.
  std::string host_limit_option = "the limit on host memory";
  std::string disk_directory_option = "the directory for backups";
  // How long a sleep waits for calls into the driver, and for running work.
  std::chrono::milliseconds drain_timeout{30000};
  // How long a sleep or a trim waits for stream captures to end.
  std::chrono::milliseconds capture_timeout{500};

  // What copy_threads comes to.
  unsigned threads() const noexcept;
};

// Who asks for a sleep. The program itself knows which memory it will not touch; anyone else does
// not, so the gate closes for them.
enum class Origin : std::uint8_t { kProgram, kOutside };

struct SleepRequest {
  std::vector<std::string> tags;  // by name; empty = all
  Origin origin = Origin::kProgram;
  bool discard = false;     // drop the content whatever the tag's policy is
  bool only_awake = false;  // with discard: what sleeps already keeps its content
  // Stop when this much is released; 0 = all of the tags. What was made first goes first, tag by
  // tag where tags are named, else priority by priority.
  // With discard, what sleeps already keeps its content then.
  std::uint64_t at_least_bytes = 0;

  bool discards_sleeping() const noexcept { return discard && !only_awake && at_least_bytes == 0; }
};

struct WakeRequest {
  std::vector<std::string> tags;    // by name, in this order; empty = all
  bool only_slept_outside = false;  // what the program put to sleep itself sleeps on
};

}  // namespace dormouse
