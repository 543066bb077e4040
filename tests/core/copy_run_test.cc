// CopyRun at random: threads that cannot be had, memory that runs out or is refused registration,
// driver calls that fail, runs that end early. What failed is tried again on the same images, and
// then the content is there and the books are even. The linker puts start_thread() of this file in
// place of the real one (see BUILD.bazel).
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <system_error>
#include <thread>
#include <vector>

#include "core/backup/host_image.h"
#include "core/backup/transfer.h"
#include "core/memory/pool.h"
#include "core/threads.h"
#include "tests/core/simulated_engine.h"

namespace {

std::function<bool(int)> thread_fails;  // the nth that is asked for
std::atomic<int> threads_asked_for{0};

}  // namespace

#define START_THREAD "_ZN8dormouse12start_threadEPKcSt8functionIFvvEE"
std::thread real_start_thread(const char* name,
                              std::function<void()> work) asm("__real_" START_THREAD);
std::thread wrapped_start_thread(const char* name,
                                 std::function<void()> work) asm("__wrap_" START_THREAD);
std::thread wrapped_start_thread(const char* name, std::function<void()> work) {
  if (thread_fails && thread_fails(++threads_asked_for)) {
    throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
  }
  return real_start_thread(name, std::move(work));
}

namespace dormouse {
namespace {

constexpr std::size_t kBytes = 16 * kMiB;
constexpr std::size_t kImages = 5;
constexpr int kRounds = 40;

std::function<bool(int)> registration_fails;
std::atomic<int> registrations{0};

CUresult page_lock(void* begin, std::size_t bytes, unsigned flags) {
  if (registration_fails && registration_fails(++registrations)) return CUDA_ERROR_OUT_OF_MEMORY;
  return cuMemHostRegister_v2(begin, bytes, flags);
}

class CopyRunTest : public SimulatedEngine {
 protected:
  void SetUp() override {
    SimulatedEngine::SetUp();
    driver = simulated_driver();
    driver.cuMemHostRegister_v2 = page_lock;
    for (std::size_t i = 0; i < kImages; ++i) {
      blocks[i] = allocate(weights, kBytes);
      fill(blocks[i], kBytes, i + 1);
    }
  }
  void TearDown() override {
    thread_fails = nullptr;
    registration_fails = nullptr;
    simgpu_clear_failures();
    SimulatedEngine::TearDown();
  }

  unsigned pick(unsigned count) { return static_cast<unsigned>(random() % count); }

  // None, all, the nth or all from the nth on.
  std::function<bool(int)> some() {
    const unsigned kind = pick(4);
    const int nth = static_cast<int>(1 + pick(10));
    return [=](int use) {
      return kind == 1 || (kind == 2 && use == nth) || (kind == 3 && use >= nth);
    };
  }

  void let_things_fail() {
    threads_asked_for = registrations = 0;
    thread_fails = some();
    constexpr const char* kCalls[] = {"cuStreamCreate", "cuEventCreate", "cuMemcpyDtoHAsync",
                                      "cuEventSynchronize"};
    const unsigned call = pick(2 * std::size(kCalls));
    if (call < std::size(kCalls)) simgpu_fail_at(kCalls[call], 1 + pick(15), CUDA_ERROR_UNKNOWN);
  }
  void let_nothing_fail() {
    thread_fails = nullptr;
    simgpu_clear_failures();
  }

  // Plans copies of some chunks at a time, whole or in parts, some of them prepared before.
  bool add_some(CopyRun& run, HostMemory& memory, std::size_t* next, bool whole) {
    std::vector<PieceCopy> plan;
    const std::size_t stop = std::min(kImages, *next + 1 + pick(3));
    for (; *next < stop; ++*next) {
      HostImage& image = *images[*next];
      const Ranges parts = {{kMiB, 5 * kMiB}, {9 * kMiB, 512}};
      const Ranges ranges = whole || pick(3) != 0 ? Ranges{{0, kBytes}} : parts;
      const std::uint64_t missing = image.missing_bytes(ranges);
      if (!memory.admit(missing).is_ok()) return false;
      image.add_pieces(ranges);
      if (pick(4) == 0) {
        EXPECT_TRUE(image.make_ready(image.pieces().front(), context_id()).is_ok());
      }
      plan_copies(image, blocks[*next], ranges, &unfinished[*next], &plan);
    }
    std::shuffle(plan.begin(), plan.end(), random);
    run.add(std::move(plan));
    return *next < kImages;
  }

  // One run over all images, ended in one of the ways there are; kBusy if it was left.
  Status copy(HostMemory& memory, bool whole) {
    std::fill(std::begin(unfinished), std::end(unfinished), 0);
    CopyOptions options;
    options.context = context;
    options.context_id = context_id();
    options.threads = std::vector<unsigned>{1, 2, 3, 16}[pick(4)];
    std::atomic<std::uint64_t> done{0};
    CopyRun run(driver, options, &done);
    std::size_t next = 0;
    while (add_some(run, memory, &next, whole)) {
      if (!whole && pick(8) == 0) return {Code::kBusy, "left"};
      if (pick(3) == 0) std::this_thread::sleep_for(std::chrono::microseconds(pick(3000)));
    }
    if (!whole && pick(5) == 0) return {Code::kBusy, "left"};
    if (pick(2) == 0) {
      run.complete();
      const bool ready = run.wait_until_ready();
      for (const std::size_t& each : unfinished) {
        EXPECT_TRUE(run.wait_for(each) || run.failed());
      }
      EXPECT_TRUE(ready || run.failed());
    }
    return run.finish();
  }

  void expect_copied(const HostMemory& memory) {
    std::uint64_t held = 0;
    for (std::size_t i = 0; i < kImages; ++i) {
      EXPECT_EQ(unfinished[i], 0u);
      EXPECT_TRUE(images[i]->is_ready({{0, kBytes}}));
      EXPECT_EQ(std::memcmp(images[i]->data(), reinterpret_cast<void*>(blocks[i]), kBytes), 0);
      held += images[i]->held_bytes();
    }
    EXPECT_EQ(memory.held_bytes(), held);
  }

  Driver driver;
  std::mt19937 random;
  CUdeviceptr blocks[kImages] = {};
  std::vector<std::unique_ptr<HostImage>> images;
  std::size_t unfinished[kImages] = {};
};

TEST_F(CopyRunTest, WhateverFailsAnotherRunCopiesAll) {
  unsigned failed = 0;
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    random.seed(static_cast<unsigned>(round));
    HostMemory memory(kImages * kBytes, true, (std::size_t{2} << pick(4)) * kMiB);
    images.clear();
    for (std::size_t i = 0; i < kImages; ++i) {
      images.push_back(HostImage::reserve(driver, contexts, memory, 0, kBytes));
      ASSERT_NE(images.back(), nullptr);
    }
    registration_fails = some();
    let_things_fail();
    if (!copy(memory, false).is_ok()) ++failed;
    let_nothing_fail();
    const Status status = copy(memory, true);
    ASSERT_TRUE(status.is_ok()) << status.message();
    expect_copied(memory);
    images.clear();
    EXPECT_EQ(memory.held_bytes(), 0u);
    EXPECT_TRUE(memory.fits(kImages * kBytes));
  }
  EXPECT_GT(failed, kRounds / 8u) << "too little was tried";
  EXPECT_LT(failed, kRounds * 7 / 8u);
}

}  // namespace
}  // namespace dormouse
