#include "tests/core/simulated_engine.h"

#include <cstring>

#include "core/backup/content_hash.h"

namespace dormouse {
namespace {

std::uint64_t word_at(std::uint64_t seed, std::size_t index) {
  std::uint64_t value = seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 1;
  value ^= value >> 31;
  return value * 0x94D049BB133111EB;
}

thread_local int calls_inside = 0;

struct InDriver {
  InDriver() { ++calls_inside; }
  ~InDriver() { --calls_inside; }
};

template <typename Function, Function function>
struct Apart;
template <typename... Parameters, CUresult (*function)(Parameters...)>
struct Apart<CUresult (*)(Parameters...), function> {
  static CUresult call(Parameters... parameters) {
    const InDriver here;
    return function(parameters...);
  }
};

}  // namespace

const Driver& simulated_driver() {
  static const Driver driver = [] {
    Driver made;
#define DORMOUSE_SIMULATED(name) made.name = &::name;
    DORMOUSE_DRIVER_FUNCTIONS(DORMOUSE_SIMULATED)
#undef DORMOUSE_SIMULATED
#define DORMOUSE_SIMULATED(name, type) made.name = &::name;
    DORMOUSE_LATER_DRIVER_FUNCTIONS(DORMOUSE_SIMULATED)
#undef DORMOUSE_SIMULATED
    return made;
  }();
  return driver;
}

const Driver& driver_apart() {
  static const Driver driver = [] {
    Driver made = simulated_driver();
#define DORMOUSE_APART(name) made.name = &Apart<decltype(&::name), &::name>::call;
    DORMOUSE_DRIVER_FUNCTIONS(DORMOUSE_APART)
#undef DORMOUSE_APART
#define DORMOUSE_APART(name, type) made.name = &Apart<decltype(&::name), &::name>::call;
    DORMOUSE_LATER_DRIVER_FUNCTIONS(DORMOUSE_APART)
#undef DORMOUSE_APART
    return made;
  }();
  return driver;
}

bool in_driver() noexcept {
  return calls_inside != 0;
}

void fill(CUdeviceptr address, std::size_t bytes, std::uint64_t seed) {
  auto* words = reinterpret_cast<std::uint64_t*>(address);
  for (std::size_t i = 0; i < bytes / 8; ++i) words[i] = word_at(seed, i);
}

bool holds(CUdeviceptr address, std::size_t bytes, std::uint64_t seed) {
  const auto* words = reinterpret_cast<const std::uint64_t*>(address);
  for (std::size_t i = 0; i < bytes / 8; ++i) {
    if (words[i] != word_at(seed, i)) return false;
  }
  return true;
}

bool is_zero(CUdeviceptr address, std::size_t bytes) {
  const auto* at = reinterpret_cast<const unsigned char*>(address);
  return at[0] == 0 && std::memcmp(at, at + 1, bytes - 1) == 0;
}

EngineOptions SimulatedEngine::small_options() {
  EngineOptions options;
  options.max_chunk_bytes = 16 * kMiB;
  options.retain_bytes = 0;
  options.stage_bytes = 8 * kMiB;
  options.copy_threads = 2;
  return options;
}

void SimulatedEngine::SetUp() {
  simgpu_clear_failures();
  simulated_driver();
  ASSERT_EQ(cuInit(0), CUDA_SUCCESS);
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&context, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxPushCurrent_v2(context), CUDA_SUCCESS);
  weights = tags.intern("weights", Backup::kHost);
  kv_cache = tags.intern("kv_cache", Backup::kNone);
  restart(small_options());
}

void SimulatedEngine::restart(const EngineOptions& options) {
  engine.reset();
  engine = std::make_unique<Engine>(simulated_driver(), tags, options);
}

void SimulatedEngine::TearDown() {
  simgpu_clear_failures();
  engine.reset();
  simgpu_live_counts live{};
  simgpu_live(&live);
  EXPECT_EQ(live.handles, 0u);
  EXPECT_EQ(live.mappings, 0u);
  EXPECT_EQ(live.reservations, 0u);
  EXPECT_EQ(live.allocations, 0u);
  EXPECT_EQ(live.host, 0u);
  EXPECT_EQ(live.registrations, 0u);
  EXPECT_EQ(live.streams, 0u);
  EXPECT_EQ(simgpu_usage(0), 0u);
  CUcontext popped = nullptr;
  EXPECT_EQ(cuCtxPopCurrent_v2(&popped), CUDA_SUCCESS);
  EXPECT_EQ(cuDevicePrimaryCtxRelease_v2(0), CUDA_SUCCESS);
}

CUdeviceptr SimulatedEngine::allocate(TagId tag, std::size_t bytes) {
  CUdeviceptr address = 0;
  EXPECT_EQ(engine->allocate(tag, bytes, &address), CUDA_SUCCESS);
  return address;
}

ContextId SimulatedEngine::context_id() {
  ContextPins pins;
  EXPECT_EQ(contexts.pin_all({0}, &pins), CUDA_SUCCESS);
  return pins.for_work_on(0)->id();
}

TagStats SimulatedEngine::stats_of(const std::string& tag) const {
  for (const TagStats& stats : engine->stats()) {
    if (stats.tag == tag) return stats;
  }
  return {};
}

std::size_t SimulatedEngine::pinned_for_backups() const {
  if (engine != nullptr) engine->wait_for_dropped(std::chrono::seconds(10));
  simgpu_live_counts live{};
  simgpu_live(&live);
  return simgpu_pinned() - live.host * ContentHasher::kBufferBytes;
}

}  // namespace dormouse
