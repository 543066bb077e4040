// CPython's API as the process has it: found at run time, never linked, so that the library loads
// into programs without Python. For what enters Python from region begin and end.
//
// No thread of the program waits for the GIL without a limit, except to take back what it gave
// away: whoever holds it may be waiting for that thread.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "core/sleep/gate.h"

namespace dormouse::shim::python {

struct Object;  // PyObject

// Builtin functions that Python code can call back through; the layout of CPython's PyMethodDef.
struct Method {
  const char* name;
  Object* (*function)(Object* self, Object* argument);
  int flags;
  const char* doc;
};
inline constexpr int kOneArgument = 0x0008;  // METH_O

// Every function: X(name, result, parameters). All are in CPython's stable ABI or have been
// exported since 3.2.
#define DORMOUSE_PYTHON_FUNCTIONS(X)                                               \
  X(Py_IsInitialized, int, (void))                                                 \
  X(PyGILState_Ensure, int, (void))                                                \
  X(PyGILState_Release, void, (int))                                               \
  X(PyGILState_GetThisThreadState, void*, (void))                                  \
  X(PyEval_SaveThread, void*, (void))                                              \
  X(PyEval_RestoreThread, void, (void*))                                           \
  X(PyDict_New, Object*, (void))                                                   \
  X(PyDict_GetItemString, Object*, (Object*, const char*))                         \
  X(PyDict_SetItemString, int, (Object*, const char*, Object*))                    \
  X(PyEval_GetBuiltins, Object*, (void))                                           \
  X(PyEval_EvalCode, Object*, (Object*, Object*, Object*))                         \
  X(Py_CompileStringExFlags, Object*, (const char*, const char*, int, void*, int)) \
  X(PyCFunction_NewEx, Object*, (Method*, Object*, Object*))                       \
  X(PyObject_CallObject, Object*, (Object*, Object*))                              \
  X(PyTuple_New, Object*, (long))                                                  \
  X(PyTuple_SetItem, int, (Object*, long, Object*))                                \
  X(PyUnicode_FromStringAndSize, Object*, (const char*, long))                     \
  X(PyUnicode_AsUTF8AndSize, const char*, (Object*, long*))                        \
  X(PyObject_Str, Object*, (Object*))                                              \
  X(PyErr_Fetch, void, (Object**, Object**, Object**))                             \
  X(PyErr_Restore, void, (Object*, Object*, Object*))                              \
  X(PyErr_NormalizeException, void, (Object**, Object**, Object**))                \
  X(PyErr_GivenExceptionMatches, int, (Object*, Object*))                          \
  X(PyErr_Clear, void, (void))                                                     \
  X(PyErr_SetInterrupt, void, (void))                                              \
  X(PyErr_CheckSignals, int, (void))                                               \
  X(Py_AddPendingCall, int, (int (*)(void*), void*))                               \
  X(Py_IncRef, void, (Object*))                                                    \
  X(Py_DecRef, void, (Object*))

struct Api {
#define DORMOUSE_PYTHON_FIELD(name, result, parameters) result(*name) parameters = nullptr;
  DORMOUSE_PYTHON_FUNCTIONS(DORMOUSE_PYTHON_FIELD)
#undef DORMOUSE_PYTHON_FIELD
  int (*is_finalizing)(void) = nullptr;
  void* (*current_thread_state)(void) = nullptr;  // of whoever holds the GIL; not exported by all
  Object* none = nullptr;
  Object** keyboard_interrupt = nullptr;
};

// Null while there is no interpreter that can be entered: none in this process, not initialised
// yet, or on its way out. Cheap when there is none. Thread-safe.
const Api* api() noexcept;

// Holds the GIL, from any thread, and keeps an exception that was set aside.
class Gil {
 public:
  explicit Gil(const Api& api) noexcept;
  ~Gil();
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;

 private:
  const Api& api_;
  int state_;
  Object* pending_[3] = {};
};

// True if the calling thread holds the GIL, with the state that PyGILState_Ensure would use; false
// where that cannot be told. From any thread. (PyGILState_Check says yes to all once there are
// subinterpreters.)
bool holds_gil(const Api& api) noexcept;

// Before a wait for others: whoever waits for the GIL must not have to wait for this thread. Gives
// it away for its lifetime, if the calling thread has it.
class GilReleased {
 public:
  GilReleased() noexcept;
  ~GilReleased();
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  const Api* api_ = nullptr;
  void* thread_ = nullptr;
};

// What a thread does around a wait at the gate: it gives the GIL back if it has it, so that the
// rest of the program goes on (health checks, and the thread that is to wake the memory). Python's
// main thread runs the handlers of signals meanwhile, which otherwise would run only after the
// wake. What a handler raises is raised in Python code as soon as the call, which is then refused,
// has returned there: C code between is not made for an exception that comes without an error of
// its own.
gate::Waiting at_gate() noexcept;

// Whether the calling thread may take the GIL now: it holds it; or Python knows the thread, which
// has given the GIL back for a call and either takes it again right after (ReturnsToPython), or may
// expect it soon, since another thread was just able to take it within a fraction of a second.
// Threads that Python does not know do not wait for it at all: an extension that keeps the GIL and
// joins its own threads waits for them.
bool can_take_gil(const Api& api) noexcept;

// While alive, in a function that the program called: if the caller is ctypes or cffi, the thread
// waits for the GIL as soon as the function returns, so it may as well wait inside.
class ReturnsToPython {
 public:
  explicit ReturnsToPython(const void* return_address) noexcept;
  ~ReturnsToPython();
  ReturnsToPython(const ReturnsToPython&) = delete;
  ReturnsToPython& operator=(const ReturnsToPython&) = delete;
};

// Work under the GIL on a thread of its own, while the one that wants it waits with a limit. Where
// the interpreter ends before, it is never run: CPython before 3.14 ends a thread that waits for
// the GIL then, by an unwinding that ends the process at any frame of ours with something to clean
// up.
class Errand {
 public:
  Errand() = default;
  virtual ~Errand() = default;
  Errand(const Errand&) = delete;
  Errand& operator=(const Errand&) = delete;

  // `late`: nobody waits any more.
  virtual void run(const Api& api, bool late) noexcept = 0;

  void begin_run(const Api& api) noexcept;
  bool wait(std::chrono::milliseconds limit) noexcept;

 private:
  std::mutex mutex_;
  std::condition_variable done_changed_;
  bool done_ = false;
  bool given_up_ = false;
};

// True if the errand was done within `limit`. The calling thread does not hold the GIL.
bool run_under_gil(const Api& api, const char* thread_name, std::shared_ptr<Errand> errand,
                   std::chrono::milliseconds limit) noexcept;

// Under the GIL: runs `source` and returns the dictionary of its names, or null with an exception
// set. `name` stands in tracebacks; `methods` (ends with a null name, never freed) are there as
// builtins.
Object* run(const Api& api, const char* source, const char* name, Method* methods) noexcept;

// What a user can do where Python code of the library fails.
inline constexpr const char* kWithoutTorch = "Set DORMOUSE_TORCH=off if this stands in the way.";
inline constexpr const char* kWithoutRules =
    "Leave python(...) and presets out of DORMOUSE_REGIONS if this stands in the way.";

// Under the GIL: calls a function of such a dictionary with a text (a null one is None) or, without
// `has_argument`, with nothing. False, and what went wrong logged once per function, if it raised;
// a KeyboardInterrupt is raised again later.
bool call(const Api& api, Object* names, const char* function, bool has_argument, const char* text,
          long length, const char* way_out) noexcept;

// Under the GIL: logs the exception that is set, once per `what`, with what a user can do, and
// clears it.
void report_exception(const Api& api, const char* what, const char* way_out) noexcept;

}  // namespace dormouse::shim::python
