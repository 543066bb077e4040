// The hash: 256 lanes, each a bijective two-word state stepped by multiply and rotate over its
// 16-byte words; the lanes' scrambled ends (MurmurHash3's finaliser, public domain) are added up.
// See content_hash.h.
#include "core/content_hash.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/content_hash_ptx.h"
#include "core/context.h"

namespace dormouse {
namespace {

constexpr std::size_t kLanes = 256;
constexpr std::size_t kWordBytes = 16;
constexpr std::uint64_t kStep1 = 0x9E3779B185EBCA87;
constexpr std::uint64_t kStep2 = 0xC2B2AE3D27D4EB4F;
constexpr std::uint64_t kStart1 = 0x165667B19E3779F9;
constexpr std::uint64_t kStart2 = 0x27D4EB2F165667C5;
constexpr std::size_t kBatch = 16384;  // ranges hashed in one launch

struct Lane {
  std::uint64_t a;
  std::uint64_t b;
};

std::uint64_t rotate_left(std::uint64_t value, int bits) {
  return value << bits | value >> (64 - bits);
}

void step(Lane& lane, std::uint64_t x, std::uint64_t y) {
  lane.a = rotate_left(lane.a ^ x, 29) * kStep1 + lane.b;
  lane.b = rotate_left(lane.b ^ y, 31) * kStep2 + lane.a;
}

std::uint64_t scramble(std::uint64_t value) {
  value ^= value >> 33;
  value *= 0xFF51AFD7ED558CCD;
  value ^= value >> 33;
  value *= 0xC4CEB9FE1A85EC53;
  return value ^ value >> 33;
}

// As the kernel writes it.
struct Result {
  std::uint64_t low;
  std::uint64_t high;
  std::uint64_t nonzero;
  std::uint64_t unused;
};

}  // namespace

ContentHash hash_on_host(const void* data, std::size_t bytes) noexcept {
  std::array<Lane, kLanes> lanes;
  for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = {bytes + kStart1, i + kStart2};
  std::uint64_t any = 0;
  const auto* at = static_cast<const unsigned char*>(data);
  for (std::size_t word = 0; word < bytes / kWordBytes; ++word) {
    std::uint64_t value[2];
    std::memcpy(value, at + word * kWordBytes, kWordBytes);
    step(lanes[word % kLanes], value[0], value[1]);
    any |= value[0] | value[1];
  }
  ContentHash hash;
  for (std::size_t i = 0; i < kLanes; ++i) {
    step(lanes[i], 0, 0);  // carries the last word's second half into both
    const std::uint64_t a = scramble(lanes[i].a + i * kStep2);
    const std::uint64_t b = scramble((lanes[i].b ^ a) + i * kStep1);
    hash.low += a;
    hash.high += b;
  }
  hash.zero = any == 0;
  return hash;
}

ContentHasher::~ContentHasher() {
  for (auto& [context, loaded] : modules_) {
    ScopedContext current(driver_, context);
    if (current.ok()) driver_.cuModuleUnload(loaded.module);
  }
}

void ContentHasher::forget(CUcontext context) {
  std::lock_guard lock(modules_mutex_);
  modules_.erase(context);
}

CUresult ContentHasher::load(CUcontext context, CUfunction* function) {
  std::lock_guard lock(modules_mutex_);
  auto at = modules_.find(context);
  if (at == modules_.end()) {
    Loaded loaded;
    CUresult result = driver_.cuModuleLoadData(&loaded.module, kContentHashPtx);
    if (result != CUDA_SUCCESS) return result;
    result = driver_.cuModuleGetFunction(&loaded.function, loaded.module, kContentHashKernel);
    if (result != CUDA_SUCCESS) {
      give_back([&] { return driver_.cuModuleUnload(loaded.module); });
      return result;
    }
    at = modules_.emplace(context, loaded).first;
  }
  *function = at->second.function;
  return CUDA_SUCCESS;
}

CUresult ContentHasher::hash(CUcontext context, const std::vector<HashRange>& ranges,
                             std::vector<ContentHash>* out) {
  out->resize(ranges.size());
  if (ranges.empty()) return CUDA_SUCCESS;
  ScopedContext current(driver_, context);
  if (!current.ok()) return current.result();
  RelaxedCapture relaxed(driver_);
  CUfunction function = nullptr;
  CUresult result = load(context, &function);
  if (result != CUDA_SUCCESS) return result;
  const std::size_t batch = std::min(kBatch, ranges.size());
  CUdeviceptr buffer = 0;
  result = driver_.cuMemAlloc_v2(&buffer, batch * (sizeof(HashRange) + sizeof(Result)));
  if (result != CUDA_SUCCESS) return result;
  CUstream stream = nullptr;
  result = driver_.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
  for (std::size_t at = 0; result == CUDA_SUCCESS && at < ranges.size(); at += batch) {
    const std::size_t count = std::min(batch, ranges.size() - at);
    result = hash_batch(function, stream, buffer, ranges.data() + at, count, out->data() + at);
  }
  if (stream != nullptr) give_back([&] { return driver_.cuStreamDestroy_v2(stream); });
  const CUresult freed = give_back([&] { return driver_.cuMemFree_v2(buffer); });
  return result != CUDA_SUCCESS ? result : freed;
}

CUresult ContentHasher::hash_batch(CUfunction function, CUstream stream, CUdeviceptr buffer,
                                   const HashRange* ranges, std::size_t count, ContentHash* out) {
  CUdeviceptr device_ranges = buffer;
  CUdeviceptr device_results = buffer + count * sizeof(HashRange);
  std::vector<Result> results(count);
  CUresult result =
      driver_.cuMemcpyHtoDAsync_v2(device_ranges, ranges, count * sizeof(HashRange), stream);
  if (result == CUDA_SUCCESS)
    result = driver_.cuMemsetD8Async(device_results, 0, count * sizeof(Result), stream);
  if (result == CUDA_SUCCESS) {
    void* parameters[] = {&device_ranges, &device_results};
    result = driver_.cuLaunchKernel(function, static_cast<unsigned>(count), 1, 1, kLanes, 1, 1, 0,
                                    stream, parameters, nullptr);
  }
  if (result == CUDA_SUCCESS) {
    result = driver_.cuMemcpyDtoHAsync_v2(results.data(), device_results, count * sizeof(Result),
                                          stream);
  }
  // Also after an error: the host vectors must not go while a copy runs.
  const CUresult synchronized = synchronize_stream(driver_, stream);
  if (result == CUDA_SUCCESS) result = synchronized;
  if (result != CUDA_SUCCESS) return result;
  for (std::size_t i = 0; i < count; ++i)
    out[i] = {results[i].low, results[i].high, results[i].nonzero == 0};
  return CUDA_SUCCESS;
}

}  // namespace dormouse
