// The chunks of one pool: reserved addresses, and physical memory that is created, mapped and made
// accessible in them. Used by Pool, whose lock protects it.
//
// Invariant: an address is reserved for the store's life.
#pragma once

#include <cuda.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/driver.h"
#include "core/extents.h"
#include "core/memory/chunk.h"
#include "core/memory/device_work.h"
#include "core/range.h"
#include "core/tags.h"

namespace dormouse {

class DeviceWaits;

struct PoolOptions {
  TagId tag = kNoTag;
  Tag info;
  CUdevice device = 0;
  int ordinal = 0;
  std::size_t max_chunk_bytes = 0;
  std::size_t retain_bytes = 0;
  std::size_t granularity = 0;                     // of physical memory on the device
  std::uint64_t device_bytes = 0;                  // the device's total memory
  bool gpu_direct_rdma = false;                    // as cudaMalloc's memory, where the device can
  bool unified_memory = false;                     // the device has the host's memory
  std::vector<int> peers;                          // devices with access at first
  std::chrono::milliseconds drain_timeout{30000};  // of operations
  std::atomic<std::uint64_t>* next_sequence = nullptr;  // of chunks, for all pools
  DeviceWaits* waits = nullptr;
  DeviceWork* work = nullptr;
};

class ChunkStore {
 public:
  // Told of each reservation before anything is handed out of it.
  using RegisterReservation = std::function<CUresult(const Range&)>;
  using Map = std::map<CUdeviceptr, std::unique_ptr<Chunk>>;

  // `options` must stay as long.
  ChunkStore(const Driver& driver, const PoolOptions& options,
             RegisterReservation register_reservation);
  // Gives everything back.
  ~ChunkStore();
  ChunkStore(const ChunkStore&) = delete;
  ChunkStore& operator=(const ChunkStore&) = delete;

  // By address: neighbours come together.
  const Map& all() const noexcept { return chunks_; }
  // The chunk around the address, or null.
  Chunk* at(CUdeviceptr address) const;

  // A new chunk, awake.
  CUresult make(std::size_t bytes, Chunk** out);
  // Unmaps and releases an awake chunk, and forgets it. False if the driver refused.
  bool release(Chunk& chunk) noexcept;
  // Forgets a chunk that has no memory. Its addresses are used again.
  void forget(Chunk& chunk) noexcept;

  // Memory that the program mapped comes and goes. Nothing has changed if it throws.
  Chunk& adopt(std::unique_ptr<Chunk>& chunk);
  std::unique_ptr<Chunk> disown(Chunk& chunk) noexcept;

  // For a chunk that an operation has begun; without the pool's lock.
  // Releases the physical memory of a chunk that falls asleep.
  CUresult unmap(Chunk& chunk) noexcept;
  // Gives a waking chunk physical memory; its content is undefined. Nothing is changed on failure.
  CUresult create(Chunk& chunk) const noexcept;
  CUresult map(const Chunk& chunk) const noexcept;
  // Gives back the physical memory of a chunk that is not mapped.
  void release_handle(Chunk& chunk) const noexcept;
  // Access for a mapped chunk that the program made.
  CUresult set_program_access(const Chunk& chunk) const noexcept;

  // Access for a run of mapped chunks of the pool's own that are neighbours, in one call.
  CUresult set_access(CUdeviceptr begin, std::size_t bytes) noexcept;

  // With the pool's lock again. Changes the access of a device for the chunks that have access now;
  // others get it when they wake. Nothing has changed on failure.
  CUresult set_peer_access(int device, bool enabled);
  std::vector<int> peers() const;

 private:
  void erase(CUdeviceptr address) noexcept;
  CUresult reserve(std::size_t bytes, CUdeviceptr* out);
  void return_address(const Chunk& chunk) noexcept;

  const Driver& driver_;
  const PoolOptions& options_;
  const RegisterReservation register_reservation_;
  // Protects peers_ and Chunk::accessible and, beside the pool's lock, which chunks there are.
  mutable std::mutex access_mutex_;
  std::vector<int> peers_;
  Ranges reservations_;  // in the order in which they were made
  Extents addresses_;    // reserved, without a chunk
  Map chunks_;
};

}  // namespace dormouse
