// The simulated driver's rules about memory.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <thread>
#include <vector>

#include "tests/simgpu/test_support.h"

namespace simgpu {
namespace {

using MemoryTest = SimulatedGpu;
using MemoryDeathTest = SimulatedGpu;

TEST_F(MemoryTest, HandlesNeedWholePagesAndAKnownDevice) {
  CUmemGenericAllocationHandle handle;
  CUmemAllocationProp prop = properties();
  EXPECT_EQ(cuMemCreate(&handle, 0, &prop, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemCreate(&handle, kMiB, &prop, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemCreate(&handle, kPage + 1, &prop, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemCreate(&handle, kPage, &prop, 1), CUDA_ERROR_INVALID_VALUE);
  prop.location.id = 2;
  EXPECT_EQ(cuMemCreate(&handle, kPage, &prop, 0), CUDA_ERROR_INVALID_DEVICE);
  prop = properties();
  prop.type = CU_MEM_ALLOCATION_TYPE_INVALID;
  EXPECT_EQ(cuMemCreate(&handle, kPage, &prop, 0), CUDA_ERROR_INVALID_VALUE);
  size_t granularity = 0;
  prop = properties();
  EXPECT_EQ(cuMemGetAllocationGranularity(&granularity, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
            CUDA_SUCCESS);
  EXPECT_EQ(granularity, kPage);
}

TEST_F(MemoryTest, PhysicalMemoryIsCountedPerDeviceAndRunsOut) {
  CUmemAllocationProp prop = properties(1);
  CUmemGenericAllocationHandle all, more;
  ASSERT_EQ(cuMemCreate(&all, 1024 * kMiB, &prop, 0), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_usage(1), 1024 * kMiB);
  EXPECT_EQ(simgpu_usage(0), 0u);
  EXPECT_EQ(cuMemCreate(&more, kPage, &prop, 0), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(cuMemRelease(all), CUDA_SUCCESS);
  EXPECT_EQ(cuMemRelease(all), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(simgpu_usage(1), 0u);
}

TEST_F(MemoryTest, AReleasedHandleLivesAsLongAsItsMapping) {
  CUmemAllocationProp prop = properties();
  CUdeviceptr at;
  CUmemGenericAllocationHandle handle;
  ASSERT_EQ(cuMemAddressReserve(&at, kPage, 0, 0, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemCreate(&handle, kPage, &prop, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemMap(at, kPage, 0, handle, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_usage(0), kPage);
  CUmemAccessDesc desc = access(0);
  ASSERT_EQ(cuMemSetAccess(at, kPage, &desc, 1), CUDA_SUCCESS);
  std::memset(reinterpret_cast<void*>(at), 1, kPage);
  ASSERT_EQ(cuMemUnmap(at, kPage), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_usage(0), 0u);
  EXPECT_EQ(cuMemAddressFree(at, kPage), CUDA_SUCCESS);
}

TEST_F(MemoryTest, RetainedHandlesAreCounted) {
  Mapped mapped(kPage, properties());
  CUmemGenericAllocationHandle again;
  ASSERT_EQ(cuMemRetainAllocationHandle(&again, reinterpret_cast<void*>(mapped.at + 5)),
            CUDA_SUCCESS);
  EXPECT_EQ(again, mapped.handle);
  CUmemAllocationProp prop{};
  EXPECT_EQ(cuMemGetAllocationPropertiesFromHandle(&prop, again), CUDA_SUCCESS);
  EXPECT_EQ(prop.location.id, 0);
  EXPECT_EQ(cuMemRelease(again), CUDA_SUCCESS);
  EXPECT_EQ(cuMemGetAllocationPropertiesFromHandle(&prop, mapped.handle), CUDA_SUCCESS);
  CUdeviceptr plain;
  ASSERT_EQ(cuMemAlloc(&plain, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemRetainAllocationHandle(&again, reinterpret_cast<void*>(plain)),
            CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(plain), CUDA_SUCCESS);
}

TEST_F(MemoryTest, MappingsStayInsideTheirReservationAndDoNotOverlap) {
  CUmemAllocationProp prop = properties();
  CUdeviceptr at;
  CUmemGenericAllocationHandle handle;
  ASSERT_EQ(cuMemAddressReserve(&at, 2 * kPage, 0, 0, 0), CUDA_SUCCESS);
  EXPECT_EQ(at % kPage, 0u);
  ASSERT_EQ(cuMemCreate(&handle, 2 * kPage, &prop, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemMap(at + kPage, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemMap(at + kMiB, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemMap(at, kMiB, 0, handle, 0), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(cuMemMap(at, kPage, 0, handle, 0), CUDA_ERROR_NOT_SUPPORTED) << "a part of a handle";
  EXPECT_EQ(cuMemMap(at, kPage, kPage, handle, 0), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(cuMemMap(at, 4 * kPage, 0, handle, 0), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(cuMemMap(at, 2 * kPage, 0, handle + 1000, 0), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemMap(at, 2 * kPage, 0, handle, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemMap(at, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemAddressFree(at, 2 * kPage), CUDA_ERROR_INVALID_VALUE)
      << "something is still mapped";
  EXPECT_EQ(cuMemUnmap(at, 2 * kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(at, kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemAddressFree(at, 2 * kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(at, 2 * kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
}

TEST_F(MemoryTest, OnlyWholeMappingsAreUnmappedButSeveralAtOnce) {
  CUmemAllocationProp prop = properties();
  CUdeviceptr at;
  ASSERT_EQ(cuMemAddressReserve(&at, 8 * kPage, 0, 0, 0), CUDA_SUCCESS);
  CUmemGenericAllocationHandle handles[3];
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(cuMemCreate(&handles[i], 2 * kPage, &prop, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemMap(at + 2 * i * kPage, 2 * kPage, 0, handles[i], 0), CUDA_SUCCESS);
  }
  EXPECT_EQ(cuMemUnmap(at, kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemUnmap(at + kPage, kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemUnmap(at, 3 * kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemUnmap(at, 8 * kPage), CUDA_ERROR_INVALID_VALUE) << "the end is not mapped";
  EXPECT_EQ(cuMemUnmap(at, 0), CUDA_ERROR_INVALID_VALUE);
  simgpu_live_counts live;
  simgpu_live(&live);
  EXPECT_EQ(live.mappings, 3u) << "failed calls change nothing";
  EXPECT_EQ(cuMemUnmap(at, 4 * kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemUnmap(at, 4 * kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemUnmap(at + 4 * kPage, 2 * kPage), CUDA_SUCCESS);
  for (CUmemGenericAllocationHandle handle : handles) EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(at, 8 * kPage), CUDA_SUCCESS);
}

TEST_F(MemoryTest, AccessIsSetForWholeMappingsOfKnownDevices) {
  Mapped mapped(2 * kPage, properties());
  CUmemAccessDesc desc = access(0);
  EXPECT_EQ(cuMemSetAccess(mapped.at, kPage, &desc, 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemSetAccess(mapped.at, 2 * kPage, &desc, 0), CUDA_ERROR_INVALID_VALUE);
  CUmemAccessDesc unknown = access(7);
  EXPECT_EQ(cuMemSetAccess(mapped.at, 2 * kPage, &unknown, 1), CUDA_ERROR_INVALID_VALUE);
  unsigned long long flags = 9;
  EXPECT_EQ(cuMemGetAccess(&flags, &desc.location, mapped.at), CUDA_SUCCESS);
  EXPECT_EQ(flags, static_cast<unsigned long long>(CU_MEM_ACCESS_FLAGS_PROT_NONE));
  EXPECT_EQ(cuMemSetAccess(mapped.at, 2 * kPage, &desc, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemGetAccess(&flags, &desc.location, mapped.at + kPage), CUDA_SUCCESS);
  EXPECT_EQ(flags, static_cast<unsigned long long>(CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
}

TEST_F(MemoryTest, CopiesNeedAccessForTheirOwnDevice) {
  Mapped mapped(kPage, properties(1));
  std::vector<char> host(kPage);
  EXPECT_NE(cuMemcpyHtoD(mapped.at, host.data(), kPage), CUDA_SUCCESS) << "no access at all";
  CUmemAccessDesc other = access(1);
  ASSERT_EQ(cuMemSetAccess(mapped.at, kPage, &other, 1), CUDA_SUCCESS);
  EXPECT_NE(cuMemcpyHtoD(mapped.at, host.data(), kPage), CUDA_SUCCESS)
      << "only for the other device";
  CUmemAccessDesc read = access(0, CU_MEM_ACCESS_FLAGS_PROT_READ);
  ASSERT_EQ(cuMemSetAccess(mapped.at, kPage, &read, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyDtoH(host.data(), mapped.at, kPage), CUDA_SUCCESS);
  EXPECT_NE(cuMemcpyHtoD(mapped.at, host.data(), kPage), CUDA_SUCCESS) << "read only";
  CUmemAccessDesc both = access(0);
  ASSERT_EQ(cuMemSetAccess(mapped.at, kPage, &both, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyHtoD(mapped.at, host.data(), kPage), CUDA_SUCCESS);
}

TEST_F(MemoryTest, PeerAccessDoesNotReachVirtualMemory) {
  CUcontext peer;
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&peer, 1), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxEnablePeerAccess(peer, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxEnablePeerAccess(peer, 0), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
  {
    Mapped mapped(kPage, properties(1));
    CUmemAccessDesc desc = access(1);
    ASSERT_EQ(cuMemSetAccess(mapped.at, kPage, &desc, 1), CUDA_SUCCESS);
    EXPECT_NE(cuMemsetD8(mapped.at, 1, kPage), CUDA_SUCCESS);
  }
  EXPECT_EQ(cuCtxDisablePeerAccess(peer), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxDisablePeerAccess(peer), CUDA_ERROR_PEER_ACCESS_NOT_ENABLED);
}

// As seen on two H100s.
TEST_F(MemoryTest, CopiesReachAllocationsOfEveryDeviceAndFillsDoNot) {
  CUcontext other;
  CUdeviceptr block;
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&other, 1), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxPushCurrent(other), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxPopCurrent(&other), CUDA_SUCCESS);
  std::vector<char> host(kPage, 3);
  EXPECT_EQ(cuMemcpyHtoD(block, host.data(), kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyDtoH(host.data(), block, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemsetD8(block, 1, kPage), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuCtxEnablePeerAccess(other, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemsetD8(block, 1, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxDisablePeerAccess(other), CUDA_SUCCESS);
  {
    Mapped mapped(kPage, properties(1));
    CUmemAccessDesc desc = access(1);
    ASSERT_EQ(cuMemSetAccess(mapped.at, kPage, &desc, 1), CUDA_SUCCESS);
    EXPECT_EQ(cuMemcpyHtoD(mapped.at, host.data(), kPage), CUDA_ERROR_INVALID_VALUE);
    EXPECT_EQ(cuMemcpyDtoD(block, mapped.at, kPage), CUDA_ERROR_INVALID_VALUE);
    EXPECT_EQ(cuMemcpyPeer(block, other, mapped.at, other, kPage), CUDA_SUCCESS);
    EXPECT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  }
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
}

TEST_F(MemoryTest, ADmaBufKeepsItsPhysicalMemoryUntilItIsClosed) {
  int fd = -1;
  {
    Mapped mapped(2 * kPage, properties());
    EXPECT_EQ(cuMemGetHandleForAddressRange(&fd, mapped.at + 1, kPage,
                                            CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0),
              CUDA_ERROR_INVALID_VALUE);
    EXPECT_EQ(cuMemGetHandleForAddressRange(&fd, mapped.at, 3 * kPage,
                                            CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0),
              CUDA_ERROR_INVALID_VALUE);
    ASSERT_EQ(cuMemGetHandleForAddressRange(&fd, mapped.at + kPage, kPage,
                                            CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0),
              CUDA_SUCCESS);
  }
  EXPECT_EQ(simgpu_usage(0), 2 * kPage);
  EXPECT_EQ(close(fd), 0);
  EXPECT_EQ(simgpu_usage(0), 0u);
}

TEST_F(MemoryTest, AMulticastObjectKeepsWhatIsBoundToIt) {
  CUmulticastObjectProp wanted{};
  wanted.numDevices = 2;
  wanted.size = kPage;
  CUmemGenericAllocationHandle multicast;
  ASSERT_EQ(cuMulticastCreate(&multicast, &wanted), CUDA_SUCCESS);
  {
    Mapped mapped(kPage, properties());
    ASSERT_EQ(cuMulticastBindAddr(multicast, 0, mapped.at, kPage, 0), CUDA_SUCCESS);
  }
  EXPECT_EQ(simgpu_usage(0), kPage);
  EXPECT_EQ(cuMulticastUnbind(multicast, 0, 0, kPage), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_usage(0), 0u);
  {
    Mapped mapped(kPage, properties());
    ASSERT_EQ(cuMulticastBindMem(multicast, 0, mapped.handle, 0, kPage, 0), CUDA_SUCCESS);
  }
  EXPECT_EQ(cuMemRelease(multicast), CUDA_SUCCESS);
}

// The driver takes the attribute for mapped memory too, and forgets it (H100, driver 580).
TEST_F(MemoryTest, OnlyAllocationsRememberSyncMemops) {
  const unsigned on = 1;
  unsigned seen = 7;
  CUdeviceptr block;
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuPointerSetAttribute(&on, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, block), CUDA_SUCCESS);
  EXPECT_EQ(cuPointerGetAttribute(&seen, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, block), CUDA_SUCCESS);
  EXPECT_EQ(seen, 1u);
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  Mapped mapped(kPage, properties());
  EXPECT_EQ(cuPointerSetAttribute(&on, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, mapped.at), CUDA_SUCCESS);
  EXPECT_EQ(cuPointerGetAttribute(&seen, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, mapped.at),
            CUDA_SUCCESS);
  EXPECT_EQ(seen, 0u);
}

TEST_F(MemoryTest, APoolsAccessReachesWhatComesOutOfIt) {
  CUmemoryPool pool;
  CUcontext other;
  CUdeviceptr block;
  CUmemAccess_flags flags;
  CUmemLocation there{CU_MEM_LOCATION_TYPE_DEVICE, {1}};
  ASSERT_EQ(cuDeviceGetDefaultMemPool(&pool, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemPoolGetAccess(&flags, pool, &there), CUDA_SUCCESS);
  EXPECT_EQ(flags, CU_MEM_ACCESS_FLAGS_PROT_NONE);
  ASSERT_EQ(cuMemAllocAsync(&block, kPage, CU_STREAM_PER_THREAD), CUDA_SUCCESS);
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&other, 1), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxPushCurrent(other), CUDA_SUCCESS);
  EXPECT_EQ(cuMemsetD8(block, 5, kPage), CUDA_ERROR_INVALID_VALUE);
  CUmemAccessDesc desc = access(1);
  ASSERT_EQ(cuMemPoolSetAccess(pool, &desc, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemPoolGetAccess(&flags, pool, &there), CUDA_SUCCESS);
  EXPECT_EQ(flags, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  EXPECT_EQ(cuMemsetD8(block, 5, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  desc.flags = CU_MEM_ACCESS_FLAGS_PROT_NONE;
  EXPECT_EQ(cuMemPoolSetAccess(pool, &desc, 1), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxPopCurrent(&other), CUDA_SUCCESS);
  ASSERT_EQ(cuMemFree(block), CUDA_SUCCESS);
}

TEST_F(MemoryTest, CopiesStayInsideTheirRange) {
  CUdeviceptr block;
  ASSERT_EQ(cuMemAlloc(&block, 3 * kMiB), CUDA_SUCCESS);
  std::vector<char> host(4 * kMiB);
  EXPECT_EQ(cuMemcpyHtoD(block, host.data(), 3 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyHtoD(block, host.data(), 3 * kMiB + 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemcpyDtoH(host.data(), block + 1, 3 * kMiB), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemsetD8(block, 0, 3 * kMiB + 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemsetD32(block + 1, 0, 1), CUDA_ERROR_INVALID_VALUE) << "not aligned";
  EXPECT_EQ(cuMemcpyHtoD(reinterpret_cast<CUdeviceptr>(host.data()), host.data(), 1),
            CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemFree(block), CUDA_SUCCESS);
  EXPECT_EQ(cuMemcpyHtoD(block, host.data(), 1), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(MemoryTest, CopiesMayCrossMappingsThatTouch) {
  CUmemAllocationProp prop = properties();
  CUdeviceptr at;
  ASSERT_EQ(cuMemAddressReserve(&at, 3 * kPage, 0, 0, 0), CUDA_SUCCESS);
  CUmemGenericAllocationHandle handles[2];
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(cuMemCreate(&handles[i], kPage, &prop, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemMap(at + i * kPage, kPage, 0, handles[i], 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemRelease(handles[i]), CUDA_SUCCESS);
  }
  CUmemAccessDesc desc = access(0);
  ASSERT_EQ(cuMemSetAccess(at, 2 * kPage, &desc, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemsetD8(at + kMiB, 3, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_EQ(*reinterpret_cast<char*>(at + kPage), 3);
  EXPECT_EQ(cuMemsetD8(at + kPage + kMiB, 3, kPage), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemUnmap(at, 2 * kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressFree(at, 3 * kPage), CUDA_SUCCESS);
}

TEST_F(MemoryTest, RowsAndSlicesAreCopied) {
  CUdeviceptr pitched;
  size_t pitch = 0;
  ASSERT_EQ(cuMemAllocPitch(&pitched, &pitch, 100, 10, 4), CUDA_SUCCESS);
  EXPECT_GE(pitch, 100u);
  EXPECT_EQ(cuMemAllocPitch(&pitched, &pitch, 100, 10, 5), CUDA_ERROR_INVALID_VALUE);
  std::vector<char> in(100 * 10), out(100 * 10);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<char>(i * 7);
  CUDA_MEMCPY2D copy{};
  copy.srcMemoryType = CU_MEMORYTYPE_HOST;
  copy.srcHost = in.data();
  copy.srcPitch = 100;
  copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
  copy.dstDevice = pitched;
  copy.dstPitch = pitch;
  copy.WidthInBytes = 100;
  copy.Height = 10;
  ASSERT_EQ(cuMemcpy2D(&copy), CUDA_SUCCESS);
  CUDA_MEMCPY3D back{};
  back.srcMemoryType = CU_MEMORYTYPE_DEVICE;
  back.srcDevice = pitched;
  back.srcPitch = pitch;
  back.srcHeight = 5;
  back.dstMemoryType = CU_MEMORYTYPE_HOST;
  back.dstHost = out.data();
  back.dstPitch = 100;
  back.dstHeight = 5;
  back.WidthInBytes = 100;
  back.Height = 5;
  back.Depth = 2;
  ASSERT_EQ(cuMemcpy3D(&back), CUDA_SUCCESS);
  EXPECT_EQ(in, out);
  copy.Height = 11;
  EXPECT_EQ(cuMemcpy2D(&copy), CUDA_ERROR_INVALID_VALUE);
  copy.dstPitch = 50;
  EXPECT_EQ(cuMemcpy2D(&copy), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemFree(pitched), CUDA_SUCCESS);
}

TEST_F(MemoryTest, OnlyTheStartOfALiveBlockIsFreed) {
  CUdeviceptr block;
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(block + 512), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(block), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAlloc(&block, 0), CUDA_ERROR_INVALID_VALUE);
  Mapped mapped(kPage, properties());
  EXPECT_EQ(cuMemFree(mapped.at), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(MemoryTest, SmallBlocksShareAPage) {
  std::vector<CUdeviceptr> blocks(100);
  for (CUdeviceptr& block : blocks) {
    ASSERT_EQ(cuMemAlloc(&block, 1000), CUDA_SUCCESS);
    EXPECT_EQ(block % 512, 0u);
  }
  EXPECT_EQ(simgpu_usage(0), kPage);
  CUdeviceptr base;
  size_t size;
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, blocks[50] + 999), CUDA_SUCCESS);
  EXPECT_EQ(base, blocks[50]);
  EXPECT_EQ(size, 1000u);
  for (CUdeviceptr block : blocks) EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_usage(0), 0u);
}

TEST_F(MemoryTest, FreeMemoryIsWhatIsLeftOfTheDevice) {
  size_t before, after, total;
  ASSERT_EQ(cuMemGetInfo(&before, &total), CUDA_SUCCESS);
  EXPECT_EQ(total, 1024 * kMiB);
  CUdeviceptr block;
  ASSERT_EQ(cuMemAlloc(&block, 5 * kMiB), CUDA_SUCCESS);
  ASSERT_EQ(cuMemGetInfo(&after, &total), CUDA_SUCCESS);
  EXPECT_EQ(before - after, 6 * kMiB);
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAlloc(&block, 2048 * kMiB), CUDA_ERROR_OUT_OF_MEMORY);
}

TEST_F(MemoryTest, CallsThatNeedAContextSayIfThereIsNone) {
  ASSERT_EQ(cuCtxSetCurrent(nullptr), CUDA_SUCCESS);
  CUdeviceptr block;
  size_t free, total;
  EXPECT_EQ(cuMemAlloc(&block, 1), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cuMemGetInfo(&free, &total), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cuMemsetD8(1, 1, 1), CUDA_ERROR_INVALID_CONTEXT);
  Mapped mapped(kPage, properties());  // virtual memory needs none
}

TEST_F(MemoryTest, ContentStaysWithTheHandle) {
  CUmemAllocationProp prop = properties();
  CUmemAccessDesc desc = access(0);
  CUdeviceptr at;
  CUmemGenericAllocationHandle handle;
  ASSERT_EQ(cuMemAddressReserve(&at, 2 * kPage, 0, 0, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemCreate(&handle, kPage, &prop, 0), CUDA_SUCCESS);
  for (CUdeviceptr place : {at, at + kPage}) {
    ASSERT_EQ(cuMemMap(place, kPage, 0, handle, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemSetAccess(place, kPage, &desc, 1), CUDA_SUCCESS);
  }
  std::memset(reinterpret_cast<void*>(at), 42, kPage);
  EXPECT_EQ(*reinterpret_cast<char*>(at + 2 * kPage - 1), 42) << "both places show the same memory";
  ASSERT_EQ(cuMemUnmap(at, 2 * kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuMemMap(at, kPage, 0, handle, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemSetAccess(at, kPage, &desc, 1), CUDA_SUCCESS);
  EXPECT_EQ(*reinterpret_cast<char*>(at), 42);
  ASSERT_EQ(cuMemUnmap(at, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressFree(at, 2 * kPage), CUDA_SUCCESS);
}

TEST_F(MemoryTest, AReservationIsWhereItWasAskedForIfThatIsFree) {
  CUdeviceptr first, second, third;
  ASSERT_EQ(cuMemAddressReserve(&first, 4 * kPage, 0, 0, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressReserve(&second, kPage, 0, first, 0), CUDA_SUCCESS);
  EXPECT_NE(second, first);
  ASSERT_EQ(cuMemAddressFree(first, 4 * kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressReserve(&third, kPage, 0, first + kPage, 0), CUDA_SUCCESS);
  EXPECT_EQ(third, first + kPage);
  EXPECT_EQ(cuMemAddressFree(third, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(second, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressReserve(&first, kPage + 1, 0, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemAddressReserve(&first, kPage, 3, 0, 0), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemAddressReserve(&first, kPage, 64 * kMiB, 0, 0), CUDA_SUCCESS);
  EXPECT_EQ(first % (64 * kMiB), 0u);
  EXPECT_EQ(cuMemAddressFree(first, kPage), CUDA_SUCCESS);
}

TEST_F(MemoryTest, ManyHandlesNeedNoDescriptors) {
  CUmemAllocationProp prop = properties();
  std::vector<CUmemGenericAllocationHandle> handles(512);
  int before = dup(0);
  for (CUmemGenericAllocationHandle& handle : handles) {
    ASSERT_EQ(cuMemCreate(&handle, kPage, &prop, 0), CUDA_SUCCESS);
  }
  int after = dup(0);
  EXPECT_LE(after - before, 2);
  close(before);
  close(after);
  for (CUmemGenericAllocationHandle handle : handles) EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
}

TEST_F(MemoryTest, AnExportedHandleIsImportedAsTheSameMemory) {
  CUmemAllocationProp prop = properties();
  Mapped plain(kPage, prop);
  int fd = -1;
  EXPECT_NE(
      cuMemExportToShareableHandle(&fd, plain.handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
      CUDA_SUCCESS)
      << "not created for it";
  prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  Mapped mapped(kPage, prop);
  ASSERT_EQ(
      cuMemExportToShareableHandle(&fd, mapped.handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
      CUDA_SUCCESS);
  CUmemGenericAllocationHandle imported;
  ASSERT_EQ(
      cuMemImportFromShareableHandle(&imported, reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
                                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
      CUDA_SUCCESS);
  EXPECT_EQ(close(fd), 0);
  EXPECT_EQ(simgpu_usage(0), 2 * kPage) << "no new memory";
  EXPECT_EQ(cuMemRelease(imported), CUDA_SUCCESS);
}

TEST_F(MemoryTest, PointersTellWhatTheyAre) {
  CUdeviceptr block;
  void* pinned;
  ASSERT_EQ(cuMemAlloc(&block, 3 * kMiB), CUDA_SUCCESS);
  ASSERT_EQ(cuMemHostAlloc(&pinned, kMiB, 0), CUDA_SUCCESS);
  CUmemorytype type{};
  size_t size = 0;
  int device = -1;
  CUdeviceptr start = 0;
  EXPECT_EQ(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, block + 7),
            CUDA_SUCCESS);
  EXPECT_EQ(type, CU_MEMORYTYPE_DEVICE);
  EXPECT_EQ(cuPointerGetAttribute(&start, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, block + 7),
            CUDA_SUCCESS);
  EXPECT_EQ(start, block);
  EXPECT_EQ(cuPointerGetAttribute(&size, CU_POINTER_ATTRIBUTE_RANGE_SIZE, block), CUDA_SUCCESS);
  EXPECT_EQ(size, 3 * kMiB);
  EXPECT_EQ(cuPointerGetAttribute(&device, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, block),
            CUDA_SUCCESS);
  EXPECT_EQ(device, 0);
  EXPECT_EQ(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                  reinterpret_cast<CUdeviceptr>(pinned)),
            CUDA_SUCCESS);
  EXPECT_EQ(type, CU_MEMORYTYPE_HOST);
  EXPECT_EQ(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                  reinterpret_cast<CUdeviceptr>(&type)),
            CUDA_ERROR_INVALID_VALUE);
  CUpointer_attribute asked[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_CONTEXT};
  unsigned kind = 9;
  CUcontext owner = context_;
  void* answers[] = {&kind, &owner};
  EXPECT_EQ(cuPointerGetAttributes(2, asked, answers, reinterpret_cast<CUdeviceptr>(&type)),
            CUDA_SUCCESS);
  EXPECT_EQ(kind, 0u);
  EXPECT_EQ(owner, nullptr);
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  EXPECT_EQ(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, block),
            CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFreeHost(pinned), CUDA_SUCCESS);
}

TEST_F(MemoryTest, InterprocessHandlesAreForPlainMemoryAlone) {
  CUipcMemHandle handle;
  CUdeviceptr block, opened;
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cuIpcGetMemHandle(&handle, block), CUDA_SUCCESS);
  EXPECT_EQ(cuIpcOpenMemHandle(&opened, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS),
            CUDA_ERROR_INVALID_CONTEXT)
      << "not in the process that made it";
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  Mapped mapped(kPage, properties());
  EXPECT_EQ(cuIpcGetMemHandle(&handle, mapped.at), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(MemoryTest, HostMemoryIsRegisteredOnceAndUnregisteredByItsStart) {
  std::vector<char> host(4 * kMiB);
  void* start = host.data();
  void* middle = host.data() + kMiB;
  EXPECT_EQ(cuMemHostRegister(nullptr, kMiB, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemHostRegister(start, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemHostRegister(start, kMiB, 0x100), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cuMemHostRegister(start, 2 * kMiB, 0), CUDA_SUCCESS);
  EXPECT_GE(simgpu_pinned(), 2 * kMiB);
  EXPECT_EQ(cuMemHostRegister(start, 2 * kMiB, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  EXPECT_EQ(cuMemHostRegister(middle, 2 * kMiB, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  EXPECT_EQ(cuMemHostUnregister(middle), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFreeHost(start), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemHostUnregister(start), CUDA_SUCCESS);
  EXPECT_EQ(cuMemHostUnregister(start), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
  void* hole = mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  munmap(hole, kMiB);
  EXPECT_EQ(cuMemHostRegister(hole, kMiB, 0), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(MemoryTest, StreamOrderedMemoryIsFreedInStreamOrder) {
  CUstream stream;
  CUdeviceptr block;
  ASSERT_EQ(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAllocAsync(&block, kPage, stream), CUDA_SUCCESS);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block, 1, kPage, stream), CUDA_SUCCESS);
  ASSERT_EQ(cuMemFreeAsync(block, stream), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFreeAsync(block, stream), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(block), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(simgpu_usage(0), kPage);
  simgpu_release_streams();
  EXPECT_EQ(cuStreamSynchronize(stream), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_usage(0), 0u);
  EXPECT_EQ(cuStreamDestroy(stream), CUDA_SUCCESS);
}

TEST_F(MemoryTest, FreeingWaitsForTheWorkOfTheContext) {
  CUstream stream;
  CUdeviceptr block;
  ASSERT_EQ(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block, 1, kPage, stream), CUDA_SUCCESS);
  std::thread opener([] { simgpu_release_streams(); });
  EXPECT_EQ(cuMemFree(block), CUDA_SUCCESS);
  opener.join();
  EXPECT_EQ(cuStreamQuery(stream), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamDestroy(stream), CUDA_SUCCESS);
}

TEST_F(MemoryTest, AContextsEndFreesWhatItOwns) {
  CUcontext own;
#if CUDA_VERSION >= 13000
  ASSERT_EQ(cuCtxCreate(&own, nullptr, 0, 1), CUDA_SUCCESS);
#else
  ASSERT_EQ(cuCtxCreate(&own, 0, 1), CUDA_SUCCESS);
#endif
  CUdeviceptr block;
  void* pinned;
  CUstream stream;
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAllocHost(&pinned, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamCreate(&stream, 0), CUDA_SUCCESS);
  EXPECT_EQ(simgpu_usage(1), kPage);
  EXPECT_EQ(cuCtxDestroy(own), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxDestroy(own), CUDA_ERROR_INVALID_CONTEXT);
  CUcontext current;
  EXPECT_EQ(cuCtxGetCurrent(&current), CUDA_SUCCESS);
  EXPECT_EQ(current, context_);
  EXPECT_EQ(cuStreamDestroy(stream), CUDA_ERROR_INVALID_HANDLE);
}

TEST_F(MemoryDeathTest, TouchingUnmappedMemoryFaults) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  CUdeviceptr at;
  ASSERT_EQ(cuMemAddressReserve(&at, kPage, 0, 0, 0), CUDA_SUCCESS);
  EXPECT_DEATH(*reinterpret_cast<volatile char*>(at) = 1, "");
  ASSERT_EQ(cuMemAddressFree(at, kPage), CUDA_SUCCESS);
}

TEST_F(MemoryDeathTest, TouchingMemoryWithoutAccessFaults) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Mapped mapped(kPage, properties());
  EXPECT_DEATH(*reinterpret_cast<volatile char*>(mapped.at) = 1, "");
}

TEST_F(MemoryDeathTest, TouchingFreedMemoryFaults) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  CUdeviceptr block;
  ASSERT_EQ(cuMemAlloc(&block, kPage), CUDA_SUCCESS);
  ASSERT_EQ(cuMemFree(block), CUDA_SUCCESS);
  EXPECT_DEATH(*reinterpret_cast<volatile char*>(block) = 1, "");
}

}  // namespace
}  // namespace simgpu
