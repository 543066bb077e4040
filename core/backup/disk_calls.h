// The system calls that backups on disk need, as a struct of function pointers that is handed in:
// the system's own, or a test's that fail. Core's disk files make no other system call on files.
#pragma once

#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/types.h>

#include <cerrno>
#include <cstddef>

namespace dormouse {

// Each behaves as the call of its name: the result, errno, and short counts.
struct DiskCalls {
  int (*open)(const char* path, int flags, mode_t mode) = nullptr;
  int (*close)(int fd) = nullptr;
  int (*unlink)(const char* path) = nullptr;
  int (*fstat)(int fd, struct stat* out) = nullptr;
  int (*fstatfs)(int fd, struct statfs* out) = nullptr;
  int (*flock)(int fd, int operation) = nullptr;
  int (*set_flags)(int fd, int flags) = nullptr;  // fcntl(F_SETFL)
  int (*fallocate)(int fd, int mode, off_t offset, off_t bytes) = nullptr;
  int (*fdatasync)(int fd) = nullptr;
  ssize_t (*pread)(int fd, void* data, std::size_t bytes, off_t offset) = nullptr;
  ssize_t (*pwrite)(int fd, const void* data, std::size_t bytes, off_t offset) = nullptr;
};

// Calls again what a signal interrupted.
template <typename Call>
auto uninterrupted(Call&& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

// The system's.
const DiskCalls& system_disk_calls() noexcept;

}  // namespace dormouse
