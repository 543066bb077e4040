// Every way to look a CUDA function up by name, checked from inside a program that links nothing of
// CUDA. `lookups CASE` says "ok", or what was not as it should be. Run under the library by
// preload_test.
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#define DORMOUSE_OPTIONAL
#include "shim/abi/dormouse.h"
#include "shim/hooks/newer_types.h"
#include "tests/preload/expect.h"

// Beside the program.
#define BUILT_LIBRARY(name) (program_folder() + name).c_str()

namespace {

const std::vector<std::string>& rows() {
  static const std::vector<std::string> all = {
#define HOOK(name, ret, params, args, group) #name,
#include "shim/hooks/hooks.def"
  };
  return all;
}

bool is_row(const std::string& name) {
  return std::find(rows().begin(), rows().end(), name) != rows().end();
}

struct Place {
  std::string file;  // without its folder
  std::string symbol;
};

Place place_of(void* address) {
  Dl_info info{};
  if (dladdr(address, &info) == 0 || info.dli_saddr != address) return {};
  const std::string path = info.dli_fname;
  return {path.substr(path.rfind('/') + 1), info.dli_sname == nullptr ? "" : info.dli_sname};
}

bool is_ours(void* address, const std::string& symbol) {
  const Place place = place_of(address);
  return place.file.rfind("libdormouse", 0) == 0 && place.symbol == symbol;
}

void* library(const char* name, int flags = RTLD_NOW | RTLD_LOCAL) {
  void* handle = dlopen(name, flags);
  if (handle == nullptr) fail(std::string("dlopen of ") + name + ": " + dlerror());
  return handle;
}

using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t,
                                    CUdriverProcAddressQueryResult*);
using OldGetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t);
constexpr auto kUnwritten = static_cast<CUdriverProcAddressQueryResult>(77);

// --- Cases

void every_driver_row_by_dlsym() {
  void* cuda = library("libcuda.so.1");
  int found = 0;
  for (const std::string& row : rows()) {
    void* address = dlsym(cuda, row.c_str());
    if (address == nullptr && on_real_driver()) continue;  // an older driver
    EXPECT(is_ours(address, row), row);
    EXPECT(dlsym(cuda, row.c_str()) == address, "two equal lookups of " + row);
    ++found;
  }
  EXPECT(found > 100, "few functions were found");
}

// Without its version and stream suffix, as cuGetProcAddress takes it.
std::string base_name(std::string name) {
  for (const char* suffix : {"_ptsz", "_ptds", "_v2", "_v3", "_v4"}) {
    const std::size_t length = std::strlen(suffix);
    if (name.size() > length && name.compare(name.size() - length, length, suffix) == 0) {
      name.resize(name.size() - length);
    }
  }
  return name;
}

void every_driver_row_by_get_proc_address() {
  void* cuda = library("libcuda.so.1");
  auto get = reinterpret_cast<GetProcAddress>(dlsym(cuda, "cuGetProcAddress_v2"));
  EXPECT(is_ours(reinterpret_cast<void*>(get), "cuGetProcAddress_v2"), "cuGetProcAddress_v2");
  std::set<std::string> reached;
  for (const std::string& row : rows()) {
    for (int version : {2000, 3020, 4000, 7000, 8000, 10000, 11020, 11060, 12000, 12080, 13000}) {
      for (cuuint64_t flags : {CU_GET_PROC_ADDRESS_DEFAULT, CU_GET_PROC_ADDRESS_LEGACY_STREAM,
                               CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM}) {
        void* address = nullptr;
        CUdriverProcAddressQueryResult status = kUnwritten;
        const CUresult result = get(base_name(row).c_str(), &address, version, flags, &status);
        EXPECT(status != kUnwritten, "the status of " + row);
        if (result != CUDA_SUCCESS || address == nullptr) continue;
        const Place place = place_of(address);
        // What is in the table is ours, what is not (older forms) is the driver's.
        EXPECT(
            is_row(place.symbol) == (place.file.rfind("libdormouse", 0) == 0),
            row + " for " + std::to_string(version) + " is " + place.symbol + " in " + place.file);
        EXPECT(base_name(place.symbol) == base_name(row), place.symbol);
        reached.insert(place.symbol);
      }
    }
  }
  EXPECT(reached.size() > 90, "few functions were reached");
  for (const char* name :
       {"cuMemAlloc_v2", "cuLaunchKernel", "cuLaunchKernel_ptsz", "cuMemcpy_ptds",
        "cuMemFreeAsync_ptsz", "cuStreamBeginCapture_v2_ptsz"}) {
    EXPECT(reached.count(name) == 1, name);
  }
}

void get_proc_address_of_itself() {
  void* cuda = library("libcuda.so.1");
  auto get = reinterpret_cast<GetProcAddress>(dlsym(cuda, "cuGetProcAddress_v2"));
  auto old = reinterpret_cast<OldGetProcAddress>(dlsym(cuda, "cuGetProcAddress"));
  void* address = nullptr;
  EXPECT(get("cuGetProcAddress", &address, 12000, 0, nullptr) == CUDA_SUCCESS &&
             is_ours(address, "cuGetProcAddress_v2"),
         "for 12000");
  EXPECT(get("cuGetProcAddress", &address, 11030, 0, nullptr) == CUDA_SUCCESS &&
             is_ours(address, "cuGetProcAddress"),
         "for 11030");
  EXPECT(old("cuMemAlloc", &address, 3020, 0) == CUDA_SUCCESS && is_ours(address, "cuMemAlloc_v2"),
         "through the old one");
  CUdriverProcAddressQueryResult status = kUnwritten;
  address = &status;
  get("cuNoSuchFunction", &address, 12000, 0, &status);
  EXPECT(status == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND, "the status of a name that is not there");
  EXPECT(address == nullptr, "the address of a name that is not there");
}

void entry_points_of_the_runtime() {
  void* cudart = library("libcudart.so.13");
  using ByVersion = int (*)(const char*, void**, unsigned, unsigned long long, int*);
  using Latest = int (*)(const char*, void**, unsigned long long, int*);
  auto by_version = reinterpret_cast<ByVersion>(dlsym(cudart, "cudaGetDriverEntryPointByVersion"));
  auto latest = reinterpret_cast<Latest>(dlsym(cudart, "cudaGetDriverEntryPoint"));
  void* address = nullptr;
  int status = 77;
  EXPECT(by_version("cuMemCreate", &address, 12000, 0, &status) == 0 && status == 0 &&
             is_ours(address, "cuMemCreate"),
         "by version");
  EXPECT(by_version("cuMemAddressReserve", &address, 12000, 0, &status) == 0 &&
             place_of(address).file.rfind("libcuda.so", 0) == 0,
         "a function without a hook");
  EXPECT(latest("cuMemFree", &address, 0, &status) == 0 && is_ours(address, "cuMemFree_v2"),
         "the latest");
}

// Names that begin like CUDA's, and CUDA's names in libraries that are not CUDA's.
void other_libraries_keep_theirs() {
  void* cuda = library("libcuda.so.1");
  EXPECT(place_of(dlsym(cuda, "cuDriverGetVersion")).file.rfind("libcuda.so", 0) == 0,
         "a function of libcuda without a hook");
  EXPECT(place_of(dlsym(library("libcudart.so.13"), "cudaMalloc")).file.rfind("libcudart", 0) == 0,
         "a function of the runtime");
  void* other = library(BUILT_LIBRARY("libcudnn_like.so"));
  EXPECT(place_of(dlsym(other, "cudnnCreate")).file == "libcudnn_like.so", "cudnnCreate");
  EXPECT(place_of(dlsym(other, "cuMemAlloc_v2")).file == "libcudnn_like.so",
         "another library's own cuMemAlloc_v2");
}

// Where no libcuda is, its functions are not either, although the library defines them.
void nothing_without_cuda() {
  for (const std::string& row : rows()) {
    dlerror();
    EXPECT(dlsym(RTLD_DEFAULT, row.c_str()) == nullptr, row + " by default");
    EXPECT(dlerror() != nullptr, "the message for " + row);
    EXPECT(dlsym(RTLD_NEXT, row.c_str()) == nullptr, row + " next");
    EXPECT(dlsym(dlopen(nullptr, RTLD_NOW), row.c_str()) == nullptr, row + " in all");
  }
  library("libcuda.so.1");  // not for everyone to see
  EXPECT(dlsym(RTLD_DEFAULT, "cuInit") == nullptr, "a local libcuda by default");
}

void default_order_with_cuda() {
  library("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  EXPECT(is_ours(dlsym(RTLD_DEFAULT, "cuMemAlloc_v2"), "cuMemAlloc_v2"), "by default");
  EXPECT(is_ours(dlsym(dlopen(nullptr, RTLD_NOW), "cuMemAlloc_v2"), "cuMemAlloc_v2"), "in all");
  EXPECT(is_ours(dlsym(RTLD_NEXT, "cuMemAlloc_v2"), "cuMemAlloc_v2"), "next after the executable");
}

void errors_are_dlsyms_own() {
  void* cuda = library("libcuda.so.1");
  EXPECT(dlsym(cuda, "cuNoSuchFunction") == nullptr, "a function that is not there");
  const char* message = dlerror();
  EXPECT(message != nullptr && std::strstr(message, "cuNoSuchFunction") != nullptr, "its message");
  EXPECT(dlerror() == nullptr, "the message stays");
  void* asker = library(BUILT_LIBRARY("libasker.so"));
  auto ask = reinterpret_cast<void* (*)(const char*)>(dlsym(asker, "ask_next"));
  EXPECT(ask("cuNoSuchFunction") == nullptr, "a function that is nowhere");
  message = dlerror();
  EXPECT(message != nullptr && std::strstr(message, "libasker.so") != nullptr, "who asked");
  EXPECT(dlsym(cuda, "cuInit") != nullptr && dlerror() == nullptr, "a message without an error");
}

// A function that neither table has; what is said of it is checked by the test.
void an_unknown_function_is_named() {
  void* cuda = library("libcuda.so.1");
  auto get = reinterpret_cast<GetProcAddress>(dlsym(cuda, "cuGetProcAddress_v2"));
  auto init = reinterpret_cast<CUresult (*)(unsigned)>(dlsym(cuda, "cuInit"));
  for (int i = 0; i < 2; ++i) {
    void* address = dlsym(cuda, "cuMemCompactAsync");
    EXPECT(place_of(address).file.rfind("libcuda.so", 0) == 0, "the driver's own by dlsym");
    void* same = nullptr;
    EXPECT(get("cuMemCompactAsync", &same, 13000, 0, nullptr) == CUDA_SUCCESS && same == address,
           "the driver's own by cuGetProcAddress");
    // None of these is anything to speak of: not there, left to the driver, of before CUDA 4.
    EXPECT(dlsym(cuda, "cuMemNoSuchFunction") == nullptr, "a function that is not there");
    dlsym(cuda, "cuMemAddressReserve");
    dlsym(cuda, "cuMemAlloc");
    EXPECT(init(0) == CUDA_SUCCESS, "cuInit");
  }
}

struct Generated {
  const char* name;
  CUresult (*call)(void* function);
};

template <typename... Arguments>
CUresult call_with_nothing(CUresult (*function)(Arguments...)) {
  return function(Arguments{}...);
}

const std::vector<Generated>& gate_passes() {
#define PASS(name, params)                                                     \
  {#name, [](void* function) {                                                 \
     return call_with_nothing(reinterpret_cast<CUresult(*) params>(function)); \
   }},
#define NO_PASS(name, params)
#define PASS_OF_launch PASS
#define PASS_OF_copy PASS
#define PASS_OF_memset PASS
#define PASS_OF_address PASS
#define PASS_OF_capture PASS
#define PASS_OF_allocate NO_PASS
#define PASS_OF_free NO_PASS
#define PASS_OF_query NO_PASS
#define PASS_OF_context NO_PASS
#define PASS_OF_mapped NO_PASS
#define PASS_OF_room NO_PASS
#define PASS_OF_init NO_PASS
#define PASS_OF_entry NO_PASS
#define HOOK(name, ret, params, args, group) PASS_OF_##group(name, params)
  static const std::vector<Generated> all = {
#include "shim/hooks/hooks.def"
  };
  return all;
}

template <typename Driver>
void make_context(Driver driver) {
  CUcontext context = nullptr;
  EXPECT(reinterpret_cast<CUresult (*)(unsigned)>(driver("cuInit"))(0) == CUDA_SUCCESS, "cuInit");
  EXPECT(reinterpret_cast<CUresult (*)(CUcontext*, CUdevice)>(driver("cuDevicePrimaryCtxRetain"))(
             &context, 0) == CUDA_SUCCESS,
         "a context");
  EXPECT(
      reinterpret_cast<CUresult (*)(CUcontext)>(driver("cuCtxSetCurrent"))(context) == CUDA_SUCCESS,
      "the current context");
}

// With DORMOUSE_GATE=fail: the gate is what refuses, whatever the arguments. What ends a capture is
// never refused.
void every_gate_pass_is_refused_while_memory_sleeps() {
  void* cuda = library("libcuda.so.1");
  const auto driver = [&](const char* name) { return dlsym(cuda, name); };
  CUdeviceptr memory = 0;
  make_context(driver);
  EXPECT(dormouse_region_begin("weights") == DORMOUSE_OK, "a region");
  EXPECT(reinterpret_cast<CUresult (*)(CUdeviceptr*, size_t)>(driver("cuMemAlloc_v2"))(
             &memory, 1 << 20) == CUDA_SUCCESS,
         "memory");
  EXPECT(dormouse_region_end() == DORMOUSE_OK, "its end");
  EXPECT(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE) == DORMOUSE_OK, "the sleep");
  int refused = 0;
  for (const Generated& pass : gate_passes()) {
    void* function = driver(pass.name);
    if (function == nullptr && on_real_driver()) continue;  // an older driver
    const std::string name = pass.name;
    const bool ends_capture =
        name.rfind("cuStreamEndCapture", 0) == 0 || name.rfind("cuStreamDestroy", 0) == 0;
    EXPECT((pass.call(function) == CUDA_ERROR_NOT_PERMITTED) != ends_capture, name);
    if (!ends_capture) ++refused;
  }
  EXPECT(refused > 150, "few functions were tried");
  EXPECT(dormouse_wake(nullptr, 0) == DORMOUSE_OK, "the wake");
}

const std::vector<Generated>& calls_that_need_memory() {
#define NEEDS_MEMORY_launch PASS
#define NEEDS_MEMORY_copy NO_PASS
#define NEEDS_MEMORY_memset PASS
#define NEEDS_MEMORY_address PASS
#define NEEDS_MEMORY_capture NO_PASS
#define NEEDS_MEMORY_allocate PASS
#define NEEDS_MEMORY_free NO_PASS
#define NEEDS_MEMORY_query NO_PASS
#define NEEDS_MEMORY_context NO_PASS
#define NEEDS_MEMORY_mapped NO_PASS
#define NEEDS_MEMORY_room PASS
#define NEEDS_MEMORY_init NO_PASS
#define NEEDS_MEMORY_entry NO_PASS
#define HOOK(name, ret, params, args, group) NEEDS_MEMORY_##group(name, params)
  static const std::vector<Generated> all = {
#include "shim/hooks/hooks.def"
  };
  return all;
}

// What pools keep without using it counts as free, so that no call of the program may miss it.
void every_call_that_needs_memory_gets_what_pools_keep() {
  void* cuda = library("libcuda.so.1");
  const auto driver = [&](const char* name) { return dlsym(cuda, name); };
  const auto inject =
      reinterpret_cast<int (*)(const char*, unsigned long long, int)>(driver("simgpu_fail_at"));
  const auto clear = reinterpret_cast<void (*)()>(driver("simgpu_clear_failures"));
  if (inject == nullptr) return;  // a device is hard to fill to the last byte
  const auto allocate =
      reinterpret_cast<CUresult (*)(CUdeviceptr*, size_t)>(driver("cuMemAlloc_v2"));
  const auto free = reinterpret_cast<CUresult (*)(CUdeviceptr)>(driver("cuMemFree_v2"));
  make_context(driver);
  int tried = 0;
  for (const Generated& each : calls_that_need_memory()) {
    CUdeviceptr memory = 0;
    EXPECT(dormouse_region_begin("weights") == DORMOUSE_OK, "a region");
    EXPECT(allocate(&memory, 1 << 20) == CUDA_SUCCESS, "memory");
    EXPECT(dormouse_region_end() == DORMOUSE_OK, "its end");
    EXPECT(free(memory) == CUDA_SUCCESS, "memory that the pool keeps");
    void* function = driver(each.name);
    EXPECT(inject(each.name, 1, CUDA_ERROR_OUT_OF_MEMORY) == 0, each.name);
    EXPECT(each.call(function) != CUDA_ERROR_OUT_OF_MEMORY, each.name);
    clear();
    ++tried;
  }
  EXPECT(tried > 50, "few functions were tried");
}

void many_threads() {
  void* cuda = library("libcuda.so.1");
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        EXPECT(is_ours(dlsym(cuda, "cuMemAlloc_v2"), "cuMemAlloc_v2"), "in a thread");
        EXPECT(dlsym(RTLD_DEFAULT, "malloc") != nullptr, "malloc");
        dlclose(dlopen(BUILT_LIBRARY("libanswerer.so"), RTLD_NOW));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  return run_case(argc, argv,
                  {
                      CASE(every_driver_row_by_dlsym),
                      CASE(every_driver_row_by_get_proc_address),
                      CASE(get_proc_address_of_itself),
                      CASE(entry_points_of_the_runtime),
                      CASE(other_libraries_keep_theirs),
                      CASE(nothing_without_cuda),
                      CASE(default_order_with_cuda),
                      CASE(errors_are_dlsyms_own),
                      CASE(an_unknown_function_is_named),
                      CASE(every_gate_pass_is_refused_while_memory_sleeps),
                      CASE(every_call_that_needs_memory_gets_what_pools_keep),
                      CASE(many_threads),
                  });
}
