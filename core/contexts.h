// The contexts of the process: whose running work may use memory, which of them our own work uses,
// and that none goes while our work is in it. The one owner of that knowledge.
//
// A device's work is done in its primary context where that is active, since it outlives the
// others, else in one that the program made. Work in a green context is its primary context's.
#pragma once

#include <cuda.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "core/driver.h"
#include "core/thread_annotations.h"

namespace dormouse {

class Contexts;

// Tells a context from a later one at the same address; never 0.
using ContextId = std::uint64_t;

// A context that stays while this lives: Contexts::retire() waits, and a reference holds a primary
// one. Nothing of ours is done in a context without one of these.
class ContextPin {
 public:
  ContextPin() = default;
  // Empty if the context is unknown, gone or about to go.
  ContextPin(Contexts& contexts, CUcontext context) noexcept;
  ContextPin(Contexts& contexts, ContextId id) noexcept;
  ~ContextPin() { release(); }
  ContextPin(ContextPin&& other) noexcept { swap(other); }
  ContextPin& operator=(ContextPin&& other) noexcept {
    swap(other);
    return *this;
  }

  CUcontext context() const noexcept { return context_; }
  ContextId id() const noexcept { return id_; }
  int device() const noexcept { return device_; }
  explicit operator bool() const noexcept { return context_ != nullptr; }

 private:
  friend class Contexts;
  friend class ContextPins;

  void hold_primary() noexcept;
  void swap(ContextPin& other) noexcept;
  void release() noexcept;

  Contexts* contexts_ = nullptr;
  CUcontext context_ = nullptr;
  ContextId id_ = 0;
  int device_ = 0;
  bool retained_ = false;  // a primary context, by a reference
};

class ContextPins {
 public:
  const std::vector<ContextPin>& all() const noexcept { return pins_; }
  bool has(ContextId id) const noexcept;
  // The one for our work of the device; null if there is none.
  const ContextPin* for_work_on(int device) const noexcept;

 private:
  friend class Contexts;
  std::vector<ContextPin> pins_;
};

// All functions are thread-safe.
class Contexts {
 public:
  explicit Contexts(const Driver& driver);
  Contexts(const Contexts&) = delete;
  Contexts& operator=(const Contexts&) = delete;

  // `gone` is called with a context that went without retire(), and whether it was a primary one.
  // Set before anything else is called.
  using Gone = std::function<void(CUcontext context, bool primary)>;
  void when_gone(Gone gone) { gone_ = std::move(gone); }

  // The program made a context, or got one from a green one. Primary ones need not be told.
  void created(CUcontext context, int device);
  void green_created(CUcontext context, int device);
  // The context that owns what is allocated while `current`, a context of the device, is.
  CUcontext owner_of(CUcontext current, int device);

  // Whether there is a context for our work of the device.
  bool any_on(int device);
  // Pins all contexts whose running work may use memory of the devices. On failure the driver's
  // error is returned, and nothing is pinned.
  CUresult pin_all(const std::set<int>& devices, ContextPins* pins);

  // The context is about to go: returns when no pin is left, and gives none from then on.
  void retire(CUcontext context) noexcept;
  // Returns when none of the devices' contexts is about to go; false after `limit`.
  bool wait_for_retiring(const std::set<int>& devices, std::chrono::milliseconds limit);
  // Returns when no context with this id is about to go: then it has gone, or can be pinned.
  void wait_while_retiring(ContextId id) noexcept;
  // It has gone, or stays after all.
  void forget(CUcontext context) noexcept;
  void keep(CUcontext context) noexcept;
  // The driver says that the context has gone; nobody told of it. The caller has no pin on it.
  void lost(CUcontext context) noexcept;

 private:
  friend class ContextPin;

  struct Known {
    ContextId id = 0;
    int device = 0;
    bool primary = false;
    CUcontext green_of = nullptr;  // the primary context behind a green one
    int pins = 0;
    bool retiring = false;
  };

  using Map = std::map<CUcontext, Known>;

  Known& add(CUcontext context, int device) REQUIRES(contexts_mutex_);
  bool pin(Map::iterator at, ContextPin* pin) noexcept REQUIRES(contexts_mutex_);
  CUresult is_active(int device, bool* active) noexcept;
  CUresult pin_primary(int device, ContextPins* pins);
  void forget_primary_unless_active(int device) noexcept;

  const Driver& driver_;
  Gone gone_;

  Mutex contexts_mutex_;
  std::condition_variable changed_;
  Map known_ GUARDED_BY(contexts_mutex_);
  ContextId next_id_ GUARDED_BY(contexts_mutex_) = 1;
};

// What the driver answers in a context that has gone.
constexpr bool is_gone(CUresult result) noexcept {
  return result == CUDA_ERROR_CONTEXT_IS_DESTROYED || result == CUDA_ERROR_INVALID_CONTEXT;
}

}  // namespace dormouse
