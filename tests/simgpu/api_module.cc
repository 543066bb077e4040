// Exported functions of the simulated driver: modules, libraries, kernels and their launch.
#include <fcntl.h>

#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "tests/simgpu/api_support.h"
#include "tests/simgpu/kernels.h"
#include "tests/simgpu/ptx.h"

namespace simgpu {
namespace {

struct Module;

struct Function {
  Module* module;
  Context* context;  // null: a library's, which belongs to no context
  PtxEntry entry;
  Kernel kernel;  // empty: the simulation does not know it
};

// A module or a library; their kernels may be launched alike.
struct Module {
  std::vector<std::unique_ptr<Function>> functions;
};

// All that is loaded. Thread-safe.
class Loaded {
 public:
  Module* add(std::unique_ptr<Module> module) {
    std::lock_guard lock(mutex_);
    modules_.push_back(std::move(module));
    return modules_.back().get();
  }

  bool remove(void* handle) {
    std::lock_guard lock(mutex_);
    return std::erase_if(modules_, [&](const auto& module) { return module.get() == handle; }) != 0;
  }

  // A loaded module from its handle; null if it is none.
  Module* module(void* handle) {
    std::lock_guard lock(mutex_);
    for (const auto& module : modules_) {
      if (module.get() == handle) return module.get();
    }
    return nullptr;
  }

  // A copy of a loaded function, which outlives an unload.
  bool function(void* handle, Function* out) {
    std::lock_guard lock(mutex_);
    for (const auto& module : modules_) {
      for (const auto& function : module->functions) {
        if (function.get() != handle) continue;
        *out = *function;
        return true;
      }
    }
    return false;
  }

 private:
  std::mutex mutex_;  // protects modules_
  std::vector<std::unique_ptr<Module>> modules_;
};

Loaded& loaded() {
  static auto* instance = new Loaded;
  return *instance;
}

CUresult load(const void* image, Context* context, Module** out) {
  SIMGPU_REQUIRE(image != nullptr);
  const char* text = static_cast<const char*>(image);
  constexpr unsigned char kFatbin[] = {0x50, 0xed, 0x55, 0xba};
  // Compiled code is for a real GPU.
  if (std::memcmp(text, "\177ELF", 4) == 0 || std::memcmp(text, kFatbin, 4) == 0) {
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  std::vector<PtxEntry> entries;
  if (!parse_ptx(text, &entries)) return CUDA_ERROR_INVALID_IMAGE;
  auto module = std::make_unique<Module>();
  bool any = entries.empty();
  for (PtxEntry& entry : entries) {
    Kernel kernel = find_kernel(entry.name);
    any = any || kernel;
    module->functions.push_back(std::make_unique<Function>(
        Function{module.get(), context, std::move(entry), std::move(kernel)}));
  }
  if (!any) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  *out = loaded().add(std::move(module));
  return CUDA_SUCCESS;
}

CUresult load_in_context(CUmodule* out, const void* image) {
  SIMGPU_REQUIRE(out != nullptr);
  Context* context = nullptr;
  SIMGPU_TRY(simulation().current(&context));
  Module* module = nullptr;
  SIMGPU_TRY(load(image, context, &module));
  *out = reinterpret_cast<CUmodule>(module);
  return CUDA_SUCCESS;
}

CUresult find_in(Module* module, const char* name, void** out) {
  SIMGPU_REQUIRE(name != nullptr && out != nullptr);
  if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  for (const auto& function : module->functions) {
    if (function->entry.name != name || !function->kernel) continue;
    *out = function.get();
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}

// The arguments of one launch, copied when it is asked for.
struct Arguments {
  std::vector<std::byte> bytes;
  std::vector<const void*> pointers;
  std::vector<size_t> sizes;
};

CUresult copy_arguments(const PtxEntry& entry, void** params, void** extra, Arguments* out) {
  const std::byte* packed = nullptr;
  size_t packed_size = 0;
  SIMGPU_REQUIRE(params == nullptr || extra == nullptr);
  for (void** item = extra; item != nullptr && *item != CU_LAUNCH_PARAM_END; item += 2) {
    if (*item == CU_LAUNCH_PARAM_BUFFER_POINTER) packed = static_cast<const std::byte*>(item[1]);
    if (*item == CU_LAUNCH_PARAM_BUFFER_SIZE) packed_size = *static_cast<const size_t*>(item[1]);
  }
  bool given = params != nullptr || (packed != nullptr && packed_size >= entry.packed_size);
  SIMGPU_REQUIRE(given || entry.parameters.empty());
  out->bytes.resize(entry.packed_size);
  for (size_t i = 0; i < entry.parameters.size(); ++i) {
    const PtxParameter& parameter = entry.parameters[i];
    const void* from = params != nullptr ? params[i] : packed + parameter.offset;
    std::byte* to = out->bytes.data() + parameter.offset;
    std::memcpy(to, from, parameter.size);
    out->pointers.push_back(to);
    out->sizes.push_back(parameter.size);
  }
  return CUDA_SUCCESS;
}

CUresult launch(CUfunction handle, const CUlaunchConfig& config, void** params, void** extra) {
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(config.hStream, &context, &stream));
  Function function;
  if (!loaded().function(handle, &function)) return CUDA_ERROR_INVALID_HANDLE;
  Context* owner = function.context;
  if (owner != nullptr && owner != stream->context()) return CUDA_ERROR_INVALID_HANDLE;
  size_t threads = size_t{config.blockDimX} * config.blockDimY * config.blockDimZ;
  SIMGPU_REQUIRE(config.gridDimX != 0 && config.gridDimY != 0 && config.gridDimZ != 0);
  SIMGPU_REQUIRE(threads != 0 && threads <= 1024 && config.blockDimZ <= 64);
  SIMGPU_REQUIRE(config.gridDimY <= 65535 && config.gridDimZ <= 65535);
  auto arguments = std::make_shared<Arguments>();
  SIMGPU_TRY(copy_arguments(function.entry, params, extra, arguments.get()));
  Work work;
  work.type = CU_GRAPH_NODE_TYPE_KERNEL;
  work.kernel.func = handle;
  work.kernel.gridDimX = config.gridDimX;
  work.kernel.gridDimY = config.gridDimY;
  work.kernel.gridDimZ = config.gridDimZ;
  work.kernel.blockDimX = config.blockDimX;
  work.kernel.blockDimY = config.blockDimY;
  work.kernel.blockDimZ = config.blockDimZ;
  work.kernel.sharedMemBytes = config.sharedMemBytes;
  work.action = [config, arguments, kernel = function.kernel] {
    simgpu_launch description = {{config.gridDimX, config.gridDimY, config.gridDimZ},
                                 {config.blockDimX, config.blockDimY, config.blockDimZ},
                                 config.sharedMemBytes,
                                 static_cast<unsigned>(arguments->pointers.size()),
                                 arguments->pointers.data(),
                                 arguments->sizes.data()};
    kernel(description);
    return CUDA_SUCCESS;
  };
  return simulation().submit(stream, std::move(work), nullptr);
}

CUresult function_attribute(CUfunction_attribute attribute, int* value) {
  SIMGPU_REQUIRE(value != nullptr && attribute >= 0 && attribute < CU_FUNC_ATTRIBUTE_MAX);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = 1024;
      break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      *value = 90;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

SIMGPU_API CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
  SIMGPU_ENTER(cuModuleLoadData);
  return load_in_context(module, image);
}

SIMGPU_API CUresult CUDAAPI cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int,
                                               CUjit_option*, void**) {
  SIMGPU_ENTER(cuModuleLoadDataEx);
  return load_in_context(module, image);
}

SIMGPU_API CUresult CUDAAPI cuModuleLoadFatBinary(CUmodule* module, const void* fatCubin) {
  SIMGPU_ENTER(cuModuleLoadFatBinary);
  return load_in_context(module, fatCubin);
}

SIMGPU_API CUresult CUDAAPI cuModuleLoad(CUmodule* module, const char* fname) {
  SIMGPU_ENTER(cuModuleLoad);
  SIMGPU_REQUIRE(fname != nullptr);
  std::ifstream file(fname, std::ios::binary);
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::stringstream text;
  text << file.rdbuf();
  return load_in_context(module, text.str().c_str());
}

SIMGPU_API CUresult CUDAAPI cuModuleUnload(CUmodule hmod) {
  SIMGPU_ENTER(cuModuleUnload);
  return loaded().remove(hmod) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

SIMGPU_API CUresult CUDAAPI cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
  SIMGPU_ENTER(cuModuleGetLoadingMode);
  SIMGPU_REQUIRE(mode != nullptr);
  *mode = CU_MODULE_EAGER_LOADING;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuModuleGetFunction(CUfunction* hfunc, CUmodule hmod,
                                                const char* name) {
  SIMGPU_ENTER(cuModuleGetFunction);
  return find_in(loaded().module(hmod), name, reinterpret_cast<void**>(hfunc));
}

SIMGPU_API CUresult CUDAAPI cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule hmod,
                                                 const char* name) {
  SIMGPU_ENTER(cuModuleGetGlobal);
  SIMGPU_REQUIRE(name != nullptr);
  if (loaded().module(hmod) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return CUDA_ERROR_NOT_FOUND;  // variables of modules are not simulated
}

SIMGPU_API CUresult CUDAAPI cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*,
                                              void**, unsigned int, CUlibraryOption*, void**,
                                              unsigned int) {
  SIMGPU_ENTER(cuLibraryLoadData);
  SIMGPU_REQUIRE(library != nullptr);
  Module* module = nullptr;
  SIMGPU_TRY(load(code, nullptr, &module));
  *library = reinterpret_cast<CUlibrary>(module);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuLibraryUnload(CUlibrary library) {
  SIMGPU_ENTER(cuLibraryUnload);
  return loaded().remove(library) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

SIMGPU_API CUresult CUDAAPI cuLibraryGetKernel(CUkernel* pKernel, CUlibrary library,
                                               const char* name) {
  SIMGPU_ENTER(cuLibraryGetKernel);
  return find_in(loaded().module(library), name, reinterpret_cast<void**>(pKernel));
}

SIMGPU_API CUresult CUDAAPI cuLibraryGetModule(CUmodule* pMod, CUlibrary library) {
  SIMGPU_ENTER(cuLibraryGetModule);
  SIMGPU_REQUIRE(pMod != nullptr);
  if (loaded().module(library) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  *pMod = reinterpret_cast<CUmodule>(library);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuKernelGetFunction(CUfunction* pFunc, CUkernel kernel) {
  SIMGPU_ENTER(cuKernelGetFunction);
  SIMGPU_REQUIRE(pFunc != nullptr);
  Function function;
  if (!loaded().function(kernel, &function)) return CUDA_ERROR_INVALID_HANDLE;
  *pFunc = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuKernelGetLibrary(CUlibrary* pLib, CUkernel kernel) {
  SIMGPU_ENTER(cuKernelGetLibrary);
  SIMGPU_REQUIRE(pLib != nullptr);
  Function function;
  if (!loaded().function(kernel, &function)) return CUDA_ERROR_INVALID_HANDLE;
  *pLib = reinterpret_cast<CUlibrary>(function.module);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuFuncGetModule(CUmodule* hmod, CUfunction hfunc) {
  SIMGPU_ENTER(cuFuncGetModule);
  SIMGPU_REQUIRE(hmod != nullptr);
  Function function;
  if (!loaded().function(hfunc, &function)) return CUDA_ERROR_INVALID_HANDLE;
  *hmod = reinterpret_cast<CUmodule>(function.module);
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuFuncGetAttribute(int* pi, CUfunction_attribute attrib,
                                               CUfunction hfunc) {
  SIMGPU_ENTER(cuFuncGetAttribute);
  Function function;
  if (!loaded().function(hfunc, &function)) return CUDA_ERROR_INVALID_HANDLE;
  return function_attribute(attrib, pi);
}

SIMGPU_API CUresult CUDAAPI cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int) {
  SIMGPU_ENTER(cuFuncSetAttribute);
  SIMGPU_REQUIRE(attrib >= 0 && attrib < CU_FUNC_ATTRIBUTE_MAX);
  Function function;
  return loaded().function(hfunc, &function) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

SIMGPU_API CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction hfunc, CUfunc_cache) {
  SIMGPU_ENTER(cuFuncSetCacheConfig);
  Function function;
  return loaded().function(hfunc, &function) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

SIMGPU_API CUresult CUDAAPI cuKernelGetAttribute(int* pi, CUfunction_attribute attrib,
                                                 CUkernel kernel, CUdevice) {
  SIMGPU_ENTER(cuKernelGetAttribute);
  Function function;
  if (!loaded().function(kernel, &function)) return CUDA_ERROR_INVALID_HANDLE;
  return function_attribute(attrib, pi);
}

SIMGPU_API CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessor(int* numBlocks,
                                                                        CUfunction func,
                                                                        int blockSize, size_t) {
  SIMGPU_ENTER(cuOccupancyMaxActiveBlocksPerMultiprocessor);
  SIMGPU_REQUIRE(numBlocks != nullptr && blockSize > 0);
  Function function;
  if (!loaded().function(func, &function)) return CUDA_ERROR_INVALID_HANDLE;
  *numBlocks = blockSize > 1024 ? 0 : 2048 / blockSize;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuLaunchKernel(CUfunction f, unsigned int gridDimX,
                                           unsigned int gridDimY, unsigned int gridDimZ,
                                           unsigned int blockDimX, unsigned int blockDimY,
                                           unsigned int blockDimZ, unsigned int sharedMemBytes,
                                           CUstream hStream, void** kernelParams, void** extra) {
  SIMGPU_ENTER(cuLaunchKernel);
  CUlaunchConfig config{};
  config.gridDimX = gridDimX;
  config.gridDimY = gridDimY;
  config.gridDimZ = gridDimZ;
  config.blockDimX = blockDimX;
  config.blockDimY = blockDimY;
  config.blockDimZ = blockDimZ;
  config.sharedMemBytes = sharedMemBytes;
  config.hStream = hStream;
  return launch(f, config, kernelParams, extra);
}

SIMGPU_API CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f,
                                             void** kernelParams, void** extra) {
  SIMGPU_ENTER(cuLaunchKernelEx);
  SIMGPU_REQUIRE(config != nullptr);
  return launch(f, *config, kernelParams, extra);
}

SIMGPU_API CUresult CUDAAPI cuLaunchCooperativeKernel(
    CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
    unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,
    unsigned int sharedMemBytes, CUstream hStream, void** kernelParams) {
  SIMGPU_ENTER(cuLaunchCooperativeKernel);
  CUlaunchConfig config{};
  config.gridDimX = gridDimX;
  config.gridDimY = gridDimY;
  config.gridDimZ = gridDimZ;
  config.blockDimX = blockDimX;
  config.blockDimY = blockDimY;
  config.blockDimZ = blockDimZ;
  config.sharedMemBytes = sharedMemBytes;
  config.hStream = hStream;
  return launch(f, config, kernelParams, nullptr);
}

SIMGPU_API CUresult CUDAAPI cuLaunchKernel_ptsz(CUfunction f, unsigned int gridDimX,
                                                unsigned int gridDimY, unsigned int gridDimZ,
                                                unsigned int blockDimX, unsigned int blockDimY,
                                                unsigned int blockDimZ, unsigned int sharedMemBytes,
                                                CUstream hStream, void** kernelParams,
                                                void** extra) {
  return cuLaunchKernel(f, gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ,
                        sharedMemBytes, per_thread(hStream), kernelParams, extra);
}

SIMGPU_API CUresult CUDAAPI cuLaunchKernelEx_ptsz(const CUlaunchConfig* config, CUfunction f,
                                                  void** kernelParams, void** extra) {
  SIMGPU_REQUIRE(config != nullptr);
  CUlaunchConfig own = *config;
  own.hStream = per_thread(own.hStream);
  return cuLaunchKernelEx(&own, f, kernelParams, extra);
}

SIMGPU_API CUresult CUDAAPI cuLaunchCooperativeKernel_ptsz(
    CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
    unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,
    unsigned int sharedMemBytes, CUstream hStream, void** kernelParams) {
  return cuLaunchCooperativeKernel(f, gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ,
                                   sharedMemBytes, per_thread(hStream), kernelParams);
}
