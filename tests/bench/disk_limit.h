// What the disk of a directory writes and reads at most, for benchmarks to compare with: several
// threads, blocks of 4 MiB, past the page cache where the file system allows it.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/threads.h"
#include "tests/bench/loaded_driver.h"

namespace dormouse {

struct DiskLimit {
  double write = 0;  // GB/s, until the data is on the disk
  double read = 0;   // GB/s
  bool direct = false;
};

/// Writes and reads a file of `bytes`, and removes it. Ends the process if it cannot.
inline DiskLimit measure_disk(const std::string& directory, std::size_t bytes) {
  constexpr std::size_t kBlock = std::size_t{4} << 20;
  constexpr unsigned kThreads = 8;
  bytes = bytes / kBlock * kBlock;
  std::string path = directory + "/disk_limit.XXXXXX";
  int fd = mkostemp(path.data(), O_DIRECT);
  DiskLimit limit{0, 0, fd >= 0};
  if (fd < 0) fd = mkstemp(path.data());
  if (fd < 0) die("no file in " + directory);
  unlink(path.c_str());
  if (posix_fallocate(fd, 0, static_cast<off_t>(bytes)) != 0) die("no room in " + directory);
  const auto all_blocks = [&](auto&& work) {
    std::atomic<std::size_t> next{0};
    std::atomic<bool> failed{false};
    const auto begin = std::chrono::steady_clock::now();
    run_on_threads(std::min(kThreads, default_threads()), [&] {
      void* block = std::aligned_alloc(kBlock, kBlock);
      std::memset(block, 0x5a, kBlock);
      for (std::size_t at; (at = next.fetch_add(kBlock)) < bytes;) {
        if (work(block, kBlock, static_cast<off_t>(at)) != static_cast<ssize_t>(kBlock)) {
          failed = true;
        }
      }
      std::free(block);
    });
    if (fdatasync(fd) != 0 || failed) die("the disk of " + directory + " failed");
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    return static_cast<double>(bytes) / 1e9 / time.count();
  };
  limit.write = all_blocks(
      [&](void* block, std::size_t size, off_t at) { return pwrite(fd, block, size, at); });
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  limit.read = all_blocks(
      [&](void* block, std::size_t size, off_t at) { return pread(fd, block, size, at); });
  close(fd);
  return limit;
}

}  // namespace dormouse
