// What memory that the program maps itself needs of the engine that has the pools.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/held.h"
#include "core/status.h"
#include "core/tags.h"
#include "core/transition.h"

namespace dormouse {

class Pool;
struct Chunk;

class PoolsOwner {
 public:
  virtual Transition begin_transition() = 0;
  virtual Pool* pool_for(TagId tag, CUdevice device, CUresult* error) = 0;
  virtual const TagTable& tag_table() const noexcept = 0;
  // Whether anything can be copied there.
  virtual bool has_context(int device) = 0;
  virtual bool release_retained(int device) noexcept = 0;
  virtual Status wake_chunk(const Transition& transition, Pool& pool, const Chunk& chunk) = 0;
  // A chunk that may have slept has left its pool.
  virtual void chunk_left(const Transition& transition) noexcept = 0;
  // Once for each holder.
  virtual void say_held(Holder by, std::uint64_t bytes) noexcept = 0;

 protected:
  ~PoolsOwner() = default;
};

}  // namespace dormouse
