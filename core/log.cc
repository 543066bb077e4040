// The logger; see log.h.
#include "core/log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <new>
#include <set>

#include "core/thread_annotations.h"
#include "core/threads.h"

namespace dormouse {
namespace {

constexpr const char* kPattern = "dormouse[%P] %l: %v";

// Where messages go, and how many.
struct Target {
  spdlog::level::level_enum level = spdlog::level::warn;
  std::string file;
  std::string option;
};

struct Shared {
  Mutex said_mutex;
  std::set<std::string> said GUARDED_BY(said_mutex);
  Mutex configure_mutex;  // one configure_log at a time
  std::atomic<LogSetup> setup{nullptr};
  // Neither is ever freed: someone may be using them.
  std::atomic<const Target*> target{nullptr};
  std::atomic<spdlog::logger*> logger{nullptr};
};

// Never destroyed: hooks may log while the process exits.
Shared& shared() {
  static Shared* const instance = new Shared;
  return *instance;
}

spdlog::logger* make_logger(const Target& target) {
  spdlog::sink_ptr sink;
  std::string problem;
  if (!target.file.empty()) {
    try {
      sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(target.file);
    } catch (const std::exception& error) {
      problem = error.what();
    }
  }
  if (sink == nullptr) sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  auto* logger = new spdlog::logger("dormouse", sink);
  logger->set_pattern(kPattern);
  logger->set_level(target.level);
  logger->flush_on(spdlog::level::info);
  if (!problem.empty()) {
    logger->warn("{}={} cannot be opened ({}); logging to standard error", target.option,
                 target.file, problem);
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
spdlog::logger& logger() {
  spdlog::logger* known = shared().logger.load(std::memory_order_acquire);
  if (known != nullptr) return *known;
  if (const LogSetup setup = shared().setup.exchange(nullptr); setup != nullptr) {
    setup();
    known = shared().logger.load(std::memory_order_acquire);
    if (known != nullptr) return *known;
  }
  const Target* target = shared().target.load(std::memory_order_acquire);
  spdlog::logger* made = make_logger(target != nullptr ? *target : Target{});
  if (shared().logger.compare_exchange_strong(known, made)) return *made;
  delete made;
  return *known;
}

}  // namespace

void configure_log(const std::string& level, const std::string& file,
                   const std::string& option) noexcept {
  try {
    MutexLock lock(shared().configure_mutex);
    auto target = std::make_unique<Target>();
    target->level = level == "error" ? spdlog::level::err : spdlog::level::from_str(level);
    // A forked child opens it again, perhaps after it has gone to another folder.
    if (!file.empty()) target->file = std::filesystem::absolute(file);
    target->option = option;
    spdlog::logger* logger = make_logger(*target);
    shared().target.store(target.release(), std::memory_order_release);
    shared().logger.store(logger, std::memory_order_release);
  } catch (...) {
  }
}

void set_log_setup(LogSetup setup) noexcept {
  shared().setup.store(setup);
}

void Log::write(LogLevel level, fmt::string_view format, fmt::format_args arguments) noexcept {
  const CancellationOff cancellation;
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
    MutexLock lock(shared().said_mutex);
    return shared().said.insert(key).second;
  } catch (...) {
    return false;
  }
}

void reset_log_after_fork() noexcept {
  Shared& s = shared();
  new (&s.said_mutex) Mutex;
  new (&s.configure_mutex) Mutex;
  // A sink's own lock may be held by a thread that no longer exists: the child's first message
  // makes a new one.
  s.logger.store(nullptr, std::memory_order_release);
}

}  // namespace dormouse
