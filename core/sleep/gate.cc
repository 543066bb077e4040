// The gate; see gate.h for the invariant. Slots are never freed, only reused: a closer may be
// reading one while its thread ends.
#include "core/sleep/gate.h"

#include <linux/membarrier.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace dormouse::gate {

std::atomic<std::uint32_t> state{0};
thread_local Slot* this_slot __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

// What only the slow paths use. Constructed at the first pass and never destroyed: threads may
// still pass at exit.
struct Shared {
  std::mutex slots_mutex;  // protects slots and free_slots
  Slot* slots = nullptr;   // of living threads
  Slot* free_slots = nullptr;
  pthread_key_t thread_end{};
  bool has_thread_end = false;

  std::mutex gate_mutex;  // protects close_count, policy, found_closed, waking; and the closed bit
                          // of state changes under it
  std::condition_variable opened;
  std::uint32_t close_count = 0;
  Policy policy = Policy::kWait;
  FoundClosed found_closed = nullptr;
  bool waking = false;  // a waiting thread sees to it that the memory wakes
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
  std::lock_guard lock(s.slots_mutex);
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
  std::lock_guard lock(s.slots_mutex);
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

// Has the memory woken until the gate is open, or until the policy is another. A wake can fail, for
// want of memory above all, and what it wants can come.
void wake_until_open(Shared& s, std::unique_lock<std::mutex>& lock) {
  constexpr std::chrono::milliseconds kLongestPause{5000};
  std::chrono::milliseconds pause{100};
  s.waking = true;
  while (s.close_count != 0 && s.policy == Policy::kWake && s.found_closed != nullptr) {
    const FoundClosed wake = s.found_closed;
    lock.unlock();
    wake();
    lock.lock();
    s.opened.wait_for(lock, pause, [&] { return s.close_count == 0; });
    pause = std::min(2 * pause, kLongestPause);
  }
  s.waking = false;
}

// Waits, wakes or refuses, as the policy says. The caller's slot shows it outside meanwhile.
CUresult at_closed_gate() {
  Shared& s = shared();
  std::unique_lock lock(s.gate_mutex);
  if (s.close_count == 0) return CUDA_SUCCESS;
  if (s.policy == Policy::kFail) {
    const FoundClosed refused = s.found_closed;
    lock.unlock();
    if (refused != nullptr) refused();
    return CUDA_ERROR_NOT_PERMITTED;
  }
  s.waiting.fetch_add(1, std::memory_order_relaxed);
  while (s.close_count != 0) {
    const bool wakes = s.policy == Policy::kWake && s.found_closed != nullptr && !s.waking;
    if (wakes) {
      wake_until_open(s, lock);
    } else {
      s.opened.wait(lock);
    }
  }
  s.waiting.fetch_sub(1, std::memory_order_relaxed);
  return CUDA_SUCCESS;
}

// True when every thread but the caller is outside. The caller holds gate_mutex with the closed bit
// set.
bool all_outside(Shared& s) {
  std::lock_guard lock(s.slots_mutex);
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

CUresult enter_slow() noexcept {
  Slot* slot = this_slot != nullptr ? this_slot : register_thread();
  if (slot == nullptr)
    return CUDA_SUCCESS;  // no memory for a slot: an ungated call beats a failing program
  while (true) {
    const std::uint32_t depth = slot->in_call.load(std::memory_order_relaxed);
    slot->in_call.store(depth + 1, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (depth != 0 || (state.load(std::memory_order_seq_cst) & kClosed) == 0) return CUDA_SUCCESS;
    slot->in_call.store(depth, std::memory_order_release);
    const CUresult verdict = at_closed_gate();
    if (verdict != CUDA_SUCCESS) return verdict;
  }
}

void configure(Policy policy, FoundClosed found_closed) noexcept {
  Shared& s = shared();
  std::lock_guard lock(s.gate_mutex);
  s.policy = policy;
  s.found_closed = found_closed;
}

bool close(std::chrono::milliseconds timeout) noexcept {
  Shared& s = shared();
  std::unique_lock lock(s.gate_mutex);
  if (s.close_count++ == 0) state.fetch_or(kClosed, std::memory_order_seq_cst);
  make_stores_visible();
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  auto pause = std::chrono::microseconds(20);
  while (!all_outside(s)) {
    if (std::chrono::steady_clock::now() >= deadline) {
      if (--s.close_count == 0) {
        state.fetch_and(~kClosed, std::memory_order_seq_cst);
        s.opened.notify_all();
      }
      return false;
    }
    lock.unlock();
    std::this_thread::sleep_for(pause);
    if (pause < std::chrono::milliseconds(2)) pause *= 2;
    lock.lock();
  }
  return true;
}

void open() noexcept {
  Shared& s = shared();
  std::lock_guard lock(s.gate_mutex);
  if (s.close_count == 0 || --s.close_count != 0) return;
  state.fetch_and(~kClosed, std::memory_order_seq_cst);
  s.opened.notify_all();
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
  new (&s.slots_mutex) std::mutex;
  new (&s.gate_mutex) std::mutex;
  new (&s.opened) std::condition_variable;
  s.slots = nullptr;
  s.free_slots = nullptr;
  s.close_count = 0;
  s.waking = false;
  s.waiting.store(0, std::memory_order_relaxed);
}

}  // namespace dormouse::gate
