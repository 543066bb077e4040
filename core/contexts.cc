// See contexts.h.
#include "core/contexts.h"

#include <algorithm>

#include "core/threads.h"

namespace dormouse {

ContextPin::ContextPin(Contexts& contexts, CUcontext context) noexcept {
  {
    MutexLock lock(contexts.contexts_mutex_);
    if (!contexts.pin(contexts.known_.find(context), this)) return;
  }
  hold_primary();
}

ContextPin::ContextPin(Contexts& contexts, ContextId id) noexcept {
  {
    MutexLock lock(contexts.contexts_mutex_);
    const auto at = std::find_if(contexts.known_.begin(), contexts.known_.end(),
                                 [&](const auto& entry) { return entry.second.id == id; });
    if (!contexts.pin(at, this)) return;
  }
  hold_primary();
}

// So far retained_ only says that the context is one. Without a reference, if the driver refuses
// it, the pin still counts.
void ContextPin::hold_primary() noexcept {
  if (!std::exchange(retained_, false)) return;
  bool active = true;
  CUcontext same = nullptr;
  if (contexts_->is_active(device_, &active) == CUDA_SUCCESS && !active) return release();
  retained_ = contexts_->driver_.cuDevicePrimaryCtxRetain(&same, device_) == CUDA_SUCCESS;
}

void ContextPin::swap(ContextPin& other) noexcept {
  std::swap(contexts_, other.contexts_);
  std::swap(context_, other.context_);
  std::swap(id_, other.id_);
  std::swap(device_, other.device_);
  std::swap(retained_, other.retained_);
}

// With our reference a primary context goes, if the program gave its own back meanwhile.
void ContextPin::release() noexcept {
  if (context_ == nullptr) return;
  if (retained_)
    give_back([&] { return contexts_->driver_.cuDevicePrimaryCtxRelease_v2(device_); });
  {
    MutexLock lock(contexts_->contexts_mutex_);
    const auto at = contexts_->known_.find(context_);
    if (at != contexts_->known_.end() && at->second.id == id_) --at->second.pins;
  }
  contexts_->changed_.notify_all();
  context_ = nullptr;
  if (std::exchange(retained_, false)) contexts_->forget_primary_unless_active(device_);
}

bool ContextPins::has(ContextId id) const noexcept {
  return std::any_of(pins_.begin(), pins_.end(),
                     [&](const ContextPin& pin) { return pin.id_ == id; });
}

const ContextPin* ContextPins::for_work_on(int device) const noexcept {
  const ContextPin* found = nullptr;
  for (const ContextPin& pin : pins_) {
    if (pin.device_ == device && (found == nullptr || pin.retained_)) found = &pin;
  }
  return found;
}

Contexts::Contexts(const Driver& driver)
    : driver_(driver), gone_([this](CUcontext context, bool) { forget(context); }) {}

Contexts::Known& Contexts::add(CUcontext context, int device) {
  Known& known = known_.try_emplace(context).first->second;
  if (known.id == 0) known.id = next_id_++;
  known.device = device;
  return known;
}

bool Contexts::pin(Map::iterator at, ContextPin* pin) noexcept {
  if (at == known_.end() || at->second.retiring) return false;
  Known& known = at->second;
  ++known.pins;
  pin->contexts_ = this;
  pin->context_ = at->first;
  pin->id_ = known.id;
  pin->device_ = known.device;
  pin->retained_ = known.primary;
  return true;
}

CUresult Contexts::is_active(int device, bool* active) noexcept {
  unsigned flags = 0;
  int is = 0;
  const CUresult result = driver_.cuDevicePrimaryCtxGetState(device, &flags, &is);
  *active = is != 0;
  return result;
}

void Contexts::forget_primary_unless_active(int device) noexcept {
  CUcontext primary = nullptr;
  {
    MutexLock lock(contexts_mutex_);
    for (const auto& [context, known] : known_) {
      if (known.primary && known.device == device) primary = context;
    }
  }
  bool active = true;
  if (primary != nullptr && is_active(device, &active) == CUDA_SUCCESS && !active) lost(primary);
}

void Contexts::created(CUcontext context, int device) {
  MutexLock lock(contexts_mutex_);
  add(context, device);
}

// It holds a reference of the primary context.
void Contexts::green_created(CUcontext context, int device) {
  ContextPins primary;
  if (pin_primary(device, &primary) != CUDA_SUCCESS || primary.all().empty()) return;
  MutexLock lock(contexts_mutex_);
  add(context, device).green_of = primary.all().front().context();
}

CUcontext Contexts::owner_of(CUcontext current, int device) {
  MutexLock lock(contexts_mutex_);
  const Known& known = add(current, device);
  return known.green_of != nullptr ? known.green_of : current;
}

bool Contexts::any_on(int device) {
  bool active = false;
  if (is_active(device, &active) == CUDA_SUCCESS && active) return true;
  MutexLock lock(contexts_mutex_);
  return std::any_of(known_.begin(), known_.end(), [&](const auto& entry) {
    const Known& known = entry.second;
    return known.device == device && known.green_of == nullptr && !known.primary && !known.retiring;
  });
}

// If it is active.
CUresult Contexts::pin_primary(int device, ContextPins* pins) {
  bool active = false;
  CUresult result = is_active(device, &active);
  if (result != CUDA_SUCCESS || !active) return result;
  ContextPin& pin = pins->pins_.emplace_back();
  CUcontext primary = nullptr;
  result = driver_.cuDevicePrimaryCtxRetain(&primary, device);
  if (result != CUDA_SUCCESS) {
    pins->pins_.pop_back();
    return result;
  }
  pin.contexts_ = this;
  pin.context_ = primary;
  pin.device_ = device;
  pin.retained_ = true;
  bool retiring = false;
  {
    MutexLock lock(contexts_mutex_);
    Known& known = add(primary, device);
    known.primary = true;
    ++known.pins;
    pin.id_ = known.id;
    retiring = known.retiring;
  }
  if (retiring) pins->pins_.pop_back();  // the program resets it
  return CUDA_SUCCESS;
}

CUresult Contexts::pin_all(const std::set<int>& devices, ContextPins* pins) {
  ContextPins made;
  for (const int device : devices) {
    forget_primary_unless_active(device);
    const CUresult result = pin_primary(device, &made);
    if (result != CUDA_SUCCESS) return result;
  }
  {
    MutexLock lock(contexts_mutex_);
    for (auto at = known_.begin(); at != known_.end(); ++at) {
      const Known& known = at->second;
      if (devices.count(known.device) == 0 || known.primary || known.green_of != nullptr) continue;
      ContextPin& pinned = made.pins_.emplace_back();
      if (!pin(at, &pinned)) made.pins_.pop_back();
    }
  }
  std::swap(pins->pins_, made.pins_);
  return CUDA_SUCCESS;
}

void Contexts::retire(CUcontext context) noexcept {
  const CancellationOff cancellation;
  MutexLock lock(contexts_mutex_);
  const auto known = known_.find(context);
  if (known == known_.end()) return;
  known->second.retiring = true;
  changed_.wait(lock.waiting(), [&]() REQUIRES(contexts_mutex_) {
    const auto at = known_.find(context);
    return at == known_.end() || at->second.pins == 0;
  });
}

bool Contexts::wait_for_retiring(const std::set<int>& devices, std::chrono::milliseconds limit) {
  MutexLock lock(contexts_mutex_);
  return changed_.wait_for(lock.waiting(), limit, [&]() REQUIRES(contexts_mutex_) {
    return std::none_of(known_.begin(), known_.end(), [&](const auto& entry) {
      return entry.second.retiring && devices.count(entry.second.device) != 0;
    });
  });
}

void Contexts::wait_while_retiring(ContextId id) noexcept {
  const CancellationOff cancellation;
  MutexLock lock(contexts_mutex_);
  changed_.wait(lock.waiting(), [&]() REQUIRES(contexts_mutex_) {
    return std::none_of(known_.begin(), known_.end(), [&](const auto& entry) {
      return entry.second.id == id && entry.second.retiring;
    });
  });
}

void Contexts::forget(CUcontext context) noexcept {
  MutexLock lock(contexts_mutex_);
  known_.erase(context);
  changed_.notify_all();
}

void Contexts::lost(CUcontext context) noexcept {
  bool primary = false;
  {
    MutexLock lock(contexts_mutex_);
    const auto at = known_.find(context);
    if (at == known_.end()) return;
    primary = at->second.primary;
  }
  gone_(context, primary);
}

void Contexts::keep(CUcontext context) noexcept {
  MutexLock lock(contexts_mutex_);
  const auto at = known_.find(context);
  if (at != known_.end()) at->second.retiring = false;
  changed_.notify_all();
}

}  // namespace dormouse
