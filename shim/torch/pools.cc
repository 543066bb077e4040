// See pools.h. Runs pools.py once per process and calls its functions.
#include "shim/torch/pools.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "core/context.h"
#include "core/log.h"
#include "core/region.h"
#include "shim/process/linker.h"
#include "shim/process/python.h"
#include "shim/torch/settings_per_process.h"
#include "shim/torch/symbols.h"
#include "shim/torch/torch.h"

namespace dormouse::shim::isolation {
namespace {

// pools.py as a string literal.
constexpr char kSource[] =
#include "shim/torch/pools_source.inc"
    ;
constexpr const char* kSourceName = "<dormouse: pools.py>";
constexpr std::size_t kTags = 1024;  // beyond, tags share what is kept by tag
// A thread of the program can hold the GIL for any time, and can wait for what the sleep holds up.
constexpr std::chrono::milliseconds kLookTime{250};
constexpr std::chrono::seconds kFarewellTime{5};

// What is needed beside python::Api; all of it has been exported since 3.4.
struct Functions {
  python::Object* (*PyLong_FromLong)(long) = nullptr;
  long (*PyLong_AsLong)(python::Object*) = nullptr;
};

enum class State { kNew, kReady, kBroken };

// Written once under the GIL, before the state is kReady; lives as long as the process, with the
// pools in it.
constinit std::atomic<State> state{State::kNew};
constinit Functions functions;
constinit python::Object* names = nullptr;
constinit python::Object* begin_function = nullptr;
constinit python::Object* end_function = nullptr;
constinit python::Object* no_arguments = nullptr;
// By tag, kNoTag first; under the GIL.
constinit std::array<python::Object*, kTags + 1> arguments_of{};

constinit std::atomic<bool> forked{false};
// By tag: how often a thread has entered one of its pools.
constinit std::array<std::atomic<std::uint64_t>, kTags> entries{};

std::size_t index_of(TagId tag) noexcept {
  return std::min(static_cast<std::size_t>(tag), kTags - 1);
}

template <typename Function>
bool find(Function& function, const char* name) noexcept {
  function = reinterpret_cast<Function>(python_symbol(name));
  return function != nullptr;
}

// --- What pools.py calls.

python::Object* none() noexcept {
  const python::Api* api = python::api();
  if (api == nullptr) return nullptr;
  api->Py_IncRef(api->none);
  return api->none;
}

// For what goes wrong where no call of ours is under way.
python::Object* report(python::Object*, python::Object* message) {
  const python::Api* api = python::api();
  if (api == nullptr) return nullptr;
  const char* text = api->PyUnicode_AsUTF8AndSize(message, nullptr);
  if (text != nullptr && first_time(std::string("isolation ") + text)) {
    log().warn("PyTorch's memory pools of regions: {}.", text);
  }
  api->PyErr_Clear();
  return none();
}

// PyTorch has been loaded.
python::Object* look_again(python::Object*, python::Object*) {
  torch::setter_look_again();
  return none();
}

// A region without a tag, and its end.
python::Object* begin_none(python::Object*, python::Object*) {
  region::begin(kNoTag);
  torch::region_began(kNoTag);
  return none();
}

python::Object* end_none(python::Object*, python::Object*) {
  torch::region_ended(kNoTag);
  region::end();
  return none();
}

// The thread has entered a pool of the tag again; begin() tells of the first time.
python::Object* entered(python::Object*, python::Object* tag) {
  entries[index_of(static_cast<TagId>(functions.PyLong_AsLong(tag)))].fetch_add(1);
  return none();
}

// One more reference to the object, for one that will be dropped too many.
python::Object* hold(python::Object*, python::Object* object) {
  const python::Api* api = python::api();
  if (api != nullptr) api->Py_IncRef(object);
  return none();
}

const Driver& capture_driver() noexcept {
  static const Driver driver = [] {
    Driver found{};
    found.cuThreadExchangeStreamCaptureMode =
        reinterpret_cast<decltype(found.cuThreadExchangeStreamCaptureMode)>(
            libcuda_symbol("cuThreadExchangeStreamCaptureMode"));
    return found;
  }();
  return driver;
}

// Calls the function such that what it frees does not end a capture of another thread.
python::Object* relaxed(python::Object*, python::Object* function) {
  const python::Api* api = python::api();
  if (api == nullptr || capture_driver().cuThreadExchangeStreamCaptureMode == nullptr) {
    return none();
  }
  const RelaxedCapture mode(capture_driver());
  return api->PyObject_CallObject(function, nullptr);
}

python::Method methods[] = {
    {"_report", report, python::kOneArgument, nullptr},
    {"_look_again", look_again, python::kOneArgument, nullptr},
    {"_begin_none", begin_none, python::kOneArgument, nullptr},
    {"_end_none", end_none, python::kOneArgument, nullptr},
    {"_entered", entered, python::kOneArgument, nullptr},
    {"_hold", hold, python::kOneArgument, nullptr},
    {"_relaxed", relaxed, python::kOneArgument, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// --- Calls of pools.py, under the GIL.

bool find_all(const python::Api& api) noexcept {
  if (!find(functions.PyLong_FromLong, "PyLong_FromLong") ||
      !find(functions.PyLong_AsLong, "PyLong_AsLong")) {
    return false;
  }
  names = python::run(api, kSource, kSourceName, methods);
  if (names == nullptr) {
    python::report_exception(api, "isolation of PyTorch's cached blocks does not start",
                             python::kWithoutTorch);
    return false;
  }
  begin_function = api.PyDict_GetItemString(names, "begin");  // borrowed; never removed
  end_function = api.PyDict_GetItemString(names, "end");
  no_arguments = api.PyTuple_New(0);
  return begin_function != nullptr && end_function != nullptr && no_arguments != nullptr;
}

bool prepare(const python::Api& api) noexcept {
  State known = state.load(std::memory_order_acquire);
  if (__builtin_expect(known != State::kNew, 1)) return known == State::kReady;
  static std::mutex preparing;
  std::unique_lock lock(preparing, std::try_to_lock);
  if (!lock) {  // another thread is at it, and may wait for the GIL
    void* thread = api.PyEval_SaveThread();
    lock.lock();
    api.PyEval_RestoreThread(thread);
  }
  known = state.load(std::memory_order_acquire);
  if (known == State::kNew) {
    known = find_all(api) ? State::kReady : State::kBroken;
    state.store(known, std::memory_order_release);
  }
  return known == State::kReady;
}

// Borrowed; null with an exception set.
python::Object* arguments(const python::Api& api, TagId tag) noexcept {
  python::Object*& known = arguments_of[tag == kNoTag ? 0 : 1 + index_of(tag)];
  if (known != nullptr) return known;
  python::Object* number = api.none;
  if (tag == kNoTag) {
    api.Py_IncRef(number);
  } else {
    number = functions.PyLong_FromLong(static_cast<long>(index_of(tag)));
  }
  if (number == nullptr) return nullptr;
  python::Object* made = api.PyTuple_New(1);
  if (made == nullptr || api.PyTuple_SetItem(made, 0, number) != 0) return nullptr;
  return known = made;
}

void call(const python::Api& api, python::Object* function, python::Object* with,
          const char* what) noexcept {
  python::Object* result = with == nullptr ? nullptr : api.PyObject_CallObject(function, with);
  api.Py_DecRef(result);
  if (result == nullptr) python::report_exception(api, what, python::kWithoutTorch);
}

void settle_fork(const python::Api& api) noexcept {
  if (forked.load(std::memory_order_relaxed) && forked.exchange(false)) {
    python::call(api, names, "forked", false, nullptr, 0, python::kWithoutTorch);
  }
}

// --- What is free in the pools.

struct UnusedOfTag {
  std::size_t index;  // of the tag
  Range range;
};

// A line: tag, address and bytes, in decimal.
std::vector<UnusedOfTag> read_lines(const char* at, const char* end) {
  std::vector<UnusedOfTag> found;
  const auto number = [&](auto& value) {
    const auto read = std::from_chars(at, end, value);
    const bool good = read.ec == std::errc();
    at = read.ptr == end ? end : read.ptr + 1;
    return good;
  };
  while (at < end) {
    UnusedOfTag each{};
    if (!number(each.index) || !number(each.range.begin) || !number(each.range.bytes)) return {};
    if (each.index < kTags) found.push_back(each);
  }
  return found;
}

// Under the GIL.
std::vector<UnusedOfTag> ask_for_unused(const python::Api& api) {
  python::Object* function = api.PyDict_GetItemString(names, "unused");
  python::Object* text =
      function == nullptr ? nullptr : api.PyObject_CallObject(function, no_arguments);
  long length = 0;
  const char* lines = text == nullptr ? nullptr : api.PyUnicode_AsUTF8AndSize(text, &length);
  std::vector<UnusedOfTag> found;
  if (lines == nullptr) {
    python::report_exception(api, "what is free in PyTorch's memory pools is not known",
                             python::kWithoutTorch);
  } else {
    found = read_lines(lines, lines + length);
  }
  api.Py_DecRef(text);
  return found;
}

class Look : public python::Errand {
 public:
  explicit Look(bool gives_back) : gives_back_(gives_back) {}

  void run(const python::Api& api, bool late) noexcept override {
    if (late || !prepare(api)) return;
    settle_fork(api);
    if (gives_back_) {
      python::call(api, names, "give_back", false, nullptr, 0, python::kWithoutTorch);
    }
    try {
      found = ask_for_unused(api);
    } catch (const std::bad_alloc&) {
      found.clear();
    }
  }

  std::vector<UnusedOfTag> found;

 private:
  const bool gives_back_;
};

std::vector<UnusedOfTag> look_on_another_thread(const python::Api& api, bool gives_back) {
  const auto look = std::make_shared<Look>(gives_back);
  if (!python::run_under_gil(api, "dormouse-look", look, kLookTime)) return {};
  return std::move(look->found);
}

// --- A thread that leaves its pools by another one.

// How many of the thread's leaves have not been done yet.
using Leaves = std::atomic<unsigned>;
thread_local std::shared_ptr<Leaves> leaves_under_way;

class Leave : public python::Errand {
 public:
  // `function` of pools.py: "end_of" or "thread_ended".
  Leave(const char* function, std::shared_ptr<Leaves> leaves)
      : function_(function), leaves_(std::move(leaves)) {
    if (leaves_ != nullptr) leaves_->fetch_add(1);
  }

  void run(const python::Api& api, bool) noexcept override {
    settle_fork(api);
    python::call(api, names, function_, true, thread_.data(), static_cast<long>(thread_.size()),
                 python::kWithoutTorch);
    if (leaves_ != nullptr) leaves_->fetch_sub(1);
  }

 private:
  const char* function_;
  std::shared_ptr<Leaves> leaves_;
  // As Python names it.
  const std::string thread_ = std::to_string(static_cast<unsigned long>(pthread_self()));
};

bool has_left() noexcept {
  return leaves_under_way == nullptr || leaves_under_way->load() == 0;
}

void end_by_another_thread(const python::Api& api) {
  const python::GilReleased released;  // a leave that is late may wait for this very thread
  if (leaves_under_way == nullptr) leaves_under_way = std::make_shared<Leaves>();
  const auto leave = std::make_shared<Leave>("end_of", leaves_under_way);
  if (python::run_under_gil(api, "dormouse-leave", leave, kLookTime)) return;
  if (first_time("late leave")) {
    log().warn(
        "a region ended on a thread that cannot get Python's GIL, because another thread holds it: "
        "until that one releases it, the thread's PyTorch tensors still come from the region's "
        "pool");
  }
}

class PoolsUnused : public UnusedMemory {
 public:
  void look(bool from_outside) noexcept override;
  Ranges unused() noexcept override;

 private:
  // The last look, and how often each tag's pools had been entered before it.
  std::array<std::uint64_t, kTags> entries_before_{};
  std::vector<UnusedOfTag> found_;
};

void PoolsUnused::look(bool from_outside) noexcept {
  found_.clear();
  const bool gives_back = from_outside && torch::switched_on() && torch::cuda_allocator_loaded();
  if (state.load(std::memory_order_acquire) != State::kReady && !gives_back) return;
  const python::Api* api = python::api();
  if (api == nullptr || forked.load(std::memory_order_relaxed)) return;
  for (std::size_t i = 0; i < kTags; ++i) entries_before_[i] = entries[i].load();
  try {
    found_ = look_on_another_thread(*api, gives_back);
  } catch (const std::exception& error) {
    if (first_time("look for unused")) {
      log().warn("what PyTorch's memory pools hold free is backed up with the rest: {}",
                 error.what());
    }
  }
}

Ranges PoolsUnused::unused() noexcept {
  Ranges ranges;
  try {
    for (const UnusedOfTag& each : found_) {
      if (entries[each.index].load() == entries_before_[each.index]) ranges.push_back(each.range);
    }
  } catch (const std::bad_alloc&) {
    ranges.clear();
  }
  found_.clear();
  return ranges;
}

}  // namespace

bool begin(TagId tag) noexcept {
  const python::Api* api = python::api();
  if (api == nullptr || !has_left() || !python::can_take_gil(*api)) return false;
  const python::Gil gil(*api);
  if (!prepare(*api)) return false;
  settle_fork(*api);
  // Also when it raised: the region is on its list, and end() takes it off.
  call(*api, begin_function, arguments(*api, tag), "begin");
  // After the pool was taken: a look that has read this count found the pool taken or read its
  // blocks before; a look that has not is void. The thread allocates only after this.
  if (tag != kNoTag) entries[index_of(tag)].fetch_add(1);
  return true;
}

bool can_begin_at_once() noexcept {
  const python::Api* api = python::api();
  return api == nullptr || python::holds_gil(*api);
}

void end() noexcept {
  const python::Api* api = python::api();
  if (api == nullptr) return;
  if (!has_left() || !python::can_take_gil(*api)) {
    try {
      end_by_another_thread(*api);
    } catch (const std::bad_alloc&) {
      log().error("out of memory: a region's end did not leave PyTorch's memory pool");
    }
    return;
  }
  const python::Gil gil(*api);
  settle_fork(*api);
  call(*api, end_function, no_arguments, "end");
}

// Taking the GIL here could end this thread a second time, see python::Errand.
void thread_ended() noexcept {
  const python::Api* api = python::api();
  if (api == nullptr) return;
  try {
    (void)python::run_under_gil(*api, "dormouse-ended",
                                std::make_shared<Leave>("thread_ended", nullptr), kFarewellTime);
  } catch (const std::exception& error) {
    log().warn("a thread that ended inside a region could not leave its memory pool: {}",
               error.what());
  }
}

UnusedMemory& unused_memory() noexcept {
  static auto* const instance = new PoolsUnused;
  return *instance;
}

void forget_after_fork() noexcept {
  forked.store(true, std::memory_order_relaxed);
}

}  // namespace dormouse::shim::isolation
