// Loading, forking and exiting: which copy of the library acts, and what is left behind. For the
// shim only.
#pragma once

namespace dormouse::shim {

// False for a second copy of the library in one process, and with DORMOUSE=off: then every hook
// passes through. No lock, no allocation; may be called from inside dlsym.
bool active() noexcept;

}  // namespace dormouse::shim
