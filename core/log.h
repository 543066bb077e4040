// Logging of the library: standard error or a file, created at first use, silent below the
// configured level. Anyone may call it; a message is one line that says what happened and what to
// do. spdlog does the work, in log.cc alone: its headers cost seconds in every file that includes
// them.
#pragma once

#include <fmt/format.h>

#include <string>
#include <utility>

namespace dormouse {

enum class LogLevel : int { kDebug, kInfo, kWarn, kError };

// Writes messages in fmt's format. Thread-safe; throws nothing: a message that cannot be made or
// written is lost.
class Log {
 public:
  template <typename... Arguments>
  void debug(fmt::format_string<Arguments...> format, Arguments&&... arguments) noexcept {
    write(LogLevel::kDebug, format, fmt::make_format_args(arguments...));
  }
  template <typename... Arguments>
  void info(fmt::format_string<Arguments...> format, Arguments&&... arguments) noexcept {
    write(LogLevel::kInfo, format, fmt::make_format_args(arguments...));
  }
  template <typename... Arguments>
  void warn(fmt::format_string<Arguments...> format, Arguments&&... arguments) noexcept {
    write(LogLevel::kWarn, format, fmt::make_format_args(arguments...));
  }
  template <typename... Arguments>
  void error(fmt::format_string<Arguments...> format, Arguments&&... arguments) noexcept {
    write(LogLevel::kError, format, fmt::make_format_args(arguments...));
  }

 private:
  static void write(LogLevel level, fmt::string_view format, fmt::format_args arguments) noexcept;
};

inline Log& log() noexcept {
  static constinit Log instance;
  return instance;
}

// Where and how much: `level` is off, error, warn, info or debug; an empty `file` is standard
// error. A file that cannot be opened falls back to standard error and says so, by the name of the
// option that gave it. Holds in forked children too. Thread-safe.
void configure_log(const std::string& level, const std::string& file,
                   const std::string& option = "") noexcept;

// What the first message calls, once, before it is written: it may call configure_log.
using LogSetup = void (*)() noexcept;
void set_log_setup(LogSetup setup) noexcept;

// True the first time it is called with this key: for messages that are logged once per process.
// Thread-safe.
bool first_time(const std::string& key) noexcept;

// In a forked child: locks that another thread may have held are fresh; messages go where they
// went.
void reset_log_after_fork() noexcept;

}  // namespace dormouse
