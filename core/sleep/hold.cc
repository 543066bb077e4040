// What stays awake since others hold its physical memory, or since the program wants it so.
#include <exception>

#include "core/log.h"
#include "core/memory/mapped_memory.h"
#include "core/memory/pool.h"
#include "core/sleep/background.h"
#include "core/sleep/engine.h"

namespace dormouse {

void Engine::say_held(Holder by, std::uint64_t bytes) noexcept {
  if (by == Holder::kProgram || !first_time(holder_name(by))) return;
  log().info(
      "tagged memory stays awake from now on, since others hold its physical memory: {} ({} bytes "
      "this time; the status tells how much)",
      holder_name(by), bytes);
}

// What is on its way is waited for.
CUresult Engine::wake_held(Pool* pool, const std::set<const Chunk*>& chunks) {
  if (chunks.empty()) return CUDA_SUCCESS;
  const Transition transition(transition_lock_);
  const Status status = wake_chunks(transition, {pool}, chunks);
  update_gate(transition);
  background_->woke();
  if (status.is_ok()) return CUDA_SUCCESS;
  log().error("memory that is to stay awake sleeps and could not be woken: {}", status.message());
  return status.driver() != CUDA_SUCCESS ? status.driver() : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult Engine::hold(CUdeviceptr address, std::size_t bytes, Holder by, Hold* hold) noexcept {
  Pool* const pool = pool_at(address);
  if (pool == nullptr) return mapped_->share_range(address, bytes, by);
  CUresult result = CUDA_SUCCESS;
  try {
    std::set<const Chunk*> not_awake;
    hold->blocks = pool->hold(address, bytes, by, &not_awake);
    hold->pool = pool;
    if (hold->blocks.empty()) return CUDA_ERROR_INVALID_VALUE;
    result = wake_held(pool, not_awake);
  } catch (const std::exception&) {
    result = CUDA_ERROR_OUT_OF_MEMORY;
  }
  result == CUDA_SUCCESS ? say_held(by, bytes) : let_go(*hold);
  return result;
}

void Engine::let_go(const Hold& hold) noexcept {
  if (hold.pool != nullptr) hold.pool->let_go(hold.blocks);
}

Status Engine::keep_awake(CUdeviceptr address, bool on, std::size_t* bytes) noexcept {
  Pool* const pool = pool_at(address);
  CUresult result = CUDA_SUCCESS;
  try {
    if (pool == nullptr) {
      result = mapped_->keep_awake(address, on, bytes);
    } else {
      std::set<const Chunk*> not_awake;
      *bytes = pool->keep_awake(address, on, &not_awake);
      result = wake_held(pool, not_awake);
      if (result != CUDA_SUCCESS) pool->keep_awake(address, false, &not_awake);
    }
  } catch (const std::exception&) {
    return {Code::kOutOfHostMemory, {}};
  }
  if (result == CUDA_SUCCESS) return Status::ok();
  *bytes = 0;
  const Code code = result == CUDA_ERROR_OUT_OF_MEMORY ? Code::kOutOfDeviceMemory : Code::kDriver;
  return {code, "the memory sleeps and could not be woken", result};
}

}  // namespace dormouse
