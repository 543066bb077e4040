// A file with the backups of one pool, and the images in it. Each image is a stretch of the file as
// long as its chunk, in which only the parts that are backed up have space. Used by DiskStore,
// Operation and the disk copies.
//
// The file holds content alone: what lies where, and with which hash, its process knows, and nobody
// reads it after that. The file goes with its last image.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backup/disk_calls.h"
#include "core/backup/image.h"
#include "core/descriptor.h"
#include "core/extents.h"
#include "core/process_identity.h"
#include "core/range.h"
#include "core/status.h"
#include "core/thread_annotations.h"

namespace dormouse {

class DiskStore;
class DiskImage;

class DiskFile {
 public:
  // Offsets, sizes and memory addresses of all I/O are multiples of this: what direct I/O needs.
  static constexpr std::size_t kBlockBytes = 4096;

  // A new file of mode 0600 at `path`. Every error is kIo, and leaves no file.
  static Status create(DiskStore& store, const std::string& path, std::shared_ptr<DiskFile>* out);
  // Closes and removes the file.
  ~DiskFile();
  DiskFile(const DiskFile&) = delete;
  DiskFile& operator=(const DiskFile&) = delete;

  // Opens the file again if the program closed its descriptor (as those do that close all they
  // know nothing of): nothing is ever read from or written to a file that is not this one. To be
  // asked at the beginning of every operation.
  Status reopen_if_lost();

  // Whole blocks. Interrupted and short calls go on where they ended. Thread-safe for different
  // places.
  Status write(const void* data, std::size_t bytes, std::uint64_t offset);
  Status read(void* data, std::size_t bytes, std::uint64_t offset);

  // Bytes that this user can still write to the file system; of one in memory no more than host
  // memory has left.
  Status available_bytes(std::uint64_t* out);
  // Space for a stretch of the file, so that writing it cannot fail for want of space. File systems
  // that know no such promise give none.
  Status get_space(std::uint64_t offset, std::uint64_t bytes);
  void drop_space(std::uint64_t offset, std::uint64_t bytes) noexcept;

  // What was written is on the disk, not only with the system, which could find out too late that
  // it cannot be written.
  Status sync();

  bool direct() const noexcept { return direct_.load(std::memory_order_relaxed); }
  const std::string& path() const noexcept { return path_; }

 private:
  friend class DiskImage;

  DiskFile(DiskStore& store, std::string path);
  Status open(int flags);
  Status error(const char* what, int number) const;
  bool is_ours(int fd, int* error_number) const;
  bool use_buffered_io() noexcept;
  Status transfer(bool writing, std::byte* data, std::size_t bytes, std::uint64_t offset);

  Status add_image(std::uint64_t bytes, std::uint64_t* offset);
  void remove_image(std::uint64_t offset, std::uint64_t bytes) noexcept;

  DiskStore& store_;
  const DiskCalls& calls_;
  const std::string path_;
  // Changed under file_mutex_, at the beginning of an operation, before any I/O on threads.
  int fd_ = -1;
  FileIdentity identity_;  // which file it is
  std::atomic<bool> direct_{false};

  Mutex file_mutex_;
  Extents free_ GUARDED_BY(file_mutex_);  // parts of the file that belong to no image
  std::size_t images_ GUARDED_BY(file_mutex_) = 0;
};

class DiskImage : public Image {
 public:
  // Images have space in units of this many bytes.
  static constexpr std::size_t kUnitBytes = std::size_t{256} << 10;

  static Status reserve(std::shared_ptr<DiskFile> file, CUdeviceptr chunk_address,
                        std::size_t bytes, std::unique_ptr<DiskImage>* out);
  ~DiskImage() override;

  // Bytes that get_space(ranges) would take from the file system.
  std::uint64_t missing_bytes(const Ranges& ranges) const;
  // Space for all of `ranges`. On error the image has space for a part of them.
  Status get_space(const Ranges& ranges);

  std::uint64_t held_bytes() const noexcept { return held_bytes_; }
  DiskFile& file() const noexcept { return *file_; }
  std::uint64_t offset() const noexcept { return offset_; }  // in the file
  CUdeviceptr chunk_address() const noexcept { return chunk_address_; }
  // The content will be restored at another address.
  void move_to(CUdeviceptr chunk_address) noexcept { chunk_address_ = chunk_address; }

 private:
  DiskImage(std::shared_ptr<DiskFile> file, CUdeviceptr chunk_address, std::size_t bytes);
  std::vector<bool> missing_units(const Ranges& ranges) const;

  const std::shared_ptr<DiskFile> file_;
  CUdeviceptr chunk_address_;
  std::uint64_t offset_ = 0;
  std::uint64_t held_bytes_ = 0;
  bool added_ = false;
  std::vector<bool> has_space_;  // per unit
};

}  // namespace dormouse
