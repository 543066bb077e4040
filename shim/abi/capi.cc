// The C interface; see dormouse.h. Translates, and keeps each thread's last message.
#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/regions.h"
#include "core/log.h"
#include "core/region.h"
#include "core/version.h"
#include "shim/abi/dormouse.h"
#include "shim/process/export.h"
#include "shim/process/process.h"
#include "shim/process/python.h"
#include "shim/process/settings.h"
#include "shim/rules/regions.h"

namespace {

using namespace dormouse;
using namespace dormouse::shim;

constexpr std::array<const char*, 11> kTexts = {
    "no error",
    "invalid argument",
    "no such tag",
    "not enough device memory",
    "not enough host memory for the backup",
    "busy: try again",
    "not supported on this machine",
    "the CUDA driver reported an error",
    "a system call failed",
    "no region has begun on this thread",
    "Dormouse is not active in this process",
};

// Of the thread's last call that failed: `text` points to the message or to what needs no memory.
struct LastMessage {
  std::string message;
  const char* text = "";
};

LastMessage& last_message() {
  thread_local LastMessage last;
  return last;
}

int failed(int code, std::string message) {
  LastMessage& last = last_message();
  last.message = std::move(message);
  last.text = last.message.c_str();
  return code;
}

int code_of(Code code) noexcept {
  switch (code) {
    case Code::kOk:
      return DORMOUSE_OK;
    case Code::kInvalidArgument:
      return DORMOUSE_INVALID_ARGUMENT;
    case Code::kNotFound:
      return DORMOUSE_NOT_FOUND;
    case Code::kOutOfDeviceMemory:
      return DORMOUSE_OUT_OF_DEVICE_MEMORY;
    case Code::kOutOfHostMemory:
      return DORMOUSE_OUT_OF_HOST_MEMORY;
    case Code::kBusy:
      return DORMOUSE_BUSY;
    case Code::kUnsupported:
      return DORMOUSE_UNSUPPORTED;
    case Code::kDriver:
      return DORMOUSE_DRIVER_ERROR;
    case Code::kIo:
      return DORMOUSE_IO_ERROR;
  }
  return DORMOUSE_DRIVER_ERROR;
}

int code_of(const Status& status) {
  return status.is_ok() ? DORMOUSE_OK : failed(code_of(status.code()), status.message());
}

// Runs what may throw, behind the C boundary.
template <typename Work>
int guarded(Work work) noexcept {
  try {
    return work();
  } catch (...) {  // all that is thrown here is a failed allocation
    last_message().text = "not enough host memory for the call itself; nothing was done";
    return DORMOUSE_OUT_OF_HOST_MEMORY;
  }
}

// The same, of a region; with DORMOUSE=off there are none. `caller`: the program's return address.
template <typename Work>
int of_region(const void* caller, Work work) noexcept {
  const python::ReturnsToPython returns(caller);
  return guarded([&]() -> int {
    if (settings().enabled) return work();
    return failed(DORMOUSE_NOT_ACTIVE, "Dormouse is switched off in this process: DORMOUSE=off");
  });
}

int begin(const char* tag, const Backup* backup) {
  if (tag == nullptr) return failed(DORMOUSE_INVALID_ARGUMENT, "the tag is NULL");
  const bool no_tag = std::string_view(tag) == "-";
  if (no_tag && backup != nullptr) {
    return failed(DORMOUSE_INVALID_ARGUMENT, "memory without a tag has no policy");
  }
  if (!no_tag && !config::is_tag(tag)) {
    return failed(DORMOUSE_INVALID_ARGUMENT, "'" + std::string(tag) + "' is not a valid tag; " +
                                                 std::string(config::kTagForm));
  }
  region_begin(no_tag              ? kNoTag
               : backup == nullptr ? tags().intern(tag)
                                   : tags().intern(tag, *backup));
  return DORMOUSE_OK;
}

// The engine for an operation on tags, and the tags' names; an error code if either is missing.
template <typename Work>
int with_tags(const char* const* names, size_t count, Work work) noexcept {
  return guarded([&]() -> int {
    std::vector<std::string> list;
    for (size_t i = 0; names != nullptr && i < count; ++i) {
      if (names[i] == nullptr) return failed(DORMOUSE_INVALID_ARGUMENT, "a tag is NULL");
      list.emplace_back(names[i]);
    }
    if (names != nullptr && count == 0) {
      return failed(DORMOUSE_INVALID_ARGUMENT, "no tag is named; NULL means all tags");
    }
    Engine* current = exiting() ? nullptr : engine();
    if (current == nullptr) {
      return failed(DORMOUSE_NOT_ACTIVE,
                    "there is no tagged memory: the process has not used CUDA, or Dormouse is "
                    "switched off in it");
    }
    const python::GilReleased released;  // a sleep or a wake waits for others
    return work(*current, std::move(list));
  });
}

int sleep(const char* const* names, size_t count, unsigned int flags) noexcept {
  return with_tags(names, count, [&](Engine& current, std::vector<std::string> list) -> int {
    if ((flags & ~(DORMOUSE_SLEEP_DISCARD | DORMOUSE_SLEEP_GATE)) != 0) {
      return failed(DORMOUSE_INVALID_ARGUMENT, "unknown flag");
    }
    SleepRequest request;
    request.tags = std::move(list);
    request.discard = (flags & DORMOUSE_SLEEP_DISCARD) != 0;
    request.origin = (flags & DORMOUSE_SLEEP_GATE) != 0 ? Origin::kOutside : Origin::kProgram;
    return code_of(current.sleep(request, nullptr));
  });
}

void fill(dormouse_tag_stats& to, const TagStats& from) noexcept {
  const size_t length = std::min(from.tag.size(), sizeof(to.tag) - 1);
  std::memcpy(to.tag, from.tag.data(), length);
  to.tag[length] = '\0';
  to.backup = static_cast<int>(from.backup);
  to.device = from.device;
  to.allocated = from.allocated;
  to.mapped = from.mapped;
  to.asleep = from.asleep;
  to.backed_up = from.backed_up;
  to.on_disk = from.on_disk;
  to.peak_allocated = from.peak_allocated;
  to.peak_mapped = from.peak_mapped;
  to.blocks = from.blocks;
  to.chunks = from.chunks;
  to.allocations = from.allocations;
  to.frees = from.frees;
  to.sleeps = from.sleeps;
  to.wakes = from.wakes;
  to.last_sleep_seconds = from.last_sleep.seconds;
  to.last_wake_seconds = from.last_wake.seconds;
  for (const HeldBytes& held : from.held) to.held += held.bytes;
}

static_assert(static_cast<int>(Backup::kHost) == DORMOUSE_BACKUP_HOST &&
              static_cast<int>(Backup::kNone) == DORMOUSE_BACKUP_NONE &&
              static_cast<int>(Backup::kDisk) == DORMOUSE_BACKUP_DISK);

}  // namespace

extern "C" {

DORMOUSE_EXPORT const char* dormouse_version(void) {
  return dormouse::kVersion;
}

DORMOUSE_EXPORT int dormouse_region_begin(const char* tag) {
  return of_region(__builtin_return_address(0), [&] { return begin(tag, nullptr); });
}

DORMOUSE_EXPORT int dormouse_region_begin_with_backup(const char* tag, int backup) {
  return of_region(__builtin_return_address(0), [&]() -> int {
    if (backup < DORMOUSE_BACKUP_HOST || backup > DORMOUSE_BACKUP_DISK) {
      return failed(DORMOUSE_INVALID_ARGUMENT, "the policy is not a DORMOUSE_BACKUP_ value");
    }
    if (backup == DORMOUSE_BACKUP_DISK && settings().options.disk_dir.empty()) {
      return failed(DORMOUSE_INVALID_ARGUMENT,
                    "the policy disk needs a directory: set DORMOUSE_DISK_DIR");
    }
    const auto policy = static_cast<Backup>(backup);
    return begin(tag, &policy);
  });
}

DORMOUSE_EXPORT int dormouse_region_begin_none(void) {
  return of_region(__builtin_return_address(0), [] { return begin("-", nullptr); });
}

DORMOUSE_EXPORT int dormouse_region_end(void) {
  return of_region(__builtin_return_address(0), []() -> int {
    if (region_end()) return DORMOUSE_OK;
    return failed(DORMOUSE_NO_REGION, "a region was ended on a thread that is in none");
  });
}

DORMOUSE_EXPORT const char* dormouse_current_tag(void) {
  // Names that were handed out, each once; a process has few.
  static std::mutex mutex;
  static auto* const handed_out = new std::set<std::string>;
  const TagId tag = region::current();
  if (tag == kNoTag) return "";
  try {
    std::string name = tags().get(tag).name;
    const std::lock_guard lock(mutex);
    return handed_out->insert(std::move(name)).first->c_str();
  } catch (const std::bad_alloc&) {
    return "";
  }
}

DORMOUSE_EXPORT size_t dormouse_region_depth(void) {
  return region::depth();
}

DORMOUSE_EXPORT int dormouse_sleep(const char* const* tags, size_t count, unsigned int flags) {
  return sleep(tags, count, flags);
}

DORMOUSE_EXPORT int dormouse_discard(const char* const* tags, size_t count) {
  return sleep(tags, count, DORMOUSE_SLEEP_DISCARD);
}

DORMOUSE_EXPORT int dormouse_wake(const char* const* tags, size_t count) {
  return with_tags(tags, count, [&](Engine& current, std::vector<std::string> list) {
    return code_of(current.wake({std::move(list)}, nullptr));
  });
}

DORMOUSE_EXPORT int dormouse_is_sleeping(const char* const* tags, size_t count, int* sleeping) {
  if (sleeping == nullptr) {
    return guarded([] { return failed(DORMOUSE_INVALID_ARGUMENT, "the result is NULL"); });
  }
  return with_tags(tags, count, [&](Engine& current, std::vector<std::string> list) -> int {
    if (const Status known = current.check_tags(list); !known.is_ok()) return code_of(known);
    *sleeping = current.is_sleeping(list) ? 1 : 0;
    return DORMOUSE_OK;
  });
}

DORMOUSE_EXPORT int dormouse_keep_awake(const void* pointer, int on) {
  return with_tags(nullptr, 0, [&](Engine& current, const std::vector<std::string>&) -> int {
    std::size_t bytes = 0;
    const auto address = reinterpret_cast<CUdeviceptr>(pointer);
    const Status status = current.keep_awake(address, on != 0, &bytes);
    if (!status.is_ok()) return code_of(status);
    if (bytes != 0) return DORMOUSE_OK;
    return failed(DORMOUSE_NOT_FOUND, "the pointer is not in memory that has a tag");
  });
}

DORMOUSE_EXPORT int dormouse_stats(struct dormouse_tag_stats* stats, size_t capacity,
                                   size_t* count) {
  return guarded([&]() -> int {
    // The first version's size: programs built against it must go on working.
    constexpr size_t kSmallest = offsetof(dormouse_tag_stats, last_wake_seconds) + sizeof(double);
    if (count == nullptr || (stats == nullptr && capacity != 0) ||
        (capacity != 0 && stats[0].size < kSmallest)) {
      return failed(DORMOUSE_INVALID_ARGUMENT,
                    "count is NULL, or stats[0].size is not sizeof(struct dormouse_tag_stats)");
    }
    Engine* current = engine();
    const std::vector<TagStats> all =
        current != nullptr ? current->stats() : std::vector<TagStats>{};
    *count = all.size();
    const size_t stride = capacity != 0 ? stats[0].size : 0;
    for (size_t i = 0; i < std::min(capacity, all.size()); ++i) {
      dormouse_tag_stats filled{};
      fill(filled, all[i]);
      filled.size = stride;
      std::memcpy(reinterpret_cast<char*>(stats) + i * stride, &filled,
                  std::min(stride, sizeof(filled)));
    }
    return DORMOUSE_OK;
  });
}

DORMOUSE_EXPORT const char* dormouse_strerror(int code) {
  const bool known = code >= 0 && static_cast<size_t>(code) < kTexts.size();
  return known ? kTexts[static_cast<size_t>(code)] : "unknown error";
}

DORMOUSE_EXPORT const char* dormouse_last_error_message(void) {
  return last_message().text;
}

}  // extern "C"
