// One physical handle and its mapping: the unit of sleep and of backup. Owned by a Pool.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/backup/disk_file.h"
#include "core/backup/host_image.h"
#include "core/backup/reaper.h"

namespace dormouse {

struct ProgramMapping;  // core/memory/mapped_memory.h

enum class ChunkState : std::uint8_t {
  kAwake,          // mapped; blocks are handed out of it
  kFallingAsleep,  // mapped; an operation backs it up
  kAsleep,         // not mapped; its content is in its backup, or was discarded
  kWaking,         // an operation restores it
};

// What an operation may read of a chunk in kFallingAsleep or kWaking belongs to that operation; all
// else is protected by the pool's lock.
struct Chunk {
  CUdeviceptr address = 0;                  // constant for life
  std::size_t bytes = 0;                    // constant for life; a multiple of the granularity
  CUmemGenericAllocationHandle handle = 0;  // 0 while asleep
  ChunkState state = ChunkState::kAwake;
  std::size_t live_blocks = 0;
  std::size_t held_blocks = 0;  // of these: with any, the chunk stays awake
  std::uint64_t sequence = 0;   // of its making in the process: lower is older
  // Number of the pool's next block when its last sleep began: blocks from then on are not in the
  // backup.
  std::uint64_t slept_before_block = 0;
  std::uint64_t era = 0;     // counts its sleeps that began
  bool small = false;        // of blocks that share chunks
  std::size_t empty_at = 0;  // where it stands in the pool's list, while no block is in it
  bool accessible = false;   // mapped, with access for the pool's devices
  bool held = false;         // background preparation uses it: it may not be released
  bool discarded = false;    // asleep without content: reads as zero after waking
  bool slept_outside =
      false;  // put to sleep by someone who does not know what the program will touch
  // Not null: memory that the program mapped itself, which is one block and was not made here. The
  // mapping outlives the chunk.
  const ProgramMapping* program = nullptr;
  // The backup: at most one of the two. It may outlive waking, to be reused by the next sleep.
  ImagePtr<HostImage> image;
  ImagePtr<DiskImage> disk_image;

  CUdeviceptr end() const noexcept { return address + bytes; }
  // Null if there is none.
  Image* backup() const noexcept {
    return image != nullptr ? static_cast<Image*>(image.get()) : disk_image.get();
  }
  void drop_backup() noexcept {
    image.reset();
    disk_image.reset();
  }
};

}  // namespace dormouse
