// Figures that people and metrics read. Plain values, copied out under the owner's lock.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/held.h"
#include "core/tags.h"

namespace dormouse {

// One finished sleep or wake of one tag on one device, or of all of a request.
struct OperationStats {
  std::uint64_t bytes = 0;            // physical memory released or restored
  std::uint64_t copied_bytes = 0;     // content that went over the bus (or to the disk)
  std::uint64_t unchanged_bytes = 0;  // content that was known to be unchanged and not copied
  std::uint64_t differing_bytes =
      0;  // (wake, when verified) content that is not what fell asleep; 0 is right
  std::uint64_t unchecked_bytes =
      0;  // (wake, when verified) content that could not be checked; 0 is right
  std::uint64_t dropped_bytes = 0;  // (discard) kept content of memory that slept already, dropped
  std::vector<HeldBytes> held;      // (sleep) of the tags asked for, what stays awake
  std::uint32_t chunks = 0;
  double seconds = 0;    // wall time
  double unix_time = 0;  // when it ended; 0 = never
};

// One tag on one device. All sizes in bytes.
struct TagStats {
  std::string tag;
  Backup backup = Backup::kHost;
  int device = 0;               // the driver's ordinal
  std::uint64_t allocated = 0;  // in live blocks, as asked for
  std::uint64_t mapped = 0;     // physical device memory held now
  std::vector<HeldBytes> held;  // of `mapped`, what never sleeps
  std::uint64_t asleep = 0;     // physical device memory given back, to be restored on waking
  std::uint64_t backed_up = 0;  // host memory held for backups, kept ones after waking included
  std::uint64_t on_disk = 0;    // the same in files
  std::uint64_t peak_allocated = 0;
  std::uint64_t peak_mapped = 0;
  std::uint64_t blocks = 0;       // live
  std::uint64_t chunks = 0;       // awake and asleep
  std::uint64_t allocations = 0;  // ever
  std::uint64_t frees = 0;        // ever
  std::uint64_t sleeps = 0;
  std::uint64_t wakes = 0;
  OperationStats last_sleep;
  OperationStats last_wake;
};

// The operation that runs now, for people who wait for it.
struct Progress {
  bool active = false;
  std::string operation;          // "sleep", "wake" or ""
  std::uint64_t done_bytes = 0;   // copied, or (sleeping) known to need no copy
  std::uint64_t total_bytes = 0;  // 0 until it is known
  double seconds = 0;             // since it began
};

}  // namespace dormouse
