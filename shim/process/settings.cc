// See settings.h.
#include "shim/process/settings.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "config/presets.h"
#include "core/log.h"
#include "core/region.h"
#include "shim/process/export.h"
#include "shim/process/linker.h"
#include "shim/process/listeners.h"

namespace dormouse::shim {
namespace {

enum class Role : int { unknown, acts, passive };

// Zero before anything of the library ran: hooks can be called before its constructor.
constinit std::atomic<Role> role{Role::unknown};
constinit std::atomic<bool> switched_off{false};

// Of several copies the one acts that a lookup in the global order finds first. One that only NVTX
// has loaded, since the program's parent was preloaded with it, is not in that order.
Role find_role() noexcept {
  void* first = real_dlsym(dlopen(nullptr, RTLD_LAZY | RTLD_NOLOAD), "dormouse_version");
  return first == reinterpret_cast<void*>(&dormouse_version) ? Role::acts : Role::passive;
}

// Leaks, so that it outlives every hook.
struct State {
  std::recursive_mutex mutex;  // held while the settings are made, and by fork
  std::atomic<const Settings*> settings{nullptr};
  TagTable tags;
};

State& state() noexcept {
  static State* const instance = new State;
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
  settings.regions = config::parse_with_presets(settings.options.regions, &settings.item_origins);
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
        tell(&Listener::process_tag_changed);
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
    log().error("the configuration could not be read; the defaults apply: {}", error.what());
    *made = Settings{};
  }
  if (made->enabled && active()) apply_process_rule(*made);
  return made;
}

}  // namespace

const Settings& settings() noexcept {
  State& s = state();
  const Settings* known = s.settings.load(std::memory_order_acquire);
  if (known != nullptr) return *known;
  std::lock_guard lock(s.mutex);
  known = s.settings.load(std::memory_order_acquire);
  if (known == nullptr) {
    known = read_settings();
    s.settings.store(known, std::memory_order_release);
  }
  return *known;
}

bool active() noexcept {
  Role known = role.load(std::memory_order_relaxed);
  if (known == Role::unknown) {
    known = find_role();
    role.store(known, std::memory_order_relaxed);
  }
  return known == Role::acts && !switched_off.load(std::memory_order_relaxed);
}

void find_out_whether_active() noexcept {
  // Most processes that a shell starts have nothing set: they need not read the options.
  if (std::getenv("DORMOUSE") == nullptr && std::getenv("DORMOUSE_REGIONS") == nullptr) return;
  switched_off.store(!settings().enabled, std::memory_order_relaxed);
}

TagTable& tags() noexcept {
  return state().tags;
}

namespace {
std::mutex directory_mutex;  // protects said_directory
constinit const std::string* said_directory = nullptr;
}  // namespace

std::string tms_disk_directory() {
  const char* directory = std::getenv("TMS_DISK_BACKUP_DIR");
  const std::lock_guard lock(directory_mutex);
  return said_directory != nullptr ? *said_directory : directory == nullptr ? "" : directory;
}

void set_tms_disk_directory(const std::string& directory) {
  auto said = std::make_unique<const std::string>(directory);
  const std::lock_guard lock(directory_mutex);
  delete std::exchange(said_directory, said.release());
}

void configure_log_from_settings() noexcept {
  try {
    const config::Options& options = settings().options;
    configure_log(std::string(name_of(options.log_level)), options.log_file, "DORMOUSE_LOG_FILE");
  } catch (const std::bad_alloc&) {
    // The log stays as it is.
  }
}

void say_warnings() noexcept {
  try {
    static std::atomic<bool> said{false};
    const Settings& current = settings();
    if (said.exchange(true) || !active()) return;
    configure_log_from_settings();
    for (const std::string& warning : current.warnings) log().warn("{}", warning);
  } catch (...) {
    // Nothing to say it with.
  }
}

void lock_settings_for_fork() noexcept {
  state().mutex.lock();
  tags().lock();
}

void unlock_settings_in_parent() noexcept {
  tags().unlock();
  state().mutex.unlock();
}

void unlock_settings_in_child() noexcept {
  tags().unlock();
  // Locked by the parent's thread, which in the child has another number: it cannot be unlocked.
  new (&state().mutex) std::recursive_mutex;
}

}  // namespace dormouse::shim
