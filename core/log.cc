// The logger; see log.h.
#include "core/log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <mutex>
#include <new>
#include <set>

namespace dormouse {
namespace {

constexpr const char* kPattern = "dormouse[%P] %l: %v";

struct Shared {
  std::mutex said_mutex;  // protects said
  std::set<std::string> said;
  std::mutex configure_mutex;  // one configure_log at a time
  std::atomic<spdlog::logger*> logger{nullptr};
};

// Never destroyed: hooks may log while the process exits.
Shared& shared() {
  static Shared* const instance = new Shared;
  return *instance;
}

spdlog::logger* make_logger(const std::string& file) {
  spdlog::sink_ptr sink;
  std::string problem;
  if (!file.empty()) {
    try {
      sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(file);
    } catch (const std::exception& error) {
      problem = error.what();
    }
  }
  if (sink == nullptr) sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  auto* logger = new spdlog::logger("dormouse", sink);
  logger->set_pattern(kPattern);
  logger->set_level(spdlog::level::warn);
  logger->flush_on(spdlog::level::info);
  if (!problem.empty()) {
    logger->warn("DORMOUSE_LOG_FILE={} cannot be opened ({}); logging to standard error", file,
                 problem);
  }
  return logger;
}

spdlog::level::level_enum severity_of(LogLevel level) noexcept {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::off;
}

// Never null.
spdlog::logger& logger() noexcept {
  spdlog::logger* known = shared().logger.load(std::memory_order_acquire);
  if (known != nullptr) return *known;
  spdlog::logger* made = make_logger("");
  if (shared().logger.compare_exchange_strong(known, made)) return *made;
  delete made;
  return *known;
}

}  // namespace

void configure_log(const std::string& level, const std::string& file) noexcept {
  try {
    std::lock_guard lock(shared().configure_mutex);
    spdlog::logger* logger = make_logger(file);
    logger->set_level(level == "error" ? spdlog::level::err : spdlog::level::from_str(level));
    shared().logger.store(logger,
                          std::memory_order_release);  // the old one leaks: someone may be using it
  } catch (...) {
  }
}

void Log::write(LogLevel level, fmt::string_view format, fmt::format_args arguments) noexcept {
  try {
    spdlog::logger& to = logger();
    const spdlog::level::level_enum severity = severity_of(level);
    if (to.should_log(severity)) to.log(severity, "{}", fmt::vformat(format, arguments));
  } catch (...) {
    // Nothing to say it with.
  }
}

bool first_time(const std::string& key) noexcept {
  try {
    std::lock_guard lock(shared().said_mutex);
    return shared().said.insert(key).second;
  } catch (...) {
    return false;
  }
}

void reset_log_after_fork() noexcept {
  Shared& s = shared();
  new (&s.said_mutex) std::mutex;
  new (&s.configure_mutex) std::mutex;
  spdlog::logger* old = s.logger.load(std::memory_order_relaxed);
  if (old == nullptr) return;
  try {
    // A sink's own lock may be held by a thread that no longer exists: the child logs to standard
    // error afresh.
    spdlog::logger* made = make_logger("");
    made->set_level(old->level());
    s.logger.store(made, std::memory_order_release);
  } catch (...) {
  }
}

}  // namespace dormouse
