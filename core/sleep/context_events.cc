// What an engine does when contexts of the program come and go.
#include <exception>
#include <new>

#include "core/backup/content_hash.h"
#include "core/backup/device_kernels.h"
#include "core/log.h"
#include "core/memory/pool.h"
#include "core/sleep/engine.h"

namespace dormouse {

void Engine::context_created(CUcontext context, int device) noexcept {
  try {
    contexts_.created(context, device);
  } catch (const std::bad_alloc&) {
    // Its work is waited for if it allocates.
  }
}

void Engine::green_context_created(CUcontext context, int device) noexcept {
  try {
    contexts_.green_created(context, device);
  } catch (const std::bad_alloc&) {
    // It is taken for a context of its own.
  }
}

// What is kept in the context is given back while that can be done; registrations of host memory go
// with it.
void Engine::context_going(CUcontext context) noexcept {
  contexts_.retire(context);
  hasher_->forget(context, true);
  kernels_->forget(context, true);
  for_pools([&](Pool& pool) { pool.context_going(context); });
}

void Engine::context_gone(CUcontext context, bool gone) noexcept {
  if (!gone) {
    for_pools([&](Pool& pool) { pool.context_stays(context); });
    return contexts_.keep(context);
  }
  contexts_.forget(context);
  drop_peer_access(context);
  drop_blocks_of(context);
}

void Engine::context_destroyed(CUcontext context) noexcept {
  context_going(context);
  context_gone(context, true);
}

// Of a context that the hooks did not see go nothing is dropped that may be in use: it may have
// been a green one, whose memory is its primary context's.
void Engine::context_lost(CUcontext context, bool primary) noexcept {
  hasher_->forget(context, false);
  kernels_->forget(context, false);
  contexts_.forget(context);
  drop_peer_access(context);
  if (primary) return drop_blocks_of(context);
  for_pools([&](Pool& pool) { pool.context_lost(context); });
}

void Engine::drop_blocks_of(CUcontext context) noexcept {
  for_pools([&](Pool& pool) { pool.drop_context(context); });
}

template <typename Call>
void Engine::for_pools(Call call) noexcept {
  try {
    for (Pool* pool : all_pools()) call(*pool);
  } catch (const std::exception& error) {
    log().error("forgetting a destroyed context failed inside Dormouse: {}", error.what());
  }
}

}  // namespace dormouse
