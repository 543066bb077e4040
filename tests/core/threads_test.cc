#include "core/threads.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>

namespace dormouse {
namespace {

TEST(Threads, AllRunAndTheCallerIsOneOfThem) {
  std::atomic<int> ran{0};
  std::atomic<bool> caller{false};
  const pthread_t self = pthread_self();
  run_on_threads(4, [&] {
    ++ran;
    if (pthread_equal(self, pthread_self())) caller = true;
  });
  EXPECT_EQ(ran, 4);
  EXPECT_TRUE(caller);
}

TEST(Threads, HelpersNeverRunTheProgramsSignalHandlers) {
  std::atomic<int> unblocked{0};
  const pthread_t self = pthread_self();
  run_on_threads(3, [&] {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    if (!pthread_equal(self, pthread_self()) && sigismember(&mask, SIGUSR1) == 0) ++unblocked;
  });
  EXPECT_EQ(unblocked, 0);
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  EXPECT_EQ(sigismember(&mask, SIGUSR1), 0) << "the caller's own mask is as it was";
}

TEST(Threads, TheDefaultIsWithinBounds) {
  EXPECT_GE(default_threads(), 1u);
  EXPECT_LE(default_threads(), 16u);
}

}  // namespace
}  // namespace dormouse
