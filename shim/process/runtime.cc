// The process's settings, tags and engine; see runtime.h.
#include "shim/process/runtime.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>

#include "config/presets.h"
#include "core/control/paths.h"
#include "core/control/server.h"
#include "core/log.h"
#include "core/region.h"
#include "core/sleep/gate.h"
#include "shim/abi/dormouse.h"
#include "shim/abi/tms.h"
#include "shim/hooks/real.h"
#include "shim/process/lifecycle.h"
#include "shim/rules/python_rules.h"
#include "shim/torch/torch.h"

namespace dormouse::shim {
namespace {

// Leaks, so that it outlives every hook.
struct Runtime {
  std::recursive_mutex setup_mutex;  // held while settings, engine or server are made, and by fork
  std::atomic<const Settings*> settings{nullptr};
  TagTable tags;
  Driver driver;
  ControlServer server;
  std::atomic<Engine*> engine{nullptr};
  std::atomic<bool> tried{false};  // to make the engine
  std::atomic<bool> exiting{false};
};

Runtime& runtime() noexcept {
  static Runtime* const instance = new Runtime;
  return *instance;
}

Backup backup_of(config::BackupPolicy policy) noexcept {
  switch (policy) {
    case config::BackupPolicy::kHost:
      return Backup::kHost;
    case config::BackupPolicy::kNone:
      return Backup::kNone;
    case config::BackupPolicy::kDisk:
      return Backup::kDisk;
  }
  return Backup::kHost;
}

// What the rest of the options makes of an item.
void check_item(const config::RegionItem& item, Settings& settings) {
  const auto warn = [&](std::string text) {
    auto& said = settings.warnings;  // items of one tag say the same
    if (std::find(said.begin(), said.end(), text) == said.end()) said.push_back(std::move(text));
  };
  if (item.policy == config::BackupPolicy::kDisk && settings.options.disk_dir.empty()) {
    warn("DORMOUSE_REGIONS: the tag " + item.tag +
         " has the policy disk, but DORMOUSE_DISK_DIR is not set; its content is kept in host "
         "memory");
  }
  for (const config::Rule& rule : item.rules) {
    if (settings.options.nvtx || !std::holds_alternative<config::NvtxRule>(rule)) continue;
    warn(
        "DORMOUSE_NVTX=off: the rules nvtx(...) of DORMOUSE_REGIONS begin no regions; leave one of "
        "the two out");
  }
}

void read_regions(Settings& settings) {
  settings.regions = config::parse_with_presets(settings.options.regions, &settings.item_presets);
  for (const config::Diagnostic& error : settings.regions.errors) {
    settings.warnings.push_back(error.text() + "; this item is ignored");
  }
  for (const config::Diagnostic& warning : settings.regions.warnings) {
    settings.warnings.push_back(warning.text());
  }
  for (const config::RegionItem& item : settings.regions.items) {
    check_item(item, settings);
    if (!item.tag.empty()) tags().set_priority(item.tag, item.priority);
    const bool disk = !settings.options.disk_dir.empty();
    const Backup backup = backup_of(item.policy);
    settings.region_tags.push_back(
        item.tag.empty()
            ? kNoTag
            : tags().intern(item.tag, backup == Backup::kDisk && !disk ? Backup::kHost : backup));
  }
}

void apply_process_rule(const Settings& settings) noexcept {
  for (std::size_t i = 0; i < settings.regions.items.size(); ++i) {
    for (const config::Rule& rule : settings.regions.items[i].rules) {
      if (std::holds_alternative<config::ProcessRule>(rule)) {
        region::set_process_tag(settings.region_tags[i]);
        torch::process_region(settings.region_tags[i]);
      }
    }
  }
}

const Settings* read_settings() noexcept {
  auto* made = new Settings;
  try {
    config::ParsedOptions parsed = config::parse_options(&::getenv, made->warnings);
    made->options = parsed.options;
    made->option_values = std::move(parsed.values);
    config::check_unknown_names(environ, made->warnings);
    made->enabled = made->options.enabled;
    read_regions(*made);
  } catch (const std::exception& error) {
    log().error("the configuration could not be read, the defaults hold: {}", error.what());
    *made = Settings{};
  }
  if (made->enabled && active()) apply_process_rule(*made);
  return made;
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
  result.disk_directory = options.disk_dir.empty() ? tms::disk_directory() : options.disk_dir;
  return result;
}

void wake_everything() noexcept {
  Engine* current = exiting() ? nullptr : engine();
  if (current == nullptr) return;
  try {
    const Status status = current->wake({}, nullptr);
    if (status.is_ok() || !first_time("gate wake failed")) return;
    log().error(
        "a GPU call found memory asleep and could not wake it: {}. The call waits, and the wake is "
        "tried again, every 5 s at last, until it succeeds",
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
      return gate::configure(gate::Policy::kWait, nullptr);
    case config::Gate::kWake:
      return gate::configure(gate::Policy::kWake, &wake_everything);
    case config::Gate::kFail:
      return gate::configure(gate::Policy::kFail, &say_refusal);
  }
}

// Registered after the driver's own exit handlers, so it runs before them.
void process_exits() {
  Runtime& r = runtime();
  r.exiting.store(true, std::memory_order_release);
  r.server.remove_socket();
  if (Engine* current = r.engine.load(std::memory_order_acquire)) {
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
  const std::string directory = settings.options.disk_dir.empty() ? tms::disk_directory() : "";
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
  control.version = dormouse_version();
  control.options = options_in_force(settings);
  runtime().server.start(engine, std::move(control));
}

void make_engine() {
  Runtime& r = runtime();
  const Settings& current = settings();
  say_warnings();
  if (!current.enabled || !active()) return;
  const char* missing = load_driver(r.driver, &libcuda_symbol);
  if (missing != nullptr) {
    log().error(
        "this libcuda has no {}: memory gets no tags in this process. Install a driver for CUDA "
        "11.2 or later",
        missing);
    return;
  }
  auto* made = new Engine(r.driver, r.tags, engine_options(current.options));
  made->set_unused_memory(&torch::unused_memory());
  configure_gate(current.options.gate);
  std::atexit(&process_exits);
  r.engine.store(made, std::memory_order_release);
  if (current.options.control) start_server(*made, current);
}

}  // namespace

const Settings& settings() noexcept {
  Runtime& r = runtime();
  const Settings* known = r.settings.load(std::memory_order_acquire);
  if (known != nullptr) return *known;
  std::lock_guard lock(r.setup_mutex);
  known = r.settings.load(std::memory_order_acquire);
  if (known == nullptr) {
    known = read_settings();
    r.settings.store(known, std::memory_order_release);
  }
  return *known;
}

TagTable& tags() noexcept {
  return runtime().tags;
}

Engine* engine() noexcept {
  return runtime().engine.load(std::memory_order_acquire);
}

void driver_initialised() noexcept {
  Runtime& r = runtime();
  if (r.tried.load(std::memory_order_acquire)) return;
  std::lock_guard lock(r.setup_mutex);
  if (r.tried.load(std::memory_order_acquire) || exiting()) return;
  try {
    make_engine();
  } catch (const std::exception& error) {
    log().error("memory gets no tags in this process: {}", error.what());
  }
  r.tried.store(true, std::memory_order_release);
  torch::driver_initialised();
  triggers::driver_initialised();
}

void say_warnings() noexcept {
  try {
    static std::atomic<bool> said{false};
    const Settings& current = settings();
    if (said.exchange(true) || !active()) return;
    configure_log(std::string(name_of(current.options.log_level)), current.options.log_file);
    for (const std::string& warning : current.warnings) log().warn("{}", warning);
  } catch (...) {
    // Nothing to say it with.
  }
}

bool exiting() noexcept {
  return runtime().exiting.load(std::memory_order_acquire);
}

void lock_for_fork() noexcept {
  runtime().setup_mutex.lock();
  tags().lock();
}

void unlock_in_parent() noexcept {
  tags().unlock();
  runtime().setup_mutex.unlock();
}

void forget_after_fork() noexcept {
  Runtime& r = runtime();
  r.tags.unlock();
  // Locked by the parent's thread, which in the child has another number: it cannot be unlocked.
  new (&r.setup_mutex) std::recursive_mutex;
  r.engine.store(nullptr, std::memory_order_release);
  r.tried.store(false, std::memory_order_release);
  r.server.forget_after_fork();
}

}  // namespace dormouse::shim
