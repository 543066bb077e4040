// How an engine allocates and frees, and what it does when the device is full.
#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>

#include "core/log.h"
#include "core/memory/pool.h"
#include "core/sleep/background.h"
#include "core/sleep/engine.h"
#include "core/sleep/gate.h"

namespace dormouse {
namespace {

// Between looks at what the device has passed, for a full device; twice as long each time.
constexpr std::chrono::milliseconds kLongestPause{100};

}  // namespace

CUresult Engine::allocate(TagId tag, std::size_t bytes, const CUstream* stream,
                          CUdeviceptr* out) noexcept {
  if (out == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  try {
    CUcontext context = nullptr;
    CUresult result = driver_.cuCtxGetCurrent(&context);
    if (result != CUDA_SUCCESS) return result;
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    CUdevice device = 0;
    result = driver_.cuCtxGetDevice(&device);
    if (result != CUDA_SUCCESS) return result;
    Pool* pool = pool_for(tag, device, &result);
    if (pool == nullptr) return result;
    context = contexts_.owner_of(context, device);
    StreamName name;
    const StreamName* const named = name_stream(stream, &name) ? &name : nullptr;
    const auto served = [&] {
      result = pool->allocate(bytes, context, named, out);
      return result != CUDA_ERROR_OUT_OF_MEMORY;
    };
    if (served() || (release_retained_now(device) && served())) return result;
    retry_while_freed_memory_waits(device, [&] {
      release_retained_now(device);
      return served();
    });
    return result;
  } catch (const std::exception& error) {
    log().error("an allocation of {} bytes failed inside Dormouse: {}", bytes, error.what());
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
}

// Without a number of its own a stream cannot be told from a later one at the same address.
bool Engine::name_stream(const CUstream* stream, StreamName* out) const noexcept {
  unsigned long long id = 0;
  if (stream == nullptr || driver_.cuStreamGetId == nullptr ||
      driver_.cuStreamGetId(*stream, &id) != CUDA_SUCCESS || id == 0) {
    return false;
  }
  *out = {*stream, id};
  return true;
}

// For a full device: freed memory comes back when the device has passed the free, which the program
// would have waited for in its cudaFree. True if `again` came to something.
template <typename Try>
bool Engine::retry_while_freed_memory_waits(int device, Try again) {
  const auto deadline = std::chrono::steady_clock::now() + options_.drain_timeout;
  std::chrono::milliseconds pause{1};
  while (!captures_.any() && std::chrono::steady_clock::now() < deadline) {
    bool waiting = false;
    for (const Pool* pool : pools_on(device)) waiting = pool->is_waiting() || waiting;
    if (!waiting) return false;
    for (Pool* pool : pools_on(device)) pool->wait(pause);
    if (again()) return true;
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, kLongestPause);
  }
  return false;
}

bool Engine::outside_captures(const std::function<bool()>& call) {
  const Captures::Excluded excluded(captures_, std::chrono::milliseconds(0));
  return excluded && call();
}

std::optional<std::uint64_t> Engine::calls() noexcept {
  return gate::quiet_passes();
}

void Engine::collect_later() noexcept {
  background_->collect_later();
}

bool Engine::release_retained(int device) noexcept {
  try {
    return release_retained_now(device) ||
           retry_while_freed_memory_waits(device, [&] { return release_retained_now(device); });
  } catch (const std::exception& error) {
    log().error("releasing unused memory failed inside Dormouse: {}", error.what());
    return false;
  }
}

bool Engine::release_retained_now(int device) {
  std::uint64_t released = 0;
  for (Pool* pool : pools_on(device)) released += pool->release_empty(0, {});
  return released != 0;
}

CUresult Engine::free(CUdeviceptr address, const CUstream* stream) noexcept {
  Pool* pool = pool_at(address);
  if (pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
  try {
    StreamName name;
    CUcontext context = nullptr;
    if (!name_stream(stream, &name) || driver_.cuCtxGetCurrent(&context) != CUDA_SUCCESS)
      return pool->free(address, nullptr, nullptr);
    return pool->free(address, context, &name);
  } catch (const std::exception& error) {
    log().error("a free failed inside Dormouse: {}", error.what());
    return CUDA_ERROR_UNKNOWN;
  }
}

}  // namespace dormouse
