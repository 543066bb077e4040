// See torch_setter.h. The program's own calls of the setter come through here, so that the text in
// force is known; exceptions of PyTorch's parser pass through the frames that stand in for it,
// which therefore have nothing to clean up.
#include "shim/torch_setter.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "config/alloc_conf.h"
#include "core/log.h"
#include "shim/export.h"
#include "shim/runtime.h"
#include "shim/torch_old_string.h"
#include "shim/torch_symbols.h"

#define DORMOUSE_OWN_FRAME __attribute__((noinline))
#define SETTER "_ZN3c104cuda20CUDACachingAllocator20setAllocatorSettings"
#define NEW_SETTER SETTER "ERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
#define OLD_SETTER SETTER "ERKSs"

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

// A setter call of the program that is under way on this thread.
std::string& given_text() noexcept {
  static thread_local std::string text;
  return text;
}

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

  bool found() noexcept;
  void suspend() noexcept;
  void resume() noexcept;
  void look_again() noexcept;
  // What PyTorch is to get instead of the program's text, if anything.
  std::optional<std::string> text_instead(std::string_view text);
  void accepted(std::string_view text, bool instead) noexcept;
  NewSetter new_setter(const void* caller) noexcept;
  OldSetter old_setter(const void* caller) noexcept;
  void forget_after_fork() noexcept;

 private:
  bool find() noexcept;
  bool has_setter() const noexcept;
  void find_once_more(const void* caller) noexcept;
  void write_suspended_if_possible() noexcept;
  void write_suspended();
  void write_users();
  bool write(const std::string& text);
  const std::string& users_text();
  static std::optional<std::string> with_expandable_segments(std::string_view text, bool on);

  static inline std::atomic<Setter*> made_{nullptr};

  std::mutex mutex_;  // protects what follows, and the order of writes
  unsigned suspended_threads_ = 0;
  bool off_written_ = false;  // PyTorch has a text of ours
  unsigned long long libraries_seen_ = 0;
  std::optional<std::string> user_text_;                 // the variable's, then the program's own
  config::AllocSettings user_;                           // and all of these texts taken together
  std::map<std::string, const OldString*> old_strings_;  // made, never freed, used again

  std::atomic<NewSetter> new_setter_{nullptr};
  std::atomic<OldSetter> old_setter_{nullptr};
};

bool Setter::has_setter() const noexcept {
  return new_setter_.load() != nullptr || old_setter_.load() != nullptr;
}

bool Setter::found() noexcept {
  const std::lock_guard lock(mutex_);
  return find();
}

bool Setter::find() noexcept {
  if (has_setter()) return true;
  const unsigned long long libraries = libraries_loaded();
  if (libraries == libraries_seen_) return false;
  libraries_seen_ = libraries;
  find_once_more(nullptr);
  return has_setter();
}

void Setter::find_once_more(const void* caller) noexcept {
  void* found = find_in_library(kLibrary, NEW_SETTER);
  if (found == nullptr && caller != nullptr) found = find_from_caller(caller, NEW_SETTER);
  if (found != nullptr) new_setter_.store(reinterpret_cast<NewSetter>(found));
  found = find_in_library(kLibrary, OLD_SETTER);
  if (found == nullptr && caller != nullptr) found = find_from_caller(caller, OLD_SETTER);
  if (found != nullptr) old_setter_.store(reinterpret_cast<OldSetter>(found));
}

NewSetter Setter::new_setter(const void* caller) noexcept {
  if (new_setter_.load() == nullptr) find_once_more(caller);
  return new_setter_.load();
}

OldSetter Setter::old_setter(const void* caller) noexcept {
  if (old_setter_.load() == nullptr) find_once_more(caller);
  return old_setter_.load();
}

std::optional<std::string> Setter::with_expandable_segments(std::string_view text, bool on) {
  auto conf = config::AllocConf::read(config::Generation::kG1, text);
  if (!conf.ok()) return std::nullopt;
  config::AllocConf changed = *conf;
  changed.remove("expandable_segments");
  changed.set("expandable_segments", on ? "True" : "False");
  return changed.print();
}

// The variable as it is when it is first needed here. PyTorch may have read it earlier; a program
// that changes it after that changes nothing for PyTorch, which cannot be seen from outside.
const std::string& Setter::users_text() {
  if (!user_text_) {
    const char* value = std::getenv(kVariable);
    user_text_ = value == nullptr ? "" : value;
    if (config::apply_alloc_conf(dialect(), *user_text_, user_)) {
      user_ = config::AllocSettings();
      log().warn("{}='{}' is not what PyTorch takes: expandable segments are left alone.",
                 kVariable, *user_text_);
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

// Nothing is written while expandable segments are off anyway, or another allocator is in use.
void Setter::write_suspended() {
  const std::string& text = users_text();
  if (!user_.expandable_segments || user_.backend != "native") return;
  const auto changed = with_expandable_segments(text, false);
  if (changed) off_written_ = write(*changed);
}

void Setter::write_users() {
  if (!off_written_) return;
  const auto text = with_expandable_segments(users_text(), user_.expandable_segments);
  if (text && write(*text)) off_written_ = false;
}

void Setter::suspend() noexcept {
  const std::lock_guard lock(mutex_);
  ++suspended_threads_;
  write_suspended_if_possible();
}

void Setter::look_again() noexcept {
  const std::lock_guard lock(mutex_);
  if (suspended_threads_ != 0) write_suspended_if_possible();
}

void Setter::write_suspended_if_possible() noexcept {
  if (off_written_ || !find()) return;
  try {
    write_suspended();
  } catch (const std::bad_alloc&) {
    log().error("out of memory: expandable segments are not suspended in this region");
  }
}

void Setter::resume() noexcept {
  const std::lock_guard lock(mutex_);
  if (suspended_threads_ == 0 || --suspended_threads_ != 0 || exiting()) return;
  try {
    write_users();
  } catch (const std::bad_alloc&) {
    log().error("out of memory: expandable segments stay off");
  }
}

std::optional<std::string> Setter::text_instead(std::string_view text) {
  const std::lock_guard lock(mutex_);
  users_text();
  if (suspended_threads_ == 0) return std::nullopt;
  config::AllocSettings after = user_;
  if (config::apply_alloc_conf(dialect(), text, after) || !after.expandable_segments) {
    return std::nullopt;
  }
  return with_expandable_segments(text, false);
}

// PyTorch has taken the program's text, or, with `instead`, ours. A region may have begun or ended
// meanwhile on another thread.
void Setter::accepted(std::string_view text, bool instead) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    users_text();
    user_text_ = std::string(text);
    (void)config::apply_alloc_conf(dialect(), text, user_);
    off_written_ = instead;
    if (suspended_threads_ == 0) {
      write_users();
    } else if (!instead) {
      write_suspended();
    }
  } catch (const std::bad_alloc&) {
    log().error("out of memory: PyTorch's settings may not be restored after a region");
  }
}

void Setter::forget_after_fork() noexcept {
  new (&mutex_) std::mutex;
  suspended_threads_ = 0;
}

struct SetterCall {
  NewSetter new_setter = nullptr;
  OldSetter old_setter = nullptr;
  const std::string* text = nullptr;
  const OldString* old_text = nullptr;
};

void report_missing() noexcept {
  if (first_time("torch setAllocatorSettings")) {
    log().error(
        "libc10_cuda's setAllocatorSettings was called but is not to be found: PyTorch's "
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
  end_call(text, call.text != &text);
}

void set_allocator_settings_old(const OldString& text) {
  const SetterCall call = begin_old(text, __builtin_return_address(0));
  if (call.old_setter == nullptr) return;
  call.old_setter(*call.old_text);  // may throw: then the text is not taken
  end_call(text.view(), call.old_text != &text);
}

void setter_suspend() noexcept {
  Setter::get().suspend();
}
void setter_resume() noexcept {
  Setter::get().resume();
}
void setter_look_again() noexcept {
  Setter::get().look_again();
}
bool setter_found() noexcept {
  return Setter::get().found();
}
void forget_setter_after_fork() noexcept {
  if (Setter* setter = Setter::get_if_made()) setter->forget_after_fork();
}

}  // namespace dormouse::shim::torch
