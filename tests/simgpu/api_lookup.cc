// Exported functions of the simulated driver: cuGetProcAddress, and the table that it looks into.
// The table's types are checked against the toolkit's typedefs of the same version.
#include <type_traits>
#include <vector>

#include "tests/simgpu/api_support.h"
#include "tests/simgpu/functions.h"
#include "tests/simgpu/settings.h"

namespace simgpu {
namespace {

#define FUNCTION(name, version, symbol) \
  static_assert(std::is_same_v<decltype(&symbol), PFN_##name##_v##version>);
#define PER_THREAD(name, version, symbol, suffix) \
  static_assert(std::is_same_v<decltype(&symbol), PFN_##name##_v##version##_##suffix>);
#define NEWER(name, version, symbol)
#define NEWER_PER_THREAD(name, version, symbol, suffix)
#include "tests/simgpu/functions.def"
#undef FUNCTION
#undef PER_THREAD

// The addresses of functions that the headers may not declare.
#define FUNCTION(name, version, symbol)
#define PER_THREAD(name, version, symbol, suffix)
#define NEWER(name, version, symbol) extern "C" const char address_of_##symbol __asm__(#symbol);
#define NEWER_PER_THREAD(name, version, symbol, suffix) NEWER(name, version, symbol)
#include "tests/simgpu/functions.def"
#undef FUNCTION
#undef PER_THREAD

struct Row {
  const char* name;
  int version;
  void* function;
  bool per_thread;
};

const std::vector<Row>& rows() {
  static const auto* table = new std::vector<Row>{
#define FUNCTION(name, version, symbol) {#name, version, reinterpret_cast<void*>(&symbol), false},
#define PER_THREAD(name, version, symbol, suffix) \
  {#name, version, reinterpret_cast<void*>(&symbol), true},
#define NEWER(name, version, symbol) \
  {#name, version, const_cast<char*>(&address_of_##symbol), false},
#define NEWER_PER_THREAD(name, version, symbol, suffix) \
  {#name, version, const_cast<char*>(&address_of_##symbol), true},
#include "tests/simgpu/functions.def"
#undef FUNCTION
#undef PER_THREAD
  };
  return *table;
}

// The newest form of a function that a program for CUDA `version` expects, of the wanted stream
// variety if there is one.
CUdriverProcAddressQueryResult look_up(const std::string& name, int version, bool per_thread,
                                       void** function) {
  *function = nullptr;
  bool known = false;
  const Row* best = nullptr;
  for (const Row& row : rows()) {
    if (name != row.name || row.version > settings().driver_version) continue;
    known = true;
    if (row.version > version || (row.per_thread && !per_thread)) continue;
    bool better = best == nullptr || row.per_thread > best->per_thread ||
                  (row.per_thread == best->per_thread && row.version > best->version);
    if (better) best = &row;
  }
  if (best != nullptr) {
    *function = best->function;
    return CU_GET_PROC_ADDRESS_SUCCESS;
  }
  return known ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
}

CUresult get_address(const char* symbol, void** pfn, int version, cuuint64_t flags,
                     CUdriverProcAddressQueryResult* status) {
  constexpr cuuint64_t kKnown =
      CU_GET_PROC_ADDRESS_LEGACY_STREAM | CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM;
  SIMGPU_REQUIRE(symbol != nullptr && pfn != nullptr && (flags & ~kKnown) == 0);
  SIMGPU_REQUIRE(version <= settings().driver_version);
  bool per_thread = (flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM) != 0;
  CUdriverProcAddressQueryResult found = look_up(symbol, version, per_thread, pfn);
  if (status != nullptr) *status = found;
  return CUDA_SUCCESS;  // that there is no such function is told by the status alone
}

}  // namespace

bool is_driver_function(const std::string& name) {
  std::string base = base_name(name);
  for (const Row& row : rows()) {
    if (base == row.name) return true;
  }
  return false;
}

}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

SIMGPU_API CUresult CUDAAPI cuGetProcAddress_v2(const char* symbol, void** pfn, int cudaVersion,
                                                cuuint64_t flags,
                                                CUdriverProcAddressQueryResult* symbolStatus) {
  SIMGPU_ENTER_EARLY(cuGetProcAddress);
  return get_address(symbol, pfn, cudaVersion, flags, symbolStatus);
}

SIMGPU_API CUresult CUDAAPI cuGetProcAddress(const char* symbol, void** pfn, int cudaVersion,
                                             cuuint64_t flags) {
  SIMGPU_ENTER_EARLY(cuGetProcAddress);
  return get_address(symbol, pfn, cudaVersion, flags, nullptr);
}
