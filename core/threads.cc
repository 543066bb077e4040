// See threads.h.
#include "core/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace dormouse {

void run_on_threads(unsigned count, const std::function<void()>& work) noexcept {
  std::vector<std::thread> threads;
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited by the new threads
  try {
    for (unsigned i = 1; i < count; ++i) {
      threads.emplace_back([&work] {
        pthread_setname_np(pthread_self(), "dormouse-copy");
        work();
      });
    }
  } catch (...) {
    // No more threads to be had: those that run do all the work.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  work();
  for (std::thread& thread : threads) thread.join();
}

unsigned default_threads() noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return static_cast<unsigned>(std::clamp(CPU_COUNT(&set), 1, 16));
}

}  // namespace dormouse
