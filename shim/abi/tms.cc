// The functions that torch_memory_saver's preload library exports (versions 0.0.8 to 0.0.10, and
// what came since), so that its Python package, and all that uses it, works unmodified on this
// library. What a thread has set there is a state, not a stack: while it is 'interesting', the
// thread is inside one region of its current tag and policy. Errors are return codes and log lines
// where theirs end the process.
//
// Relied on: the package's binary_wrapper.py and entrypoint.py, and the behaviour of its library.
#include "shim/abi/tms.h"

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/log.h"
#include "core/region.h"
#include "core/sleep/engine.h"
#include "shim/process/export.h"
#include "shim/process/process.h"
#include "shim/process/python.h"
#include "shim/process/settings.h"
#include "shim/rules/regions.h"
#include "shim/rules/spans.h"
#include "shim/torch/torch.h"

namespace dormouse::shim::tms {
namespace {

constexpr const char* kDefaultTag = "default";

bool is_one_of(std::string_view text, std::initializer_list<std::string_view> words) {
  for (const std::string_view word : words) {
    if (text == word) return true;
  }
  return false;
}

bool read_bool(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr || is_one_of(value, {"", "0", "false", "FALSE", "no", "NO"})) return false;
  if (is_one_of(value, {"1", "true", "TRUE", "yes", "YES"})) return true;
  if (first_time(variable)) {
    log().warn("{}='{}' is ignored: 1, true and yes or 0, false and no are allowed.", variable,
               value);
  }
  return false;
}

bool valid_backend(std::string_view backend) {
  return is_one_of(backend, {"mmap", "pinned"});
}

// Both mean the same here: backups are in registered host memory that is given back when asked.
std::string read_backend() {
  const char* value = std::getenv("TMS_INIT_CPU_BACKUP_BACKEND");
  if (value == nullptr || *value == '\0') return "pinned";
  if (valid_backend(value)) return value;
  if (first_time("tms backend")) {
    log().warn("TMS_INIT_CPU_BACKUP_BACKEND='{}' is ignored: mmap and pinned are allowed.", value);
  }
  return "pinned";
}

// Whether the environment makes all threads interesting from their start.
bool process_is_interesting() {
  static const bool value = read_bool("TMS_INIT_ENABLE");
  return value;
}

Backup policy(bool cpu, bool disk) {
  if (!disk) return cpu ? Backup::kHost : Backup::kNone;
  if (cpu && first_time("tms two backups")) {
    log().warn(
        "torch_memory_saver: a region has a backup in host memory and on disk; host memory is "
        "used.");
  }
  if (cpu) return Backup::kHost;
  if (!settings().options.disk_dir.empty() || !tms_disk_directory().empty()) return Backup::kDisk;
  if (first_time("tms no disk")) {
    log().warn(
        "torch_memory_saver: backups on disk need a directory: set TMS_DISK_BACKUP_DIR or "
        "DORMOUSE_DISK_DIR at start. Host memory is used.");
  }
  return Backup::kHost;
}

// The calling thread's state, and the region that follows from it.
class Thread {
 public:
  std::string tag = kDefaultTag;
  bool interesting = process_is_interesting();
  bool cpu_backup = read_bool("TMS_INIT_ENABLE_CPU_BACKUP");
  bool disk_backup = read_bool("TMS_INIT_ENABLE_DISK_BACKUP");
  std::string backend = read_backend();

  // The tag that the state asks for; kNoTag if the thread's memory is none of torch_memory_saver's.
  TagId wanted() const {
    return interesting ? tags().intern(tag_of_any_text(tag), policy(cpu_backup, disk_backup))
                       : kNoTag;
  }

  // Begins and ends regions until the tag in force is the state's.
  void settle() {
    const TagId now = wanted();
    if (span_ != 0 && now == span_tag_) return;
    if (span_ != 0) end_span(span_);
    span_ = 0;
    // What the process has anyway needs no region.
    if (now == (process_is_interesting() ? region::process_tag() : kNoTag)) return;
    const torch::CallerIsolates caller_isolates;
    span_ = begin_span(now);
    span_tag_ = now;
  }

 private:
  SpanId span_ = 0;
  TagId span_tag_ = kNoTag;
};

thread_local std::unique_ptr<Thread> this_thread;

Thread& thread() {
  if (this_thread == nullptr) this_thread = std::make_unique<Thread>();
  return *this_thread;
}

std::atomic<std::uint64_t> margin_bytes{0};

void set_disk_directory(const char* directory) {
  if (!settings().options.disk_dir.empty()) {
    if (first_time("tms disk directory")) {
      log().warn("torch_memory_saver: backups stay in DORMOUSE_DISK_DIR, {}, not {}",
                 settings().options.disk_dir, directory);
    }
    return;
  }
  set_tms_disk_directory(directory);
  if (Engine* current = engine()) current->set_disk_directory(directory);
}

// Whether the host memory of a backup is kept after waking. The package's default is not to;
// DORMOUSE_KEEP_BACKUP, if the user has set it, is what holds where the program says nothing.
enum class Retain { kUnread, kNo, kYes };
std::atomic<Retain> retain{Retain::kUnread};

bool user_keeps_backups() {
  for (std::size_t i = 0; i < settings().option_values.size(); ++i) {
    if (std::string_view(config::option_table()[i].environment) != "DORMOUSE_KEEP_BACKUP") continue;
    return !settings().option_values[i].variable.empty() &&
           !settings().options.keep_backup.is_never();
  }
  return false;
}

bool retains() {
  Retain now = retain.load();
  if (now == Retain::kUnread) {
    const bool said = std::getenv("TMS_RETAIN_CPU_BACKUP") != nullptr;
    now = (said ? read_bool("TMS_RETAIN_CPU_BACKUP") : user_keeps_backups()) ? Retain::kYes
                                                                             : Retain::kNo;
    retain.store(now);
  }
  return now == Retain::kYes;
}

// Runs what can run out of memory.
template <typename Function>
void guarded(Function function) noexcept {
  try {
    function();
  } catch (const std::bad_alloc&) {
    log().error("out of memory in torch_memory_saver's interface: the call changed nothing");
  }
}

template <typename Result, typename Function>
Result guarded_or(Result fallback, Function function) noexcept {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return fallback;
  }
}

std::vector<std::string> tags_of(const char* tag) {
  if (tag == nullptr || *tag == '\0') return {};
  return {tag_of_any_text(tag)};
}

// 0, or the code. A tag without memory is not an error there.
int finish(const Status& status, const char* what, const char* tag) {
  if (status.is_ok() || status.code() == Code::kNotFound) return 0;
  log().error("torch_memory_saver: {} of {} failed: {}", what, tag == nullptr ? "all tags" : tag,
              status.message());
  return static_cast<int>(status.code());
}

int pause(const char* tag) {
  Engine* current = engine();
  if (current == nullptr) return 0;
  const python::GilReleased released;
  return finish(current->sleep({.tags = tags_of(tag), .origin = Origin::kProgram}, nullptr),
                "pause", tag);
}

int resume(const char* tag) {
  Engine* current = engine();
  if (current == nullptr) return 0;
  const python::GilReleased released;
  const int result = finish(current->wake({.tags = tags_of(tag)}, nullptr), "resume", tag);
  if (result == 0 && !retains()) (void)current->trim(true);
  return result;
}

// The whole process is interesting from its start: its threads need no region for it.
__attribute__((constructor)) void begin_process_region() {
  if (std::getenv("TMS_INIT_ENABLE") == nullptr || !active()) return;
  guarded([] {
    if (!process_is_interesting() || !settings().enabled) return;
    if (region::process_tag() != kNoTag) return;  // a rule of the user's own
    const TagId tag = Thread().wanted();
    region::set_process_tag(tag);
    torch::process_region();
  });
}

}  // namespace

std::uint64_t memory_margin_bytes() noexcept {
  return margin_bytes.load(std::memory_order_relaxed);
}

}  // namespace dormouse::shim::tms

using namespace dormouse;
using shim::tms::guarded;
using shim::tms::guarded_or;
using shim::tms::thread;

extern "C" {

DORMOUSE_EXPORT void tms_set_interesting_region(bool interesting) {
  guarded([&] {
    thread().interesting = interesting;
    thread().settle();
  });
}

DORMOUSE_EXPORT bool tms_get_interesting_region() {
  return guarded_or(false, [] { return thread().interesting; });
}

DORMOUSE_EXPORT void tms_set_current_tag(const char* tag) {
  if (tag == nullptr) {
    log().error("torch_memory_saver: tms_set_current_tag(NULL) is ignored");
    return;
  }
  guarded([&] {
    thread().tag = tag;
    thread().settle();
  });
}

// Valid until the thread sets another.
DORMOUSE_EXPORT const char* tms_get_current_tag() {
  return guarded_or(shim::tms::kDefaultTag, [] { return thread().tag.c_str(); });
}

DORMOUSE_EXPORT void tms_set_enable_cpu_backup(bool enable) {
  guarded([&] {
    thread().cpu_backup = enable;
    thread().settle();
  });
}

DORMOUSE_EXPORT bool tms_get_enable_cpu_backup() {
  return guarded_or(false, [] { return thread().cpu_backup; });
}

DORMOUSE_EXPORT void tms_set_enable_disk_backup(bool enable) {
  guarded([&] {
    thread().disk_backup = enable;
    thread().settle();
  });
}

DORMOUSE_EXPORT bool tms_get_enable_disk_backup() {
  return guarded_or(false, [] { return thread().disk_backup; });
}

DORMOUSE_EXPORT void tms_set_cpu_backup_backend(const char* backend) {
  if (backend == nullptr || !shim::tms::valid_backend(backend)) {
    log().error("torch_memory_saver: the backend '{}' is ignored: mmap and pinned are allowed",
                backend == nullptr ? "NULL" : backend);
    return;
  }
  guarded([&] { thread().backend = backend; });
}

DORMOUSE_EXPORT const char* tms_get_cpu_backup_backend() {
  return guarded_or("pinned", [] { return thread().backend.c_str(); });
}

// Holds for all regions from now on; those that sleep on disk stay where they are until they wake.
DORMOUSE_EXPORT void tms_set_disk_backup_dir(const char* directory) {
  if (directory == nullptr) {
    log().error("torch_memory_saver: tms_set_disk_backup_dir(NULL) is ignored");
    return;
  }
  guarded([&] { shim::tms::set_disk_directory(directory); });
}

DORMOUSE_EXPORT void set_memory_margin_bytes(std::uint64_t bytes) {
  shim::tms::margin_bytes.store(bytes, std::memory_order_relaxed);
}

DORMOUSE_EXPORT void tms_set_retain_cpu_backup(bool retain) {
  shim::tms::retain.store(retain ? shim::tms::Retain::kYes : shim::tms::Retain::kNo);
}

DORMOUSE_EXPORT bool tms_get_retain_cpu_backup() {
  return guarded_or(false, [] { return shim::tms::retains(); });
}

// 0, or what failed (the number of a dormouse::Code); everything is awake and intact then.
DORMOUSE_EXPORT int tms_pause(const char* tag) {
  return guarded_or(static_cast<int>(Code::kOutOfHostMemory),
                    [&] { return shim::tms::pause(tag); });
}

// 0, or what failed; everything stays asleep and intact then, and it can be tried again.
DORMOUSE_EXPORT int tms_resume(const char* tag) {
  return guarded_or(static_cast<int>(Code::kOutOfHostMemory),
                    [&] { return shim::tms::resume(tag); });
}

// The host copy of memory that is paused, or was and retained it; null if there is none.
DORMOUSE_EXPORT std::uint8_t* tms_get_cpu_backup_pointer(const std::uint8_t* address,
                                                         std::uint64_t bytes) {
  const Engine* current = shim::engine();
  if (current == nullptr) return nullptr;
  const void* copy = current->host_backup(reinterpret_cast<CUdeviceptr>(address), bytes);
  return static_cast<std::uint8_t*>(const_cast<void*>(copy));
}

// Bytes of the buffer around the address, which stays awake from now on; 0 for memory without a
// tag.
DORMOUSE_EXPORT std::size_t tms_keep_resident(const void* address) {
  std::size_t bytes = 0;
  Engine* current = shim::exiting() ? nullptr : shim::engine();
  if (current == nullptr) return 0;
  const shim::python::GilReleased released;  // what sleeps is woken
  const Status status = current->keep_awake(reinterpret_cast<CUdeviceptr>(address), true, &bytes);
  if (!status.is_ok())
    log().error("torch_memory_saver: memory could not be kept awake: {}", status.message());
  return bytes;
}

// 0.0.8's way to say interesting and not.
DORMOUSE_EXPORT void tms_region_enter() {
  tms_set_interesting_region(true);
}

DORMOUSE_EXPORT void tms_region_leave() {
  tms_set_interesting_region(false);
}

}  // extern "C"
