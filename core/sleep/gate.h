// The gate: where a program's launch or copy waits while memory that was put to sleep from outside
// is asleep.
//
// Invariant: once close() has returned, no thread is between gate_enter() and gate_leave(), and
// none gets there until open(). Open, passing it costs a store to the thread's own slot and one
// relaxed load; close() pays for that with membarrier(2), or, where the kernel has none, every pass
// pays with a fence.
#pragma once

#include <cuda.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>

namespace dormouse::gate {

// What a call does that finds the gate closed.
enum class Policy : std::uint8_t {
  kWait,  // blocks until the memory is awake
  kWake,  // wakes the memory itself, again and again until that works, then goes on
  kFail,  // returns CUDA_ERROR_NOT_PERMITTED
};

// One per thread, and then of a later one; in_call counts nested passes.
struct Slot {
  std::atomic<std::uint32_t> in_call{0};
  std::atomic<std::uint64_t> passes{0};
  Slot* next = nullptr;
};

inline constexpr std::uint32_t kClosed = 1;
inline constexpr std::uint32_t kFenceNeeded = 2;

extern std::atomic<std::uint32_t> state;
extern thread_local Slot* this_slot __attribute__((tls_model("initial-exec")));

CUresult enter_slow();

// Before a call that may touch device memory. CUDA_SUCCESS: go on, and call leave() after it.
// Anything else: do not call, return this error, do not call leave(). A wait here is a cancellation
// point: pthread_cancel unwinds the thread from it, so no caller is noexcept.
inline CUresult enter() {
  Slot* slot = this_slot;
  if (__builtin_expect(slot == nullptr, 0)) return enter_slow();
  const std::uint32_t depth = slot->in_call.load(std::memory_order_relaxed);
  slot->in_call.store(depth + 1, std::memory_order_relaxed);
  slot->passes.store(slot->passes.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  asm volatile(
      "" ::
          : "memory");  // the compiler keeps the order; membarrier makes the processor keep it
  if (__builtin_expect(depth != 0 || state.load(std::memory_order_relaxed) == 0, 1)) {
    return CUDA_SUCCESS;
  }
  slot->in_call.store(depth, std::memory_order_release);
  return enter_slow();
}

inline void leave() noexcept {
  Slot* slot = this_slot;
  const std::uint32_t depth = slot != nullptr ? slot->in_call.load(std::memory_order_relaxed) : 0;
  if (__builtin_expect(depth == 0, 0)) return;  // there was no memory for a slot at enter()
  slot->in_call.store(depth - 1, std::memory_order_release);
}

// Called by a thread that finds the gate closed, outside any lock of the gate; null: not. Under
// kWake it is to wake the memory, and is called by one of the threads that wait, with a pause that
// grows from 100 ms to 5 s, until the gate is open. Under kFail it is told of each refusal.
using FoundClosed = void (*)() noexcept;

// What a thread does around a wait at the gate, outside any lock of the gate; null: nothing.
// begin() is called before the thread blocks (or wakes the memory), end() after it with begin()'s
// result. A wait ends when the gate or its policy changes, when a signal handler has run on the
// thread, and otherwise after a second; while the gate is closed, another one follows. end() may
// thus run what a handler has only noted. It returns false to have the call refused with
// CUDA_ERROR_NOT_PERMITTED instead of waiting on. It may end the thread by unwinding it, as CPython
// before 3.14 does once the interpreter has ended; cancellation is off in it.
struct Waiting {
  void* (*begin)() noexcept = nullptr;
  bool (*end)(void* token) = nullptr;
};

// Sets what a call does that finds the gate closed. Those that wait follow the new policy.
void configure(Policy policy, FoundClosed found_closed, Waiting around = {}) noexcept;

// Closes the gate and waits until every thread inside has left; the calling thread itself may be
// inside. False after `timeout`: the gate is as it was before. Counted: as many open() as
// successful close() open it.
bool close(std::chrono::milliseconds timeout) noexcept;
void open() noexcept;

// How often threads have passed; nothing while one is inside. The same number twice: none was
// inside in between, as far as what happened before the calls goes.
std::optional<std::uint64_t> quiet_passes() noexcept;

bool is_closed() noexcept;
// Threads that wait at the gate now.
std::uint32_t waiting() noexcept;
// In a forked child: the gate is open and no thread but this one exists.
void reset_after_fork() noexcept;

}  // namespace dormouse::gate
