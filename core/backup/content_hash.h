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
#include <vector>

#include "core/backup/device_kernels.h"
#include "core/driver.h"
#include "core/range.h"
#include "core/thread_annotations.h"

namespace dormouse {

struct ContentHash {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  bool zero = false;  // every byte is zero

  friend bool operator==(const ContentHash&, const ContentHash&) = default;
};

// The hash of `bytes` (a multiple of 16) of host memory: the same value as the device computes.
ContentHash hash_on_host(const void* data, std::size_t bytes) noexcept;

class ContentHasher {
 public:
  // Page-locked host memory that is kept for each context.
  static const std::size_t kBufferBytes;

  // `kernels` must stay as long.
  ContentHasher(const Driver& driver, DeviceKernels& kernels)
      : driver_(driver), kernels_(kernels) {}
  ~ContentHasher();
  ContentHasher(const ContentHasher&) = delete;
  ContentHasher& operator=(const ContentHasher&) = delete;

  // Hashes every range of addresses (both numbers multiples of 16) in `context`, which need not be
  // current. It takes no device memory and does not wait for copies, so that both may run at the
  // same time. On failure `out` is undefined, and the driver's error is returned. Thread-safe; one
  // call at a time runs.
  CUresult hash(CUcontext context, const Ranges& ranges, std::vector<ContentHash>* out);

  // Loads the kernel and gets host memory (kBufferBytes), which the first hash() of a context does
  // otherwise: some milliseconds. Thread-safe.
  CUresult prepare(CUcontext context);

  // What is kept for the context goes; if it is not `alive`, it has gone with the context. Before
  // DeviceKernels is told. Thread-safe.
  void forget(CUcontext context, bool alive) noexcept;

 private:
  // What is kept for a context.
  struct Launch {
    CUfunction function = nullptr;
    void* buffer = nullptr;  // page-locked host memory that the kernel reads and writes
    CUstream stream = nullptr;
  };

  // With the context current.
  CUresult load(CUcontext context, Launch** out) REQUIRES(hash_mutex_);
  void unload(const Launch& launch) noexcept;
  CUresult hash_batch(const Launch& launch, const Range* ranges, std::size_t count,
                      ContentHash* out);

  const Driver& driver_;
  DeviceKernels& kernels_;
  Mutex hash_mutex_;  // protects the buffers too
  std::map<CUcontext, Launch> launches_ GUARDED_BY(hash_mutex_);
};

}  // namespace dormouse
