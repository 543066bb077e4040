// See process.h.
#include "shim/process/process.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>

#include "core/control/paths.h"
#include "core/control/server.h"
#include "core/log.h"
#include "core/region.h"
#include "core/sleep/gate.h"
#include "shim/process/export.h"
#include "shim/process/linker.h"
#include "shim/process/listeners.h"
#include "shim/process/python.h"
#include "shim/process/settings.h"

namespace dormouse::shim {
namespace {

// Leaks, so that it outlives every hook.
struct Process {
  std::recursive_mutex mutex;  // held while the engine and the server are made, and by fork
  Driver driver;
  ControlServer server;
  std::atomic<Engine*> engine{nullptr};
  std::atomic<bool> tried{false};  // to make the engine
  std::atomic<bool> exiting{false};
  std::atomic<bool> passed_by{true};  // as far as is known: no call of the program came to a hook
};

Process& process() noexcept {
  static Process* const instance = new Process;
  return *instance;
}

EngineOptions engine_options(const config::Options& options) {
  EngineOptions result;
  result.max_chunk_bytes = options.chunk_size;
  result.retain_bytes = options.retain;
  result.host_limit_bytes = options.host_limit;
  result.keep_backups = !options.keep_backup.is_never();
  if (!options.keep_backup.is_always() && !options.keep_backup.is_never()) {
    result.keep_backups_for =
        std::chrono::ceil<std::chrono::milliseconds>(options.keep_backup.time());  // 0: for ever
  }
  result.copy_threads = static_cast<unsigned>(options.copy_threads);
  result.huge_pages = options.huge_pages;
  result.hash = options.hash;
  result.verify = options.verify;
  result.kernel_copies = options.kernel_copies;
  result.prepare = options.prepare;
  result.prepare_limit_bytes = options.prepare_limit;
  result.disk_directory = options.disk_dir.empty() ? tms_disk_directory() : options.disk_dir;
  result.host_limit_option = "DORMOUSE_HOST_LIMIT";
  result.disk_directory_option = "DORMOUSE_DISK_DIR";
  return result;
}

void wake_everything() noexcept {
  Engine* current = exiting() ? nullptr : engine();
  if (current == nullptr) return;
  try {
    const Status status = current->wake({.tags = {}, .only_slept_outside = true}, nullptr);
    if (status.is_ok() || !first_time("gate wake failed")) return;
    log().error(
        "a GPU call found memory asleep and could not wake it: {}. The call waits; the wake is "
        "retried, at intervals growing to 5 s, until it succeeds",
        status.message());
  } catch (const std::bad_alloc&) {
    // Tried again.
  }
}

void say_refusal() noexcept {
  if (!first_time("gate refused")) return;
  log().warn(
      "a GPU call was refused: memory is asleep and DORMOUSE_GATE=fail; wake it with "
      "`dormouse wake {}`",
      getpid());
}

void configure_gate(config::Gate gate) noexcept {
  switch (gate) {
    case config::Gate::kWait:
      return gate::configure(gate::Policy::kWait, nullptr, python::at_gate());
    case config::Gate::kWake:
      return gate::configure(gate::Policy::kWake, &wake_everything, python::at_gate());
    case config::Gate::kFail:
      return gate::configure(gate::Policy::kFail, &say_refusal);
  }
}

// Registered after the driver's own exit handlers, so it runs before them.
void process_exits() {
  Process& p = process();
  p.exiting.store(true, std::memory_order_release);
  p.server.remove_socket();
  if (Engine* current = p.engine.load(std::memory_order_acquire)) {
    current->stop_background(std::chrono::seconds(1));
    current->remove_files();
  }
  // A call in an exit handler must not wait for someone to wake the memory.
  gate::configure(gate::Policy::kFail, nullptr);
}

// Those that are not what they are by default.
std::vector<control::OptionInForce> options_in_force(const Settings& settings) {
  std::vector<control::OptionInForce> result;
  const std::vector<config::OptionInfo>& table = config::option_table();
  for (std::size_t i = 0; i < settings.option_values.size(); ++i) {
    const config::OptionValue& value = settings.option_values[i];
    if (value.value == table[i].default_value) continue;
    result.push_back({table[i].environment, value.value, value.variable});
  }
  const std::string directory = settings.options.disk_dir.empty() ? tms_disk_directory() : "";
  if (!directory.empty()) {
    result.push_back({"DORMOUSE_DISK_DIR", directory, "TMS_DISK_BACKUP_DIR"});
  }
  return result;
}

void start_server(Engine& engine, const Settings& settings) {
  const config::Options& options = settings.options;
  const char* xdg = std::getenv("XDG_RUNTIME_DIR");
  ControlOptions control;
  control.directory =
      control::socket_directory(options.socket_dir, xdg == nullptr ? "" : xdg, geteuid());
  control.directory_option = "DORMOUSE_SOCKET_DIR";
  control.version = dormouse_version();
  control.options = options_in_force(settings);
  process().server.start(engine, std::move(control));
}

// `missing`: a function that `driver` lacks, or null.
void make_engine(const Driver& driver, const char* missing) {
  Process& p = process();
  const Settings& current = settings();
  if (!current.enabled || !active()) return;
  if (missing != nullptr) {
    log().error(
        "this libcuda has no {}: memory gets no tags in this process. Install a driver for CUDA "
        "11.2 or later",
        missing);
    return;
  }
  p.driver = driver;
  auto* made = new Engine(p.driver, tags(), engine_options(current.options));
  tell(&Listener::engine_made, *made);
  configure_gate(current.options.gate);
  std::atexit(&process_exits);
  p.engine.store(made, std::memory_order_release);
  if (current.options.control) start_server(*made, current);
}

void before_fork() {
  process().mutex.lock();
  lock_settings_for_fork();
  tell(&Listener::before_fork);
}

void in_parent() {
  tell(&Listener::forked_in_parent);
  unlock_settings_in_parent();
  process().mutex.unlock();
}

void in_child() {
  Process& p = process();
  gate::reset_after_fork();
  reset_log_after_fork();
  region::reset_thread();
  unlock_settings_in_child();  // first: what follows may ask for the settings
  new (&p.mutex) std::recursive_mutex;
  p.engine.store(nullptr, std::memory_order_release);
  p.tried.store(false, std::memory_order_release);
  p.passed_by.store(false, std::memory_order_relaxed);  // the linker's lock may be held for ever
  p.server.forget_after_fork();
  tell(&Listener::forked_in_child);
}

__attribute__((constructor)) void loaded() {
  if (!active()) return;
  set_log_setup(&configure_log_from_settings);
  find_out_whether_active();
  if (active()) pthread_atfork(&before_fork, &in_parent, &in_child);
}

}  // namespace

Engine* engine() noexcept {
  return process().engine.load(std::memory_order_acquire);
}

void driver_initialised() noexcept {
  Process& p = process();
  if (p.tried.load(std::memory_order_acquire) || !active()) return;
  program_looks_up(nullptr, nullptr);
  // The dynamic linker is asked without a lock of ours: initialisers of libraries run under its
  // own, and may use CUDA.
  Driver driver;
  const char* missing = load_driver(driver, &next_driver_function);
  const bool second_copy = real_dlsym(RTLD_NEXT, "dormouse_version") != nullptr;
  say_warnings();
  if (second_copy && first_time("two copies")) {
    log().warn("two copies of Dormouse are loaded into this process; only the first acts");
  }
  {
    const std::lock_guard lock(p.mutex);
    if (p.tried.load(std::memory_order_acquire) || exiting()) return;
    try {
      make_engine(driver, missing);
    } catch (const std::exception& error) {
      log().error("memory gets no tags in this process: {}", error.what());
    }
    p.tried.store(true, std::memory_order_release);
  }
  tell(&Listener::cuda_in_use);
}

void hooks_are_called() noexcept {
  process().passed_by.store(false, std::memory_order_relaxed);
}

void look_for_calls_past_the_hooks() noexcept {
  using Clock = std::chrono::steady_clock;
  // Each look takes the linker's lock, which a fork may then find held.
  static std::atomic<Clock::duration> next_look{};
  static std::atomic<int> looks_left{16};
  Process& p = process();
  if (!p.passed_by.load(std::memory_order_relaxed) || !active() || exiting()) return;
  const Clock::duration now = Clock::now().time_since_epoch();
  if (now < next_look.load(std::memory_order_relaxed)) return;
  if (looks_left.fetch_sub(1) <= 0) return hooks_are_called();  // nobody asks again
  next_look.store(now + std::chrono::seconds(1), std::memory_order_relaxed);
  const auto get_current =
      reinterpret_cast<decltype(&cuCtxGetCurrent)>(libcuda_symbol("cuCtxGetCurrent"));
  CUcontext current = nullptr;
  if (get_current == nullptr || get_current(&current) != CUDA_SUCCESS) return;
  if (!p.passed_by.exchange(false)) return;
  log().warn(
      "the program uses CUDA past this library: its memory gets no tags and does not sleep. Is "
      "another preloaded library in front of this one in LD_PRELOAD?");
}

bool exiting() noexcept {
  return process().exiting.load(std::memory_order_acquire);
}

}  // namespace dormouse::shim
