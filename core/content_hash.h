// A 128-bit hash of device memory, computed on the device: what tells changed content from
// unchanged without moving it. Used by Operation. The same function on the host is the reference
// for tests and for backups on disk.
//
// The hash tells content apart that differs by chance; it is no protection against an adversary who
// constructs two contents with one hash (he would have to run inside the program whose memory it
// is).
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "core/driver.h"

namespace dormouse {

struct ContentHash {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  bool zero = false;  // every byte is zero

  friend bool operator==(const ContentHash&, const ContentHash&) = default;
};

// A stretch of device memory; both a multiple of 16.
struct HashRange {
  CUdeviceptr address = 0;
  std::uint64_t bytes = 0;
};

// The hash of `bytes` (a multiple of 16) of host memory: the same value as the device computes.
ContentHash hash_on_host(const void* data, std::size_t bytes) noexcept;

class ContentHasher {
 public:
  explicit ContentHasher(const Driver& driver) : driver_(driver) {}
  ~ContentHasher();
  ContentHasher(const ContentHasher&) = delete;
  ContentHasher& operator=(const ContentHasher&) = delete;

  // Hashes every range in `context`, which need not be current. Needs a little free device memory
  // (48 bytes a range, 768 KiB at most). On failure `out` is undefined, and the driver's error is
  // returned. Thread-safe.
  CUresult hash(CUcontext context, const std::vector<HashRange>& ranges,
                std::vector<ContentHash>* out);

  // The context is about to be destroyed, and the module in it.
  void forget(CUcontext context);

 private:
  struct Loaded {
    CUmodule module = nullptr;
    CUfunction function = nullptr;
  };

  CUresult load(CUcontext context, CUfunction* function);
  CUresult hash_batch(CUfunction function, CUstream stream, CUdeviceptr buffer,
                      const HashRange* ranges, std::size_t count, ContentHash* out);

  const Driver& driver_;
  std::mutex modules_mutex_;  // protects modules_
  std::map<CUcontext, Loaded> modules_;
};

}  // namespace dormouse
