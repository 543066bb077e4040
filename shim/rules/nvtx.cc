// NVTX ranges as regions: a range whose name a rule nvtx(...) names is one. NVTX loads the library
// that NVTX_INJECTION64_PATH names into each binary that contains its header, and gives it tables
// of function pointers to fill; the constructor here names this library, and a tool that was named
// before (a profiler) is initialised first and called on. Ranges that no rule names cost a look at
// the rules.
#include "shim/rules/nvtx.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "config/regions.h"
#include "core/log.h"
#include "shim/process/export.h"
#include "shim/process/linker.h"
#include "shim/process/settings.h"
#include "shim/rules/nvtx_interface.h"
#include "shim/rules/spans.h"

namespace dormouse::shim::nvtx {
namespace {

constexpr const char* kInjectionPath = "NVTX_INJECTION64_PATH";
// Where a tool's path goes whose place this library took: programs that this one starts find it
// there.
constexpr const char* kChain = "_DORMOUSE_NVTX_CHAIN";

// --- What is called on: the functions of a tool that was there before

// One tool, one set of functions, whichever binary they were put into. Written before the tables
// are filled, then constant.
struct Next {
#define DORMOUSE_NVTX_FIELD(module, number, name, result, parameters, arguments) \
  result(*name) parameters = nullptr;
  DORMOUSE_NVTX_FUNCTIONS(DORMOUSE_NVTX_FIELD)
#undef DORMOUSE_NVTX_FIELD
};
Next next;

// --- Names

std::string utf8(const wchar_t* text) {
  std::string result;
  for (; text != nullptr && *text != L'\0'; ++text) {
    const auto c = static_cast<std::uint32_t>(*text);
    if (c < 0x80) {
      result += static_cast<char>(c);
      continue;
    }
    if (c >= 0x10000) {
      result += static_cast<char>(0xF0 | (c >> 18 & 0x07));
      result += static_cast<char>(0x80 | (c >> 12 & 0x3F));
    } else if (c >= 0x800) {
      result += static_cast<char>(0xE0 | c >> 12);
    }
    if (c < 0x800) {
      result += static_cast<char>(0xC0 | c >> 6);
    } else {
      result += static_cast<char>(0x80 | (c >> 6 & 0x3F));
    }
    result += static_cast<char>(0x80 | (c & 0x3F));
  }
  return result;
}

// The tag that a name begins a region of; kNoTag is one that excludes memory.
using Match = std::optional<TagId>;

struct Rule {
  config::NvtxRule rule;
  TagId tag;
};

const std::vector<Rule>& rules() {
  static const std::vector<Rule>* const instance = [] {
    auto* made = new std::vector<Rule>;
    const Settings& current = settings();
    for (std::size_t i = 0; i < current.regions.items.size(); ++i) {
      for (const config::Rule& rule : current.regions.items[i].rules) {
        if (const auto* named = std::get_if<config::NvtxRule>(&rule)) {
          made->push_back({*named, current.region_tags[i]});
        }
      }
    }
    return made;
  }();
  return *instance;
}

Match match(std::string_view domain, std::string_view name) {
  for (const Rule& each : rules()) {
    if (each.rule.domain && !config::glob_match(*each.rule.domain, domain)) continue;
    if (config::glob_match(each.rule.pattern, name)) return each.tag;
  }
  return std::nullopt;
}

// Domains and registered strings by their handles, which are the tool's where there is one.
class Names {
 public:
  std::string domain(Domain handle) const {
    if (handle == nullptr) return {};
    const std::shared_lock lock(mutex_);
    const auto found = domains_.find(handle);
    return found == domains_.end() ? std::string() : found->second;
  }

  Domain add_domain(Domain handle, std::string name) {
    const std::unique_lock lock(mutex_);
    if (handle == nullptr) handle = own_handle();
    domains_[handle] = std::move(name);
    return handle;
  }

  void remove_domain(Domain handle) {
    const std::unique_lock lock(mutex_);
    domains_.erase(handle);
  }

  // What a registered name matches is found out once.
  Match registered(String handle) const {
    const std::shared_lock lock(mutex_);
    const auto found = strings_.find(handle);
    return found == strings_.end() ? std::nullopt : found->second;
  }

  String add_string(String handle, Match match) {
    const std::unique_lock lock(mutex_);
    if (handle == nullptr) handle = own_handle();
    strings_[handle] = match;
    return handle;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }
  // In a forked child the lock is held by a thread that has another number there.
  void renew_lock() { new (&mutex_) std::shared_mutex; }

 private:
  // An address that nothing else has; NVTX never looks behind it.
  static void* own_handle() { return new char; }

  mutable std::shared_mutex mutex_;  // protects both
  std::unordered_map<Domain, std::string> domains_;
  std::unordered_map<String, Match> strings_;
};

Names& names() {
  static Names* const instance = new Names;
  return *instance;
}

Match match_event(Domain domain, const EventAttributes* event) {
  if (event == nullptr) return std::nullopt;
  switch (event->message_type) {
    case kAscii:
      if (event->message.ascii == nullptr) return std::nullopt;
      return match(names().domain(domain), event->message.ascii);
    case kUnicode:
      return match(names().domain(domain), utf8(event->message.unicode));
    case kRegistered:
      return names().registered(event->message.registered);
    default:
      return std::nullopt;
  }
}

Match match_text(const char* message) {
  return message == nullptr ? std::nullopt : match({}, message);
}
Match match_text(const wchar_t* message) {
  return match({}, utf8(message));
}

// --- What threads are inside of

// The pushed ranges of one domain on one thread: how many, and which of them began a region.
struct Pushed {
  struct Begun {
    std::size_t level;
    SpanId span;
  };
  Domain domain;
  std::size_t level = 0;
  std::vector<Begun> begun;
};

// A range between nvtxRangeStart and nvtxRangeEnd that began a region.
struct Range {
  Domain domain;
  RangeId id;
  std::uint64_t thread;
  SpanId span;
};

// Ranges that have a number can be ended on another thread than their own, whose region then ends
// when that thread next comes by.
class Ranges {
 public:
  RangeId new_id() { return ++last_id_; }
  bool any() const { return count_.load(std::memory_order_relaxed) != 0; }
  void add(const Range& range);
  void end(Domain domain, RangeId id, std::uint64_t thread);
  // Ends what others ended for this thread.
  void settle(std::uint64_t thread);
  void thread_ended(std::uint64_t thread);

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }
  void renew_lock() { new (&mutex_) std::mutex; }

 private:
  std::vector<SpanId> take_ended(std::uint64_t thread);

  std::atomic<RangeId> last_id_{0};
  std::atomic<std::size_t> count_{0};  // of open_ and ended_
  std::mutex mutex_;                   // protects both
  std::vector<Range> open_;
  std::vector<Range> ended_;  // on another thread than theirs
};

Ranges& ranges() {
  static Ranges* const instance = new Ranges;
  return *instance;
}

void Ranges::add(const Range& range) {
  const std::lock_guard lock(mutex_);
  open_.push_back(range);
  ++count_;
}

void Ranges::end(Domain domain, RangeId id, std::uint64_t thread) {
  SpanId span = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto range = std::find_if(open_.rbegin(), open_.rend(), [&](const Range& each) {
      return each.domain == domain && each.id == id;
    });
    if (range == open_.rend()) return;
    if (range->thread == thread) {
      span = range->span;
      --count_;
    } else {
      ended_.push_back(*range);
    }
    open_.erase(std::next(range).base());
  }
  if (span != 0) end_span(span);
}

std::vector<SpanId> Ranges::take_ended(std::uint64_t thread) {
  std::vector<SpanId> spans;
  const std::lock_guard lock(mutex_);
  for (const Range& range : ended_) {
    if (range.thread == thread) spans.push_back(range.span);
  }
  std::erase_if(ended_, [&](const Range& range) { return range.thread == thread; });
  count_ -= spans.size();
  return spans;
}

void Ranges::settle(std::uint64_t thread) {
  for (const SpanId span : take_ended(thread)) end_span(span);
}

void Ranges::thread_ended(std::uint64_t thread) {
  const std::lock_guard lock(mutex_);
  const auto of_thread = [&](const Range& range) { return range.thread == thread; };
  std::erase_if(open_, of_thread);
  std::erase_if(ended_, of_thread);
  count_ = open_.size() + ended_.size();
}

class Thread {
 public:
  ~Thread() {
    if (ranges().any()) ranges().thread_ended(id_);
  }
  std::uint64_t id() const { return id_; }
  void push(Domain domain, const Match& match);
  void pop(Domain domain);

 private:
  static inline std::atomic<std::uint64_t> last_id_{0};
  const std::uint64_t id_ = ++last_id_;
  std::vector<Pushed> pushed_;  // by domain; a thread uses few
};

thread_local std::unique_ptr<Thread> this_thread;

Thread& thread() {
  if (this_thread == nullptr) this_thread = std::make_unique<Thread>();
  if (ranges().any()) ranges().settle(this_thread->id());
  return *this_thread;
}

void Thread::push(Domain domain, const Match& match) {
  auto pushed = std::find_if(pushed_.begin(), pushed_.end(),
                             [&](const Pushed& each) { return each.domain == domain; });
  if (pushed == pushed_.end()) pushed = pushed_.insert(pushed_.end(), Pushed{.domain = domain});
  ++pushed->level;
  if (match) pushed->begun.push_back({pushed->level, begin_span(*match)});
}

void Thread::pop(Domain domain) {
  const auto pushed = std::find_if(pushed_.begin(), pushed_.end(),
                                   [&](const Pushed& each) { return each.domain == domain; });
  if (pushed == pushed_.end() || pushed->level == 0) return;
  if (!pushed->begun.empty() && pushed->begun.back().level == pushed->level) {
    end_span(pushed->begun.back().span);
    pushed->begun.pop_back();
  }
  --pushed->level;
}

// Runs what can run out of memory; then the range is none of ours.
template <typename Function>
void guarded(Function function) noexcept {
  try {
    function();
  } catch (const std::bad_alloc&) {
    if (first_time("nvtx memory")) log().error("out of memory: an NVTX range begins no region");
  }
}

void started(Domain domain, const Match& match, RangeId id) {
  if (!match) return;
  Thread& here = thread();
  ranges().add({domain, id, here.id(), begin_span(*match)});
}

// --- What the tables are filled with. The tool comes first: its time includes none of ours.

RangeId RangeStartEx(const EventAttributes* event) {
  RangeId id = next.RangeStartEx != nullptr ? next.RangeStartEx(event) : ranges().new_id();
  guarded([&] { started(nullptr, match_event(nullptr, event), id); });
  return id;
}
RangeId RangeStartA(const char* message) {
  RangeId id = next.RangeStartA != nullptr ? next.RangeStartA(message) : ranges().new_id();
  guarded([&] { started(nullptr, match_text(message), id); });
  return id;
}
RangeId RangeStartW(const wchar_t* message) {
  RangeId id = next.RangeStartW != nullptr ? next.RangeStartW(message) : ranges().new_id();
  guarded([&] { started(nullptr, match_text(message), id); });
  return id;
}
void RangeEnd(RangeId id) {
  if (next.RangeEnd != nullptr) next.RangeEnd(id);
  guarded([&] {
    if (ranges().any()) ranges().end(nullptr, id, thread().id());
  });
}

int RangePushEx(const EventAttributes* event) {
  const int level = next.RangePushEx != nullptr ? next.RangePushEx(event) : kNotTracked;
  guarded([&] { thread().push(nullptr, match_event(nullptr, event)); });
  return level;
}
int RangePushA(const char* message) {
  const int level = next.RangePushA != nullptr ? next.RangePushA(message) : kNotTracked;
  guarded([&] { thread().push(nullptr, match_text(message)); });
  return level;
}
int RangePushW(const wchar_t* message) {
  const int level = next.RangePushW != nullptr ? next.RangePushW(message) : kNotTracked;
  guarded([&] { thread().push(nullptr, match_text(message)); });
  return level;
}
int RangePop() {
  guarded([&] { thread().pop(nullptr); });
  return next.RangePop != nullptr ? next.RangePop() : kNotTracked;
}

RangeId DomainRangeStartEx(Domain domain, const EventAttributes* event) {
  RangeId id = next.DomainRangeStartEx != nullptr ? next.DomainRangeStartEx(domain, event)
                                                  : ranges().new_id();
  guarded([&] { started(domain, match_event(domain, event), id); });
  return id;
}
void DomainRangeEnd(Domain domain, RangeId id) {
  if (next.DomainRangeEnd != nullptr) next.DomainRangeEnd(domain, id);
  guarded([&] {
    if (ranges().any()) ranges().end(domain, id, thread().id());
  });
}
int DomainRangePushEx(Domain domain, const EventAttributes* event) {
  const int level =
      next.DomainRangePushEx != nullptr ? next.DomainRangePushEx(domain, event) : kNotTracked;
  guarded([&] { thread().push(domain, match_event(domain, event)); });
  return level;
}
int DomainRangePop(Domain domain) {
  guarded([&] { thread().pop(domain); });
  return next.DomainRangePop != nullptr ? next.DomainRangePop(domain) : kNotTracked;
}

String register_string(String handle, Domain domain, const std::string& text) {
  guarded([&] { handle = names().add_string(handle, match(names().domain(domain), text)); });
  return handle;
}
String DomainRegisterStringA(Domain domain, const char* text) {
  String handle =
      next.DomainRegisterStringA != nullptr ? next.DomainRegisterStringA(domain, text) : nullptr;
  return text == nullptr ? handle : register_string(handle, domain, text);
}
String DomainRegisterStringW(Domain domain, const wchar_t* text) {
  String handle =
      next.DomainRegisterStringW != nullptr ? next.DomainRegisterStringW(domain, text) : nullptr;
  return text == nullptr ? handle : register_string(handle, domain, utf8(text));
}

Domain create_domain(Domain handle, const std::string& name) {
  guarded([&] { handle = names().add_domain(handle, name); });
  return handle;
}
Domain DomainCreateA(const char* name) {
  Domain handle = next.DomainCreateA != nullptr ? next.DomainCreateA(name) : nullptr;
  return name == nullptr ? handle : create_domain(handle, name);
}
Domain DomainCreateW(const wchar_t* name) {
  Domain handle = next.DomainCreateW != nullptr ? next.DomainCreateW(name) : nullptr;
  return name == nullptr ? handle : create_domain(handle, utf8(name));
}
void DomainDestroy(Domain domain) {
  guarded([&] { names().remove_domain(domain); });
  if (next.DomainDestroy != nullptr) next.DomainDestroy(domain);
}

// --- Filling the tables

struct Table {
  Pointer** slots = nullptr;
  unsigned size = 0;
  std::vector<Pointer> before;  // what stood there before the tool came

  void read(const Callbacks& callbacks, int module) {
    if (callbacks.get_module_function_table(module, &slots, &size) == 0) size = 0;
    for (unsigned i = 0; i < size; ++i) before.push_back(slots[i] == nullptr ? nullptr : *slots[i]);
  }
};

// Puts `ours` into a slot, and calls on to what the tool put there. Where a binary got another
// function of the tool than the first binary did, the tool keeps it to itself.
template <typename Function>
void fill(const Table& table, unsigned number, Function ours, Function& called_on, bool first) {
  if (number >= table.size || table.slots[number] == nullptr) return;
  Pointer& slot = *table.slots[number];
  const Pointer put_there = slot == table.before[number] ? nullptr : slot;
  const auto tools = reinterpret_cast<Function>(put_there);
  if (first) called_on = tools;
  if (called_on == tools) slot = reinterpret_cast<Pointer>(ours);
}

void fill_tables(const Table& core, const Table& core2, bool first) {
#define DORMOUSE_NVTX_FILL(module, number, name, result, parameters, arguments) \
  fill(module == kCore ? core : core2, number, &name, next.name, first);
  DORMOUSE_NVTX_FUNCTIONS(DORMOUSE_NVTX_FILL)
#undef DORMOUSE_NVTX_FILL
}

// --- The tool that was named before

std::string own_path() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&own_path), &info) == 0) return {};
  char resolved[PATH_MAX];
  return realpath(info.dli_fname, resolved) == nullptr ? std::string() : std::string(resolved);
}

bool same_file(const char* a, const char* b) {
  struct stat first, second;
  return stat(a, &first) == 0 && stat(b, &second) == 0 && first.st_dev == second.st_dev &&
         first.st_ino == second.st_ino;
}

// Its handle, loaded once; null if there is none.
void* tool() {
  static void* const handle = []() -> void* {
    const char* path = std::getenv(kChain);
    if (path == nullptr || *path == '\0' || same_file(path, own_path().c_str())) return nullptr;
    void* loaded = dlopen(path, RTLD_LAZY);
    if (loaded == nullptr) {
      log().warn("{} named {}, which does not load: {}. NVTX ranges go to Dormouse alone.",
                 kInjectionPath, path, dlerror());
    }
    return loaded;
  }();
  return handle;
}

template <typename Function>
Function tools_function(const char* name) {
  void* handle = tool();
  return handle == nullptr ? nullptr : reinterpret_cast<Function>(real_dlsym(handle, name));
}

bool wanted() {
  const Settings& current = settings();
  return active() && current.enabled && current.options.nvtx && !rules().empty();
}

std::mutex initialise_mutex;  // binaries are initialised one by one

int initialise(GetExportTable get_export_table) {
  static bool first = true;
  const std::lock_guard lock(initialise_mutex);
  const auto* callbacks = static_cast<const Callbacks*>(get_export_table(kCallbacksTable));
  const bool usable =
      callbacks != nullptr && callbacks->struct_size >= sizeof(Callbacks) && wanted();
  Table core, core2;
  if (usable) {
    core.read(*callbacks, kCore);
    core2.read(*callbacks, kCore2);
  }
  const auto tools_initialise = tools_function<Initialize>("InitializeInjectionNvtx2");
  const int tools_result = tools_initialise != nullptr ? tools_initialise(get_export_table) : 0;
  if (!usable) return tools_result;
  fill_tables(core, core2, first);
  first = false;
  return 1;
}

// Names this library to NVTX if any rule is about ranges. Runs in every process that the library is
// preloaded into, so that it looks at one variable before it does anything.
__attribute__((constructor)) void name_this_library() {
  const char* regions = std::getenv("DORMOUSE_REGIONS");
  if (regions == nullptr) return;
  if (std::strstr(regions, "nvtx") == nullptr && std::strchr(regions, '@') == nullptr) return;
  if (!wanted()) return;
  const std::string own = own_path();
  if (own.empty()) return;
  const char* before = std::getenv(kInjectionPath);
  if (before != nullptr && *before != '\0' && !same_file(before, own.c_str())) {
    setenv(kChain, before, 1);
  } else if (before == nullptr) {
    unsetenv(kChain);
  }
  setenv(kInjectionPath, own.c_str(), 1);
}

}  // namespace

void before_fork() noexcept {
  names().lock();
  ranges().lock();
}

void forked_in_parent() noexcept {
  ranges().unlock();
  names().unlock();
}

void forked_in_child() noexcept {
  ranges().renew_lock();
  names().renew_lock();
  new (&initialise_mutex) std::mutex;  // a tool may have been at work under it
}

}  // namespace dormouse::shim::nvtx

// Called by NVTX in each binary that contains its header, at that binary's first NVTX call. 0: it
// goes on as if there were no tool.
extern "C" DORMOUSE_EXPORT int InitializeInjectionNvtx2(
    dormouse::shim::nvtx::GetExportTable get_export_table) {
  using namespace dormouse;
  if (get_export_table == nullptr) return 0;
  try {
    return shim::nvtx::initialise(get_export_table);
  } catch (const std::exception& error) {
    log().error("NVTX ranges begin no regions: {}", error.what());
    return 0;
  }
}

// NVTX's extensions are none of ours, but may be the tool's.
extern "C" DORMOUSE_EXPORT int InitializeInjectionNvtxExtension(void* module) {
  const auto tools =
      dormouse::shim::nvtx::tools_function<int (*)(void*)>("InitializeInjectionNvtxExtension");
  return tools == nullptr ? 0 : tools(module);
}
