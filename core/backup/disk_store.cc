// The directory of backup files; see disk_store.h.
#include "core/backup/disk_store.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <system_error>
#include <vector>

#include "core/log.h"

namespace dormouse {
namespace {

constexpr char kPrefix[] = "dormouse-";
constexpr char kSuffix[] = ".backup";

// True only if it is certain: the number means nothing in another container or on another machine
// that shares the directory, and where /proc cannot be read nothing is known.
bool is_gone(const ProcessIdentity& owner, const ProcessIdentity& self) {
  if (self.boot_id.empty() || self.pid_namespace == 0 || self.start_ticks == 0) return false;
  if (owner.boot_id != self.boot_id || owner.pid_namespace != self.pid_namespace) return false;
  // exec keeps the process and its identity, but no file open: the lock tells.
  if (owner == self) return true;
  const auto start = start_ticks_of(std::to_string(owner.pid));
  return !start || *start != owner.start_ticks;
}

std::string file_name(const ProcessIdentity& owner, unsigned number) {
  return fmt::format("{}{}-{}-{}-{}-{}{}", kPrefix, owner.boot_id, owner.pid_namespace, owner.pid,
                     owner.start_ticks, number, kSuffix);
}

// The owner, if this is such a name.
std::optional<ProcessIdentity> owner_of(const std::string& name) {
  char boot_id[33] = {};
  unsigned long long pid_namespace = 0;
  unsigned long long pid = 0;
  unsigned long long start = 0;
  unsigned number = 0;
  if (std::sscanf(name.c_str(), "dormouse-%32[0-9a-f]-%llu-%llu-%llu-%u.backup", boot_id,
                  &pid_namespace, &pid, &start, &number) != 5) {
    return std::nullopt;
  }
  const ProcessIdentity owner{boot_id, pid_namespace, pid, start};
  if (file_name(owner, number) != name) return std::nullopt;
  return owner;
}

std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  DIR* opened = opendir(directory.c_str());
  if (opened == nullptr) return names;
  while (const dirent* entry = readdir(opened)) names.emplace_back(entry->d_name);
  closedir(opened);
  return names;
}

}  // namespace

DiskStore::DiskStore(const DiskCalls& calls, std::string directory, std::string option)
    : calls_(calls),
      option_(std::move(option)),
      self_(own_identity()),
      directory_(std::move(directory)) {}

bool DiskStore::configured() const noexcept {
  const MutexLock lock(store_mutex_);
  return !directory_.empty();
}

std::string DiskStore::directory() const {
  const MutexLock lock(store_mutex_);
  return directory_;
}

void DiskStore::set_directory(std::string directory) noexcept {
  const MutexLock lock(store_mutex_);
  if (directory == directory_) return;
  directory_ = std::move(directory);
  files_.clear();
}

bool DiskStore::in_owner() const noexcept {
  return static_cast<std::uint64_t>(getpid()) == self_.pid;
}

// Others must not be able to read, replace or plant what this process restores.
Status DiskStore::check_directory(const std::string& directory) const {
  if (directory.empty()) {
    return {
        Code::kUnsupported,
        fmt::format("backups on disk need a directory: set {} when the program starts", option_)};
  }
  const int fd = uninterrupted(
      [&] { return calls_.open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0); });
  if (fd < 0) {
    const int number = errno;
    return {Code::kIo,
            fmt::format("the directory for backups, {}, cannot be opened: {}; {}", directory,
                        std::system_category().message(number),
                        number == ENOENT ? "create it (mkdir -m 700)"
                                         : "name a directory of your own in " + option_)};
  }
  struct stat found {};
  struct statfs file_system {};
  int result = uninterrupted([&] { return calls_.fstat(fd, &found); });
  if (result == 0) result = uninterrupted([&] { return calls_.fstatfs(fd, &file_system); });
  const int number = errno;
  calls_.close(fd);
  if (result != 0) {
    return {Code::kIo, fmt::format("the directory for backups, {}, cannot be inspected: {}",
                                   directory, std::system_category().message(number))};
  }
  if (found.st_uid != geteuid()) {
    return {Code::kIo, fmt::format("the directory for backups, {}, belongs to user {}, and this "
                                   "process is user {}'s: name a directory of your own in {}",
                                   directory, found.st_uid, geteuid(), option_)};
  }
  if ((found.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return {Code::kIo, fmt::format("others may write to the directory for backups, {} (mode "
                                   "{:o}): chmod go-w it, or name another in {}",
                                   directory, found.st_mode & 07777, option_)};
  }
  if ((file_system.f_flags & ST_RDONLY) != 0) {
    return {Code::kIo, fmt::format("the directory for backups, {}, is on a file system that is "
                                   "mounted read-only: name another in {}",
                                   directory, option_)};
  }
  return Status::ok();
}

void DiskStore::remove_leftovers() noexcept {
  try {
    const std::string directory = this->directory();
    if (directory.empty()) return;
    const Status status = check_directory(directory);
    if (!status.is_ok()) {
      log().warn("{}. Until then, sleeps that need it are refused", status.message());
      return;
    }
    for (const std::string& name : names_in(directory)) remove_if_left(directory, name);
  } catch (const std::exception& error) {
    log().warn("looking for old backup files failed: {}", error.what());
  }
}

void DiskStore::remove_if_left(const std::string& directory, const std::string& name) noexcept {
  try {
    const auto owner = owner_of(name);
    if (!owner || !is_gone(*owner, self_)) return;
    const std::string path = directory + "/" + name;
    const int fd = calls_.open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0);
    if (fd < 0) return;
    struct stat found {};
    if (calls_.flock(fd, LOCK_EX | LOCK_NB) == 0 && calls_.fstat(fd, &found) == 0 &&
        S_ISREG(found.st_mode) && found.st_uid == geteuid()) {
      if (calls_.unlink(path.c_str()) == 0) {
        log().info("removed {}, left by process {}, which is gone", path, owner->pid);
      } else {
        log().warn("{}, left by process {}, cannot be removed: {}", path, owner->pid,
                   std::system_category().message(errno));
      }
    }
    calls_.close(fd);
  } catch (const std::exception& error) {
    log().warn("looking at {} failed: {}", name, error.what());
  }
}

Status DiskStore::file_for(TagId tag, int device, std::shared_ptr<DiskFile>* out) {
  static std::atomic<unsigned> next_number{0};
  std::string directory;
  {
    MutexLock lock(store_mutex_);
    if (ended_ || !in_owner())
      return {Code::kIo, "the process is ending, or was forked: no files are made"};
    *out = files_[{tag, device}].lock();
    directory = directory_;
  }
  if (*out != nullptr) return (*out)->reopen_if_lost();
  Status status = check_directory(directory);
  if (!status.is_ok()) return status;
  const std::string path = directory + "/" + file_name(self_, next_number.fetch_add(1));
  status = DiskFile::create(*this, path, out);
  if (!status.is_ok()) return status;
  MutexLock lock(store_mutex_);
  files_[{tag, device}] = *out;
  return Status::ok();
}

void DiskStore::add_path(const std::string& path) {
  MutexLock lock(store_mutex_);
  paths_.insert(path);
}

void DiskStore::remove_path(const std::string& path) noexcept {
  MutexLock lock(store_mutex_);
  if (paths_.erase(path) == 0 || !in_owner()) return;
  if (calls_.unlink(path.c_str()) == 0 || errno == ENOENT) return;
  if (calls_.unlink(path.c_str()) == 0 || errno == ENOENT) return;  // what stays is seen by no one
  const int number = errno;
  log().error("the backup file {} cannot be removed: error {}", path, number);
}

void DiskStore::remove_files() noexcept {
  // A forked child may have inherited the lock from a thread that it does not have.
  if (!in_owner()) return;
  MutexLock lock(store_mutex_);
  ended_ = true;
  for (const std::string& path : paths_) {
    if (calls_.unlink(path.c_str()) != 0) calls_.unlink(path.c_str());
  }
  paths_.clear();
}

}  // namespace dormouse
