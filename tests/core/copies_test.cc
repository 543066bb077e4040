// How copies run: chunks go as their copies end, a kernel helps a wake behind a closed gate, and
// progress counts what has ended. A driver in the way of the simulated one holds calls up.
#include <algorithm>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <functional>
#include <iterator>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

constexpr std::size_t kChunks = 4;
constexpr std::size_t kChunkBytes = 16 * kMiB;  // of small_options()
constexpr std::size_t kSmallPiece =
    2 * kMiB;  // so that a chunk has more than are under way at once

// What the functions below, which cannot carry state, share with the test.
struct Seen {
  std::mutex mutex;  // protects all below
  std::condition_variable changed;
  std::vector<CUdeviceptr> mapped;  // addresses, in this order
  unsigned unmapped = 0;
  unsigned launched = 0;
  unsigned ended = 0;  // events that were waited for
  std::function<void()> before_event;
  bool wait_for_launch = false;
  bool released_too_early = false;
  unsigned registrations = 0;
  unsigned refuse_after = UINT_MAX;  // registrations
  bool refused = false;
  std::size_t wait_for_copiers = 0;  // with memory that is not registered: until so many copy
  std::set<std::thread::id> copiers;
  bool timed_out = false;

  // With the mutex held: until `condition`, for at most as long as a test may take.
  template <typename Condition>
  void wait(std::unique_lock<std::mutex>& lock, Condition&& condition) {
    if (timed_out) return;  // the test has failed: it ends soon
    if (!changed.wait_for(lock, std::chrono::seconds(30), condition)) timed_out = true;
  }
};
Seen* seen = nullptr;

CUresult unmap(CUdeviceptr address, std::size_t bytes) {
  const CUresult result = cuMemUnmap(address, bytes);
  std::lock_guard lock(seen->mutex);
  ++seen->unmapped;
  seen->changed.notify_all();
  return result;
}

CUresult page_lock(void* begin, std::size_t bytes, unsigned flags) {
  bool refuse = false;
  {
    std::lock_guard lock(seen->mutex);
    seen->released_too_early |= seen->unmapped != 0;
    refuse = ++seen->registrations > seen->refuse_after;
  }
  if (!refuse) return cuMemHostRegister_v2(begin, bytes, flags);
  // By then all memory is touched.
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  std::lock_guard lock(seen->mutex);
  seen->refused = true;
  return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult copy_to_host(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  {
    std::unique_lock lock(seen->mutex);
    if (seen->refused) {
      seen->copiers.insert(std::this_thread::get_id());
      seen->changed.notify_all();
      seen->wait(lock, [] { return seen->copiers.size() >= seen->wait_for_copiers; });
    }
  }
  return cuMemcpyDtoHAsync_v2(to, from, bytes, stream);
}

CUresult wait_for_event(CUevent event) {
  std::function<void()> before;
  {
    std::lock_guard lock(seen->mutex);
    ++seen->ended;
    before = seen->before_event;
  }
  if (before) before();
  return cuEventSynchronize(event);
}

CUresult map(CUdeviceptr address, std::size_t bytes, std::size_t offset,
             CUmemGenericAllocationHandle handle, unsigned long long flags) {
  {
    std::lock_guard lock(seen->mutex);
    seen->mapped.push_back(address);
  }
  return cuMemMap(address, bytes, offset, handle, flags);
}

CUresult launch(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                void** parameters, void** extra) {
  const CUresult result = cuLaunchKernel(function, x, y, z, block_x, block_y, block_z, shared,
                                         stream, parameters, extra);
  std::lock_guard lock(seen->mutex);
  ++seen->launched;
  seen->changed.notify_all();
  return result;
}

CUresult copy_to_device(CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream) {
  {
    std::unique_lock lock(seen->mutex);
    if (seen->wait_for_launch) seen->wait(lock, [] { return seen->launched != 0; });
  }
  return cuMemcpyHtoDAsync_v2(to, from, bytes, stream);
}

class CopiesTest : public SimulatedEngine {
 protected:
  void SetUp() override {
    seen = &seen_;
    SimulatedEngine::SetUp();
    driver = simulated_driver();
    driver.cuMemMap = map;
    driver.cuMemUnmap = unmap;
    driver.cuMemHostRegister_v2 = page_lock;
    driver.cuEventSynchronize = wait_for_event;
    driver.cuLaunchKernel = launch;
    driver.cuMemcpyHtoDAsync_v2 = copy_to_device;
    driver.cuMemcpyDtoHAsync_v2 = copy_to_host;
  }

  // An engine over the driver above, with blocks that fill a chunk each.
  void begin(const EngineOptions& options) {
    engine.reset();
    engine = std::make_unique<Engine>(driver, tags, options);
    for (std::size_t i = 0; i < kChunks; ++i) {
      blocks[i] = allocate(weights, kChunkBytes);
      fill(blocks[i], kChunkBytes, i + 1);
    }
  }

  Status sleep_from(Origin origin) {
    return engine->sleep({.tags = {}, .origin = origin}, &report);
  }

  void expect_intact() {
    for (std::size_t i = 0; i < kChunks; ++i) EXPECT_TRUE(holds(blocks[i], kChunkBytes, i + 1));
  }

  // From outside; the wake waits with the engine's copies until a kernel is launched.
  void sleep_in_small_pieces() {
    EngineOptions options = small_options();
    options.piece_bytes = kSmallPiece;
    begin(options);
    ASSERT_TRUE(sleep_from(Origin::kOutside).is_ok());
    seen_.wait_for_launch = true;
  }

  // The launches of a wake.
  unsigned launches_of_wake() {
    seen_.launched = 0;
    EXPECT_TRUE(wake().is_ok());
    EXPECT_FALSE(seen_.timed_out);
    return seen_.launched;
  }

  Seen seen_;
  Driver driver;
  CUdeviceptr blocks[kChunks] = {};
};

TEST_F(CopiesTest, AChunkIsReleasedWhileThoseAfterItAreCopied) {
  EngineOptions options = small_options();
  options.copy_threads = 1;
  begin(options);
  seen_.before_event = [this] {
    std::unique_lock lock(seen_.mutex);
    if (seen_.ended == kChunks) seen_.wait(lock, [this] { return seen_.unmapped != 0; });
  };
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_FALSE(seen_.timed_out) << "nothing was released before the last copy had ended";
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
}

TEST_F(CopiesTest, NothingIsReleasedBeforeAllHostMemoryIsThere) {
  EngineOptions options = small_options();
  options.copy_threads = 1;
  options.piece_bytes = kSmallPiece;
  begin(options);
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_FALSE(seen_.released_too_early);
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
}

TEST_F(CopiesTest, ACopyThatFailsAfterChunksWereReleasedBringsThemBack) {
  EngineOptions options = small_options();
  options.copy_threads = 1;
  begin(options);
  seen_.before_event = [this] {
    std::unique_lock lock(seen_.mutex);
    if (seen_.ended != kChunks) return;
    seen_.wait(lock, [this] { return seen_.unmapped == kChunks - 1; });
    simgpu_fail_at("cuEventSynchronize", 1, CUDA_ERROR_UNKNOWN);
  };
  const Status status = sleep();
  EXPECT_FALSE(seen_.timed_out);
  ASSERT_FALSE(status.is_ok());
  EXPECT_NE(status.message().find("nothing was put to sleep: "), std::string::npos)
      << status.message();
  EXPECT_FALSE(engine->is_sleeping({}));
  expect_intact();
  seen_.before_event = nullptr;
  ASSERT_TRUE(sleep().is_ok());
  ASSERT_TRUE(wake().is_ok());
  expect_intact();
}

// Such memory is copied by the processor. The threads that only touched copy too, from whenever on
// the driver refuses.
TEST_F(CopiesTest, WhereTheDriverRefusesToRegisterAllThreadsCopy) {
  constexpr unsigned kPieces = kChunks * kChunkBytes / kSmallPiece;
  for (const unsigned registered : {0u, kPieces / 2, kPieces - 8}) {
    EngineOptions options = small_options();
    options.copy_threads = 8;
    options.piece_bytes = kSmallPiece;
    options.stage_bytes = kChunks * kChunkBytes;
    begin(options);
    seen_.registrations = 0;
    seen_.copiers.clear();
    seen_.refuse_after = registered;
    seen_.refused = false;
    seen_.wait_for_copiers = 6;
    ASSERT_TRUE(sleep().is_ok());
    EXPECT_FALSE(seen_.timed_out) << seen_.copiers.size() << " threads copied, " << registered;
    EXPECT_EQ(seen_.registrations, kPieces);
    ASSERT_TRUE(wake().is_ok());
    expect_intact();
  }
}

TEST_F(CopiesTest, AKernelCopiesAFifthAtMostOfAWakeBehindAClosedGate) {
  sleep_in_small_pieces();
  const unsigned launches = launches_of_wake();
  EXPECT_GE(launches, 1u);
  EXPECT_LE(launches, kChunks * kChunkBytes / 5 / kSmallPiece + 1);
  expect_intact();
}

TEST_F(CopiesTest, NoKernelCopiesWhereTheProgramsWorkMayBeOnTheDevice) {
  begin(small_options());
  ASSERT_TRUE(sleep_from(Origin::kProgram).is_ok());
  EXPECT_EQ(launches_of_wake(), 0u);
  expect_intact();
}

TEST_F(CopiesTest, NoKernelCopiesWhereTheOptionIsOff) {
  EngineOptions options = small_options();
  options.kernel_copies = false;
  begin(options);
  ASSERT_TRUE(sleep_from(Origin::kOutside).is_ok());
  EXPECT_EQ(launches_of_wake(), 0u);
  expect_intact();
}

TEST_F(CopiesTest, AKernelThatCannotBeLaunchedLeavesItsCopiesToTheEngine) {
  sleep_in_small_pieces();
  ASSERT_EQ(simgpu_fail_at("cuLaunchKernel", 0, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES), 0);
  EXPECT_EQ(launches_of_wake(), 1u);
  expect_intact();
}

// A tag's memory comes back whole before that of the next.
class WakeOrderTest : public CopiesTest {
 protected:
  void begin_with(int priority_of_other) {
    tags.set_priority("other", priority_of_other);
    const TagId other_tag = tags.intern("other", Backup::kHost);
    begin(small_options());
    for (CUdeviceptr& block : others) {
      block = allocate(other_tag, kChunkBytes);
      fill(block, kChunkBytes, 50);
    }
    ASSERT_TRUE(sleep().is_ok());
    seen_.mapped.clear();
  }

  // The place in the order of waking.
  std::size_t place(CUdeviceptr block) const {
    return static_cast<std::size_t>(std::find(seen_.mapped.begin(), seen_.mapped.end(), block) -
                                    seen_.mapped.begin());
  }

  void expect_others_first(bool first) {
    ASSERT_EQ(seen_.mapped.size(), kChunks + std::size(others));
    for (CUdeviceptr other : others) {
      for (CUdeviceptr block : blocks) EXPECT_EQ(place(other) < place(block), first);
    }
    expect_intact();
  }

  CUdeviceptr others[2] = {};
};

TEST_F(WakeOrderTest, TheTagOfTheHigherPriorityWakesFirst) {
  begin_with(5);
  ASSERT_TRUE(wake().is_ok());
  expect_others_first(true);
}

TEST_F(WakeOrderTest, TheTagOfTheLowerPriorityWakesLast) {
  begin_with(-5);
  ASSERT_TRUE(wake().is_ok());
  expect_others_first(false);
}

TEST_F(WakeOrderTest, TheOrderInWhichTagsAreNamedComesBeforeTheirPriority) {
  begin_with(5);
  ASSERT_TRUE(wake({"weights", "other"}).is_ok());
  expect_others_first(false);
}

TEST_F(CopiesTest, ProgressKnowsAllOfTheBytesAndCountsThoseThatEnded) {
  EngineOptions options = small_options();
  options.copy_threads = 1;
  begin(options);
  std::vector<std::uint64_t> done;
  seen_.before_event = [&] {
    const Progress progress = engine->progress();
    EXPECT_EQ(progress.total_bytes, kChunks * kChunkBytes);
    done.push_back(progress.done_bytes);
  };
  const std::vector<std::uint64_t> expected = {0, kChunkBytes, 2 * kChunkBytes, 3 * kChunkBytes};
  ASSERT_TRUE(sleep().is_ok());
  EXPECT_EQ(done, expected);
  done.clear();
  ASSERT_TRUE(wake().is_ok());
  EXPECT_EQ(done, expected);
}

}  // namespace
}  // namespace dormouse
