// Tags: a name and what happens to its memory's content during sleep. Used by regions, pools and
// the ways in.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/thread_annotations.h"

namespace dormouse {

// What becomes of a tag's content while it sleeps.
enum class Backup : std::uint8_t {
  kHost,  // kept in host memory
  kNone,  // discarded; the memory reads as zero after waking
  kDisk,  // kept in a file
};

// "host", "none" or "disk".
const char* backup_name(Backup backup) noexcept;

// A tag's number. Two regions with the same name but different backup have different numbers, so
// that each piece of memory has exactly one policy; asking by name reaches both.
using TagId = std::int32_t;

// 'No tag': allocations go to the program's own allocator. Also what a region that excludes memory
// carries.
inline constexpr TagId kNoTag = -1;

struct Tag {
  std::string name;
  Backup backup = Backup::kHost;
  int priority = 0;  // higher: falls asleep later and wakes earlier than others of the same request
};

// The tags of a process. Grows, never shrinks. Thread-safe.
class TagTable {
 public:
  // The number of (name, backup), made if new. Names are 1 to 64 characters of letters, digits,
  // '_', '-', '.', '/' and
  // ':'; anything else gives kNoTag.
  TagId intern(std::string_view name, Backup backup);

  // The number for a name alone: the one interned first under it, else (name, host).
  TagId intern(std::string_view name);

  // Sets the priority of every tag of this name, those interned later included. Ask before memory
  // is put to sleep.
  void set_priority(std::string_view name, int priority);

  // A copy; an empty name for a number that does not exist.
  Tag get(TagId id) const;

  // True if any tag has this name.
  bool known(std::string_view name) const;

  // All names, each once, in order of their first use.
  std::vector<std::string> names() const;

  static bool valid_name(std::string_view name) noexcept;

  // Around fork(), so that the child does not inherit the lock from a thread that it does not have.
  void lock() const ACQUIRE(tags_mutex_) { tags_mutex_.lock(); }
  void unlock() const RELEASE(tags_mutex_) { tags_mutex_.unlock(); }

 private:
  int priority_of(std::string_view name) const REQUIRES(tags_mutex_);

  mutable Mutex tags_mutex_;
  std::vector<Tag> tags_ GUARDED_BY(tags_mutex_);
  std::vector<std::pair<std::string, int>> priorities_ GUARDED_BY(tags_mutex_);
};

}  // namespace dormouse
