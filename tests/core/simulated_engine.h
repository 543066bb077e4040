// An engine over the simulated driver, and what tests of it share. The simulation is linked in:
// device memory is host memory, so a test reads and writes blocks directly, and touching sleeping
// memory ends the process.
#pragma once

#include <cuda.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/sleep/engine.h"
#include "tests/simgpu/simgpu_control.h"

namespace dormouse {

constexpr std::size_t kMiB = std::size_t{1} << 20;

// The simulated driver's functions. The hash kernel is registered with the simulation on the first
// call.
const Driver& simulated_driver();

// The same, with in_driver() true on a thread while it is inside: for tests in which what core asks
// of the system fails, but not what the simulation does.
const Driver& driver_apart();
bool in_driver() noexcept;

// Fills [address, address + bytes) with content that depends on the seed and on the place.
void fill(CUdeviceptr address, std::size_t bytes, std::uint64_t seed);
// True if the content is what fill() wrote.
bool holds(CUdeviceptr address, std::size_t bytes, std::uint64_t seed);
bool is_zero(CUdeviceptr address, std::size_t bytes);

// A current context on device 0, and an engine with small chunks. Ends with everything given back,
// which it checks.
class SimulatedEngine : public ::testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;

  // A fresh engine in place of the present one; all that the old one held is given back.
  void restart(const EngineOptions& options);
  static EngineOptions small_options();

  CUdeviceptr allocate(TagId tag, std::size_t bytes);
  TagStats stats_of(const std::string& tag) const;
  // Bytes that are page-locked when what was dropped has been given back, without the buffer of the
  // hash.
  std::size_t pinned_for_backups() const;
  Status sleep(std::vector<std::string> names = {}) {
    return engine->sleep({std::move(names)}, &report);
  }
  Status wake(std::vector<std::string> names = {}) {
    return engine->wake({std::move(names)}, &report);
  }

  // Of the context, for images that no engine has.
  ContextId context_id();

  Contexts contexts{simulated_driver()};
  TagTable tags;
  TagId weights = kNoTag;   // host
  TagId kv_cache = kNoTag;  // none
  std::unique_ptr<Engine> engine;
  OperationStats report;
  CUcontext context = nullptr;
};

}  // namespace dormouse
