// See python.h.
#include "shim/process/python.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <string_view>

#include "core/log.h"
#include "core/threads.h"
#include "shim/process/linker.h"
#include "shim/process/process.h"

namespace dormouse::shim::python {
namespace {

constexpr int kFileInput = 257;  // Py_file_input

std::mutex found_mutex;  // protects found_api until `ready` is set
constinit Api found_api;
constinit std::atomic<const Api*> ready{nullptr};
constinit std::atomic<unsigned long long> libraries_seen{0};

bool find_functions(Api& api) noexcept {
#define DORMOUSE_PYTHON_FIND(name, result, parameters)                   \
  api.name = reinterpret_cast<decltype(api.name)>(python_symbol(#name)); \
  if (api.name == nullptr) return false;
  DORMOUSE_PYTHON_FUNCTIONS(DORMOUSE_PYTHON_FIND)
#undef DORMOUSE_PYTHON_FIND
  // Public since 3.13, before that exported under a private name.
  void* finalizing = python_symbol("Py_IsFinalizing");
  if (finalizing == nullptr) finalizing = python_symbol("_Py_IsFinalizing");
  api.is_finalizing = reinterpret_cast<int (*)()>(finalizing);
  // Public since 3.13, before that exported under a private name.
  void* current = python_symbol("PyThreadState_GetUnchecked");
  if (current == nullptr) current = python_symbol("_PyThreadState_UncheckedGet");
  api.current_thread_state = reinterpret_cast<void* (*)()>(current);
  api.none = static_cast<Object*>(python_symbol("_Py_NoneStruct"));
  api.keyboard_interrupt = static_cast<Object**>(python_symbol("PyExc_KeyboardInterrupt"));
  return finalizing != nullptr && api.none != nullptr && api.keyboard_interrupt != nullptr;
}

// Looks only when libraries were loaded since the last time. The dynamic linker is asked without a
// lock of ours: initialisers of libraries run under its own, and may begin regions.
const Api* find() noexcept {
  const unsigned long long libraries = libraries_loaded();
  if (libraries == libraries_seen.load()) return nullptr;
  Api api;
  if (!find_functions(api)) {
    libraries_seen.store(libraries);
    return nullptr;
  }
  const std::lock_guard lock(found_mutex);
  if (ready.load(std::memory_order_relaxed) == nullptr) {
    found_api = api;
    ready.store(&found_api, std::memory_order_release);
  }
  return &found_api;
}

struct Task {
  const Api* api;
  std::shared_ptr<Errand> errand;
};

// Nothing here has a destructor: see Errand.
extern "C" void* run_task(void* pointer) {
  auto* task = static_cast<Task*>(pointer);
  const int gil = task->api->PyGILState_Ensure();
  task->errand->begin_run(*task->api);
  task->api->PyGILState_Release(gil);
  delete task;
  return nullptr;
}

// Only tests whether the GIL can be taken.
class Nothing : public Errand {
 public:
  void run(const Api&, bool) noexcept override {}
};

// How long a thread waits for the GIL where it need not have it, and how long once it has waited in
// vain: a thread that begins many regions must not wait for each.
constexpr std::chrono::milliseconds kPatience{250};
constexpr std::chrono::milliseconds kPatienceAfterFailure{5};
thread_local bool waited_in_vain = false;

thread_local const void* return_address = nullptr;  // see ReturnsToPython

bool is_ffi(const void* address) noexcept {
  Dl_info info{};
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return false;
  const char* slash = std::strrchr(info.dli_fname, '/');
  const std::string_view file = slash != nullptr ? slash + 1 : info.dli_fname;
  return file.starts_with("libffi") || file.starts_with("_ctypes") ||
         file.starts_with("_cffi_backend");
}

bool returns_to_python() noexcept {
  thread_local const void* last = nullptr;  // asking the dynamic linker each time costs more
  thread_local bool verdict = false;
  if (return_address == nullptr) return false;
  if (return_address != last) verdict = is_ffi(return_address);
  last = return_address;
  return verdict;
}

// --- The gate.

void* give_gil_back() noexcept {
  const Api* found = api();
  return found != nullptr && holds_gil(*found) ? found->PyEval_SaveThread() : nullptr;
}

struct Exception {
  Object* parts[3] = {};
};

// A pending call: Python's main thread makes it between two bytecodes.
int raise_now(void* pointer) {
  auto* exception = static_cast<Exception*>(pointer);
  Object** parts = exception->parts;
  ready.load(std::memory_order_acquire)->PyErr_Restore(parts[0], parts[1], parts[2]);
  delete exception;
  return -1;
}

// Under the GIL. False if a handler raised.
bool run_signal_handlers(const Api& api) noexcept {
  Exception before;
  api.PyErr_Fetch(&before.parts[0], &before.parts[1], &before.parts[2]);
  const bool raised = api.PyErr_CheckSignals() != 0;
  auto* exception = raised ? new (std::nothrow) Exception : nullptr;
  if (exception != nullptr) {
    Object** parts = exception->parts;
    api.PyErr_Fetch(&parts[0], &parts[1], &parts[2]);
    if (api.Py_AddPendingCall(&raise_now, exception) != 0) (void)raise_now(exception);
  }
  if (!raised || before.parts[0] != nullptr) {
    api.PyErr_Restore(before.parts[0], before.parts[1], before.parts[2]);
  }
  return !raised;
}

// Nothing here has a destructor, and it may be unwound: see Errand.
bool take_gil_back(void* thread) {
  if (thread != nullptr) {
    const Api* found = ready.load(std::memory_order_acquire);
    found->PyEval_RestoreThread(thread);
    return run_signal_handlers(*found);
  }
  // Python knows its main thread by a lock of its own; nearly always it is the process's.
  if (syscall(SYS_gettid) != getpid()) return true;
  const Api* found = api();
  if (found == nullptr || holds_gil(*found) || !can_take_gil(*found)) return true;
  const int state = found->PyGILState_Ensure();
  const bool goes_on = run_signal_handlers(*found);
  found->PyGILState_Release(state);
  return goes_on;
}

}  // namespace

gate::Waiting at_gate() noexcept {
  return {&give_gil_back, &take_gil_back};
}

void Errand::begin_run(const Api& api) noexcept {
  std::unique_lock lock(mutex_);
  const bool late = given_up_;
  lock.unlock();
  run(api, late);
  lock.lock();
  done_ = true;
  done_changed_.notify_all();
}

bool Errand::wait(std::chrono::milliseconds limit) noexcept {
  constexpr std::chrono::milliseconds kLook{20};
  const auto end = std::chrono::steady_clock::now() + limit;
  std::unique_lock lock(mutex_);
  while (!done_ && std::chrono::steady_clock::now() < end) {
    done_changed_.wait_for(lock, std::min(kLook, limit));
    if (api() == nullptr) break;  // the interpreter ends: nobody may come
  }
  given_up_ = true;
  return done_;
}

bool run_under_gil(const Api& api, const char* thread_name, std::shared_ptr<Errand> errand,
                   std::chrono::milliseconds limit) noexcept {
  auto* task = new (std::nothrow) Task{&api, errand};
  if (task == nullptr || !start_plain_thread(thread_name, &run_task, task)) {
    delete task;
    return false;
  }
  return errand->wait(limit);
}

bool can_take_gil(const Api& api) noexcept {
  if (holds_gil(api)) return true;
  if (api.PyGILState_GetThisThreadState() == nullptr) return false;
  if (returns_to_python()) return true;
  try {
    waited_in_vain = !run_under_gil(api, "dormouse-gil", std::make_shared<Nothing>(),
                                    waited_in_vain ? kPatienceAfterFailure : kPatience);
  } catch (const std::bad_alloc&) {
    return false;
  }
  return !waited_in_vain;
}

ReturnsToPython::ReturnsToPython(const void* address) noexcept {
  return_address = address;
}

ReturnsToPython::~ReturnsToPython() {
  return_address = nullptr;
}

const Api* api() noexcept {
  const Api* found = ready.load(std::memory_order_acquire);
  if (found == nullptr) found = find();
  if (found == nullptr || exiting()) return nullptr;
  return found->Py_IsInitialized() != 0 && found->is_finalizing() == 0 ? found : nullptr;
}

bool holds_gil(const Api& api) noexcept {
  void* own = api.PyGILState_GetThisThreadState();
  return own != nullptr && api.current_thread_state != nullptr && api.current_thread_state() == own;
}

GilReleased::GilReleased() noexcept : api_(api()) {
  if (api_ != nullptr && holds_gil(*api_)) thread_ = api_->PyEval_SaveThread();
}

GilReleased::~GilReleased() {
  if (thread_ != nullptr) api_->PyEval_RestoreThread(thread_);
}

Gil::Gil(const Api& api) noexcept : api_(api), state_(api.PyGILState_Ensure()) {
  api_.PyErr_Fetch(&pending_[0], &pending_[1], &pending_[2]);
}

Gil::~Gil() {
  api_.PyErr_Restore(pending_[0], pending_[1], pending_[2]);
  api_.PyGILState_Release(state_);
}

Object* run(const Api& api, const char* source, const char* name, Method* methods) noexcept {
  Object* code = api.Py_CompileStringExFlags(source, name, kFileInput, nullptr, -1);
  if (code == nullptr) return nullptr;
  Object* names = api.PyDict_New();
  bool good = names != nullptr &&
              api.PyDict_SetItemString(names, "__builtins__", api.PyEval_GetBuiltins()) == 0;
  for (Method* method = methods; good && method->name != nullptr; ++method) {
    Object* function = api.PyCFunction_NewEx(method, nullptr, nullptr);
    good = function != nullptr && api.PyDict_SetItemString(names, method->name, function) == 0;
    api.Py_DecRef(function);
  }
  Object* result = good ? api.PyEval_EvalCode(code, names, names) : nullptr;
  api.Py_DecRef(code);
  if (result == nullptr) {
    api.Py_DecRef(names);
    return nullptr;
  }
  api.Py_DecRef(result);
  return names;
}

void report_exception(const Api& api, const char* what, const char* way_out) noexcept {
  Object* type = nullptr;
  Object* value = nullptr;
  Object* trace = nullptr;
  api.PyErr_Fetch(&type, &value, &trace);
  if (type == nullptr) return;
  api.PyErr_NormalizeException(&type, &value, &trace);
  if (api.PyErr_GivenExceptionMatches(type, *api.keyboard_interrupt) != 0) {
    api.PyErr_SetInterrupt();
  } else if (first_time(std::string("python ") + what)) {
    Object* text = api.PyObject_Str(value != nullptr ? value : type);
    const char* characters = text == nullptr ? nullptr : api.PyUnicode_AsUTF8AndSize(text, nullptr);
    log().warn("{}: {}. {}", what,
               characters == nullptr ? "an exception without a text" : characters, way_out);
    api.Py_DecRef(text);
  }
  api.PyErr_Clear();
  api.Py_DecRef(type);
  api.Py_DecRef(value);
  api.Py_DecRef(trace);
}

bool call(const Api& api, Object* names, const char* function, bool has_argument, const char* text,
          long length, const char* way_out) noexcept {
  Object* callable = api.PyDict_GetItemString(names, function);  // borrowed
  Object* arguments = api.PyTuple_New(has_argument ? 1 : 0);
  bool good = callable != nullptr && arguments != nullptr;
  if (good && has_argument) {
    Object* argument = api.none;
    if (text == nullptr) {
      api.Py_IncRef(argument);
    } else {
      argument = api.PyUnicode_FromStringAndSize(text, length);
    }
    good = argument != nullptr && api.PyTuple_SetItem(arguments, 0, argument) == 0;
  }
  Object* result = good ? api.PyObject_CallObject(callable, arguments) : nullptr;
  api.Py_DecRef(arguments);
  api.Py_DecRef(result);
  if (result == nullptr) report_exception(api, function, way_out);
  return result != nullptr;
}

}  // namespace dormouse::shim::python
