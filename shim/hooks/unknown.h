// Functions of the driver that the program asked for by name and that neither hooks.def nor
// left.def has: newer than this library. Each is named in the log, once. For the hooks.
#pragma once

namespace dormouse::shim::unknown {

// The program asks for `name`. May be called from inside dlsym: no lock, no allocation; a name that
// is worth a line is kept until say().
void asked_for(const char* name) noexcept;

// cuGetProcAddress gave `function`, which is no hook's, for `name`. It can be a newer version of a
// function that is hooked.
void got(const char* name, void* function) noexcept;

// Writes what was kept to the log, unless libcuda has no function of that name. One relaxed load
// when there is nothing.
void say() noexcept;

}  // namespace dormouse::shim::unknown
