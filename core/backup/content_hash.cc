// The hash: 256 lanes, each a bijective two-word state stepped by multiply and rotate over its
// 16-byte words; the lanes' scrambled ends (MurmurHash3's finaliser, public domain) are added up.
// See content_hash.h.
#include "core/backup/content_hash.h"

#include <algorithm>
#include <array>
#include <cstring>

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

const std::size_t ContentHasher::kBufferBytes = kBatch * (sizeof(Range) + sizeof(Result));

ContentHasher::~ContentHasher() {
  while (!launches_.empty()) forget(launches_.begin()->first, true);
}

void ContentHasher::forget(CUcontext context, bool alive) noexcept {
  MutexLock lock(hash_mutex_);
  const auto at = launches_.find(context);
  if (at == launches_.end()) return;
  if (alive) {
    ScopedContext current(driver_, context);
    if (current.ok()) unload(at->second);
  }
  launches_.erase(at);
}

void ContentHasher::unload(const Launch& launch) noexcept {
  if (launch.stream != nullptr)
    give_back([&] { return driver_.cuStreamDestroy_v2(launch.stream); });
  if (launch.buffer != nullptr) give_back([&] { return driver_.cuMemFreeHost(launch.buffer); });
}

CUresult ContentHasher::load(CUcontext context, Launch** out) {
  auto at = launches_.find(context);
  if (at == launches_.end()) {
    LoadedKernels kernels;
    CUresult result = kernels_.load(context, &kernels);
    if (result != CUDA_SUCCESS) return result;
    at = launches_.emplace(context, Launch{}).first;  // first: nothing is lost if that fails
    Launch& launch = at->second;
    launch.function = kernels.content_hash;
    result = driver_.cuMemHostAlloc(&launch.buffer, kBufferBytes, CU_MEMHOSTALLOC_DEVICEMAP);
    if (result == CUDA_SUCCESS) {
      result = driver_.cuStreamCreate(&launch.stream, CU_STREAM_NON_BLOCKING);
    }
    if (result != CUDA_SUCCESS) {
      unload(launch);
      launches_.erase(at);
      return result;
    }
  }
  *out = &at->second;
  return CUDA_SUCCESS;
}

CUresult ContentHasher::prepare(CUcontext context) {
  MutexLock lock(hash_mutex_);
  ScopedContext current(driver_, context);
  if (!current.ok()) return current.result();
  RelaxedCapture relaxed(driver_);
  Launch* launch = nullptr;
  return load(context, &launch);
}

CUresult ContentHasher::hash(CUcontext context, const Ranges& ranges,
                             std::vector<ContentHash>* out) {
  out->resize(ranges.size());
  if (ranges.empty()) return CUDA_SUCCESS;
  MutexLock lock(hash_mutex_);
  ScopedContext current(driver_, context);
  if (!current.ok()) return current.result();
  RelaxedCapture relaxed(driver_);
  Launch* launch = nullptr;
  CUresult result = load(context, &launch);
  for (std::size_t at = 0; result == CUDA_SUCCESS && at < ranges.size(); at += kBatch) {
    const std::size_t count = std::min(kBatch, ranges.size() - at);
    result = hash_batch(*launch, ranges.data() + at, count, out->data() + at);
  }
  return result;
}

// The buffer lies at the same address for the device (unified addressing: every 64-bit Linux). A
// copy of the results would wait behind all copies that are under way; the kernel's stores do not.
CUresult ContentHasher::hash_batch(const Launch& launch, const Range* ranges, std::size_t count,
                                   ContentHash* out) {
  auto* const shared_ranges = static_cast<Range*>(launch.buffer);
  auto* const results = reinterpret_cast<Result*>(shared_ranges + kBatch);
  std::copy(ranges, ranges + count, shared_ranges);
  CUdeviceptr ranges_address = reinterpret_cast<CUdeviceptr>(shared_ranges);
  CUdeviceptr results_address = reinterpret_cast<CUdeviceptr>(results);
  void* parameters[] = {&ranges_address, &results_address};
  CUresult result = driver_.cuLaunchKernel(launch.function, static_cast<unsigned>(count), 1, 1,
                                           kLanes, 1, 1, 0, launch.stream, parameters, nullptr);
  // Also after an error: the buffer is used again.
  const CUresult synchronized = synchronize_stream(driver_, launch.stream);
  if (result == CUDA_SUCCESS) result = synchronized;
  if (result != CUDA_SUCCESS) return result;
  for (std::size_t i = 0; i < count; ++i)
    out[i] = {results[i].low, results[i].high, results[i].nonzero == 0};
  return CUDA_SUCCESS;
}

}  // namespace dormouse
