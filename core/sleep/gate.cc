// The gate; see gate.h for the invariant. Slots are never freed, only reused: a closer may be
// reading one while its thread ends.
#include "core/sleep/gate.h"

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <new>
#include <thread>

#include "core/thread_annotations.h"
#include "core/threads.h"

namespace dormouse::gate {

std::atomic<std::uint32_t> state{0};
thread_local Slot* this_slot __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kLongestWait{1000};
constexpr milliseconds kFirstPause{100};
constexpr milliseconds kLongestPause{5000};

// What only the slow paths use. Constructed at the first pass and never destroyed: threads may
// still pass at exit.
struct Shared {
  Mutex slots_mutex;
  Slot* slots GUARDED_BY(slots_mutex) = nullptr;  // of living threads
  Slot* free_slots GUARDED_BY(slots_mutex) = nullptr;
  pthread_key_t thread_end{};
  bool has_thread_end = false;

  Mutex gate_mutex;  // the closed bit of state changes under it too
  std::uint32_t close_count GUARDED_BY(gate_mutex) = 0;
  Policy policy GUARDED_BY(gate_mutex) = Policy::kWait;
  FoundClosed found_closed GUARDED_BY(gate_mutex) = nullptr;
  Waiting around GUARDED_BY(gate_mutex);
  bool waking GUARDED_BY(gate_mutex) = false;               // a waiting thread is waking the memory
  milliseconds pause GUARDED_BY(gate_mutex) = kFirstPause;  // between two tries to wake
  Clock::time_point next_wake GUARDED_BY(gate_mutex){};

  // Counts openings and changes of policy. A futex, since a condition variable does not return
  // when a signal handler has run.
  std::atomic<std::uint32_t> changes{0};
  std::atomic<std::uint32_t> waiting{0};
};

void thread_ended(void* slot);

long membarrier(int command) {
  return syscall(SYS_membarrier, command, 0, 0);
}

Shared& shared() noexcept {
  static Shared* const instance = [] {
    auto* made = new Shared;
    made->has_thread_end = pthread_key_create(&made->thread_end, &thread_ended) == 0;
    if (membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) != 0) {
      state.fetch_or(kFenceNeeded, std::memory_order_seq_cst);
    }
    return made;
  }();
  return *instance;
}

void thread_ended(void* pointer) {
  auto* slot = static_cast<Slot*>(pointer);
  Shared& s = shared();
  MutexLock lock(s.slots_mutex);
  for (Slot** link = &s.slots; *link != nullptr; link = &(*link)->next) {
    if (*link != slot) continue;
    *link = slot->next;
    break;
  }
  slot->in_call.store(0, std::memory_order_release);
  slot->next = s.free_slots;
  s.free_slots = slot;
  this_slot = nullptr;
}

Slot* register_thread() noexcept {
  Shared& s = shared();
  MutexLock lock(s.slots_mutex);
  Slot* slot = s.free_slots;
  if (slot != nullptr) {
    s.free_slots = slot->next;
  } else {
    slot = new (std::nothrow) Slot;
    if (slot == nullptr) return nullptr;
  }
  slot->next = s.slots;
  s.slots = slot;
  if (s.has_thread_end) pthread_setspecific(s.thread_end, slot);
  this_slot = slot;
  return slot;
}

// Returns at once if `changes` is no longer `seen`; else when it changes, when a signal handler has
// run on this thread, or after `limit`. With a limit the kernel does not restart the wait, not even
// after a handler with SA_RESTART.
void wait_for_change(std::atomic<std::uint32_t>& changes, std::uint32_t seen,
                     milliseconds limit) noexcept {
  const timespec time{limit.count() / 1000, limit.count() % 1000 * 1000000};
  syscall(SYS_futex, &changes, FUTEX_WAIT_PRIVATE, seen, &time, nullptr, 0);
}

void tell_change(Shared& s) noexcept REQUIRES(s.gate_mutex) {
  s.changes.fetch_add(1, std::memory_order_relaxed);
  syscall(SYS_futex, &s.changes, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// With the gate closed. A wake can fail, for want of memory above all, and what it wants can come:
// it is tried again, by one thread at a time.
FoundClosed begin_wake(Shared& s, Clock::time_point now) noexcept REQUIRES(s.gate_mutex) {
  const bool wakes = s.policy == Policy::kWake && !s.waking && now >= s.next_wake;
  if (!wakes || s.found_closed == nullptr) return nullptr;
  s.waking = true;
  return s.found_closed;
}

void end_wake(Shared& s) noexcept {
  MutexLock lock(s.gate_mutex);
  s.waking = false;
  s.next_wake = Clock::now() + s.pause;
  s.pause = std::min(2 * s.pause, kLongestPause);
}

// What the caller of at_closed_gate() still has to do after it.
struct Waited {
  bool (*end)(void* token) = nullptr;
  void* token = nullptr;
};

// One wait, one wake or a refusal, as the policy says; CUDA_SUCCESS: see whether the gate is open
// now. The caller's slot shows it outside meanwhile. The wait is short because nothing ends it for
// a thread that is to be cancelled.
CUresult at_closed_gate(Waited& waited) noexcept {
  const CancellationOff cancellation;
  Shared& s = shared();
  MutexLock lock(s.gate_mutex);
  if (s.close_count == 0) return CUDA_SUCCESS;
  if (s.policy == Policy::kFail) {
    const FoundClosed refused = s.found_closed;
    lock.unlock();
    if (refused != nullptr) refused();
    return CUDA_ERROR_NOT_PERMITTED;
  }
  const std::uint32_t seen = s.changes.load(std::memory_order_relaxed);
  const FoundClosed wake = begin_wake(s, Clock::now());
  const milliseconds limit =
      s.policy == Policy::kWake ? std::min(s.pause, kLongestWait) : kLongestWait;
  const Waiting around = s.around;
  lock.unlock();
  void* token = around.begin != nullptr ? around.begin() : nullptr;
  s.waiting.fetch_add(1, std::memory_order_relaxed);
  if (wake != nullptr) {
    wake();
    end_wake(s);
  }
  wait_for_change(s.changes, seen, limit);
  s.waiting.fetch_sub(1, std::memory_order_relaxed);  // before end(), in which the thread may fork
  waited = {around.end, token};
  return CUDA_SUCCESS;
}

// True when every thread but the caller is outside. The caller holds gate_mutex with the closed bit
// set.
bool all_outside(Shared& s) {
  MutexLock lock(s.slots_mutex);
  for (Slot* slot = s.slots; slot != nullptr; slot = slot->next) {
    if (slot != this_slot && slot->in_call.load(std::memory_order_acquire) != 0) return false;
  }
  return true;
}

void make_stores_visible() {
  if ((state.load(std::memory_order_relaxed) & kFenceNeeded) == 0 &&
      membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0) {
    return;
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

}  // namespace

CUresult enter_slow() {
  Slot* slot = this_slot != nullptr ? this_slot : register_thread();
  if (slot == nullptr) {
    return CUDA_SUCCESS;  // no memory for a slot: an ungated call beats a failing program
  }
  while (true) {
    const std::uint32_t depth = slot->in_call.load(std::memory_order_relaxed);
    slot->in_call.store(depth + 1, std::memory_order_seq_cst);
    slot->passes.fetch_add(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (depth != 0 || (state.load(std::memory_order_seq_cst) & kClosed) == 0) return CUDA_SUCCESS;
    slot->in_call.store(depth, std::memory_order_release);
    Waited waited;
    const CUresult verdict = at_closed_gate(waited);
    if (verdict != CUDA_SUCCESS) return verdict;
    // Both may unwind the thread: here, where no frame of ours has anything to clean up.
    if (waited.end != nullptr) {
      int cancellable = 0;
      pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancellable);
      const bool goes_on = waited.end(waited.token);
      pthread_setcancelstate(cancellable, nullptr);
      if (!goes_on) return CUDA_ERROR_NOT_PERMITTED;
    }
    pthread_testcancel();
  }
}

void configure(Policy policy, FoundClosed found_closed, Waiting around) noexcept {
  Shared& s = shared();
  MutexLock lock(s.gate_mutex);
  s.policy = policy;
  s.found_closed = found_closed;
  s.around = around;
  tell_change(s);
}

bool close(std::chrono::milliseconds timeout) noexcept {
  Shared& s = shared();
  MutexLock lock(s.gate_mutex);
  if (s.close_count++ == 0) {
    state.fetch_or(kClosed, std::memory_order_seq_cst);
    s.pause = kFirstPause;
    s.next_wake = {};
  }
  make_stores_visible();
  const auto deadline = Clock::now() + timeout;
  auto pause = std::chrono::microseconds(20);
  while (!all_outside(s)) {
    if (Clock::now() >= deadline) {
      if (--s.close_count == 0) {
        state.fetch_and(~kClosed, std::memory_order_seq_cst);
        tell_change(s);
      }
      return false;
    }
    lock.unlock();
    std::this_thread::sleep_for(pause);
    if (pause < milliseconds(2)) pause *= 2;
    lock.lock();
  }
  return true;
}

void open() noexcept {
  Shared& s = shared();
  MutexLock lock(s.gate_mutex);
  if (s.close_count == 0 || --s.close_count != 0) return;
  state.fetch_and(~kClosed, std::memory_order_seq_cst);
  tell_change(s);
}

std::optional<std::uint64_t> quiet_passes() noexcept {
  Shared& s = shared();
  std::uint64_t passes = 0;
  MutexLock lock(s.slots_mutex);
  for (const Slot* slot = s.slots; slot != nullptr; slot = slot->next) {
    if (slot->in_call.load(std::memory_order_acquire) != 0) return std::nullopt;
    passes += slot->passes.load(std::memory_order_relaxed);
  }
  for (const Slot* slot = s.free_slots; slot != nullptr; slot = slot->next)
    passes += slot->passes.load(std::memory_order_relaxed);
  return passes;
}

bool is_closed() noexcept {
  return (state.load(std::memory_order_relaxed) & kClosed) != 0;
}

std::uint32_t waiting() noexcept {
  return shared().waiting.load(std::memory_order_relaxed);
}

void reset_after_fork() noexcept {
  state.fetch_and(~kClosed, std::memory_order_seq_cst);
  this_slot = nullptr;
  Shared& s = shared();
  // Other threads are gone and may have held these; fresh ones take their place.
  new (&s.slots_mutex) Mutex;
  new (&s.gate_mutex) Mutex;
  const MutexLock gate(s.gate_mutex);
  const MutexLock slots(s.slots_mutex);
  s.slots = nullptr;
  s.free_slots = nullptr;
  s.close_count = 0;
  s.waking = false;
  s.waiting.store(0, std::memory_order_relaxed);
}

}  // namespace dormouse::gate
