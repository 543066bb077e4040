// How readers in config/ see the environment: through a function that is handed in, so that tests,
// the command line (for another process) and the library (before and after a program changes its
// environment) share them.
#pragma once

#include <functional>

namespace dormouse::config {

/// The value of a variable, or null if it is not set; ::getenv fits.
using Lookup = std::function<const char*(const char*)>;

}  // namespace dormouse::config
