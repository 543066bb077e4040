// See settings_per_thread.h. Two rules hold for the functions that stand in for PyTorch's.
// Exceptions of PyTorch's parser pass through their frames: these have nothing to clean up, and
// what they call is kept out of them (DORMOUSE_OWN_FRAME), so that our own copy of the C++ runtime
// never touches an exception of the program's. And PyTorch's own function comes first: a text that
// it rejects never reaches a copy.
#include "shim/torch/settings_per_thread.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/alloc_conf.h"
#include "core/log.h"
#include "core/region.h"
#include "shim/process/export.h"
#include "shim/process/settings.h"
#include "shim/torch/libc10.h"
#include "shim/torch/symbols.h"

#define DORMOUSE_OWN_FRAME __attribute__((noinline))

namespace dormouse::shim::torch {

struct View {
  std::atomic<void*> object{
      nullptr};  // what instance() returns; null until PyTorch has made its own
  bool is_copy = false;
  std::atomic<bool> entered{false};  // what it cannot have may be said
  ViewChanges changes;               // set in the copy besides expandable_segments
  config::AllocSettings model;       // what our reading of the texts makes of the copy
};

thread_local constinit View* this_view __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

// PyTorch 2.11's object has 136 bytes, 2.13's to 2.15's 152.
constexpr std::size_t kObjectBytes = 4096;
// White space that PyTorch drops tells our setting from the program's own: a program that reads the
// settings inside a region, changes something and writes them back did not ask for this one.
constexpr std::string_view kOff = "expandable_segments:False";
constexpr std::string_view kMarkedOff = "expandable_segments:\tFalse";
constexpr std::size_t kCachedTags = 1024;
// What instance() returns to a thread with no view of its own.
constinit std::atomic<void*> default_object{nullptr};

constinit View user_view;
// On a thread while PyTorch's parser runs on it. Has no object, so that the thread's next look at
// the settings takes the slow path and finds out that the parser threw.
constinit View parsing_view;

// What a thread has handed to PyTorch's parser. The text must outlive the call whichever way it
// ends.
struct Parsing {
  bool active = false;
  View* view_before = nullptr;
  std::string text;
};

Parsing& parsing() noexcept {
  static thread_local Parsing instance;
  return instance;
}

const config::AllocDialect& dialect_of_accepted_texts() {
  static const config::AllocDialect dialect = config::AllocDialect::g2_core();
  return dialect;
}

// With a device's parser registered, a text is rejected at the first key that nobody knows; without
// one, keys that nobody knows pass.
config::AllocDialect dialect_of_rejected_texts() {
  config::AllocDialect dialect = config::AllocDialect::g2_cuda();
  dialect.device_keys = false;
  const libc10::Copy* copy = libc10::followed();
  if (copy->keys == nullptr || copy->device_parser == nullptr) return dialect;
  dialect.known_keys.reset();
  const libc10::Keys& keys = copy->keys();
  if (copy->device_parser()) dialect.known_keys.emplace(keys.begin(), keys.end());
  return dialect;
}

std::string without_mark(const std::string& text) {
  std::string result = text;
  const std::size_t at = result.find(kMarkedOff);
  if (at == std::string::npos) return result;
  std::size_t end = at + kMarkedOff.size();
  std::size_t begin = at;
  if (end < result.size() && result[end] == ',') {
    ++end;
  } else if (begin > 0 && result[begin - 1] == ',') {
    --begin;
  }
  return result.erase(begin, end - begin);
}

// `text` with the view's changes, as our reader understands it; nothing if it does not.
std::optional<std::string> changed_text(const std::string& text, const ViewChanges& changes) {
  auto conf = config::AllocConf::read(config::Generation::kG2, text);
  if (!conf.ok()) return std::nullopt;
  config::AllocConf changed = *conf;
  changed.remove("expandable_segments");
  for (const auto& [key, value] : changes) changed.remove(key);
  for (const auto& [key, value] : changes) changed.set(key, value);
  changed.set("expandable_segments", "False");
  std::string result = changed.print();
  return result.replace(result.find(kOff), kOff.size(), kMarkedOff);
}

// Those of a view's changes that this PyTorch can follow. Where it was entered, the others are
// said.
ViewChanges possible(const View& view) {
  ViewChanges result;
  const bool entered = view.entered.load(std::memory_order_acquire);
  for (const auto& change : view.changes) {
    const char* obstacle = libc10::obstacle_to(change.first);
    if (obstacle == nullptr) {
      result.push_back(change);
    } else if (entered && first_time("torch region key " + change.first)) {
      log().warn("{} cannot be set for a region: {}. The region goes on without it.", change.first,
                 obstacle);
    }
  }
  return result;
}

// PyTorch's settings object and the copies that regions see.
class Accelerator {
 public:
  static Accelerator& get() noexcept {
    static Accelerator* instance = make();  // never destroyed: threads may outlive main()
    return *instance;
  }
  // Null while nobody needed it: what reads the options must not make what needs the options.
  static Accelerator* get_if_made() noexcept { return made_.load(std::memory_order_acquire); }

  View* view_of(TagId tag) noexcept;
  void process_tag_changed() noexcept;
  View* process_view() const noexcept { return process_view_.load(std::memory_order_acquire); }

  // instance() of PyTorch has returned `object`. Returns what the calling thread gets.
  void* settle(void* object) noexcept;
  void accepted(const std::string& text) noexcept;
  void rejected(const std::string& text) noexcept;
  // What PyTorch's parser is to work on when a program calls it on `self`.
  void* target_of(void* self) const noexcept;
  void forget_after_fork() noexcept { new (&mutex_) std::mutex; }

 private:
  Accelerator();
  static Accelerator* make() noexcept {
    auto* instance = new Accelerator;
    made_.store(instance, std::memory_order_release);
    instance->process_tag_changed();
    return instance;
  }
  View* view_for_name(const std::string& name);
  void make_copies();
  bool make_copy(View& view);
  void parse_into(View& view, const std::string& text);
  void publish_default() noexcept;

  static inline std::atomic<Accelerator*> made_{nullptr};

  std::mutex mutex_;  // protects what follows, and that one text at a time reaches the copies
  std::atomic<void*> real_{nullptr};  // written once
  config::AllocSettings user_;        // what our reading of the texts makes of the real object
  std::vector<std::string> texts_;    // what brings a fresh object to where the real one is

  View suspended_;                        // a copy without changes of its own
  std::deque<View> with_settings_;        // one for each distinct set of settings; constant
  std::map<std::string, View*> by_name_;  // tags with settings; constant
  std::array<std::atomic<View*>, kCachedTags> by_tag_{};
  std::atomic<View*> process_view_{nullptr};
};

Accelerator::Accelerator() {
  suspended_.is_copy = true;
  std::map<std::string, ViewChanges> settings_of;
  for (const auto& item : settings().regions.items) {
    for (const auto& setting : item.settings) settings_of[item.tag].push_back(setting);
  }
  for (auto& [name, changes] : settings_of) {
    View* view = nullptr;
    for (View& known : with_settings_) {
      if (known.changes == changes) view = &known;
    }
    if (view == nullptr) {
      view = &with_settings_.emplace_back();
      view->is_copy = true;
      view->changes = std::move(changes);
    }
    by_name_[name] = view;
  }
}

View* Accelerator::view_for_name(const std::string& name) {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? &suspended_ : found->second;
}

View* Accelerator::view_of(TagId tag) noexcept {
  if (tag == kNoTag) return &user_view;
  const auto index = static_cast<std::size_t>(tag);
  if (index >= kCachedTags) return &suspended_;
  View* view = by_tag_[index].load(std::memory_order_acquire);
  if (view == nullptr) {
    try {
      view = view_for_name(tags().get(tag).name);
    } catch (const std::bad_alloc&) {
      view = &suspended_;
    }
    by_tag_[index].store(view, std::memory_order_release);
  }
  return view;
}

void Accelerator::process_tag_changed() noexcept {
  const TagId tag = region::process_tag();
  const bool off = settings().options.torch == config::Torch::kOff;
  View* view = tag == kNoTag || off ? nullptr : view_of(tag);
  const std::lock_guard lock(mutex_);
  process_view_.store(view, std::memory_order_release);
  publish_default();
}

void Accelerator::publish_default() noexcept {
  if (real_ == nullptr) return;
  const View* view = process_view_.load(std::memory_order_acquire);
  void* object = view == nullptr ? real_.load() : view->object.load(std::memory_order_acquire);
  default_object.store(object == nullptr ? real_.load() : object, std::memory_order_release);
}

void* Accelerator::settle(void* object) noexcept {
  const std::lock_guard lock(mutex_);
  if (real_ == nullptr) {
    real_ = object;
    try {
      make_copies();
    } catch (...) {
      log().error(
          "PyTorch's allocator settings could not be copied: inside regions expandable "
          "segments stay as they are. Set expandable_segments:False for the process.");
    }
    user_view.object.store(object, std::memory_order_release);
    publish_default();
  }
  View* view = this_view;
  void* seen = view == nullptr ? default_object.load(std::memory_order_acquire)
                               : view->object.load(std::memory_order_acquire);
  return seen == nullptr ? object : seen;
}

void Accelerator::make_copies() {
  if (texts_.empty()) {
    // A libc10 whose instance() reaches its parser directly: what it has parsed is known all the
    // same.
    const auto variable = config::winning_alloc_conf(config::Generation::kG2, ::getenv);
    if (variable) {
      texts_.push_back(variable->text);
      (void)config::apply_alloc_conf(dialect_of_accepted_texts(), variable->text, user_);
    }
  }
  bool all = make_copy(suspended_);
  for (View& view : with_settings_) all = make_copy(view) && all;
  if (!all) {
    log().error(
        "This PyTorch's libc10 lacks the constructor of its allocator settings: inside "
        "regions expandable segments stay as they are. Set expandable_segments:False for "
        "the process.");
  }
}

// Makes a new object, for an object that threads may be reading cannot be built anew in place; the
// old one stays.
bool Accelerator::make_copy(View& view) {
  const libc10::Copy* copy = libc10::followed();
  if (copy->construct == nullptr || copy->parse == nullptr) return false;
  void* storage = std::aligned_alloc(64, kObjectBytes);
  if (storage == nullptr) throw std::bad_alloc();
  std::memset(storage, 0, kObjectBytes);
  copy->construct(storage);
  View fresh;
  fresh.object.store(storage, std::memory_order_relaxed);
  fresh.changes = view.changes;
  fresh.entered = view.entered.load();
  if (texts_.empty()) parse_into(fresh, std::string());
  for (const std::string& text : texts_) parse_into(fresh, text);
  view.model = fresh.model;
  view.object.store(storage, std::memory_order_release);
  return true;
}

// Has PyTorch's parser read into the copy what the real object has read, with the view's changes.
void Accelerator::parse_into(View& view, const std::string& text) {
  void* object = view.object.load(std::memory_order_acquire);
  if (object == nullptr) return;
  config::AllocSettings after = view.model;
  const ViewChanges changes = possible(view);
  std::optional<std::string> changed = changed_text(text, changes);
  // A change can be at odds with the rest (a split size below the segments' size); PyTorch would
  // throw.
  if (!changes.empty() &&
      (!changed || config::apply_alloc_conf(dialect_of_accepted_texts(), *changed, after))) {
    if (first_time("torch region settings " + text)) {
      log().warn(
          "The settings of a region in DORMOUSE_REGIONS conflict with PyTorch's "
          "'{}': the region goes on without them.",
          text);
    }
    changed = changed_text(text, {});
    after = view.model;
  }
  if (!changed) changed = changed_text(config::alloc_conf_text(user_), {});
  if (!changed) return;
  after = view.model;
  (void)config::apply_alloc_conf(dialect_of_accepted_texts(), *changed, after);
  libc10::followed()->parse(object, *changed);
  view.model = after;
}

void Accelerator::accepted(const std::string& text) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    (void)config::apply_alloc_conf(dialect_of_accepted_texts(), text, user_);
    if (real_ == nullptr) {
      texts_.push_back(text);
      return;
    }
    parse_into(suspended_, text);
    for (View& view : with_settings_) parse_into(view, text);
  } catch (...) {
    log().error(
        "PyTorch's new allocator settings could not be copied: regions go on with the old "
        "ones.");
  }
}

// What stood before the fault is in force, so that the copies are made anew from what is in force
// by our reading.
void Accelerator::rejected(const std::string& text) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    (void)config::apply_alloc_conf(dialect_of_rejected_texts(), text, user_);
    texts_ = {config::alloc_conf_text(user_)};
    if (real_ == nullptr) return;
    make_copy(suspended_);
    for (View& view : with_settings_) make_copy(view);
    publish_default();
  } catch (...) {
    log().error(
        "PyTorch's allocator settings could not be copied after a text that PyTorch "
        "rejected: regions go on with the old ones.");
  }
}

void* Accelerator::target_of(void* self) const noexcept {
  if (real_ == nullptr || self == real_) return self;
  if (self == suspended_.object.load(std::memory_order_acquire)) return real_;
  for (const View& view : with_settings_) {
    if (self == view.object.load(std::memory_order_acquire)) return real_;
  }
  return self;
}

// PyTorch's parser threw, or is still running (it never looks at the settings itself): the thread's
// own view is back, and the copies follow.
void end_rejected(Parsing& state) noexcept {
  state.active = false;
  this_view = state.view_before;
  Accelerator::get().rejected(state.text);
}

struct ParseCall {
  void (*function)(void* self, const std::string& text);
  void* self;
  const std::string* text;
};

DORMOUSE_OWN_FRAME ParseCall begin_parse(void* self, const std::string& text,
                                         const void* caller) noexcept {
  const libc10::Copy* copy = libc10::copy_for(caller);
  if (copy == nullptr || copy->parse == nullptr) {
    if (first_time("torch parseArgs")) {
      log().error(
          "libc10's AcceleratorAllocatorConfig::parseArgs was called but cannot be found: "
          "PyTorch's allocator settings stay as they are. Set DORMOUSE_TORCH=off.");
    }
    return {nullptr, self, &text};
  }
  Parsing& state = parsing();
  if (state.active) end_rejected(state);
  if (copy != libc10::followed()) return {copy->parse, self, &text};
  try {
    state.text = without_mark(text);
  } catch (const std::bad_alloc&) {
    return {copy->parse, self, &text};
  }
  state.active = true;
  state.view_before = this_view;
  this_view = &parsing_view;
  return {copy->parse, Accelerator::get().target_of(self), &state.text};
}

DORMOUSE_OWN_FRAME void end_parse() noexcept {
  Parsing& state = parsing();
  if (!state.active) return;
  state.active = false;
  this_view = state.view_before;
  Accelerator::get().accepted(state.text);
}

DORMOUSE_OWN_FRAME const libc10::Copy* find_copy(const void* caller) noexcept {
  const libc10::Copy* copy = libc10::copy_for(caller);
  if (copy == nullptr && first_time("torch instance")) {
    log().error(
        "libc10's AcceleratorAllocatorConfig::instance was called but cannot be found: "
        "PyTorch sees default allocator settings. Set DORMOUSE_TORCH=off.");
  }
  Parsing& state = parsing();
  if (state.active && copy == libc10::followed()) end_rejected(state);
  return copy;
}

DORMOUSE_OWN_FRAME void* settle(void* object) noexcept {
  return Accelerator::get().settle(object);
}

// Never used where libc10 is as it should be: whoever called was linked against the function.
alignas(64) constinit unsigned char no_object[kObjectBytes] = {};

DORMOUSE_OWN_FRAME void* instance_slow(const void* caller) {
  const libc10::Copy* copy = find_copy(caller);
  if (copy == nullptr) return no_object;
  if (copy != libc10::followed()) return copy->instance();  // may throw: nothing to undo
  return settle(copy->instance());                          // the same
}

}  // namespace

// Stand in for c10::CachingAllocator::AcceleratorAllocatorConfig::instance() and ::parseArgs().
DORMOUSE_EXPORT void* accelerator_config_instance() asm(DORMOUSE_LIBC10_INSTANCE);
DORMOUSE_EXPORT void accelerator_config_parse(void* self,
                                              const std::string& text) asm(DORMOUSE_LIBC10_PARSE);

void* accelerator_config_instance() {
  const void* caller = __builtin_return_address(0);
  if (__builtin_expect(libc10::is_answered_by_followed(caller), 1)) {
    const View* view = this_view;
    void* object = view == nullptr ? default_object.load(std::memory_order_acquire)
                                   : view->object.load(std::memory_order_acquire);
    if (__builtin_expect(object != nullptr, 1)) return object;
  }
  return instance_slow(caller);
}

void accelerator_config_parse(void* self, const std::string& text) {
  const ParseCall call = begin_parse(self, text, __builtin_return_address(0));
  if (call.function == nullptr) return;
  call.function(call.self, *call.text);  // may throw: the thread's next look finds out
  end_parse();
}

View* view_of(TagId tag) noexcept {
  return Accelerator::get().view_of(tag);
}

void process_tag_changed() noexcept {
  if (Accelerator* accelerator = Accelerator::get_if_made()) accelerator->process_tag_changed();
}

View* process_view() noexcept {
  return Accelerator::get().process_view();
}

const ViewChanges& changes_of(const View* view) noexcept {
  return view->changes;
}

void entered(View* view) noexcept {
  if (view->entered.load(std::memory_order_relaxed) || view->changes.empty()) return;
  view->entered.store(true, std::memory_order_release);
  if (view->object.load(std::memory_order_acquire) == nullptr) return;  // said with the first text
  try {
    (void)possible(*view);
  } catch (const std::bad_alloc&) {
    log().error("out of memory: settings of a region may be ignored without a message");
  }
}

bool accelerator_seen() noexcept {
  return libc10::followed() != nullptr;
}

bool suspends(const View* view) noexcept {
  if (view == nullptr) view = process_view();
  return view != nullptr && view->is_copy;
}

View* thread_view() noexcept {
  const Parsing& state = parsing();
  return state.active ? state.view_before : this_view;
}

void set_thread_view(View* view) noexcept {
  Parsing& state = parsing();
  if (state.active) end_rejected(state);
  this_view = view;
}

void forget_accelerator_after_fork() noexcept {
  this_view = nullptr;
  parsing().active = false;
  if (Accelerator* made = Accelerator::get_if_made()) made->forget_after_fork();
}

}  // namespace dormouse::shim::torch
