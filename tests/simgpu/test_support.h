// What the tests of the simulation share: a context on device 0 and a check that nothing is left
// behind.
#pragma once

#include <cuda.h>
#include <gtest/gtest.h>

#include "tests/simgpu/simgpu_control.h"

namespace simgpu {

inline constexpr size_t kMiB = size_t{1} << 20;
inline constexpr size_t kPage = 2 * kMiB;

// Every test starts with the primary context of device 0 and must leave no memory, stream or event
// behind.
class SimulatedGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    simgpu_clear_failures();
    ASSERT_EQ(cuInit(0), CUDA_SUCCESS);
    ASSERT_EQ(cuDevicePrimaryCtxRetain(&context_, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSetCurrent(context_), CUDA_SUCCESS);
    simgpu_reset_counts();
  }

  void TearDown() override {
    simgpu_clear_failures();
    simgpu_live_counts live;
    simgpu_live(&live);
    EXPECT_EQ(live.handles, 0u);
    EXPECT_EQ(live.mappings, 0u);
    EXPECT_EQ(live.reservations, 0u);
    EXPECT_EQ(live.allocations, 0u);
    EXPECT_EQ(live.host, 0u);
    EXPECT_EQ(live.registrations, 0u);
    EXPECT_EQ(live.streams, 0u);
    EXPECT_EQ(live.events, 0u);
    EXPECT_EQ(simgpu_usage(0), 0u);
    EXPECT_EQ(simgpu_usage(1), 0u);
    EXPECT_EQ(simgpu_pinned(), 0u);
    cuCtxSetCurrent(nullptr);
    cuDevicePrimaryCtxReset(0);
    cuDevicePrimaryCtxReset(1);
  }

  static CUmemAllocationProp properties(int device = 0) {
    CUmemAllocationProp prop{};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    prop.location.id = device;
    return prop;
  }

  static CUmemAccessDesc access(int device,
                                CUmemAccess_flags flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
    CUmemAccessDesc desc{};
    desc.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    desc.location.id = device;
    desc.flags = flags;
    return desc;
  }

  CUcontext context_ = nullptr;
};

// A reservation with one handle mapped at its start.
struct Mapped {
  CUdeviceptr at = 0;
  size_t size = 0;
  CUmemGenericAllocationHandle handle = 0;

  Mapped(size_t bytes, const CUmemAllocationProp& prop) : size(bytes) {
    EXPECT_EQ(cuMemAddressReserve(&at, size, 0, 0, 0), CUDA_SUCCESS);
    EXPECT_EQ(cuMemCreate(&handle, size, &prop, 0), CUDA_SUCCESS);
    EXPECT_EQ(cuMemMap(at, size, 0, handle, 0), CUDA_SUCCESS);
  }
  ~Mapped() {
    EXPECT_EQ(cuMemUnmap(at, size), CUDA_SUCCESS);
    EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
    EXPECT_EQ(cuMemAddressFree(at, size), CUDA_SUCCESS);
  }
};

}  // namespace simgpu
