#include "tests/simgpu/kernels.h"

#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <sstream>

namespace simgpu {
namespace {

// fill_u32(uint32_t* data, uint64_t count, uint32_t value)
void fill_u32(const simgpu_launch& launch) {
  auto* data = parameter<uint32_t*>(launch, 0);
  auto count = parameter<uint64_t>(launch, 1);
  auto value = parameter<uint32_t>(launch, 2);
  for (uint64_t i = 0; i < count; ++i) data[i] = value;
}

// add_u32(uint32_t* data, uint64_t count, uint32_t value): adds `value` and the element's index
void add_u32(const simgpu_launch& launch) {
  auto* data = parameter<uint32_t*>(launch, 0);
  auto count = parameter<uint64_t>(launch, 1);
  auto value = parameter<uint32_t>(launch, 2);
  for (uint64_t i = 0; i < count; ++i) data[i] += value + static_cast<uint32_t>(i);
}

// checksum_u64(const uint64_t* data, uint64_t count, uint64_t* sum): adds data[i] * (2 * i + 1) to
// *sum
void checksum_u64(const simgpu_launch& launch) {
  const auto* data = parameter<const uint64_t*>(launch, 0);
  auto count = parameter<uint64_t>(launch, 1);
  auto* sum = parameter<uint64_t*>(launch, 2);
  for (uint64_t i = 0; i < count; ++i) *sum += data[i] * (2 * i + 1);
}

struct Registry {
  std::mutex mutex;  // protects kernels
  std::map<std::string, Kernel> kernels = {
      {"fill_u32", fill_u32},
      {"add_u32", add_u32},
      {"checksum_u64", checksum_u64},
  };
};

Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

}  // namespace

bool register_kernel(const std::string& name, Kernel kernel) {
  std::lock_guard lock(registry().mutex);
  return registry().kernels.emplace(name, std::move(kernel)).second;
}

bool load_kernel_libraries(const std::string& paths) {
  std::stringstream list(paths);
  std::string path;
  while (std::getline(list, path, ':')) {
    using Entry = void (*)(int (*)(const char*, simgpu_kernel, void*));
    void* library = dlopen(path.c_str(), RTLD_NOW);
    if (library == nullptr) return false;
    auto entry = reinterpret_cast<Entry>(dlsym(library, "simgpu_register_kernels"));
    if (entry == nullptr) return false;
    entry(&simgpu_register_kernel);
  }
  return true;
}

Kernel find_kernel(const std::string& name) {
  std::lock_guard lock(registry().mutex);
  auto entry = registry().kernels.find(name);
  return entry == registry().kernels.end() ? nullptr : entry->second;
}

}  // namespace simgpu
