// Short-lived helper threads that never run the program's signal handlers.
#pragma once

#include <functional>
#include <thread>

namespace dormouse {

// Runs `work` on `count` threads at once, the calling one included, and returns when all have
// ended. Fewer threads run it if the system gives no more; `work` must not throw.
void run_on_threads(unsigned count, const std::function<void()>& work) noexcept;

// A thread of this name (at most 15 characters). Throws std::system_error if the system gives none.
std::thread start_thread(const char* name, std::function<void()> work);

// A detached thread without any frame of ours but `function`'s: for work that may be ended by
// pthread_exit, which cannot pass frames that have something to clean up. False if the system gives
// none. Signals are blocked in it as in the others.
bool start_plain_thread(const char* name, void* (*function)(void*), void* argument) noexcept;

// As start_thread at the lowest priority: it runs when nothing else wants the processor.
std::thread start_background_thread(const char* name, std::function<void()> work);

// The number to use when none is configured: the processors that this process may run on and that
// its control groups grant it, at most 16.
unsigned default_threads() noexcept;

}  // namespace dormouse
