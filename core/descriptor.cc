// See descriptor.h.
#include "core/descriptor.h"

#include <sys/stat.h>
#include <unistd.h>

namespace dormouse {

FileIdentity identity_of(int fd) noexcept {
  struct stat info;
  return fd >= 0 && fstat(fd, &info) == 0 ? FileIdentity{info.st_dev, info.st_ino} : FileIdentity{};
}

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this == &other) return *this;
  reset();
  identity_ = other.identity_;
  fd_.store(other.fd_.load(std::memory_order_relaxed), std::memory_order_release);
  other.fd_.store(-1, std::memory_order_release);
  return *this;
}

int UniqueFd::get() const noexcept {
  const int fd = fd_.load(std::memory_order_acquire);
  return fd >= 0 && identity_of(fd) == identity_ ? fd : -1;
}

void UniqueFd::reset() noexcept {
  const int fd = fd_.exchange(-1, std::memory_order_acq_rel);
  if (fd >= 0 && identity_of(fd) == identity_) close(fd);
}

}  // namespace dormouse
