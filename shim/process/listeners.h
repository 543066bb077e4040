// What the parts of the shim want to be told about the process, so that the process need not know
// them. shim/listeners.cc has the list: a constant, since hooks can be called before any
// constructor of the library has run.
#pragma once

#include <span>

namespace dormouse {
class Engine;
}

namespace dormouse::shim {

// Null members are not called.
struct Listener {
  // The tag of allocations outside all regions was set while the options were read: the settings
  // must not be asked for.
  void (*process_tag_changed)() noexcept = nullptr;
  // The engine was made; nobody else knows it yet. A lock of the process is held.
  void (*engine_made)(Engine& engine) noexcept = nullptr;
  // CUDA is in use, with an engine or without.
  void (*cuda_in_use)() noexcept = nullptr;
  // fork(): locks that must not be held by another thread are taken before it.
  void (*before_fork)() noexcept = nullptr;
  void (*forked_in_parent)() noexcept = nullptr;
  void (*forked_in_child)() noexcept = nullptr;
};

// In the order in which they are called.
std::span<const Listener> listeners() noexcept;

template <typename... Parameters, typename... Arguments>
void tell(void (*Listener::*event)(Parameters...) noexcept, Arguments&... arguments) noexcept {
  for (const Listener& listener : listeners()) {
    if (listener.*event != nullptr) (listener.*event)(arguments...);
  }
}

}  // namespace dormouse::shim
