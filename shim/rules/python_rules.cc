// See python_rules.h. How the Python half gets into the interpreter: an audit hook, which CPython
// lets one add before it is initialised, sees the first import of every program, that of `site` or
// the program's own first one. By then the interpreter is complete and no module of the program's
// is there.
#include "shim/rules/python_rules.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "config/presets.h"
#include "core/log.h"
#include "core/sleep/engine.h"
#include "shim/process/linker.h"
#include "shim/process/process.h"
#include "shim/process/python.h"
#include "shim/process/settings.h"
#include "shim/rules/regions.h"
#include "shim/rules/spans.h"
#include "shim/torch/torch.h"

namespace dormouse::shim::triggers {
namespace {

// embedding.py and python_rules.py, and the files of presets, as string literals.
constexpr char kSource[] =
#include "shim/rules/python_rules_source.inc"
    ;
struct PresetSource {
  std::string_view file;
  std::string_view text;
};
constexpr PresetSource kPresetSources[] = {
#include "shim/presets/presets_source.inc"
};
// torch.compile and warnings.warn() pass over code of a file of such a name.
constexpr const char* kSourceName = "<frozen importlib._bootstrap, dormouse's python_rules.py>";

using AuditHook = int (*)(const char* event, python::Object* arguments, void* data);

// What is needed beside python::Api; all of it has been exported since 3.9.
#define DORMOUSE_TRIGGER_FUNCTIONS(X)                                   \
  X(PyLong_AsLong, long, (python::Object*))                             \
  X(PyLong_AsUnsignedLongLong, unsigned long long, (python::Object*))   \
  X(PyLong_FromUnsignedLongLong, python::Object*, (unsigned long long)) \
  X(PyInterpreterState_Get, void*, (void))

struct Functions {
#define DORMOUSE_TRIGGER_FIELD(name, result, parameters) result(*name) parameters = nullptr;
  DORMOUSE_TRIGGER_FUNCTIONS(DORMOUSE_TRIGGER_FIELD)
#undef DORMOUSE_TRIGGER_FIELD
};

enum class State : int { kNew, kRunning, kOff };

// Written under the GIL before the state is kRunning.
constinit Functions functions;
constinit python::Object* names = nullptr;
constinit void* interpreter = nullptr;  // the one that was there first; others have no triggers
constinit std::atomic<State> state{State::kNew};
constinit std::atomic<bool> wanted{false};  // the configuration has something for Python

bool find_functions() noexcept {
#define DORMOUSE_TRIGGER_FIND(name, result, parameters)                              \
  functions.name = reinterpret_cast<decltype(functions.name)>(python_symbol(#name)); \
  if (functions.name == nullptr) return false;
  DORMOUSE_TRIGGER_FUNCTIONS(DORMOUSE_TRIGGER_FIND)
#undef DORMOUSE_TRIGGER_FIND
  return true;
}

// --- What the Python half calls. All of it under the GIL, from the interpreter.

python::Object* none(const python::Api& api) noexcept {
  api.Py_IncRef(api.none);
  return api.none;
}

std::string_view text_of(const python::Api& api, python::Object* object) noexcept {
  long length = 0;
  const char* text = api.PyUnicode_AsUTF8AndSize(object, &length);
  if (text == nullptr) api.PyErr_Clear();
  return text == nullptr ? std::string_view()
                         : std::string_view(text, static_cast<std::size_t>(length));
}

std::vector<std::string> lines_of(std::string_view text) {
  std::vector<std::string> lines;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    lines.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

python::Object* begin(python::Object*, python::Object* tag) {
  return functions.PyLong_FromUnsignedLongLong(
      begin_span(static_cast<TagId>(functions.PyLong_AsLong(tag))));
}

python::Object* begin_named(python::Object*, python::Object* name) {
  const python::Api* api = python::api();
  SpanId span = 0;
  try {
    if (api != nullptr) span = begin_span(tags().intern(tag_of_any_text(text_of(*api, name))));
  } catch (const std::bad_alloc&) {
    // No region; its end is told by the 0.
  }
  return functions.PyLong_FromUnsignedLongLong(span);
}

// For callers that have entered a memory pool of PyTorch's themselves.
python::Object* begin_in_own_pool(python::Object* self, python::Object* name) {
  const torch::CallerIsolates caller_isolates;
  return begin_named(self, name);
}

python::Object* end(python::Object*, python::Object* span) {
  const auto id = functions.PyLong_AsUnsignedLongLong(span);
  if (id != 0) end_span(id);
  // As python::none, but also while the interpreter finalizes.
  return functions.PyLong_FromUnsignedLongLong(0);
}

python::Object* report(python::Object*, python::Object* message) {
  const python::Api* api = python::api();
  if (api == nullptr) return functions.PyLong_FromUnsignedLongLong(0);
  try {
    const std::string text(text_of(*api, message));
    if (first_time("python trigger " + text)) log().warn("DORMOUSE_REGIONS: {}", text);
  } catch (const std::bad_alloc&) {
    // Nothing to say it with.
  }
  return none(*api);
}

// For who wants to know what works.
python::Object* note(python::Object*, python::Object* message) {
  const python::Api* api = python::api();
  if (api == nullptr) return functions.PyLong_FromUnsignedLongLong(0);
  log().info("DORMOUSE_REGIONS: {}", text_of(*api, message));
  return none(*api);
}

// Runs an operation of the engine on the tags named in `lines`, without the GIL. None, or what went
// wrong as a text.
template <typename Work>
python::Object* operate(python::Object* lines, Work work) noexcept {
  const python::Api* api = python::api();
  Engine* current = engine();
  if (api == nullptr) return functions.PyLong_FromUnsignedLongLong(0);
  if (current == nullptr) return none(*api);  // no CUDA yet: no memory either
  std::string error;
  try {
    std::vector<std::string> list;
    for (const std::string& name : lines_of(text_of(*api, lines))) {
      if (tags().known(tag_of_any_text(name))) list.push_back(tag_of_any_text(name));
    }
    if (list.empty()) return none(*api);
    Status status;
    {
      const python::GilReleased released;
      status = work(*current, std::move(list));
    }
    // A tag that never had memory has nothing to do.
    if (status.is_ok() || status.code() == Code::kNotFound) return none(*api);
    error = status.message();
    return api->PyUnicode_FromStringAndSize(error.data(), static_cast<long>(error.size()));
  } catch (const std::bad_alloc&) {
    constexpr std::string_view kText = "not enough host memory";
    return api->PyUnicode_FromStringAndSize(kText.data(), static_cast<long>(kText.size()));
  }
}

python::Object* sleep(python::Object*, python::Object* lines) {
  return operate(lines, [](Engine& current, std::vector<std::string> list) {
    return current.sleep({.tags = std::move(list), .origin = Origin::kProgram}, nullptr);
  });
}

// Of what is awake.
python::Object* discard(python::Object*, python::Object* lines) {
  return operate(lines, [](Engine& current, std::vector<std::string> list) {
    return current.sleep(
        {.tags = std::move(list), .origin = Origin::kProgram, .discard = true, .only_awake = true},
        nullptr);
  });
}

python::Object* wake(python::Object*, python::Object* lines) {
  return operate(lines, [](Engine& current, std::vector<std::string> list) {
    return current.wake({std::move(list)}, nullptr);
  });
}

// Bytes in live blocks of the tags, asleep or awake, on all devices.
python::Object* usage(python::Object*, python::Object* lines) {
  const python::Api* api = python::api();
  const Engine* current = engine();
  unsigned long long bytes = 0;
  try {
    if (api != nullptr && current != nullptr) {
      for (const std::string& name : lines_of(text_of(*api, lines))) {
        for (const TagStats& each : current->stats()) {
          if (each.tag == tag_of_any_text(name)) bytes += each.allocated;
        }
      }
    }
  } catch (const std::bad_alloc&) {
    // As far as it could be counted.
  }
  return functions.PyLong_FromUnsignedLongLong(bytes);
}

// The live blocks of a tag, a line each: address, bytes, device, and 1 if it sleeps, else 0.
python::Object* blocks(python::Object*, python::Object* name) {
  const python::Api* api = python::api();
  const Engine* current = engine();
  if (api == nullptr) return functions.PyLong_FromUnsignedLongLong(0);
  std::string lines;
  try {
    const std::string tag = tag_of_any_text(text_of(*api, name));
    if (current != nullptr && tags().known(tag)) {
      for (const BlockInfo& block : current->blocks_of(tags().intern(tag))) {
        lines += std::to_string(block.address) + ' ' + std::to_string(block.bytes) + ' ' +
                 std::to_string(block.device) + (block.asleep ? " 1\n" : " 0\n");
      }
    }
  } catch (const std::bad_alloc&) {
    // As far as they could be listed.
  }
  return api->PyUnicode_FromStringAndSize(lines.data(), static_cast<long>(lines.size()));
}

// Where this library is.
python::Object* library_path(python::Object*, python::Object*) {
  const python::Api* api = python::api();
  Dl_info info = {};
  if (api == nullptr || dladdr(&kSourceName, &info) == 0 || info.dli_fname == nullptr) {
    return functions.PyLong_FromUnsignedLongLong(0);
  }
  return api->PyUnicode_FromStringAndSize(info.dli_fname,
                                          static_cast<long>(std::strlen(info.dli_fname)));
}

python::Method methods[] = {
    {"_begin", begin, python::kOneArgument, nullptr},
    {"_begin_named", begin_named, python::kOneArgument, nullptr},
    {"_begin_in_own_pool", begin_in_own_pool, python::kOneArgument, nullptr},
    {"_end", end, python::kOneArgument, nullptr},
    {"_report", report, python::kOneArgument, nullptr},
    {"_note", note, python::kOneArgument, nullptr},
    {"_sleep", sleep, python::kOneArgument, nullptr},
    {"_discard", discard, python::kOneArgument, nullptr},
    {"_wake", wake, python::kOneArgument, nullptr},
    {"_usage", usage, python::kOneArgument, nullptr},
    {"_blocks", blocks, python::kOneArgument, nullptr},
    {"_library_path", library_path, python::kOneArgument, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// --- What the configuration asks for.

void add_line(std::string& text, std::initializer_list<std::string_view> fields) {
  if (!text.empty()) text += '\n';
  const char* separator = "";
  for (const std::string_view field : fields) {
    text += separator;
    text += field;
    separator = "\x1f";
  }
}

// For start() of python_rules.py; empty if there is nothing to do.
std::string instructions() {
  const Settings& current = settings();
  std::string text;
  for (std::size_t i = 0; i < current.regions.items.size(); ++i) {
    for (const config::Rule& rule : current.regions.items[i].rules) {
      const auto* python = std::get_if<config::PythonRule>(&rule);
      if (python == nullptr) continue;
      const std::string tag = std::to_string(current.region_tags[i]);
      const config::ItemOrigin& origin = current.item_origins[i];
      add_line(text, {"rule", python->module, python->qualname, tag, origin.preset,
                      origin.of_some_versions ? "some" : ""});
    }
  }
  const bool torch = current.options.torch != config::Torch::kOff;
  for (const std::string& name : current.regions.presets) {
    const config::Preset* preset = config::find_preset(name);
    if (preset == nullptr) continue;
    for (const config::PresetTrigger& trigger : preset->triggers) {
      add_line(text, {"trigger", trigger.module, trigger.function, torch ? "torch" : "", name, ""});
    }
  }
  return text;
}

// With the files of the presets that are in use.
std::string source() {
  std::string text = kSource;
  for (const PresetSource& each : kPresetSources) {
    const auto& used = settings().regions.presets;
    if (std::any_of(used.begin(), used.end(), [&](const std::string& name) {
          const config::Preset* preset = config::find_preset(name);
          return preset != nullptr && preset->file == each.file;
        })) {
      text += each.text;
    }
  }
  return text;
}

// Under the GIL, in an interpreter that is complete. Once.
void begin_to_follow(const python::Api& api) noexcept {
  State expected = State::kNew;
  if (!state.compare_exchange_strong(expected, State::kOff)) return;
  try {
    const std::string text = instructions();
    if (text.empty() || !find_functions()) return;
    interpreter = functions.PyInterpreterState_Get();
    names = python::run(api, source().c_str(), kSourceName, methods);
    if (names == nullptr) {
      python::report_exception(api, "the rules for Python functions are not followed",
                               python::kWithoutRules);
      return;
    }
    if (python::call(api, names, "start", true, text.data(), static_cast<long>(text.size()),
                     python::kWithoutRules)) {
      state.store(State::kRunning, std::memory_order_release);
    }
  } catch (const std::bad_alloc&) {
    log().error("out of memory: the rules for Python functions are not followed");
  }
}

// Tells python_rules.py of an import, for which the event's arguments are those of importing().
void import_begins(const python::Api& api, python::Object* arguments) noexcept {
  if (functions.PyInterpreterState_Get() != interpreter) return;
  python::Object* importing = api.PyDict_GetItemString(names, "importing");  // borrowed
  if (importing == nullptr) return;
  python::Object* result = api.PyObject_CallObject(importing, arguments);
  if (result == nullptr) {
    python::report_exception(api, "a rule for a Python function", python::kWithoutRules);
  }
  api.Py_DecRef(result);
}

// Called for every event that CPython audits, with the GIL. An error would end the program's call.
int on_event(const char* event, python::Object* arguments, void*) noexcept {
  if (event[0] != 'i' || std::strcmp(event, "import") != 0) return 0;
  const State now = state.load(std::memory_order_acquire);
  if (now == State::kOff) return 0;
  const python::Api* api = python::api();
  if (api == nullptr) return 0;  // not initialised yet
  if (now == State::kNew) {
    begin_to_follow(*api);
  } else {
    import_begins(*api, arguments);
  }
  return 0;
}

// Called by the main thread once CUDA is in use.
int on_main_thread(void*) noexcept {
  const python::Api* api = python::api();
  if (api == nullptr) return 0;
  begin_to_follow(*api);  // if the Python came after the library
  if (state.load(std::memory_order_acquire) == State::kRunning &&
      functions.PyInterpreterState_Get() == interpreter) {
    python::call(*api, names, "cuda_used", false, nullptr, 0, python::kWithoutRules);
  }
  return 0;
}

bool has_something_for_python() {
  const Settings& current = settings();
  return current.enabled && !instructions().empty();
}

__attribute__((constructor)) void get_in() noexcept {
  // Most processes have nothing set: they need not read the options.
  const char* regions = std::getenv("DORMOUSE_REGIONS");
  if (regions == nullptr || !active()) return;
  if (std::strstr(regions, "python") == nullptr && std::strchr(regions, '@') == nullptr) return;
  try {
    if (!has_something_for_python()) return;
  } catch (const std::bad_alloc&) {
    return;
  }
  wanted.store(true, std::memory_order_relaxed);
  using AddHook = int (*)(AuditHook hook, void* data);
  const auto add = reinterpret_cast<AddHook>(real_dlsym(RTLD_DEFAULT, "PySys_AddAuditHook"));
  if (add != nullptr) add(&on_event, nullptr);
}

}  // namespace

void driver_initialised() noexcept {
  if (!wanted.load(std::memory_order_relaxed) ||
      state.load(std::memory_order_acquire) == State::kOff) {
    return;
  }
  const python::Api* api = python::api();
  if (api != nullptr) api->Py_AddPendingCall(&on_main_thread, nullptr);
}

}  // namespace dormouse::shim::triggers
