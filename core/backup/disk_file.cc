// Files of backups and the images in them; see disk_file.h.
#include "core/backup/disk_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <system_error>
#include <utility>

#include "core/backup/disk_store.h"
#include "core/backup/host_image.h"
#include "core/backup/system_memory.h"
#include "core/log.h"
#include "core/round_up.h"

namespace dormouse {
namespace {

// Where a file's images may lie: far more than any file system holds.
constexpr std::uint64_t kMaxFileBytes = std::uint64_t{1} << 56;
// A direct transfer that ends inside a block is begun again at that block; one that never gets
// further has failed.
constexpr int kMaxStalls = 8;

// Writing beyond the process's limit (ulimit -f) would end it with a signal.
bool beyond_size_limit(std::uint64_t end) {
  rlimit limit{};
  if (getrlimit(RLIMIT_FSIZE, &limit) != 0) return false;
  return limit.rlim_cur != RLIM_INFINITY && end > limit.rlim_cur;
}

}  // namespace

// --- The file as the system has it

DiskFile::DiskFile(DiskStore& store, std::string path)
    : store_(store), calls_(store.calls()), path_(std::move(path)) {
  free_.insert(0, kMaxFileBytes, kBlockBytes, kMaxFileBytes);
}

Status DiskFile::create(DiskStore& store, const std::string& path, std::shared_ptr<DiskFile>* out) {
  // From here on the destructor takes back what was done.
  std::shared_ptr<DiskFile> file(new DiskFile(store, path));
  Status status = file->open(O_CREAT | O_EXCL);
  if (status.is_ok()) *out = std::move(file);
  return status;
}

DiskFile::~DiskFile() {
  int ignored = 0;
  if (fd_ >= 0 && is_ours(fd_, &ignored)) calls_.close(fd_);  // never again: it may be gone even so
  store_.remove_path(path_);
}

Status DiskFile::error(const char* what, int number) const {
  try {
    return {Code::kIo, fmt::format("{} the backup file {} failed: {}{}", what, path_,
                                   std::system_category().message(number),
                                   number == ENOSPC || number == EDQUOT
                                       ? "; free some space, or sleep fewer tags"
                                       : "")};
  } catch (...) {
    return {Code::kIo, {}};
  }
}

// Direct I/O where the file system takes it (tmpfs, for one, does not).
Status DiskFile::open(int flags) {
  flags |= O_RDWR | O_CLOEXEC | O_NOFOLLOW;
  int fd = uninterrupted([&] { return calls_.open(path_.c_str(), flags | O_DIRECT, 0600); });
  const bool direct = fd >= 0;
  const bool refused = fd < 0 && errno == EINVAL;
  const int open_error = errno;
  // A refusal of O_DIRECT can come after the file was made: what exists then is ours.
  if ((flags & O_CREAT) != 0 && (direct || refused)) {
    try {
      store_.add_path(path_);
    } catch (const std::bad_alloc&) {
      if (direct) calls_.close(fd);
      calls_.unlink(path_.c_str());
      throw;
    }
  }
  if (!direct && !refused) return error("opening", open_error);
  if (refused)
    fd = uninterrupted([&] { return calls_.open(path_.c_str(), flags & ~O_EXCL, 0600); });
  if (fd < 0) return error("opening", errno);
  // Tells those who look for files of dead processes that this one lives. Not every file system has
  // locks: there they take nothing.
  (void)uninterrupted([&] { return calls_.flock(fd, LOCK_EX); });
  struct stat found {};
  const int result = uninterrupted([&] { return calls_.fstat(fd, &found); });
  const int number = result != 0 ? errno : ENOENT;
  const FileIdentity identity{found.st_dev, found.st_ino};
  const bool other = identity_ != FileIdentity{} && identity != identity_;
  if (result != 0 || found.st_nlink == 0 || other) {
    calls_.close(fd);
    return error("opening", number);
  }
  fd_ = fd;
  identity_ = identity;
  direct_.store(direct, std::memory_order_relaxed);
  return Status::ok();
}

bool DiskFile::is_ours(int fd, int* error_number) const {
  struct stat found {};
  *error_number = 0;
  if (uninterrupted([&] { return calls_.fstat(fd, &found); }) != 0) {
    *error_number = errno;
    // Only a closed descriptor says EBADF. Any other failure says nothing about whose it is.
    return errno != EBADF;
  }
  return FileIdentity{found.st_dev, found.st_ino} == identity_;
}

Status DiskFile::reopen_if_lost() {
  MutexLock lock(file_mutex_);
  int number = 0;
  const bool ours = is_ours(fd_, &number);
  if (ours) return number == 0 ? Status::ok() : error("looking at", number);
  log().warn("the program closed the descriptor of the backup file {}: it is opened again", path_);
  fd_ = -1;
  return open(0);
}

bool DiskFile::use_buffered_io() noexcept {
  if (uninterrupted([&] { return calls_.set_flags(fd_, 0); }) != 0) return false;
  direct_.store(false, std::memory_order_relaxed);
  return true;
}

Status DiskFile::transfer(bool writing, std::byte* data, std::size_t bytes, std::uint64_t offset) {
  const char* const what = writing ? "writing" : "reading";
  std::size_t done = 0;
  int stalls = 0;
  while (done < bytes) {
    const auto place = static_cast<off_t>(offset + done);
    const bool was_direct = direct();
    const ssize_t result = uninterrupted([&] {
      return writing ? calls_.pwrite(fd_, data + done, bytes - done, place)
                     : calls_.pread(fd_, data + done, bytes - done, place);
    });
    if (result < 0) {
      const int number = errno;
      // A file system may take the flag and refuse the I/O.
      if (number == EINVAL && was_direct && use_buffered_io()) continue;
      return error(what, number);
    }
    // On with whole blocks: direct I/O goes on nowhere else.
    const std::size_t whole = static_cast<std::size_t>(result) / kBlockBytes * kBlockBytes;
    done += whole;
    if (whole == 0 && ++stalls == kMaxStalls) return error(what, EIO);
  }
  return Status::ok();
}

Status DiskFile::write(const void* data, std::size_t bytes, std::uint64_t offset) {
  if (beyond_size_limit(offset + bytes)) return error("writing", EFBIG);
  // transfer() does not write to memory that it writes out.
  return transfer(true, const_cast<std::byte*>(static_cast<const std::byte*>(data)), bytes, offset);
}

Status DiskFile::read(void* data, std::size_t bytes, std::uint64_t offset) {
  return transfer(false, static_cast<std::byte*>(data), bytes, offset);
}

// --- Space

Status DiskFile::available_bytes(std::uint64_t* out) {
  struct statfs found {};
  if (uninterrupted([&] { return calls_.fstatfs(fd_, &found); }) != 0)
    return error("asking for the free space of", errno);
  *out = static_cast<std::uint64_t>(found.f_bavail) * static_cast<std::uint64_t>(found.f_frsize);
  if (found.f_type == TMPFS_MAGIC || found.f_type == RAMFS_MAGIC) {
    const std::uint64_t memory = available_host_memory();
    *out = std::min(*out, memory - std::min(memory, HostMemory::kMarginBytes));
  }
  return Status::ok();
}

Status DiskFile::get_space(std::uint64_t offset, std::uint64_t bytes) {
  if (beyond_size_limit(offset + bytes)) return error("getting space for", EFBIG);
  const int result = uninterrupted([&] {
    return calls_.fallocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  });
  if (result == 0 || errno == EOPNOTSUPP || errno == ENOSYS) return Status::ok();
  return error("getting space for", errno);
}

// Where this is refused the space is used again by the next image there, and goes with the file.
void DiskFile::drop_space(std::uint64_t offset, std::uint64_t bytes) noexcept {
  (void)uninterrupted([&] {
    return calls_.fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                            static_cast<off_t>(offset), static_cast<off_t>(bytes));
  });
}

Status DiskFile::add_image(std::uint64_t bytes, std::uint64_t* offset) {
  MutexLock lock(file_mutex_);
  const auto found = free_.take(bytes, DiskImage::kUnitBytes);
  if (!found) return error("finding room in", EFBIG);
  *offset = *found;
  ++images_;
  return Status::ok();
}

void DiskFile::remove_image(std::uint64_t offset, std::uint64_t bytes) noexcept {
  MutexLock lock(file_mutex_);
  int number = 0;
  const bool last = --images_ == 0;  // the file goes as a whole
  if (!last && store_.in_owner() && is_ours(fd_, &number) && number == 0) {
    drop_space(offset, bytes);  // a refusal may have left more than the image counts
  }
  try {
    free_.insert(offset, bytes, kBlockBytes, kMaxFileBytes);
  } catch (const std::bad_alloc&) {
    // This place in the file is not used again.
  }
}

Status DiskFile::sync() {
  if (direct() || uninterrupted([&] { return calls_.fdatasync(fd_); }) == 0) return Status::ok();
  return error("synchronizing", errno);
}

// --- Images

DiskImage::DiskImage(std::shared_ptr<DiskFile> file, CUdeviceptr chunk_address, std::size_t bytes)
    : file_(std::move(file)),
      chunk_address_(chunk_address),
      has_space_((bytes + kUnitBytes - 1) / kUnitBytes, false) {}

Status DiskImage::reserve(std::shared_ptr<DiskFile> file, CUdeviceptr chunk_address,
                          std::size_t bytes, std::unique_ptr<DiskImage>* out) {
  std::unique_ptr<DiskImage> image(new DiskImage(std::move(file), chunk_address, bytes));
  Status status = image->file_->add_image(image->has_space_.size() * kUnitBytes, &image->offset_);
  if (!status.is_ok()) return status;
  image->added_ = true;
  *out = std::move(image);
  return Status::ok();
}

DiskImage::~DiskImage() {
  if (added_) file_->remove_image(offset_, has_space_.size() * kUnitBytes);
}

std::vector<bool> DiskImage::missing_units(const Ranges& ranges) const {
  std::vector<bool> missing(has_space_.size(), false);
  for (const Range& range : ranges) {
    const std::size_t last = (range.end() - 1) / kUnitBytes;
    for (std::size_t unit = range.begin / kUnitBytes; unit <= last; ++unit)
      missing[unit] = !has_space_[unit];
  }
  return missing;
}

std::uint64_t DiskImage::missing_bytes(const Ranges& ranges) const {
  const std::vector<bool> missing = missing_units(ranges);
  return static_cast<std::uint64_t>(std::count(missing.begin(), missing.end(), true)) * kUnitBytes;
}

Status DiskImage::get_space(const Ranges& ranges) {
  const std::vector<bool> missing = missing_units(ranges);
  for (std::size_t unit = 0; unit < missing.size(); ++unit) {
    std::size_t end = unit;
    while (end < missing.size() && missing[end]) ++end;
    if (end == unit) continue;
    const std::uint64_t bytes = (end - unit) * kUnitBytes;
    Status status = file_->get_space(offset_ + unit * kUnitBytes, bytes);
    if (!status.is_ok()) return status;
    held_bytes_ += bytes;
    std::fill(has_space_.begin() + static_cast<std::ptrdiff_t>(unit),
              has_space_.begin() + static_cast<std::ptrdiff_t>(end), true);
    unit = end - 1;
  }
  return Status::ok();
}

}  // namespace dormouse
