// Which lock protects what, in a form that clang checks (-Wthread-safety, in
// scripts/lint): to other compilers the words mean nothing. And a mutex and a
// lock that carry them, since those of libstdc++ do not.
#pragma once

#include <mutex>

#if defined(__clang__)
#define DORMOUSE_THREAD_SAFETY(word) __attribute__((word))
#else
#define DORMOUSE_THREAD_SAFETY(word)
#endif

#define CAPABILITY DORMOUSE_THREAD_SAFETY(capability("mutex"))
#define SCOPED_CAPABILITY DORMOUSE_THREAD_SAFETY(scoped_lockable)
// Of a member: read and written with the lock held.
#define GUARDED_BY(lock) DORMOUSE_THREAD_SAFETY(guarded_by(lock))
// Of a function, also of a lambda: called with the lock held.
#define REQUIRES(lock) DORMOUSE_THREAD_SAFETY(requires_capability(lock))
#define ACQUIRE(...) DORMOUSE_THREAD_SAFETY(acquire_capability(__VA_ARGS__))
#define RELEASE(...) DORMOUSE_THREAD_SAFETY(release_capability(__VA_ARGS__))
#define NO_THREAD_SAFETY_ANALYSIS DORMOUSE_THREAD_SAFETY(no_thread_safety_analysis)

namespace dormouse {

class CAPABILITY Mutex {
 public:
  void lock() ACQUIRE() { mutex_.lock(); }
  void unlock() RELEASE() { mutex_.unlock(); }

 private:
  friend class MutexLock;
  std::mutex mutex_;
};

class SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) ACQUIRE(mutex) : lock_(mutex.mutex_) {}
  ~MutexLock() RELEASE() {}

  void lock() ACQUIRE() { lock_.lock(); }
  void unlock() RELEASE() { lock_.unlock(); }

  // What a condition variable waits with.
  std::unique_lock<std::mutex>& waiting() noexcept { return lock_; }

 private:
  std::unique_lock<std::mutex> lock_;
};

}  // namespace dormouse
