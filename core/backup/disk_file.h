// A file with the backups of one pool, and the images in it. Each image is a stretch of the file as
// long as its chunk, in which only the parts that are backed up have space. Used by DiskStore,
// Operation and the disk copies.
//
// The file begins with a header (what it is, whose, of which pool) and holds, after each finished
// sleep, an index of its content with hashes, so that it can be checked by itself. While it is
// written the header says that there is no index. The file goes with its last image.
#pragma once

#include <cuda.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/backup/disk_calls.h"
#include "core/backup/image.h"
#include "core/extents.h"
#include "core/process_identity.h"
#include "core/range.h"
#include "core/status.h"

namespace dormouse {

class DiskStore;
class DiskImage;

// The first block of a file, as it lies there (little endian, as all machines with CUDA are).
struct DiskHeader {
  static constexpr char kMagic[16] = {'D', 'O', 'R', 'M', 'O', 'U', 'S', 'E',
                                      ' ', 'B', 'A', 'C', 'K', 'U', 'P', '\n'};
  static constexpr std::uint32_t kVersion = 1;

  char magic[16] = {};
  std::uint32_t version = 0;
  std::int32_t device = 0;  // the driver's ordinal
  std::uint64_t pid = 0;
  std::uint64_t start_time = 0;
  std::uint64_t index_offset = 0;
  std::uint64_t index_entries = 0;
  std::uint64_t index_complete = 0;  // 0: the file is being written
  std::uint64_t index_low = 0;       // the hash of the index, padded with zeros to whole blocks
  std::uint64_t index_high = 0;
  char tag[80] = {};
};

// One stretch of content in the index.
struct DiskIndexEntry {
  std::uint64_t file_offset = 0;
  std::uint64_t bytes = 0;
  std::uint64_t address = 0;  // of the content on the device
  std::uint64_t low = 0;      // the hash, where `hashed`
  std::uint64_t high = 0;
  std::uint32_t hashed = 0;
  std::uint32_t zero = 0;  // the content is all zero and not in the file
};

static_assert(sizeof(DiskHeader) == 160 && sizeof(DiskIndexEntry) == 48, "the file's format");

// Memory that direct I/O may use: begins at a block and is a whole number of them.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  std::byte* data() const noexcept { return data_; }
  std::size_t bytes() const noexcept { return bytes_; }  // all zero at first

 private:
  const std::size_t bytes_;
  std::byte* const data_;
};

class DiskFile {
 public:
  // Offsets, sizes and memory addresses of all I/O are multiples of this: what direct I/O needs.
  static constexpr std::size_t kBlockBytes = 4096;

  // A new file of mode 0600 at `path`, with its header written. Every error is kIo, and leaves no
  // file.
  static Status create(DiskStore& store, const std::string& path, const ProcessIdentity& owner,
                       const std::string& tag, int device, std::shared_ptr<DiskFile>* out);
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

  // Declares the index void: before anything that it describes is changed.
  Status begin_writing();
  // What was written is on the disk, and the index describes all images. The operation lock is
  // held, so that no image changes meanwhile.
  Status seal();
  // Whether the index describes the file now.
  bool is_sealed();
  // Reads everything that the index names and compares it with its hash.
  Status check();

  bool direct() const noexcept { return direct_.load(std::memory_order_relaxed); }
  const std::string& path() const noexcept { return path_; }

 private:
  friend class DiskImage;

  DiskFile(DiskStore& store, std::string path);
  Status open(int flags);
  Status error(const char* what, int number) const;
  Status write_header();
  Status invalidate_locked();
  std::vector<DiskIndexEntry> index_locked() const;
  Status write_index(const std::vector<DiskIndexEntry>& entries);
  Status check_entry(const DiskIndexEntry& entry, AlignedBuffer& buffer);
  bool is_ours(int fd, int* error_number) const;
  bool use_buffered_io() noexcept;
  Status transfer(bool writing, std::byte* data, std::size_t bytes, std::uint64_t offset);

  Status add_image(DiskImage* image, std::uint64_t bytes, std::uint64_t* offset);
  void remove_image(std::uint64_t offset, std::uint64_t bytes) noexcept;

  DiskStore& store_;
  const DiskCalls& calls_;
  const std::string path_;
  // Changed under file_mutex_, at the beginning of an operation, before any I/O on threads.
  int fd_ = -1;
  dev_t device_number_ = 0;  // which file it is
  ino_t inode_ = 0;
  std::atomic<bool> direct_{false};

  std::mutex file_mutex_;  // protects all below
  DiskHeader header_;
  AlignedBuffer header_block_{sizeof(DiskHeader)};  // so that writing it needs no memory
  std::uint64_t index_bytes_ = 0;  // that the last index occupies at header_.index_offset
  Extents free_;                   // parts of the file that belong to no image and no index
  std::map<std::uint64_t, DiskImage*> images_;  // by offset
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
