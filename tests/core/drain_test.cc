// Waiting for the device where the system gives no more threads. Default stacks that are larger
// than the address space make it so.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>

#include "core/device_waits.h"
#include "core/sleep/gate.h"
#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

class NoMoreThreads {
 public:
  NoMoreThreads() {
    pthread_attr_t attributes;
    EXPECT_EQ(pthread_getattr_default_np(&before_), 0);
    EXPECT_EQ(pthread_attr_init(&attributes), 0);
    EXPECT_EQ(pthread_attr_setstacksize(&attributes, std::size_t{1} << 50), 0);
    EXPECT_EQ(pthread_setattr_default_np(&attributes), 0);
    pthread_attr_destroy(&attributes);
  }
  ~NoMoreThreads() {
    EXPECT_EQ(pthread_setattr_default_np(&before_), 0);
    pthread_attr_destroy(&before_);
  }

 private:
  pthread_attr_t before_;
};

class DrainTest : public SimulatedEngine {};

TEST_F(DrainTest, ASleepThatCannotWaitWithALimitIsRefused) {
  const CUdeviceptr block = allocate(weights, kMiB);
  ASSERT_EQ(cuMemsetD8_v2(block, 7, kMiB), CUDA_SUCCESS);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block, 9, kMiB, nullptr), CUDA_SUCCESS);
  Status status;
  {
    const NoMoreThreads none;
    status = engine->sleep({{}, Origin::kOutside}, &report);
  }
  EXPECT_EQ(status.code(), Code::kOutOfHostMemory);
  EXPECT_NE(status.message().find("no thread"), std::string::npos) << status.message();
  EXPECT_FALSE(engine->is_sleeping({}));
  EXPECT_FALSE(gate::is_closed());
  simgpu_release_streams();
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  ASSERT_TRUE(engine->sleep({{}, Origin::kOutside}, &report).is_ok());
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(*reinterpret_cast<unsigned char*>(block), 9);
}

// Its forced unwinding would meet functions that let nothing through, which ends the process.
TEST_F(DrainTest, AThreadThatIsCancelledWhileItsSleepWaitsEndsAfterTheSleep) {
  EngineOptions options = small_options();
  options.drain_timeout = std::chrono::milliseconds(500);
  restart(options);
  const CUdeviceptr block = allocate(weights, kMiB);
  simgpu_hold_streams();
  ASSERT_EQ(cuMemsetD8Async(block, 9, kMiB, nullptr), CUDA_SUCCESS);
  std::atomic<bool> refused{false}, went_on{false};
  std::thread sleeper([&] {
    refused = engine->sleep({{}, Origin::kOutside}, &report).code() == Code::kBusy;
    pthread_testcancel();
    went_on = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  ASSERT_EQ(pthread_cancel(sleeper.native_handle()), 0);
  sleeper.join();
  EXPECT_TRUE(refused.load());
  EXPECT_FALSE(went_on.load());
  simgpu_release_streams();
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
}

TEST_F(DrainTest, WithoutAThreadNothingIsWaitedFor) {
  Captures captures;
  DeviceWaits waits(simulated_driver(), contexts, captures, std::chrono::milliseconds(0));
  const NoMoreThreads none;
  EXPECT_THROW((void)waits.wait_for({0}, std::chrono::milliseconds(20)), std::system_error);
}

}  // namespace
}  // namespace dormouse
