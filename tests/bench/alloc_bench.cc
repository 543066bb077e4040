// What calls cost: outside any region, to compare with a run of this same program without the
// library; and allocation inside a region against the driver's own. Finds libcuda and libcudart at
// run time, real or simulated, and the library's C interface if it is preloaded; what is missing is
// left out. The time of one call is the counter `call_ns`.
//
//   outside/...        calls of a program outside any region
//   malloc_free/...    cudaMalloc + cudaFree outside, one block at a time ("again") or, "first",
//                      several blocks that are new memory each time
//   region/...         the same inside a region; begin and end of a region
//   async/...          cuMemAllocAsync + cuMemFreeAsync on one stream, outside and inside
//   held/...           what blocks of many sizes take of the device over their own bytes:
//   `over_mib`
//                      and `over_percent` of it, beside the time of a call
#include <benchmark/benchmark.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr int kSkipped = 77;

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

struct Driver {
  decltype(&cuInit) init = nullptr;
  decltype(&cuDevicePrimaryCtxRetain) retain = nullptr;
  decltype(&cuCtxSetCurrent) set_current = nullptr;
  CUresult (*synchronize)() = nullptr;
  decltype(&cuMemAlloc_v2) alloc = nullptr;
  decltype(&cuMemFree_v2) free = nullptr;
  decltype(&cuMemAllocAsync) alloc_async = nullptr;
  decltype(&cuMemFreeAsync) free_async = nullptr;
  decltype(&cuMemsetD8Async) memset_async = nullptr;
  decltype(&cuMemcpyDtoDAsync_v2) copy_async = nullptr;
  decltype(&cuPointerGetAttribute) pointer_attribute = nullptr;
  decltype(&cuMemGetInfo_v2) memory_info = nullptr;
  decltype(&cuModuleLoadData) load_module = nullptr;
  decltype(&cuModuleGetFunction) get_function = nullptr;
  decltype(&cuLaunchKernel) launch = nullptr;
};
Driver cu;

struct Runtime {
  cudaError_t (*malloc)(void**, size_t) = nullptr;
  cudaError_t (*free)(void*) = nullptr;
  cudaError_t (*memset_async)(void*, int, size_t, cudaStream_t) = nullptr;
};
Runtime rt;

int (*region_begin)(const char*) = nullptr;
int (*region_end)() = nullptr;

// As the dynamic linker binds a program's calls: a preloaded definition comes first.
bool load_runtime() {
  for (const char* name : {"libcudart.so.13", "libcudart.so.12"}) {
    if (dlopen(name, RTLD_NOW | RTLD_GLOBAL) != nullptr) {
      return find(RTLD_DEFAULT, "cudaMalloc", rt.malloc) &&
             find(RTLD_DEFAULT, "cudaFree", rt.free) &&
             find(RTLD_DEFAULT, "cudaMemsetAsync", rt.memset_async);
    }
  }
  return false;
}

void load_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    std::fprintf(stderr, "no CUDA driver: %s\n", dlerror());
    std::exit(kSkipped);
  }
  const bool all =
      find(library, "cuInit", cu.init) && find(library, "cuDevicePrimaryCtxRetain", cu.retain) &&
      find(library, "cuCtxSetCurrent", cu.set_current) &&
      find(library, "cuCtxSynchronize", cu.synchronize) &&
      find(library, "cuMemAlloc_v2", cu.alloc) && find(library, "cuMemFree_v2", cu.free) &&
      find(library, "cuMemAllocAsync", cu.alloc_async) &&
      find(library, "cuMemFreeAsync", cu.free_async) &&
      find(library, "cuMemsetD8Async", cu.memset_async) &&
      find(library, "cuMemcpyDtoDAsync_v2", cu.copy_async) &&
      find(library, "cuPointerGetAttribute", cu.pointer_attribute) &&
      find(library, "cuMemGetInfo_v2", cu.memory_info) &&
      find(library, "cuModuleLoadData", cu.load_module) &&
      find(library, "cuModuleGetFunction", cu.get_function) &&
      find(library, "cuLaunchKernel", cu.launch);
  CUcontext context = nullptr;
  if (!all) {
    std::fprintf(stderr, "the driver lacks a function\n");
    std::exit(1);
  }
  if (cu.init(0) != CUDA_SUCCESS || cu.retain(&context, 0) != CUDA_SUCCESS ||
      cu.set_current(context) != CUDA_SUCCESS) {
    std::fprintf(stderr, "no GPU\n");
    std::exit(kSkipped);
  }
}

double nanoseconds(Clock::duration time) {
  return std::chrono::duration<double, std::nano>(time).count();
}

// Calls `call` in batches that fit into a stream's queue and waits between them, outside the time.
template <typename Call>
void time_calls(benchmark::State& state, Call call) {
  constexpr int kBatch = 256;
  double total = 0;
  std::int64_t calls = 0;
  for (auto _ : state) {
    const auto begin = Clock::now();
    for (int i = 0; i < kBatch; ++i) {
      if (!call()) {
        state.SkipWithError("the call failed");
        return;
      }
    }
    const auto time = Clock::now() - begin;
    cu.synchronize();
    state.SetIterationTime(nanoseconds(time) / 1e9);
    total += nanoseconds(time);
    calls += kBatch;
  }
  state.counters["call_ns"] = total / static_cast<double>(calls);
}

class DeviceBlock {
 public:
  DeviceBlock() { cu.alloc(&address_, 2 * kMiB); }
  ~DeviceBlock() { cu.free(address_); }
  CUdeviceptr address() const { return address_; }

 private:
  CUdeviceptr address_ = 0;
};

void memset_outside(benchmark::State& state) {
  const DeviceBlock block;
  time_calls(state,
             [&] { return cu.memset_async(block.address(), 1, 64, nullptr) == CUDA_SUCCESS; });
}

void copy_outside(benchmark::State& state) {
  const DeviceBlock block;
  time_calls(state, [&] {
    return cu.copy_async(block.address(), block.address() + kMiB, 64, nullptr) == CUDA_SUCCESS;
  });
}

void runtime_memset_outside(benchmark::State& state) {
  const DeviceBlock block;
  time_calls(state, [&] {
    return rt.memset_async(reinterpret_cast<void*>(block.address()), 1, 64, nullptr) == cudaSuccess;
  });
}

void launch_outside(benchmark::State& state) {
  static constexpr char kEmpty[] =
      ".version 6.0\n.target sm_70\n.address_size 64\n.visible .entry empty() { ret; }\n";
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  if (cu.load_module(&module, kEmpty) != CUDA_SUCCESS ||
      cu.get_function(&function, module, "empty") != CUDA_SUCCESS) {
    state.SkipWithError("this driver has no such kernel");
    return;
  }
  time_calls(state, [&] {
    return cu.launch(function, 1, 1, 1, 32, 1, 1, 0, nullptr, nullptr, nullptr) == CUDA_SUCCESS;
  });
}

void pointer_attribute_outside(benchmark::State& state) {
  const DeviceBlock block;
  unsigned int type = 0;
  time_calls(state, [&] {
    return cu.pointer_attribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, block.address()) ==
           CUDA_SUCCESS;
  });
}

void memory_info_outside(benchmark::State& state) {
  std::size_t free = 0;
  std::size_t total = 0;
  time_calls(state, [&] { return cu.memory_info(&free, &total) == CUDA_SUCCESS; });
}

// 512 bytes whose 2 MiB page is held all the time: the cheapest allocation that a driver has.
void small_driver_pair_outside(benchmark::State& state) {
  CUdeviceptr held = 0;
  cu.alloc(&held, 512);
  time_calls(state, [&] {
    CUdeviceptr address = 0;
    return cu.alloc(&address, 512) == CUDA_SUCCESS && cu.free(address) == CUDA_SUCCESS;
  });
  cu.free(held);
}

void small_runtime_pair_outside(benchmark::State& state) {
  void* held = nullptr;
  rt.malloc(&held, 512);
  time_calls(state, [&] {
    void* address = nullptr;
    return rt.malloc(&address, 512) == cudaSuccess && rt.free(address) == cudaSuccess;
  });
  rt.free(held);
}

struct Region {
  explicit Region(bool wanted) : inside(wanted && region_begin("bench") == 0) {}
  ~Region() {
    if (inside) region_end();
  }
  const bool inside;
};

void report_pair(benchmark::State& state, double alloc_ns, double free_ns, std::int64_t pairs) {
  const auto count = static_cast<double>(pairs);
  state.counters["alloc_ns"] = alloc_ns / count;
  state.counters["free_ns"] = free_ns / count;
  state.counters["call_ns"] = (alloc_ns + free_ns) / count;
}

// One block, allocated and freed again and again.
void pair_again(benchmark::State& state, std::size_t bytes, bool inside) {
  const Region region(inside);
  void* address = nullptr;
  if (rt.malloc(&address, bytes) != cudaSuccess) {
    state.SkipWithError("not enough memory");
    return;
  }
  rt.free(address);
  double alloc_ns = 0;
  double free_ns = 0;
  for (auto _ : state) {
    const auto begin = Clock::now();
    const bool allocated = rt.malloc(&address, bytes) == cudaSuccess;
    const auto middle = Clock::now();
    const bool freed = allocated && rt.free(address) == cudaSuccess;
    const auto end = Clock::now();
    if (!freed) {
      state.SkipWithError("the call failed");
      return;
    }
    state.SetIterationTime(nanoseconds(end - begin) / 1e9);
    alloc_ns += nanoseconds(middle - begin);
    free_ns += nanoseconds(end - middle);
  }
  report_pair(state, alloc_ns, free_ns, state.iterations());
}

// Blocks that all live at once and are then freed. With DORMOUSE_RETAIN=0 what is freed goes back
// to the GPU, so that each round gets new memory.
void pair_first(benchmark::State& state, std::size_t bytes, bool inside) {
  const Region region(inside);
  const std::size_t count = bytes >= 512 * kMiB ? 4 : bytes >= 16 * kMiB ? 16 : 64;
  std::vector<void*> blocks(count);
  double alloc_ns = 0;
  double free_ns = 0;
  for (auto _ : state) {
    std::size_t made = 0;
    const auto begin = Clock::now();
    while (made < count && rt.malloc(&blocks[made], bytes) == cudaSuccess) ++made;
    const auto middle = Clock::now();
    bool freed = true;
    for (std::size_t i = 0; i < made; ++i) freed = rt.free(blocks[i]) == cudaSuccess && freed;
    const auto end = Clock::now();
    if (made < count || !freed) {
      state.SkipWithError(made < count ? "not enough memory" : "cudaFree failed");
      return;
    }
    state.SetIterationTime(nanoseconds(end - begin) / 1e9);
    alloc_ns += nanoseconds(middle - begin);
    free_ns += nanoseconds(end - middle);
  }
  report_pair(state, alloc_ns, free_ns, state.iterations() * static_cast<std::int64_t>(count));
}

// Stream-ordered memory, allocated and freed again and again with nothing that waits between.
void async_pair(benchmark::State& state, std::size_t bytes, bool inside) {
  const Region region(inside);
  time_calls(state, [&] {
    CUdeviceptr address = 0;
    return cu.alloc_async(&address, bytes, nullptr) == CUDA_SUCCESS &&
           cu.free_async(address, nullptr) == CUDA_SUCCESS;
  });
}

// Blocks of these sizes in turn, as many as `total` holds.
void held(benchmark::State& state, const std::vector<std::size_t>& sizes, std::size_t total) {
  double over = 0;
  double allocated = 0;
  double calls = 0;
  double spent = 0;
  for (auto _ : state) {
    const Region region(true);
    std::vector<CUdeviceptr> blocks;
    std::size_t before = 0;
    std::size_t after = 0;
    std::size_t all = 0;
    cu.memory_info(&before, &all);
    std::size_t bytes = 0;
    bool made = true;
    const auto begin = Clock::now();
    while (made && bytes < total) {
      CUdeviceptr address = 0;
      const std::size_t size = sizes[blocks.size() % sizes.size()];
      made = cu.alloc(&address, size) == CUDA_SUCCESS;
      if (!made) break;
      blocks.push_back(address);
      bytes += size;
    }
    const auto time = Clock::now() - begin;
    cu.memory_info(&after, &all);
    for (CUdeviceptr block : blocks) cu.free(block);
    cu.synchronize();
    if (!made) {
      state.SkipWithError("not enough memory");
      return;
    }
    state.SetIterationTime(nanoseconds(time) / 1e9);
    over = static_cast<double>(before) - static_cast<double>(after) - static_cast<double>(bytes);
    allocated = static_cast<double>(bytes);
    calls += static_cast<double>(blocks.size());
    spent += nanoseconds(time);
  }
  state.counters["call_ns"] = spent / calls;
  state.counters["over_mib"] = over / static_cast<double>(kMiB);
  state.counters["over_percent"] = over / allocated * 100;
}

void begin_and_end(benchmark::State& state) {
  time_calls(state, [] { return region_begin("bench") == 0 && region_end() == 0; });
}

void add_outside(bool runtime) {
  const auto add = [](const char* name, void (*run)(benchmark::State&)) {
    benchmark::RegisterBenchmark((std::string("outside/") + name).c_str(), run)
        ->UseManualTime()
        ->MinTime(0.1);
  };
  add("pointer_attribute", pointer_attribute_outside);
  add("memory_info", memory_info_outside);
  add("memset", memset_outside);
  add("copy", copy_outside);
  add("launch", launch_outside);
  add("driver_alloc_free_512", small_driver_pair_outside);
  if (!runtime) return;
  add("runtime_memset", runtime_memset_outside);
  add("runtime_malloc_free_512", small_runtime_pair_outside);
}

void add_pairs(const std::string& prefix, bool inside) {
  for (const auto& [label, bytes] : std::vector<std::pair<std::string, std::size_t>>{
           {"2MiB", 2 * kMiB}, {"20MiB", 20 * kMiB}, {"1GiB", 1024 * kMiB}}) {
    const std::size_t size = bytes;
    benchmark::RegisterBenchmark(
        (prefix + "first/" + label).c_str(),
        [size, inside](benchmark::State& state) { pair_first(state, size, inside); })
        ->UseManualTime()
        ->MinTime(0.05);
    benchmark::RegisterBenchmark(
        (prefix + "again/" + label).c_str(),
        [size, inside](benchmark::State& state) { pair_again(state, size, inside); })
        ->UseManualTime()
        ->MinTime(0.05);
  }
}

void add_async(const std::string& prefix, bool inside) {
  for (const auto& [label, bytes] : std::vector<std::pair<std::string, std::size_t>>{
           {"512", 512}, {"2MiB", 2 * kMiB}, {"20MiB", 20 * kMiB}}) {
    const std::size_t size = bytes;
    benchmark::RegisterBenchmark(
        (prefix + label).c_str(),
        [size, inside](benchmark::State& state) { async_pair(state, size, inside); })
        ->UseManualTime()
        ->MinTime(0.05);
  }
}

void add_held() {
  const auto add = [](const char* name, std::vector<std::size_t> sizes, std::size_t total) {
    benchmark::RegisterBenchmark(
        (std::string("held/") + name).c_str(),
        [sizes = std::move(sizes), total](benchmark::State& state) { held(state, sizes, total); })
        ->UseManualTime()
        ->Iterations(1);
  };
  add("small", {512, 4096, 16384, 300000}, 256 * kMiB);
  add("odd", {5 * kMiB, 9 * kMiB, 17 * kMiB}, 1024 * kMiB);
  add("large", {20 * kMiB, 64 * kMiB, 112 * kMiB}, 2048 * kMiB);
  add("mixed", {4096, 20 * kMiB, 5 * kMiB, 300000, 2 * kMiB, 64 * kMiB}, 2048 * kMiB);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  load_driver();
  const bool runtime = load_runtime();
  const bool library = find(RTLD_DEFAULT, "dormouse_region_begin", region_begin) &&
                       find(RTLD_DEFAULT, "dormouse_region_end", region_end);
  benchmark::AddCustomContext("library", library ? "preloaded" : "absent");
  add_outside(runtime);
  if (runtime) {
    rt.free(nullptr);  // the runtime's own start
    add_pairs("malloc_free/", false);
    if (library) add_pairs("region/malloc_free/", true);
  }
  add_async("async/outside/", false);
  if (library) {
    add_async("async/region/", true);
    add_held();
    benchmark::RegisterBenchmark("region/begin_end", begin_and_end)->UseManualTime()->MinTime(0.05);
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
