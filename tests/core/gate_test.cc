#include "core/sleep/gate.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace {
thread_local bool no_memory = false;
}  // namespace

void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return no_memory ? nullptr : std::malloc(bytes);
}

namespace dormouse::gate {
namespace {

using std::chrono::milliseconds;

class GateTest : public ::testing::Test {
 protected:
  void SetUp() override { configure(Policy::kWait, nullptr); }
};

TEST_F(GateTest, OpenItLetsEveryonePass) {
  EXPECT_EQ(enter(), CUDA_SUCCESS);
  leave();
  EXPECT_FALSE(is_closed());
}

TEST_F(GateTest, ClosedItHoldsOthersUntilItOpens) {
  ASSERT_TRUE(close(milliseconds(1000)));
  std::atomic<bool> passed{false};
  std::thread other([&] {
    EXPECT_EQ(enter(), CUDA_SUCCESS);
    passed = true;
    leave();
  });
  while (waiting() == 0) std::this_thread::yield();
  EXPECT_FALSE(passed);
  open();
  other.join();
  EXPECT_TRUE(passed);
}

TEST_F(GateTest, ClosingWaitsForThoseInside) {
  std::atomic<bool> inside{false};
  std::atomic<bool> may_leave{false};
  std::thread other([&] {
    ASSERT_EQ(enter(), CUDA_SUCCESS);
    inside = true;
    while (!may_leave) std::this_thread::yield();
    leave();
  });
  while (!inside) std::this_thread::yield();
  EXPECT_FALSE(close(milliseconds(20)));
  EXPECT_FALSE(is_closed()) << "a close that gave up leaves the gate open";
  may_leave = true;
  EXPECT_TRUE(close(milliseconds(2000)));
  open();
  other.join();
}

TEST_F(GateTest, TheClosingThreadMayBeInsideItself) {
  ASSERT_EQ(enter(), CUDA_SUCCESS);
  EXPECT_TRUE(close(milliseconds(1000)));
  EXPECT_EQ(enter(), CUDA_SUCCESS) << "a nested pass of a thread inside does not wait";
  leave();
  open();
  leave();
}

TEST_F(GateTest, ThePolicyFailRefuses) {
  static std::atomic<int> refusals;
  configure(Policy::kFail, []() noexcept { ++refusals; });
  ASSERT_TRUE(close(milliseconds(1000)));
  EXPECT_EQ(enter(), CUDA_ERROR_NOT_PERMITTED);
  EXPECT_EQ(refusals, 1);
  open();
  EXPECT_EQ(enter(), CUDA_SUCCESS);
  leave();
}

TEST_F(GateTest, ThePolicyWakeCallsTheWaker) {
  configure(Policy::kWake, []() noexcept { open(); });
  ASSERT_TRUE(close(milliseconds(1000)));
  EXPECT_EQ(enter(), CUDA_SUCCESS);
  leave();
  EXPECT_FALSE(is_closed());
}

TEST_F(GateTest, AWakeThatFailsIsTriedAgainByOneOfThoseThatWait) {
  static std::atomic<int> tries;
  static std::atomic<int> at_once;
  static std::atomic<bool> overlapped;
  configure(Policy::kWake, []() noexcept {
    if (++at_once > 1) overlapped = true;
    std::this_thread::sleep_for(milliseconds(5));
    if (++tries == 3) open();
    --at_once;
  });
  ASSERT_TRUE(close(milliseconds(1000)));
  const auto began = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      EXPECT_EQ(enter(), CUDA_SUCCESS);
      leave();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(std::chrono::steady_clock::now() - began, milliseconds(250)) << "pauses between tries";
  EXPECT_EQ(tries, 3);
  EXPECT_FALSE(overlapped);
}

TEST_F(GateTest, AThreadWhoseWakeFailsGoesOnWhenOthersOpenTheGate) {
  static std::atomic<int> tries;
  configure(Policy::kWake, []() noexcept { ++tries; });
  ASSERT_TRUE(close(milliseconds(1000)));
  std::thread other([] {
    EXPECT_EQ(enter(), CUDA_SUCCESS);
    leave();
  });
  while (tries < 2) std::this_thread::yield();
  open();
  other.join();
}

TEST_F(GateTest, ThreadsThatWaitFollowANewPolicy) {
  ASSERT_TRUE(close(milliseconds(1000)));
  CUresult result = CUDA_SUCCESS;
  std::thread other([&] { result = enter(); });
  while (waiting() == 0) std::this_thread::yield();
  configure(Policy::kFail, nullptr);  // as a process does that exits
  other.join();
  EXPECT_EQ(result, CUDA_ERROR_NOT_PERMITTED);
  open();
}

// What a call that waits at the gate saw of begin() and end().
struct Around {
  std::atomic<int> begun{0};
  std::atomic<int> ended{0};
  std::atomic<bool> refuses{false};
};
Around around;

Waiting counted() {
  around.begun = around.ended = 0;
  around.refuses = false;
  return {[]() noexcept -> void* {
            ++around.begun;
            return &around;
          },
          [](void* token) noexcept {
            EXPECT_EQ(token, &around);
            ++around.ended;
            return !around.refuses;
          }};
}

TEST_F(GateTest, AWaitIsBracketedAndReturnsWhenASignalHandlerHasRun) {
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = [](int) {};
  action.sa_flags = SA_RESTART;  // as asyncio sets it
  ASSERT_EQ(sigaction(SIGUSR1, &action, &before), 0);
  configure(Policy::kWait, nullptr, counted());
  ASSERT_TRUE(close(milliseconds(1000)));
  CUresult result = CUDA_SUCCESS;
  std::thread other([&] { result = enter(); });
  while (waiting() == 0) std::this_thread::yield();
  const int ended = around.ended;
  const auto began = std::chrono::steady_clock::now();
  while (around.ended == ended) {
    pthread_kill(other.native_handle(), SIGUSR1);
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_LT(std::chrono::steady_clock::now() - began, milliseconds(900))
      << "only the time ended it";
  around.refuses = true;
  pthread_kill(other.native_handle(), SIGUSR1);
  other.join();
  EXPECT_EQ(result, CUDA_ERROR_NOT_PERMITTED) << "end() had the call refused";
  EXPECT_EQ(around.begun, around.ended);
  open();
  sigaction(SIGUSR1, &before, nullptr);
}

TEST_F(GateTest, AThreadThatIsCancelledWhileItWaitsEndsAndLeavesNothingBehind) {
  ASSERT_TRUE(close(milliseconds(1000)));
  pthread_t thread{};
  const auto waits = [](void*) -> void* { return reinterpret_cast<void*>(enter() + 1L); };
  ASSERT_EQ(pthread_create(&thread, nullptr, waits, nullptr), 0);
  while (waiting() == 0) std::this_thread::yield();
  ASSERT_EQ(pthread_cancel(thread), 0);
  void* result = nullptr;
  ASSERT_EQ(pthread_join(thread, &result), 0);
  EXPECT_EQ(result, PTHREAD_CANCELED);
  EXPECT_EQ(waiting(), 0U);
  open();
  EXPECT_TRUE(close(milliseconds(1000)));
  open();
}

TEST_F(GateTest, WithoutMemoryForASlotCallsGoThrough) {
  std::thread([] {
    no_memory = true;
    EXPECT_EQ(enter(), CUDA_SUCCESS);
    no_memory = false;
    EXPECT_EQ(enter(), CUDA_SUCCESS) << "a nested call that has a slot";
    leave();
    leave();
    EXPECT_EQ(this_slot->in_call, 0U);
  }).join();
}

TEST_F(GateTest, ClosesAreCounted) {
  ASSERT_TRUE(close(milliseconds(1000)));
  ASSERT_TRUE(close(milliseconds(1000)));
  open();
  EXPECT_TRUE(is_closed());
  open();
  EXPECT_FALSE(is_closed());
  open();
  EXPECT_FALSE(is_closed()) << "an open too many does nothing";
}

TEST_F(GateTest, NobodyIsEverInsideWhileItIsClosed) {
  std::atomic<bool> stop{false};
  std::atomic<int> value{0};  // odd while closed
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      while (!stop) {
        if (enter() != CUDA_SUCCESS) continue;
        if (value.load(std::memory_order_relaxed) % 2 != 0) ++wrong;
        leave();
      }
    });
  }
  for (int i = 0; i < 2000; ++i) {
    if (!close(milliseconds(5000))) ++wrong;
    value.fetch_add(1, std::memory_order_relaxed);
    value.fetch_add(1, std::memory_order_relaxed);
    open();
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(GateTest, ThreadsThatEndLeaveNothingBehind) {
  for (int i = 0; i < 200; ++i) {
    std::thread([] {
      if (enter() == CUDA_SUCCESS) leave();
    }).join();
  }
  EXPECT_TRUE(close(milliseconds(1000)));
  open();
}

TEST_F(GateTest, AForkedChildFindsTheGateOpen) {
  ASSERT_TRUE(close(milliseconds(1000)));
  const pid_t child = fork();
  if (child == 0) {
    reset_after_fork();
    const bool good = enter() == CUDA_SUCCESS && !is_closed();
    _exit(good ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  open();
}

}  // namespace
}  // namespace dormouse::gate
