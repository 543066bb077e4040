// The copies of an operation between chunks and their backups: to and from host memory at once, one
// run for each device, while more are being added; to and from files at the end.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "core/backup/disk_transfer.h"
#include "core/backup/transfer.h"
#include "core/contexts.h"
#include "core/sleep/operation.h"
#include "core/status.h"

namespace dormouse {

class Copies {
 public:
  // `bytes` of chunks by device: it is copied in the contexts of these.
  Copies(const OperationEnv& env, const ContextPins& pins, Direction direction,
         const std::map<int, std::uint64_t>& bytes);

  // What the chunk's `copied` says. What its image had page-locked in a context that has gone since
  // is page-locked again.
  Status add(OperationChunk& item);
  // Begins with what has been added.
  void start();
  bool failed() const;
  // Nothing more will be added to host memory.
  void complete();
  // After complete(): returns when all host memory is ready; false if a copy has failed.
  bool wait_until_ready();
  // After complete(): returns when the item's copies have ended, false if they may not have since a
  // copy has failed.
  bool wait_for(const OperationChunk& item);
  // Ends all runs with host memory; the first error is returned.
  Status finish();
  // What goes to files or comes from them.
  Status finish_disk();

 private:
  CUfunction copy_kernel(int device, CUcontext context) const;

  const OperationEnv& env_;
  const ContextPins& pins_;
  const Direction direction_;
  std::map<int, std::unique_ptr<CopyRun>> runs_;  // by device, as the next two
  std::map<int, std::vector<PieceCopy>> plans_;
  std::map<int, std::vector<DiskCopy>> disk_;
};

}  // namespace dormouse
