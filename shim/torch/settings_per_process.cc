// See settings_per_process.h. The program's own calls of the setter come through here, so that the
// text in force is known; exceptions of PyTorch's parser pass through the frames that stand in for
// it, which therefore have nothing to clean up.
#include "shim/torch/settings_per_process.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
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
#include "shim/process/export.h"
#include "shim/process/linker.h"
#include "shim/process/process.h"
#include "shim/process/settings.h"
#include "shim/torch/old_string.h"
#include "shim/torch/settings_per_thread.h"
#include "shim/torch/symbols.h"

#define DORMOUSE_OWN_FRAME __attribute__((noinline))
#define SETTER "_ZN3c104cuda20CUDACachingAllocator20setAllocatorSettings"
#define NEW_SETTER SETTER "ERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
#define OLD_SETTER SETTER "ERKSs"
// The functions that read keys, in both forms of std::string.
#define KEY_READER(function)                                                      \
  {                                                                               \
    "_ZN3c104cuda20CUDACachingAllocator19CUDAAllocatorConfig" function            \
    "ERKSt6vectorINSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEESaIS9_EEm", \
        "_ZN3c104cuda20CUDACachingAllocator19CUDAAllocatorConfig" function        \
        "ERKSt6vectorISsSaISsEEm"                                                 \
  }

namespace dormouse::shim::torch {
namespace {

constexpr const char* kLibrary = "libc10_cuda.so";
constexpr const char* kVariable = "PYTORCH_CUDA_ALLOC_CONF";
using NewSetter = void (*)(const std::string& text);
using OldSetter = void (*)(const OldString& text);

const config::AllocDialect& dialect() {
  static const config::AllocDialect result = config::AllocDialect::g1();
  return result;
}

// Keys that came after 2.4.
struct LaterKey {
  std::string_view name;
  std::array<const char*, 2> readers;
};
constexpr const char* kBackgroundThreads = "pinned_use_background_threads";
constexpr LaterKey kLaterKeys[] = {
    {"max_non_split_rounding_mb", KEY_READER("28parseMaxNonSplitRoundingSize")},
    {kBackgroundThreads, KEY_READER("31parsePinnedUseBackgroundThreads")},
};

// A setter call of the program that is under way on this thread.
std::string& given_text() noexcept {
  static thread_local std::string text;
  return text;
}

bool a_region_sets(std::string_view key) {
  for (const config::RegionItem& item : settings().regions.items) {
    for (const auto& setting : item.settings) {
      if (setting.first == key) return true;
    }
  }
  return false;
}

// A view of settings that regions are open with.
struct Open {
  View* view;
  unsigned threads;
};

class Setter {
 public:
  static Setter& get() noexcept {
    static Setter* instance = [] {  // never destroyed: threads may outlive main()
      auto* made = new Setter;
      made_.store(made, std::memory_order_release);
      return made;
    }();
    return *instance;
  }
  static Setter* get_if_made() noexcept { return made_.load(std::memory_order_acquire); }

  // Looks only when libraries were loaded since the last time.
  bool look_for_setter() noexcept;
  void change(View* from, View* to) noexcept;
  void look_again() noexcept;
  // What PyTorch is to get instead of the program's text, if anything.
  std::optional<std::string> text_instead(std::string_view text);
  void accepted(std::string_view text, bool instead) noexcept;
  // What answers code at `caller`: a process can have several copies of libc10_cuda.
  NewSetter new_setter(const void* caller) noexcept;
  OldSetter old_setter(const void* caller) noexcept;
  // Whether regions change the settings of the copy with this setter.
  bool follows(NewSetter setter) const noexcept { return switched_on() && setter == new_setter_; }
  bool follows(OldSetter setter) const noexcept { return switched_on() && setter == old_setter_; }
  void forget_after_fork() noexcept;

 private:
  bool has_setter() const noexcept;
  void find_once_more(const void* caller) noexcept;
  void learn_keys(const void* setter) noexcept;
  void begin(View* view);
  void end(View* view) noexcept;
  bool knows(const std::string& key) const;
  ViewChanges changes_for(const View* view);
  View* innermost();
  void update() noexcept;
  void bring_about(View* view);
  bool write(const std::string& text);
  const std::string& users_text();
  std::optional<std::string> text_for(View* view, std::string_view text,
                                      const config::AllocSettings& settings);
  std::optional<std::string> suspended_text(const ViewChanges& changes, std::string_view text,
                                            const config::AllocSettings& settings);
  void say_background_threads(config::AllocConf& conf, const config::AllocSettings& settings);

  static inline std::atomic<Setter*> made_{nullptr};

  const bool background_threads_set_ = a_region_sets(kBackgroundThreads);

  std::mutex mutex_;                      // protects what follows, and the order of writes
  std::vector<Open> open_;                // the one that began last comes last
  bool ours_written_ = false;             // PyTorch has a text of ours
  std::string written_;                   // which
  std::optional<std::string> user_text_;  // the variable's, then the program's own
  config::AllocSettings user_;            // and all of these texts taken together
  std::map<std::string, const OldString*> old_strings_;  // made, never freed, used again

  // What is asked of the dynamic linker, never with mutex_ held: its own lock is held while
  // initialisers of libraries run, and these may begin regions and change settings.
  std::atomic<unsigned long long> libraries_seen_{0};
  std::array<std::atomic<bool>, std::size(kLaterKeys)> knows_{};  // before one of these is set:
  std::atomic<NewSetter> new_setter_{nullptr};
  std::atomic<OldSetter> old_setter_{nullptr};
};

bool Setter::has_setter() const noexcept {
  return new_setter_.load() != nullptr || old_setter_.load() != nullptr;
}

bool Setter::look_for_setter() noexcept {
  if (has_setter() || exiting()) return has_setter();
  const unsigned long long libraries = libraries_loaded();
  if (libraries == libraries_seen_.load()) return false;
  find_once_more(nullptr);
  libraries_seen_.store(libraries);
  return has_setter();
}

void Setter::find_once_more(const void* caller) noexcept {
  void* found = find_in_library(kLibrary, NEW_SETTER);
  if (found == nullptr && caller != nullptr) found = find_in_library_of(caller, NEW_SETTER);
  if (found != nullptr) learn_keys(found);
  if (found != nullptr) new_setter_.store(reinterpret_cast<NewSetter>(found));
  found = find_in_library(kLibrary, OLD_SETTER);
  if (found == nullptr && caller != nullptr) found = find_in_library_of(caller, OLD_SETTER);
  if (found != nullptr) learn_keys(found);
  if (found != nullptr) old_setter_.store(reinterpret_cast<OldSetter>(found));
}

// Which of the later keys the library with this setter has.
void Setter::learn_keys(const void* setter) noexcept {
  for (std::size_t i = 0; i < std::size(kLaterKeys); ++i) {
    knows_[i] = std::any_of(
        kLaterKeys[i].readers.begin(), kLaterKeys[i].readers.end(),
        [&](const char* reader) { return find_in_library_of(setter, reader) != nullptr; });
  }
}

NewSetter Setter::new_setter(const void* caller) noexcept {
  if (new_setter_.load() == nullptr) find_once_more(caller);
  void* found = find_behind(caller, NEW_SETTER);
  return found != nullptr ? reinterpret_cast<NewSetter>(found) : new_setter_.load();
}

OldSetter Setter::old_setter(const void* caller) noexcept {
  if (old_setter_.load() == nullptr) find_once_more(caller);
  void* found = find_behind(caller, OLD_SETTER);
  return found != nullptr ? reinterpret_cast<OldSetter>(found) : old_setter_.load();
}

// Whether this libc10_cuda, which was found, has the key.
bool Setter::knows(const std::string& key) const {
  for (std::size_t i = 0; i < std::size(kLaterKeys); ++i) {
    if (kLaterKeys[i].name == key) return knows_[i];
  }
  return dialect().known_keys->contains(key);
}

// The view's changes that this PyTorch can follow.
ViewChanges Setter::changes_for(const View* view) {
  ViewChanges result;
  for (const auto& change : changes_of(view)) {
    if (knows(change.first)) {
      result.push_back(change);
    } else if (first_time("torch region key " + change.first)) {
      log().warn(
          "{} cannot be set for a region: this PyTorch does not know it. The region goes on "
          "without it.",
          change.first);
    }
  }
  return result;
}

// A text without this key keeps what was written, so that each of ours has it where a region sets
// it.
void Setter::say_background_threads(config::AllocConf& conf,
                                    const config::AllocSettings& settings) {
  if (!background_threads_set_ || !knows(kBackgroundThreads)) return;
  conf.remove(kBackgroundThreads);
  conf.set(kBackgroundThreads, settings.pinned_use_background_threads ? "True" : "False");
}

// The variable as it is when it is first needed here. PyTorch may have read it earlier; a program
// that changes it after that changes nothing for PyTorch, which cannot be seen from outside.
const std::string& Setter::users_text() {
  if (!user_text_) {
    const char* value = std::getenv(kVariable);
    user_text_ = value == nullptr ? "" : value;
    if (config::apply_alloc_conf(dialect(), *user_text_, user_)) {
      user_ = config::AllocSettings();
      log().warn("{}='{}' is not valid for PyTorch: expandable segments are left alone.", kVariable,
                 *user_text_);
    }
  }
  return *user_text_;
}

// A text whose form is checked, so that PyTorch takes it.
bool Setter::write(const std::string& text) {
  config::AllocSettings checked;
  if (config::apply_alloc_conf(dialect(), text, checked)) return false;
  try {
    if (const NewSetter setter = new_setter_.load()) {
      setter(text);
    } else if (const OldSetter setter = old_setter_.load()) {
      const OldString*& string = old_strings_[text];
      if (string == nullptr) string = make_old_string(text);
      if (string == nullptr) return false;
      setter(*string);
    }
  } catch (...) {
    // An older PyTorch that lacks one of the keys. It would have raised at its own first use.
    if (first_time("torch setter failed")) {
      log().warn("PyTorch rejects its own settings '{}': expandable segments are left alone.",
                 text);
    }
    return false;
  }
  return true;
}

// `text` with expandable segments off, if `settings`, which it and what came before it amount to,
// have them on, and with `changes`. Nothing if that changes nothing, or another allocator is in
// use.
std::optional<std::string> Setter::suspended_text(const ViewChanges& changes, std::string_view text,
                                                  const config::AllocSettings& settings) {
  if (settings.backend != "native" || (!settings.expandable_segments && changes.empty())) {
    return std::nullopt;
  }
  auto conf = config::AllocConf::read(config::Generation::kG1, text);
  if (!conf.ok()) return std::nullopt;
  config::AllocConf changed = *conf;
  say_background_threads(changed, settings);
  for (const auto& [key, value] : changes) {
    // A text without this key does not bring its default back, and none can say it.
    if (key == "max_non_split_rounding_mb" && !conf->get(key)) {
      if (first_time("torch setter rounding")) {
        log().warn(
            "DORMOUSE_REGIONS: {} cannot be set for a region in PyTorch before 2.10 unless {} "
            "sets it too; it is ignored.",
            key, kVariable);
      }
      continue;
    }
    changed.remove(key);
    changed.set(key, value);
  }
  if (settings.expandable_segments) {
    changed.remove("expandable_segments");
    changed.set("expandable_segments", "False");
  }
  return changed.print();
}

// What PyTorch is to have while `view` is in force (null: the user's own), for the user's `text`;
// nothing if that text itself will do.
std::optional<std::string> Setter::text_for(View* view, std::string_view text,
                                            const config::AllocSettings& settings) {
  if (view == nullptr) return std::nullopt;
  const ViewChanges changes = changes_for(view);
  auto changed = suspended_text(changes, text, settings);
  if (changes.empty() || !changed) return changed;
  config::AllocSettings checked;
  if (!config::apply_alloc_conf(dialect(), *changed, checked)) {
    if (first_time("torch setter settings")) {
      log().warn(
          "PyTorch before 2.10 has one set of settings for all threads: those of a region in "
          "DORMOUSE_REGIONS hold for the whole process while such a region is open.");
    }
    return changed;
  }
  if (first_time("torch region settings " + std::string(text))) {
    log().warn(
        "The settings of a region in DORMOUSE_REGIONS conflict with PyTorch's '{}': the "
        "region goes on without them.",
        text);
  }
  return suspended_text({}, text, settings);
}

// The view that counts for all threads: of the open regions, the one that began last; else the
// process's.
View* Setter::innermost() {
  for (auto open = open_.rbegin(); open != open_.rend(); ++open) {
    if (!changes_for(open->view).empty()) return open->view;
  }
  View* process = process_view();
  if (process != nullptr && !changes_for(process).empty()) return process;
  return open_.empty() ? process : open_.back().view;
}

void Setter::bring_about(View* view) {
  const std::string& users = users_text();
  const auto changed = text_for(view, users, user_);
  if (changed) {
    if (ours_written_ && written_ == *changed) return;
    if (!write(*changed)) return;
    written_ = *changed;
    ours_written_ = true;
  } else if (ours_written_) {
    // The key is named although the user need not have: a text without it keeps what was written.
    auto conf = config::AllocConf::read(config::Generation::kG1, users);
    if (!conf.ok()) return;
    config::AllocConf own = *conf;
    own.remove("expandable_segments");
    own.set("expandable_segments", user_.expandable_segments ? "True" : "False");
    say_background_threads(own, user_);
    if (write(own.print())) ours_written_ = false;
  }
}

void Setter::update() noexcept {
  if (exiting() || !has_setter()) return;
  try {
    bring_about(innermost());
  } catch (const std::bad_alloc&) {
    log().error("out of memory: PyTorch's settings do not follow the regions");
  }
}

void Setter::begin(View* view) {
  for (Open& open : open_) {
    if (open.view == view) {
      ++open.threads;
      return;
    }
  }
  open_.push_back({view, 1});
}

void Setter::end(View* view) noexcept {
  for (auto open = open_.begin(); open != open_.end(); ++open) {
    if (open->view != view) continue;
    if (--open->threads == 0) open_.erase(open);
    return;
  }
}

void Setter::change(View* from, View* to) noexcept {
  look_for_setter();
  const std::lock_guard lock(mutex_);
  try {
    if (to != nullptr) begin(to);
  } catch (const std::bad_alloc&) {
    log().error("out of memory: expandable segments are not suspended in this region");
  }
  if (from != nullptr) end(from);
  update();
}

void Setter::look_again() noexcept {
  look_for_setter();
  const std::lock_guard lock(mutex_);
  update();
}

std::optional<std::string> Setter::text_instead(std::string_view text) {
  const std::lock_guard lock(mutex_);
  users_text();
  config::AllocSettings after = user_;
  if (config::apply_alloc_conf(dialect(), text, after)) return std::nullopt;
  return text_for(innermost(), text, after);
}

// PyTorch has taken the program's text, or, with `instead`, ours. A region may have begun or ended
// meanwhile on another thread.
void Setter::accepted(std::string_view text, bool instead) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    users_text();
    user_text_ = std::string(text);
    (void)config::apply_alloc_conf(dialect(), text, user_);
    ours_written_ = instead;
    written_.clear();  // not known exactly: written again
    bring_about(innermost());
  } catch (const std::bad_alloc&) {
    log().error("out of memory: PyTorch's settings may not be restored after a region");
  }
}

void Setter::forget_after_fork() noexcept {
  new (&mutex_) std::mutex;
  open_.clear();
}

struct SetterCall {
  NewSetter new_setter = nullptr;
  OldSetter old_setter = nullptr;
  const std::string* text = nullptr;
  const OldString* old_text = nullptr;
  bool followed = false;
};

void report_missing() noexcept {
  if (first_time("torch setAllocatorSettings")) {
    log().error(
        "libc10_cuda's setAllocatorSettings was called but cannot be found: PyTorch's "
        "settings stay as they are. Set DORMOUSE_TORCH=off.");
  }
}

DORMOUSE_OWN_FRAME SetterCall begin_new(const std::string& text, const void* caller) noexcept {
  SetterCall call;
  call.new_setter = Setter::get().new_setter(caller);
  call.text = &text;
  if (call.new_setter == nullptr) {
    report_missing();
    return call;
  }
  call.followed = Setter::get().follows(call.new_setter);
  if (!call.followed) return call;
  try {
    if (auto instead = Setter::get().text_instead(text)) {
      given_text() = std::move(*instead);
      call.text = &given_text();
    }
  } catch (const std::bad_alloc&) {
    log().error("out of memory: expandable segments are not suspended");
  }
  return call;
}

DORMOUSE_OWN_FRAME SetterCall begin_old(const OldString& text, const void* caller) noexcept {
  SetterCall call;
  call.old_setter = Setter::get().old_setter(caller);
  call.old_text = &text;
  if (call.old_setter == nullptr) {
    report_missing();
    return call;
  }
  call.followed = Setter::get().follows(call.old_setter);
  if (!call.followed) return call;
  try {
    if (const auto instead = Setter::get().text_instead(text.view())) {
      if (const OldString* changed = make_old_string(*instead)) call.old_text = changed;
    }
  } catch (const std::bad_alloc&) {
    log().error("out of memory: expandable segments are not suspended");
  }
  return call;
}

DORMOUSE_OWN_FRAME void end_call(std::string_view text, bool instead) noexcept {
  Setter::get().accepted(text, instead);
}

}  // namespace

// Stand in for c10::cuda::CUDACachingAllocator::setAllocatorSettings, in both forms of std::string.
DORMOUSE_EXPORT void set_allocator_settings(const std::string& text) asm(NEW_SETTER);
DORMOUSE_EXPORT void set_allocator_settings_old(const OldString& text) asm(OLD_SETTER);

void set_allocator_settings(const std::string& text) {
  const SetterCall call = begin_new(text, __builtin_return_address(0));
  if (call.new_setter == nullptr) return;
  call.new_setter(*call.text);  // may throw: then the text is not taken
  if (call.followed) end_call(text, call.text != &text);
}

void set_allocator_settings_old(const OldString& text) {
  const SetterCall call = begin_old(text, __builtin_return_address(0));
  if (call.old_setter == nullptr) return;
  call.old_setter(*call.old_text);  // may throw: then the text is not taken
  if (call.followed) end_call(text.view(), call.old_text != &text);
}

void setter_change(View* from, View* to) noexcept {
  Setter::get().change(from, to);
}
void setter_look_again() noexcept {
  Setter::get().look_again();
}
void setter_look_again_if_made() noexcept {
  if (Setter* setter = Setter::get_if_made()) setter->look_again();
}
bool setter_found() noexcept {
  return Setter::get().look_for_setter();
}
void forget_setter_after_fork() noexcept {
  if (Setter* setter = Setter::get_if_made()) setter->forget_after_fork();
}

}  // namespace dormouse::shim::torch
