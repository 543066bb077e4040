// Memory that the program makes and maps itself (cuMemCreate, cuMemMap: JAX does) while a tag is in
// force: it sleeps and wakes as what the tag's pools hand out, at the addresses that the program
// chose.
//
// The program gets a name of ours in place of the driver's handle, since the handle changes with
// every sleep; all functions that take or give a handle pass through here. A handle whose mapping
// its own device may read and write is a chunk of the tag's pool (Pool::adopt); before that, and
// once the program shares it (with another process, a multicast object, a second address), it is
// the program's alone and stays awake.
//
// Invariants: a name is known from create() until the program has released it as often as it got it
// and its last mapping is gone. What sleeps keeps its content also when the program unmaps it and
// maps it somewhere else. Locks are taken in the order: the engine's operation lock, ours, a
// pool's.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/driver.h"
#include "core/held.h"
#include "core/memory/chunk.h"
#include "core/memory/pools_owner.h"
#include "core/stats.h"
#include "core/tags.h"
#include "core/thread_annotations.h"

namespace dormouse {

class Pool;
struct BlockInfo;

// Where the program mapped a handle, and who may access it there.
struct ProgramMapping {
  CUdeviceptr address = 0;
  std::size_t bytes = 0;
  CUmemAllocationProp properties{};
  std::vector<CUmemAccessDesc> access;  // one for each location, as last set

  CUdeviceptr end() const noexcept { return address + bytes; }
};

// All functions are thread-safe, throw nothing, and return what the driver's function of the name
// would, for handles and addresses that are not known here as well. While a sleep or a wake runs
// they wait for its end, create(), release() and the queries excepted.
class MappedMemory {
 public:
  MappedMemory(PoolsOwner& engine, const Driver& driver);
  ~MappedMemory();
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  // Whether any handle is known; false: the driver can be asked at once. Lock-free.
  bool any() const noexcept { return count_.load(std::memory_order_acquire) != 0; }

  // As cuMemCreate, for a tag. Only memory of a device is taken; other requests are the driver's.
  CUresult create(TagId tag, CUmemGenericAllocationHandle* handle, std::size_t bytes,
                  const CUmemAllocationProp* properties, unsigned long long flags) noexcept;
  CUresult release(CUmemGenericAllocationHandle handle) noexcept;
  CUresult map(CUdeviceptr address, std::size_t bytes, std::size_t offset,
               CUmemGenericAllocationHandle handle, unsigned long long flags) noexcept;
  CUresult unmap(CUdeviceptr address, std::size_t bytes) noexcept;
  CUresult set_access(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* access,
                      std::size_t count) noexcept;

  // The handle (or those mapped in the range) leaves its pool, awake, because it is about to be
  // used in a way that a sleep would break. `real` (may be null) is the driver's handle, or
  // `handle` itself if it is not known here.
  CUresult share(CUmemGenericAllocationHandle handle, Holder by,
                 CUmemGenericAllocationHandle* real) noexcept;
  CUresult share_range(CUdeviceptr address, std::size_t bytes, Holder by) noexcept;
  // What is mapped around `address` stays awake for as long as the program wants; `bytes` is its
  // size, 0 if it is not known here.
  CUresult keep_awake(CUdeviceptr address, bool on, std::size_t* bytes) noexcept;

  // As cuMemRetainAllocationHandle and the other queries. False: not known here, ask the driver.
  bool retain(CUdeviceptr address, CUmemGenericAllocationHandle* handle) noexcept;
  bool properties(CUmemGenericAllocationHandle handle, CUmemAllocationProp* properties) noexcept;
  // What the driver knows itself while it is awake; `block->asleep` is true while it may not know
  // it.
  bool find(CUdeviceptr address, BlockInfo* block) noexcept;
  bool access(CUdeviceptr address, const CUmemLocation& location,
              unsigned long long* flags) noexcept;
  // Whether anything that is not awake is mapped in the range.
  bool any_asleep(CUdeviceptr address, std::size_t bytes) noexcept;

  // Adds what is in no pool to the figures of its tag and device: what stays awake, and the backups
  // of what the program unmapped in its sleep.
  void add_figures(TagStats* stats);
  // Drops the backups of what the program unmapped in its sleep, of the tags (empty = all), and
  // returns the bytes of content that they held. By Engine, which holds its transition lock.
  std::uint64_t discard_unmapped(const std::vector<std::string>& tags);

  // Before a sleep, by Engine, which holds its transition lock: memory that could not join its pool
  // for want of a context is tried again.
  void adopt_rest(const Transition& transition) noexcept;

 private:
  // Its address is the program's name for it: no other live object has it, the driver's included.
  struct Handle {
    TagId tag = kNoTag;
    std::size_t bytes = 0;
    CUmemAllocationProp properties{};
    unsigned references = 1;  // the program's
    std::size_t mappings = 0;
    Holder held = Holder::kNobody;          // with any, it stays awake
    CUmemGenericAllocationHandle real = 0;  // unless a chunk has it, or it sleeps unmapped
    std::unique_ptr<Chunk> parked;          // unmapped in its sleep: its content

    CUmemGenericAllocationHandle name() const noexcept {
      return reinterpret_cast<CUmemGenericAllocationHandle>(this);
    }
  };
  struct Mapping : ProgramMapping {
    Handle* of = nullptr;
    Pool* pool = nullptr;  // of the tag; null: the program's alone
    Chunk* chunk = nullptr;
  };
  using Mappings = std::map<CUdeviceptr, Mapping>;

  Mutex mutex_;

  Handle* known(CUmemGenericAllocationHandle name) const noexcept REQUIRES(mutex_);
  Mappings::iterator first_after(CUdeviceptr address) noexcept REQUIRES(mutex_);
  Mapping* mapping_at(CUdeviceptr address) noexcept REQUIRES(mutex_);
  std::vector<Mapping*> mappings_in(CUdeviceptr address, std::size_t bytes) REQUIRES(mutex_);
  static CUdeviceptr end_of(CUdeviceptr address, std::size_t bytes) noexcept {
    return bytes < ~address ? address + bytes : ~CUdeviceptr{0};
  }
  static bool same(const CUmemLocation& a, const CUmemLocation& b) noexcept {
    return a.type == b.type && a.id == b.id;
  }
  static bool asleep(const Mapping& mapping);
  static bool mapped_by_driver(const Mapping& mapping);
  static bool writable(const Mapping& mapping, const std::vector<CUmemAccessDesc>& access) noexcept;
  static bool whole_in(const Mapping& mapping, CUdeviceptr address, std::size_t bytes) noexcept;
  CUresult create_real(Handle& handle);
  CUresult map_locked(CUdeviceptr address, std::size_t bytes, std::size_t offset, Handle& handle,
                      unsigned long long flags, const Transition& transition) REQUIRES(mutex_);
  CUresult unmap_locked(CUdeviceptr address, std::size_t bytes,
                        const std::vector<Mapping*>& mappings, const Transition& transition)
      REQUIRES(mutex_);
  CUresult set_access_locked(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* access,
                             std::size_t count, const std::vector<Mapping*>& mappings,
                             const Transition& transition) REQUIRES(mutex_);
  CUresult adopt(Mapping& mapping, const Transition& transition) REQUIRES(mutex_);
  CUresult wake(Mapping& mapping, const Transition& transition) REQUIRES(mutex_);
  CUresult wake_parked(Mapping& mapping, const Transition& transition) REQUIRES(mutex_);
  CUresult share_locked(Handle& handle, Holder by, const Transition& transition) REQUIRES(mutex_);
  std::unique_ptr<Chunk> take_back(Mapping& mapping) noexcept REQUIRES(mutex_);
  void forget(Mapping& mapping, const Transition& transition) noexcept REQUIRES(mutex_);
  void forget_if_gone(Handle& handle) noexcept REQUIRES(mutex_);

  PoolsOwner& engine_;
  const Driver& driver_;
  std::atomic<std::size_t> count_{0};  // of handles_

  // By our name.
  std::map<CUmemGenericAllocationHandle, std::unique_ptr<Handle>> handles_ GUARDED_BY(mutex_);
  Mappings mappings_ GUARDED_BY(mutex_);  // of handles_
};

}  // namespace dormouse
