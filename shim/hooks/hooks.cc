// The wrappers that only pass the gate, and the table of all hooks as data. Programs call the
// wrappers; dlsym and the entry point hooks ask the table.
#include "shim/hooks/hooks.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string_view>
#include <type_traits>

#include "core/sleep/gate.h"
#include "shim/hooks/copies.h"
#include "shim/hooks/real.h"
#include "shim/hooks/support.h"
#include "shim/process/linker.h"

namespace real = dormouse::shim::real;

// Each row's type is the toolkit's.
#define HOOK(name, ret, params, args, group)                      \
  static_assert(std::is_same_v<decltype(&::name), ret(*) params>, \
                #name " is not as the toolkit's headers declare it");
#include "shim/hooks/hooks.def"

namespace {

constexpr bool is_per_thread(std::string_view name) {
  return name.ends_with("_ptds") || name.ends_with("_ptsz");
}

}  // namespace

// A call that may touch memory which is asleep waits at the gate.
#define DORMOUSE_GATE_PASS(name, ret, params, args)                   \
  extern "C" ret name params {                                        \
    return dormouse::shim::retried_when_full([&] {                    \
      const CUresult closed = dormouse::gate::enter();                \
      if (__builtin_expect(closed != CUDA_SUCCESS, 0)) return closed; \
      const ret result = real::name args;                             \
      dormouse::gate::leave();                                        \
      return result;                                                  \
    });                                                               \
  }
// So does a copy; see copies.h for what is done where the driver refuses it.
#define DORMOUSE_COPY(name, ret, params, args)                                    \
  extern "C" ret name params {                                                    \
    const CUresult closed = dormouse::gate::enter();                              \
    if (__builtin_expect(closed != CUDA_SUCCESS, 0)) return closed;               \
    ret result = real::name args;                                                 \
    if (__builtin_expect(result == CUDA_ERROR_INVALID_VALUE, 0))                  \
      result = dormouse::shim::CopyAgain{&real::name, is_per_thread(#name)} args; \
    dormouse::gate::leave();                                                      \
    return result;                                                                \
  }
#define DORMOUSE_ROOM(name, ret, params, args)                                 \
  extern "C" ret name params {                                                 \
    return dormouse::shim::retried_when_full([&] { return real::name args; }); \
  }
#define DORMOUSE_BY_HAND(name, ret, params, args)
#define DORMOUSE_BODY_launch DORMOUSE_GATE_PASS
#define DORMOUSE_BODY_copy DORMOUSE_COPY
#define DORMOUSE_BODY_memset DORMOUSE_GATE_PASS
#define DORMOUSE_BODY_address DORMOUSE_GATE_PASS
#define DORMOUSE_BODY_room DORMOUSE_ROOM
#define DORMOUSE_BODY_allocate DORMOUSE_BY_HAND
#define DORMOUSE_BODY_free DORMOUSE_BY_HAND
#define DORMOUSE_BODY_query DORMOUSE_BY_HAND
#define DORMOUSE_BODY_context DORMOUSE_BY_HAND
#define DORMOUSE_BODY_capture DORMOUSE_BY_HAND
#define DORMOUSE_BODY_mapped DORMOUSE_BY_HAND
#define DORMOUSE_BODY_init DORMOUSE_BY_HAND
#define DORMOUSE_BODY_entry DORMOUSE_BY_HAND
#define HOOK(name, ret, params, args, group) DORMOUSE_BODY_##group(name, ret, params, args)
#include "shim/hooks/hooks.def"

namespace dormouse::shim {

namespace {

struct NamedRow {
  std::string_view name;
  std::size_t index;
};

// All rows sorted by name, made by the compiler.
constexpr auto kByName = [] {
  auto rows = std::to_array<NamedRow>({
#define HOOK(name, ret, params, args, group) {#name, static_cast<std::size_t>(Function::name)},
#include "shim/hooks/hooks.def"
  });
  std::sort(rows.begin(), rows.end(),
            [](const NamedRow& a, const NamedRow& b) { return a.name < b.name; });
  return rows;
}();

// The names of left.def, sorted.
constexpr std::string_view kLeftText =
#define LEAVE(reason, ...) #__VA_ARGS__ ", "
#include "shim/hooks/left.def"
    "";

constexpr std::size_t kLeftNames =
    static_cast<std::size_t>(std::count(kLeftText.begin(), kLeftText.end(), ','));

constexpr auto kLeft = [] {
  std::array<std::string_view, kLeftNames> names{};
  std::string_view rest = kLeftText;
  for (std::string_view& name : names) {
    const std::size_t end = rest.find(',');
    name = rest.substr(0, end);
    rest.remove_prefix(end + 2);
  }
  std::sort(names.begin(), names.end());
  return names;
}();

// Whether `full` is `name`, or `name` with a version, a variant or both.
constexpr bool is_form_of(std::string_view full, std::string_view name) {
  if (!full.starts_with(name)) return false;
  const std::string_view rest = full.substr(name.size());
  return rest.empty() || rest.starts_with("_v") || rest.starts_with("_pt");
}

// Whether `names`, sorted, has a form of `name`. Forms of one name are neighbours but for longer
// names between them (cuMemcpy, cuMemcpyAsync, cuMemcpy_ptds).
template <typename Names, typename NameOf>
bool has_form(const Names& names, std::string_view name, NameOf name_of) noexcept {
  auto at = std::lower_bound(
      names.begin(), names.end(), name,
      [&](const auto& row, std::string_view wanted) { return name_of(row) < wanted; });
  for (; at != names.end() && name_of(*at).starts_with(name); ++at) {
    if (is_form_of(name_of(*at), name)) return true;
  }
  return false;
}

std::string_view without_variant(std::string_view name) noexcept {
  for (std::string_view suffix : {"_ptsz", "_ptds"}) {
    if (name.ends_with(suffix)) name.remove_suffix(suffix.size());
  }
  return name;
}

void* wrapper_of(std::size_t index) noexcept {
  static void* const wrappers[] = {
#define HOOK(name, ret, params, args, group) reinterpret_cast<void*>(&::name),
#include "shim/hooks/hooks.def"
  };
  return wrappers[index];
}

// Whether the process's libcuda only calls on to another one, whose functions cuGetProcAddress
// hands out (WSL2): a function without versions says.
bool driver_is_loader() noexcept {
  static std::atomic<int> answer{-1};
  int known = answer.load(std::memory_order_relaxed);
  if (known >= 0) return known != 0;
  const char* name = "cuDeviceGetCount";
  void* handed_out = nullptr;
  void* exported = libcuda_symbol(name);
  const bool asked =
      exported != nullptr && real::cuGetProcAddress(name, &handed_out, 2000, 0) == CUDA_SUCCESS;
  if (!asked) return false;
  known = handed_out != nullptr && handed_out != exported ? 1 : 0;
  answer.store(known, std::memory_order_relaxed);
  return known != 0;
}

// The wrapper of a function of a libcuda behind the process's, by its exported name; else null.
void* wrapper_behind_loader(const void* function) noexcept {
  Dl_info info{};
  HookRow row;
  if (!driver_is_loader() || dladdr(function, &info) == 0 || info.dli_saddr != function ||
      info.dli_sname == nullptr || !find_hook(info.dli_sname, &row)) {
    return nullptr;
  }
  const link_map* object = object_of(function);
  return object != nullptr && is_called(object, "libcuda.so") ? row.wrapper : nullptr;
}

}  // namespace

bool find_hook(std::string_view name, HookRow* out) noexcept {
  const auto at = std::lower_bound(
      kByName.begin(), kByName.end(), name,
      [](const NamedRow& row, std::string_view wanted) { return row.name < wanted; });
  if (at == kByName.end() || at->name != name) return false;
  *out = {at->name, wrapper_of(at->index)};
  return true;
}

Knowledge knowledge_of(std::string_view name) noexcept {
  name = without_variant(name);
  if (has_form(kByName, name, [](const NamedRow& row) { return row.name; })) {
    return Knowledge::kHooked;
  }
  const bool left = has_form(kLeft, name, [](std::string_view each) { return each; });
  return left ? Knowledge::kLeft : Knowledge::kNone;
}

void* substitute(void* function, const void* caller) noexcept {
  if (function == nullptr) return nullptr;         // a name that the driver does not know
  driver_function(Function::cuGetProcAddress_v2);  // fills the table of real functions
  for (const NamedRow& row : kByName) {
    void* next = driver_functions[row.index].load(std::memory_order_relaxed);
    void* libcudas = passed_over[row.index].load(std::memory_order_relaxed);
    void* wrapper = wrapper_of(row.index);
    if (function != next && function != libcudas && function != wrapper) continue;
    if (libcudas == nullptr || !is_defined_by_caller(row.name.data(), caller)) return wrapper;
    return libcudas;
  }
  void* wrapper = wrapper_behind_loader(function);
  return wrapper != nullptr ? wrapper : function;
}

}  // namespace dormouse::shim
