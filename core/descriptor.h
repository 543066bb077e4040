// File descriptors inside a program that closes numbers it knows nothing of, as daemons do, and
// then gets them again for files of its own. Needs nothing else of core.
#pragma once

#include <sys/types.h>

#include <atomic>

namespace dormouse {

// Which file it is. No two that are open at the same time are equal.
struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  bool operator==(const FileIdentity&) const = default;
};

// Of the file behind a descriptor; all zero if there is none.
FileIdentity identity_of(int fd) noexcept;

// Owns a descriptor for as long as its number means the file that it meant at first: what the
// program has put in its place is never read, written or closed. A forked child may call get() and
// reset() on what its parent was changing.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) noexcept : identity_(identity_of(fd)), fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept { *this = static_cast<UniqueFd&&>(other); }
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd() { reset(); }

  // The number, to be asked for again before each call; -1: none, or the program has closed it.
  int get() const noexcept;
  bool is_open() const noexcept { return get() >= 0; }
  void reset() noexcept;

 private:
  FileIdentity identity_;  // changed only while fd_ is -1
  std::atomic<int> fd_{-1};
};

}  // namespace dormouse
