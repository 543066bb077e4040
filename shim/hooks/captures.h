// The stream captures that are under way. The engine is told of each beginning and each end, since
// the device cannot be synchronized in between. For the shim only.
#pragma once

#include <cuda.h>

namespace dormouse::shim::captures {

// The context has been destroyed or reset, and with it its streams: their captures are over.
void context_destroyed(CUcontext context) noexcept;

// In a forked child: no capture is under way, and no other thread holds the lock.
void forget_after_fork() noexcept;

}  // namespace dormouse::shim::captures
