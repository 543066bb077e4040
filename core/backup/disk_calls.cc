// The system's calls, each as it is.
#include "core/backup/disk_calls.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

namespace dormouse {

const DiskCalls& system_disk_calls() noexcept {
  static const DiskCalls calls = [] {
    DiskCalls made;
    made.open = [](const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); };
    made.close = [](int fd) { return ::close(fd); };
    made.unlink = [](const char* path) { return ::unlink(path); };
    made.fstat = [](int fd, struct stat* out) { return ::fstat(fd, out); };
    made.fstatfs = [](int fd, struct statfs* out) { return ::fstatfs(fd, out); };
    made.flock = [](int fd, int operation) { return ::flock(fd, operation); };
    made.set_flags = [](int fd, int flags) { return ::fcntl(fd, F_SETFL, flags); };
    made.fallocate = [](int fd, int mode, off_t offset, off_t bytes) {
      return ::fallocate(fd, mode, offset, bytes);
    };
    made.fdatasync = [](int fd) { return ::fdatasync(fd); };
    made.pread = [](int fd, void* data, std::size_t bytes, off_t offset) {
      return ::pread(fd, data, bytes, offset);
    };
    made.pwrite = [](int fd, const void* data, std::size_t bytes, off_t offset) {
      return ::pwrite(fd, data, bytes, offset);
    };
    return made;
  }();
  return calls;
}

}  // namespace dormouse
