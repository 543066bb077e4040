// See isolation.h. Runs isolation.py once per process and calls its functions.
#include "shim/isolation.h"

#include <atomic>

#include "core/log.h"
#include "shim/python.h"
#include "shim/torch_setter.h"

namespace dormouse::shim::isolation {
namespace {

// isolation.py as a string literal.
constexpr char kSource[] =
#include "shim/isolation_source.inc"
    ;
constexpr const char* kSourceName = "<dormouse: isolation.py>";

// For what goes wrong where no call of ours is under way.
python::Object* report(python::Object*, python::Object* message) {
  const python::Api* api = python::api();
  if (api == nullptr) return nullptr;
  const char* text = api->PyUnicode_AsUTF8AndSize(message, nullptr);
  if (text != nullptr) {
    log().warn("PyTorch's cached blocks are not kept apart in a region: {}.", text);
  }
  api->PyErr_Clear();
  api->Py_IncRef(api->none);
  return api->none;
}

// PyTorch has been loaded.
python::Object* look_again(python::Object*, python::Object* none) {
  torch::setter_look_again();
  const python::Api* api = python::api();
  if (api != nullptr) api->Py_IncRef(none);
  return none;
}

python::Method methods[] = {
    {"_report", report, python::kOneArgument, nullptr},
    {"_look_again", look_again, python::kOneArgument, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

enum class State { kNew, kReady, kBroken };
// Under the GIL; the dictionary lives as long as the process, with the pools in it.
constinit State state = State::kNew;
constinit python::Object* names = nullptr;

bool prepare(const python::Api& api) noexcept {
  if (state != State::kNew) return state == State::kReady;
  state = State::kBroken;
  names = python::run(api, kSource, kSourceName, methods);
  if (names == nullptr) {
    python::report_exception(api, "isolation of PyTorch's cached blocks does not start");
    return false;
  }
  state = State::kReady;
  return true;
}

}  // namespace

bool begin(std::string_view tag) noexcept {
  const python::Api* api = python::api();
  if (api == nullptr) return false;
  const python::Gil gil(*api);
  if (!prepare(*api)) return false;
  // Also when it raised: the region is on its list, and end() takes it off.
  python::call(*api, names, "begin", true, tag.empty() ? nullptr : tag.data(),
               static_cast<long>(tag.size()));
  return true;
}

void end() noexcept {
  const python::Api* api = python::api();
  if (api == nullptr) return;
  const python::Gil gil(*api);
  python::call(*api, names, "end", false, nullptr, 0);
}

void thread_ended() noexcept {
  const python::Api* api = python::api();
  if (api == nullptr) return;
  const python::Gil gil(*api);
  python::call(*api, names, "thread_ended", false, nullptr, 0);
}

}  // namespace dormouse::shim::isolation
