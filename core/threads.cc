// See threads.h.
#include "core/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "core/control_groups.h"

namespace dormouse {

namespace {

constexpr int kBackgroundNice = 10;

// Threads made meanwhile inherit that all signals are blocked but those that a fault raises in the
// thread itself: a crash handler of the program should see them.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) {
      sigdelset(&blocked, fault);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

void run_on_threads(unsigned count, const std::function<void()>& work) noexcept {
  std::vector<std::thread> threads;
  try {
    threads.reserve(count);
    for (unsigned i = 1; i < count; ++i) {
      threads.push_back(start_thread("dormouse-copy", work));
    }
  } catch (...) {
    // No more threads can be started: those that run do all the work.
  }
  work();
  for (std::thread& thread : threads) thread.join();
}

std::thread start_thread(const char* name, std::function<void()> work) {
  SignalsBlocked blocked;
  return std::thread([name, work = std::move(work)] {
    pthread_setname_np(pthread_self(), name);
    work();
  });
}

bool start_plain_thread(const char* name, void* (*function)(void*), void* argument) noexcept {
  SignalsBlocked blocked;
  pthread_t thread{};
  if (pthread_create(&thread, nullptr, function, argument) != 0) return false;
  pthread_setname_np(thread, name);
  pthread_detach(thread);
  return true;
}

std::thread start_background_thread(const char* name, std::function<void()> work) {
  return start_thread(name, [work = std::move(work)] {
    // Linux keeps a nice value per thread (sched(7)).
    setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kBackgroundNice);
    work();
  });
}

unsigned default_threads() noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  const auto processors = static_cast<unsigned>(std::clamp(CPU_COUNT(&set), 1, 16));
  try {
    // Threads beyond the control group's quota would only have each other stopped.
    return std::min(processors, processor_quota().value_or(processors));
  } catch (const std::bad_alloc&) {
    return processors;
  }
}

}  // namespace dormouse
