// Logging of the library: spdlog to standard error or a file, created at first use, silent below
// the configured level. Anyone may call it; a message is one line that says what happened and what
// to do.
#pragma once

#include <spdlog/spdlog.h>

#include <memory>
#include <string>

namespace dormouse {

// Where and how much: `level` is off, error, warn, info or debug; an empty `file` is standard
// error. A file that cannot be opened falls back to standard error and says so. Thread-safe.
void configure_log(const std::string& level, const std::string& file) noexcept;

// Never null.
spdlog::logger& log() noexcept;

// True the first time it is called with this key: for messages that are said once per process.
// Thread-safe.
bool first_time(const std::string& key) noexcept;

// In a forked child: locks that another thread may have held are fresh.
void reset_log_after_fork() noexcept;

}  // namespace dormouse
