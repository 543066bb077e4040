// What a program that uses the C interface sees, on the runtime and the driver, in good and in bad
// cases. `cases CASE` says "ok", or what was not as it should be. Run under the library by
// preload_test.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#define DORMOUSE_OPTIONAL
#include "shim/abi/dormouse.h"
#include "tests/preload/expect.h"

namespace {

constexpr size_t kMiB = size_t{1} << 20;

#define OK(call) EXPECT(static_cast<int>(call) == 0, std::string(#call) + message_of())

std::string message_of() {
  const char* text = dormouse_last_error_message == nullptr ? "" : dormouse_last_error_message();
  return *text == '\0' ? "" : std::string(" (") + text + ")";
}

dormouse_tag_stats stats_of(const std::string& tag) {
  std::vector<dormouse_tag_stats> all(16);
  all[0].size = sizeof(dormouse_tag_stats);
  size_t count = 0;
  OK(dormouse_stats(all.data(), all.size(), &count));
  for (size_t i = 0; i < count; ++i) {
    if (tag == all[i].tag && all[i].device == 0) return all[i];
  }
  return {};
}

void* allocate(size_t bytes) {
  void* pointer = nullptr;
  OK(cudaMalloc(&pointer, bytes));
  return pointer;
}

void* allocate_tagged(const char* tag, size_t bytes) {
  OK(dormouse_region_begin(tag));
  void* pointer = allocate(bytes);
  OK(dormouse_region_end());
  return pointer;
}

void write(void* pointer, size_t bytes, unsigned seed) {
  std::vector<unsigned char> content(bytes);
  for (size_t i = 0; i < bytes; ++i) content[i] = static_cast<unsigned char>(i * 31 + seed);
  OK(cudaMemcpy(pointer, content.data(), bytes, cudaMemcpyHostToDevice));
}

void check(void* pointer, size_t bytes, unsigned seed) {
  std::vector<unsigned char> content(bytes);
  OK(cudaMemcpy(content.data(), pointer, bytes, cudaMemcpyDeviceToHost));
  for (size_t i = 0; i < bytes; ++i) {
    EXPECT(content[i] == static_cast<unsigned char>(i * 31 + seed),
           "the content at " + std::to_string(i));
  }
}

size_t free_bytes() {
  size_t free = 0;
  size_t total = 0;
  OK(cudaMemGetInfo(&free, &total));
  return free;
}

// A function of the driver, as a program finds it.
template <typename Function>
Function driver_function(const char* name) {
  void* found = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
  EXPECT(found != nullptr, name);
  return reinterpret_cast<Function>(found);
}
#define DRIVER(name) driver_function<decltype(&::name)>(#name)

CUdeviceptr address_of(void* pointer) {
  return reinterpret_cast<CUdeviceptr>(pointer);
}

// --- Regions

void regions_nest_and_end() {
  OK(dormouse_region_begin("outer"));
  OK(cudaFree(allocate(kMiB)));
  OK(dormouse_region_begin_none());
  void* plain = allocate(kMiB);
  OK(dormouse_region_begin_with_backup("inner", DORMOUSE_BACKUP_NONE));
  void* inner = allocate(kMiB);
  OK(dormouse_region_end());
  OK(dormouse_region_end());
  void* outer = allocate(kMiB);
  OK(dormouse_region_end());
  void* after = allocate(kMiB);
  EXPECT(stats_of("outer").allocations == 2 && stats_of("outer").blocks == 1, "outer");
  EXPECT(stats_of("inner").blocks == 1, "inner");
  EXPECT(stats_of("inner").backup == DORMOUSE_BACKUP_NONE, "inner's policy");
  for (void* pointer : {plain, inner, outer, after}) OK(cudaFree(pointer));
  EXPECT(stats_of("outer").blocks == 0 && stats_of("inner").blocks == 0, "after freeing");
}

void regions_are_the_threads_own() {
  OK(dormouse_region_begin("mine"));
  std::thread([] {
    void* pointer = allocate(kMiB);
    OK(cudaFree(pointer));
    OK(dormouse_region_begin("theirs"));  // and the thread ends inside it
    allocate(kMiB);
  }).join();
  void* pointer = allocate(kMiB);
  OK(dormouse_region_end());
  EXPECT(stats_of("mine").allocations == 1 && stats_of("theirs").allocations == 1, "per thread");
  OK(cudaFree(pointer));
}

void an_end_without_a_begin_does_nothing() {
  EXPECT(dormouse_region_end() == DORMOUSE_NO_REGION, "the first");
  EXPECT(std::string(dormouse_last_error_message()) != "", "its message");
  EXPECT(dormouse_region_end() == DORMOUSE_NO_REGION, "the second");
  void* pointer = allocate_tagged("weights", kMiB);
  EXPECT(dormouse_region_end() == DORMOUSE_NO_REGION, "after a pair");
  OK(cudaFree(pointer));
}

void bad_arguments_are_refused() {
  OK(cudaFree(nullptr));
  for (const char* tag : {"", "with space", "semi;colon", "ümlaut", ":", "a:b", ".a", "/a", "-a"}) {
    EXPECT(dormouse_region_begin(tag) == DORMOUSE_INVALID_ARGUMENT, tag);
    EXPECT(dormouse_region_end() == DORMOUSE_NO_REGION, "no region began");
  }
  EXPECT(dormouse_region_begin(nullptr) == DORMOUSE_INVALID_ARGUMENT, "a null tag");
  EXPECT(dormouse_region_begin(std::string(65, 'a').c_str()) == DORMOUSE_INVALID_ARGUMENT, "long");
  EXPECT(dormouse_region_begin_with_backup("a", 7) == DORMOUSE_INVALID_ARGUMENT, "a policy");
  EXPECT(dormouse_region_begin_with_backup("-", DORMOUSE_BACKUP_HOST) == DORMOUSE_INVALID_ARGUMENT,
         "a policy without a tag");
  const char* none[] = {nullptr};
  EXPECT(dormouse_sleep(none, 1, 0) == DORMOUSE_INVALID_ARGUMENT, "a null in the list");
  EXPECT(dormouse_sleep(none, 0, 0) == DORMOUSE_INVALID_ARGUMENT, "an empty list");
  EXPECT(dormouse_sleep(nullptr, 0, 64) == DORMOUSE_INVALID_ARGUMENT, "a flag");
  EXPECT(dormouse_is_sleeping(nullptr, 0, nullptr) == DORMOUSE_INVALID_ARGUMENT, "no result");
  EXPECT(dormouse_stats(nullptr, 1, nullptr) == DORMOUSE_INVALID_ARGUMENT, "no count");
  EXPECT(std::string(dormouse_strerror(-1)) == dormouse_strerror(1000), "unknown codes");
  for (int code = DORMOUSE_OK; code <= DORMOUSE_NOT_ACTIVE; ++code) {
    EXPECT(std::string(dormouse_strerror(code)) != dormouse_strerror(-1), "a code's text");
  }
}

void a_dash_is_no_tag() {
  OK(dormouse_region_begin("weights"));
  OK(dormouse_region_begin("-"));
  EXPECT(dormouse_region_depth() == 2 && std::strcmp(dormouse_current_tag(), "") == 0, "inside");
  OK(cudaFree(allocate(kMiB)));
  OK(dormouse_region_end());
  OK(dormouse_region_end());
  EXPECT(stats_of("weights").allocations == 0 && stats_of("-").allocations == 0, "tags");
}

void switched_off() {  // with DORMOUSE=off and rules that are wrong
  EXPECT(dormouse_region_begin("weights") == DORMOUSE_NOT_ACTIVE, "begin");
  EXPECT(message_of().find("DORMOUSE=off") != std::string::npos, message_of());
  EXPECT(dormouse_region_begin_none() == DORMOUSE_NOT_ACTIVE, "begin without a tag");
  EXPECT(dormouse_region_begin_with_backup("weights", DORMOUSE_BACKUP_NONE) == DORMOUSE_NOT_ACTIVE,
         "begin with a policy");
  EXPECT(dormouse_region_depth() == 0 && std::strcmp(dormouse_current_tag(), "") == 0, "inside");
  OK(cudaFree(allocate(kMiB)));
  EXPECT(dormouse_region_end() == DORMOUSE_NOT_ACTIVE, "end");
  int sleeping = 0;
  EXPECT(dormouse_sleep(nullptr, 0, 0) == DORMOUSE_NOT_ACTIVE, "sleep");
  EXPECT(dormouse_is_sleeping(nullptr, 0, &sleeping) == DORMOUSE_NOT_ACTIVE, "is_sleeping");
  size_t count = 1;
  OK(dormouse_stats(nullptr, 0, &count));
  EXPECT(count == 0, "figures");
}

void a_call_without_memory_has_its_own_message() {
  EXPECT(dormouse_region_begin(nullptr) == DORMOUSE_INVALID_ARGUMENT, "an earlier error");
  const std::string earlier = message_of();
  const std::string longer_than_a_small_one(100, 'a');
  std::vector<const char*> tags(size_t{1} << 20, longer_than_a_small_one.c_str());
  rlimit limit{};
  OK(getrlimit(RLIMIT_AS, &limit));
  const rlimit before = limit;
  limit.rlim_cur = size_t{1} << 20;  // less than the process has: no memory comes any more
  OK(setrlimit(RLIMIT_AS, &limit));
  const int result = dormouse_sleep(tags.data(), tags.size(), 0);
  OK(setrlimit(RLIMIT_AS, &before));
  EXPECT(result == DORMOUSE_OUT_OF_HOST_MEMORY, "the code");
  EXPECT(message_of() != earlier && message_of().find("memory") != std::string::npos, message_of());
}

// The stride between elements is the caller's, older or newer than the library's.
void stats_fit_the_callers_struct() {
  void* pointer = allocate_tagged("weights", 3 * kMiB);
  struct Newer {
    dormouse_tag_stats known;
    uint64_t added;
  } newer[2] = {};
  newer[0].known.size = sizeof(Newer);
  newer[0].added = 5;
  newer[1].added = 7;
  size_t count = 0;
  OK(dormouse_stats(&newer[0].known, 2, &count));
  EXPECT(count == 1 && newer[0].known.allocated == 3 * kMiB, "the figures");
  EXPECT(newer[0].known.size == sizeof(Newer) && newer[0].added == 5 && newer[1].added == 7,
         "what the library does not know");
  newer[0].known.size = 8;
  EXPECT(dormouse_stats(&newer[0].known, 2, &count) == DORMOUSE_INVALID_ARGUMENT, "too small");
  OK(cudaFree(pointer));
}

void before_cuda_is_used() {
  EXPECT(dormouse_sleep(nullptr, 0, 0) == DORMOUSE_NOT_ACTIVE, "sleep");
  EXPECT(dormouse_wake(nullptr, 0) == DORMOUSE_NOT_ACTIVE, "wake");
  size_t count = 7;
  OK(dormouse_stats(nullptr, 0, &count));
  EXPECT(count == 0, "figures");
  EXPECT(std::string(dormouse_version()) != "", "version");
  OK(dormouse_region_begin("early"));
  void* pointer = allocate(kMiB);
  OK(dormouse_region_end());
  EXPECT(stats_of("early").blocks == 1, "a region that began before CUDA was used");
  OK(cudaFree(pointer));
}

// Initialisers of libraries run under the dynamic linker's lock, which whoever begins to use CUDA
// needs too.
void an_initialiser_may_use_cuda_while_cuda_begins() {
  const auto init = DRIVER(cuInit);
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    OK(init(0));
  });
  EXPECT(dlopen((program_folder() + "libinitialiser.so").c_str(), RTLD_NOW) != nullptr, dlerror());
  other.join();
  OK(cudaFree(allocate_tagged("weights", kMiB)));
}

// --- Allocation

void zero_bytes() {
  OK(dormouse_region_begin("weights"));
  void* pointer = &pointer;
  OK(cudaMalloc(&pointer, 0));
  EXPECT(pointer == nullptr, "cudaMalloc(0)");
  OK(cudaFree(pointer));
  CUdeviceptr address = 1;
  EXPECT(DRIVER(cuMemAlloc_v2)(&address, 0) == CUDA_ERROR_INVALID_VALUE, "cuMemAlloc(0)");
  EXPECT(DRIVER(cuMemAlloc_v2)(nullptr, 1) == CUDA_ERROR_INVALID_VALUE, "cuMemAlloc(NULL)");
  OK(dormouse_region_end());
  EXPECT(stats_of("weights").allocations == 0, "allocations");
}

void more_than_the_device_has() {
  OK(dormouse_region_begin("weights"));
  void* pointer = nullptr;
  EXPECT(cudaMalloc(&pointer, size_t{1} << 50) == cudaErrorMemoryAllocation, "the error");
  EXPECT(cudaGetLastError() == cudaErrorMemoryAllocation, "the last error is the runtime's");
  EXPECT(cudaGetLastError() == cudaSuccess, "once");
  OK(dormouse_region_end());
  OK(cudaFree(allocate_tagged("weights", kMiB)));
}

void every_kind_of_allocation() {
  OK(dormouse_region_begin("weights"));
  std::vector<void*> pointers(3);
  size_t pitch = 0;
  OK(cudaMallocPitch(&pointers[0], &pitch, 1000, 10));
  EXPECT(pitch >= 1000 && pitch % 512 == 0, "the pitch");
  cudaPitchedPtr volume{};
  OK(cudaMalloc3D(&volume, cudaExtent{1000, 10, 10}));
  pointers[1] = volume.ptr;
  OK(cudaMallocAsync(&pointers[2], kMiB, nullptr));
  EXPECT(stats_of("weights").blocks == 3, "blocks");
  CUdeviceptr address = 0;
  EXPECT(DRIVER(cuMemAllocPitch_v2)(&address, &pitch, 100, 10, 3) == CUDA_ERROR_INVALID_VALUE,
         "an element of 3 bytes");
  EXPECT(DRIVER(cuMemAllocPitch_v2)(&address, &pitch, size_t{1} << 62, 1 << 10, 4) != CUDA_SUCCESS,
         "a size that overflows");
  OK(dormouse_region_end());
  OK(cudaFree(pointers[0]));
  OK(cudaFree(pointers[1]));
  OK(cudaFreeAsync(pointers[2], nullptr));
  OK(cudaDeviceSynchronize());
  EXPECT(stats_of("weights").blocks == 0, "blocks after freeing");
}

// As on most vGPUs; with SIMGPU_FAIL. What is said is checked by the test.
void without_virtual_memory_the_program_is_served_itself() {
  OK(dormouse_region_begin("weights"));
  std::vector<void*> pointers(4);
  size_t pitch = 0;
  OK(cudaMalloc(&pointers[0], 4 * kMiB));
  OK(cudaMallocPitch(&pointers[1], &pitch, 1000, 10));
  EXPECT(pitch >= 1000, "the pitch");
  OK(cudaMallocAsync(&pointers[2], kMiB, nullptr));
  OK(cudaMalloc(&pointers[3], 512));
  OK(dormouse_region_end());
  EXPECT(stats_of("weights").blocks == 0, "nothing has the tag");
  OK(cudaMemset(pointers[0], 1, 4 * kMiB));
  OK(cudaDeviceSynchronize());
  OK(cudaFree(pointers[0]));
  OK(cudaFree(pointers[1]));
  OK(cudaFreeAsync(pointers[2], nullptr));
  OK(cudaFree(pointers[3]));
}

void without_physical_memory_to_map_the_program_is_served_itself() {
  without_virtual_memory_the_program_is_served_itself();
}

// What is said is checked by the test.
void memory_of_a_named_pool_stays_in_it() {
  OK(cudaFree(nullptr));
  cudaMemPool_t pool = nullptr;
  OK(cudaDeviceGetDefaultMemPool(&pool, 0));
  CUdeviceptr pointers[2] = {};
  OK(dormouse_region_begin("weights"));
  for (CUdeviceptr& pointer : pointers) {
    OK(DRIVER(cuMemAllocFromPoolAsync)(&pointer, kMiB, reinterpret_cast<CUmemoryPool>(pool),
                                       nullptr));
  }
  OK(dormouse_region_end());
  EXPECT(stats_of("weights").blocks == 0, "no tag");
  for (CUdeviceptr pointer : pointers) OK(DRIVER(cuMemFreeAsync)(pointer, nullptr));
}

void rules_on_single_allocations() {  // with DORMOUSE_REGIONS "big: size(>=4MiB); io: thread(io-*)"
  void* small = allocate(kMiB);
  void* large = allocate(4 * kMiB);
  void* threads = nullptr;
  std::thread([&] {
    pthread_setname_np(pthread_self(), "io-7");
    threads = allocate(kMiB);
  }).join();
  OK(dormouse_region_begin_none());
  void* excluded = allocate(4 * kMiB);
  OK(dormouse_region_end());
  EXPECT(stats_of("big").allocations == 1 && stats_of("io").allocations == 1, "by rules");
  for (void* pointer : {small, large, threads, excluded}) OK(cudaFree(pointer));
}

void a_thread_whose_name_fits_is_in_a_region() {  // with "io: thread(io-*); -: thread(none*)"
  std::thread([] {
    EXPECT(dormouse_region_depth() == 0, "before it has a name");
    pthread_setname_np(pthread_self(), "io-1");
    EXPECT(dormouse_region_depth() == 1 && std::strcmp(dormouse_current_tag(), "io") == 0, "named");
    OK(dormouse_region_begin("weights"));
    pthread_setname_np(pthread_self(), "io-2");
    EXPECT(dormouse_region_depth() == 2, "another name that fits");
    pthread_setname_np(pthread_self(), "other");
    EXPECT(dormouse_region_depth() == 1 && std::strcmp(dormouse_current_tag(), "weights") == 0,
           "a name that does not fit, inside a region of its own");
    OK(dormouse_region_end());
    pthread_setname_np(pthread_self(), "none");
    EXPECT(dormouse_region_depth() == 1 && std::strcmp(dormouse_current_tag(), "") == 0,
           "excluded");
  }).join();
  void* by_prctl = nullptr;
  std::thread([&] {
    prctl(PR_SET_NAME, "io-3");
    by_prctl = allocate(kMiB);
  }).join();
  EXPECT(stats_of("io").allocations == 1, "a name that came another way");
  EXPECT(dormouse_region_depth() == 0, "this thread");
  OK(cudaFree(by_prctl));
}

// With "big: size(>=4MiB)"; what is said is checked by the test.
void memory_that_the_program_maps_is_not_seen_by_size_rules() {
  OK(cudaFree(allocate(kMiB)));
  const auto create = reinterpret_cast<decltype(&cuMemCreate)>(
      dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuMemCreate"));
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  CUmemGenericAllocationHandle handle = 0;
  OK(create(&handle, 32 * kMiB, &properties, 0));
  EXPECT(stats_of("big").allocations == 0, "it has no tag");
}

// As JAX makes it: one handle, mapped whole, held until the end.
struct Mapped {
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr address = 0;
  size_t bytes = 0;

  void* pointer() const { return reinterpret_cast<void*>(address); }
};

Mapped map_memory(size_t bytes) {
  Mapped made{0, 0, bytes};
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  CUmemAccessDesc access{};
  access.location = properties.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  OK(DRIVER(cuMemCreate)(&made.handle, bytes, &properties, 0));
  OK(DRIVER(cuMemAddressReserve)(&made.address, bytes, 0, 0, 0));
  OK(DRIVER(cuMemMap)(made.address, bytes, 0, made.handle, 0));
  OK(DRIVER(cuMemSetAccess)(made.address, bytes, &access, 1));
  return made;
}

void unmap_memory(const Mapped& mapped) {
  OK(DRIVER(cuMemUnmap)(mapped.address, mapped.bytes));
  OK(DRIVER(cuMemRelease)(mapped.handle));
  OK(DRIVER(cuMemAddressFree)(mapped.address, mapped.bytes));
}

void memory_that_the_program_maps_sleeps_too() {
  OK(cudaFree(allocate(kMiB)));
  const Mapped outside = map_memory(8 * kMiB);
  OK(dormouse_region_begin("weights"));
  const Mapped inside = map_memory(64 * kMiB);
  OK(dormouse_region_end());
  EXPECT(stats_of("weights").allocated == 64 * kMiB, "what was made in the region is tagged");
  write(outside.pointer(), 8 * kMiB, 1);
  write(inside.pointer(), 64 * kMiB, 2);
  const size_t awake = free_bytes();
  OK(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE));
  EXPECT(free_bytes() >= awake + 64 * kMiB, "free memory while asleep");
  cudaPointerAttributes attributes{};
  OK(cudaPointerGetAttributes(&attributes, inside.pointer()));
  EXPECT(attributes.type == cudaMemoryTypeDevice && attributes.device == 0, "its type asleep");
  CUmemAllocationProp properties{};
  OK(DRIVER(cuMemGetAllocationPropertiesFromHandle)(&properties, inside.handle));
  EXPECT(properties.requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
         "its properties asleep");
  unsigned long long flags = 0;
  OK(DRIVER(cuMemGetAccess)(&flags, &properties.location, inside.address));
  EXPECT(flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE, "its access asleep");
  EXPECT(DRIVER(cuMemAddressFree)(inside.address, inside.bytes) == CUDA_ERROR_INVALID_VALUE,
         "its place asleep");
  std::atomic<bool> done{false};
  std::thread reader([&] {
    check(inside.pointer(), 64 * kMiB, 2);
    done = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT(!done, "a copy during the sleep");
  OK(dormouse_wake(nullptr, 0));
  reader.join();
  check(outside.pointer(), 8 * kMiB, 1);
  CUmemGenericAllocationHandle again = 0;
  OK(DRIVER(cuMemRetainAllocationHandle)(&again, inside.pointer()));
  EXPECT(again == inside.handle, "the handle of an address");
  OK(DRIVER(cuMemRelease)(again));
  // Shared, it stays awake.
  OK(dormouse_sleep(nullptr, 0, 0));
  int fd = -1;
  OK(DRIVER(cuMemExportToShareableHandle)(&fd, inside.handle,
                                          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
  close(fd);
  check(inside.pointer(), 64 * kMiB, 2);
  EXPECT(stats_of("weights").allocated == 0, "what is shared has no tag");
  unmap_memory(inside);
  unmap_memory(outside);
}

void memory_that_the_program_maps_can_be_left_alone() {  // with DORMOUSE_MAPPED_MEMORY=off
  OK(cudaFree(allocate(kMiB)));
  OK(dormouse_region_begin("weights"));
  const Mapped inside = map_memory(8 * kMiB);
  OK(dormouse_region_end());
  EXPECT(stats_of("weights").allocated == 0, "it has no tag");
  unmap_memory(inside);
}

void memory_that_the_program_maps_may_go_asleep() {
  OK(cudaFree(allocate(kMiB)));
  OK(dormouse_region_begin("weights"));
  const Mapped gone = map_memory(8 * kMiB);
  const Mapped left = map_memory(8 * kMiB);
  OK(dormouse_region_end());
  write(left.pointer(), 8 * kMiB, 1);
  OK(dormouse_sleep(nullptr, 0, 0));
  unmap_memory(gone);
  EXPECT(stats_of("weights").blocks == 1, "what is left");
  // The process ends with the other asleep.
}

// Memory that a pool keeps for itself must not be missed by the rest of the program.
void kept_memory_counts_as_free() {
  const size_t before = free_bytes();
  void* pointer = allocate_tagged("weights", 64 * kMiB);
  EXPECT(free_bytes() + 64 * kMiB <= before, "while it is in use");
  OK(cudaFree(pointer));
  EXPECT(stats_of("weights").mapped >= 64 * kMiB, "the pool keeps it");
  EXPECT(free_bytes() + 4 * kMiB >= before, "once it is free");
  void* all = allocate(free_bytes() - 16 * kMiB);
  EXPECT(stats_of("weights").mapped == 0, "the pool gave it up");
  OK(cudaFree(all));
}

// --- Queries

void pointers_answer_as_cudamallocs() {
  unsigned char* pointer = static_cast<unsigned char*>(allocate_tagged("weights", 3 * kMiB + 5));
  void* neighbour = allocate_tagged("weights", kMiB);
  CUdeviceptr base = 0;
  size_t bytes = 0;
  OK(DRIVER(cuMemGetAddressRange_v2)(&base, &bytes, address_of(pointer + 1000)));
  EXPECT(base == address_of(pointer) && bytes == 3 * kMiB + 5, "cuMemGetAddressRange");
  auto attribute = DRIVER(cuPointerGetAttribute);
  OK(attribute(&base, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address_of(pointer + 7)));
  OK(attribute(&bytes, CU_POINTER_ATTRIBUTE_RANGE_SIZE, address_of(pointer + 7)));
  EXPECT(base == address_of(pointer) && bytes == 3 * kMiB + 5, "the range");
  CUcontext context = nullptr;
  CUcontext current = nullptr;
  OK(attribute(&context, CU_POINTER_ATTRIBUTE_CONTEXT, address_of(pointer)));
  OK(DRIVER(cuCtxGetCurrent)(&current));
  EXPECT(context == current && current != nullptr, "the context");
  for (bool asleep : {false, true}) {
    if (asleep) OK(dormouse_sleep(nullptr, 0, 0));
    cudaPointerAttributes attributes{};
    OK(cudaPointerGetAttributes(&attributes, pointer + 9));
    EXPECT(attributes.type == cudaMemoryTypeDevice, asleep ? "type asleep" : "type awake");
    EXPECT(attributes.device == 0 && attributes.devicePointer == pointer + 9, "the rest");
  }
  OK(dormouse_wake(nullptr, 0));
  OK(cudaFree(pointer));
  cudaPointerAttributes attributes{};
  OK(cudaPointerGetAttributes(&attributes, pointer));
  EXPECT(attributes.type == cudaMemoryTypeUnregistered, "the type once freed");
  EXPECT(attribute(&base, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address_of(pointer)) ==
             CUDA_ERROR_INVALID_VALUE,
         "an attribute once freed");
  EXPECT(
      DRIVER(cuMemGetAddressRange_v2)(&base, &bytes, address_of(pointer)) == CUDA_ERROR_NOT_FOUND,
      "the range once freed");
  OK(cudaFree(neighbour));
}

void no_ipc_handle_of_tagged_memory() {
  void* pointer = allocate_tagged("weights", kMiB);
  cudaIpcMemHandle_t handle;
  EXPECT(cudaIpcGetMemHandle(&handle, pointer) == cudaErrorInvalidValue, "the error");
  cudaGetLastError();
  OK(cudaFree(pointer));
}

// --- Free

// As NCCL and UCX ask whether memory has a handle.
void no_handle_of_tagged_memory() {
  void* pointer = allocate_tagged("weights", kMiB);
  CUmemGenericAllocationHandle handle = 0;
  EXPECT(DRIVER(cuMemRetainAllocationHandle)(&handle, pointer) == CUDA_ERROR_INVALID_VALUE,
         "as for any memory of cudaMalloc");
  OK(cudaFree(pointer));
}

// As a network card's registration takes it.
void what_others_hold_stays_awake() {
  void* held = allocate_tagged("weights", 4 * kMiB);
  void* other = allocate_tagged("weights", 64 * kMiB);
  write(held, 4 * kMiB, 1);
  write(other, 64 * kMiB, 2);
  int fd = -1;
  const CUresult exported = DRIVER(cuMemGetHandleForAddressRange)(
      &fd, address_of(held), 4 * kMiB, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0);
  if (exported == CUDA_ERROR_NOT_SUPPORTED) return;  // a driver without dma-bufs
  OK(exported);
  const size_t before = free_bytes();
  OK(dormouse_sleep(nullptr, 0, 0));
  const dormouse_tag_stats stats = stats_of("weights");
  EXPECT(stats.held != 0 && stats.held == stats.mapped, "what is held is awake");
  EXPECT(stats.asleep >= 64 * kMiB && free_bytes() - before == stats.asleep, "what sleeps is free");
  check(held, 4 * kMiB, 1);
  OK(dormouse_wake(nullptr, 0));
  check(other, 64 * kMiB, 2);
  close(fd);
  OK(cudaFree(held));
  EXPECT(stats_of("weights").held == 0, "held for the buffer's life");
  OK(cudaFree(other));
}

void a_buffer_can_be_kept_awake() {
  void* kept = allocate_tagged("weights", 4 * kMiB);
  void* plain = allocate(kMiB);
  write(kept, 4 * kMiB, 1);
  OK(dormouse_keep_awake(static_cast<char*>(kept) + kMiB, 1));
  OK(dormouse_sleep(nullptr, 0, 0));
  check(kept, 4 * kMiB, 1);
  EXPECT(stats_of("weights").held >= 4 * kMiB && stats_of("weights").asleep == 0, "it is awake");
  OK(dormouse_keep_awake(kept, 0));
  OK(dormouse_sleep(nullptr, 0, 0));
  EXPECT(stats_of("weights").held == 0 && stats_of("weights").asleep >= 4 * kMiB, "it sleeps");
  // As torch_memory_saver's package asks.
  void* found = dlsym(RTLD_DEFAULT, "tms_keep_resident");
  EXPECT(found != nullptr, "the function");
  const auto keep_resident = reinterpret_cast<size_t (*)(const void*)>(found);
  EXPECT(keep_resident(kept) == 4 * kMiB, "it is woken and kept");
  check(kept, 4 * kMiB, 1);
  OK(dormouse_sleep(nullptr, 0, 0));
  EXPECT(stats_of("weights").asleep == 0, "it is awake");
  EXPECT(keep_resident(plain) == 0, "not of a tag");
  EXPECT(dormouse_keep_awake(plain, 1) == DORMOUSE_NOT_FOUND, "not of a tag");
  OK(cudaFree(kept));
  OK(cudaFree(plain));
}

// What UCX and Open MPI set and ask.
void attributes_of_a_buffer_are_its_own() {
  const auto id_of = [](void* pointer) {
    unsigned long long id = 0;
    OK(DRIVER(cuPointerGetAttribute)(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, address_of(pointer)));
    return id;
  };
  const auto synchronous = [](void* pointer) {
    unsigned int on = 7;
    OK(DRIVER(cuPointerGetAttribute)(&on, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, address_of(pointer)));
    return on;
  };
  void* one = allocate_tagged("weights", kMiB);
  void* other = allocate_tagged("weights", kMiB);
  EXPECT(id_of(one) != id_of(other), "a number each");
  EXPECT(id_of(one) == id_of(static_cast<char*>(one) + 4096), "one number for all of it");
  const unsigned int on = 1;
  OK(DRIVER(cuPointerSetAttribute)(&on, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, address_of(one)));
  const unsigned long long before = id_of(one);
  OK(dormouse_sleep(nullptr, 0, 0));
  EXPECT(synchronous(one) == 1, "kept in its sleep");
  OK(dormouse_wake(nullptr, 0));
  EXPECT(synchronous(one) == 1 && synchronous(other) == 0, "kept over a wake");
  EXPECT(id_of(one) != before, "other physical memory: whoever registered it must do so again");
  unsigned int flags = 0;
  OK(DRIVER(cuCtxGetFlags)(&flags));
  EXPECT((flags & CU_CTX_SYNC_MEMOPS) != 0, "the context does what the attribute asks");
  const unsigned int off = 0;
  OK(DRIVER(cuPointerSetAttribute)(&off, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, address_of(one)));
  EXPECT(synchronous(one) == 0, "as set");
  OK(cudaFree(one));
  OK(cudaFree(other));
}

// Between the first `bytes` of each, by copies in two dimensions and three and by batches.
void copy_in_every_shape(char* to, char* from, size_t bytes, cudaStream_t stream) {
  constexpr size_t kPitch = 512;
  constexpr size_t kRows = 16;
  const size_t rows = bytes / kPitch;
  unsigned seed = 100;
  const auto copied = [&](const char* what, auto call) {
    write(from, bytes, ++seed);
    EXPECT(call() == CUDA_SUCCESS, what);
    OK(cudaStreamSynchronize(stream));
    check(to, bytes, seed);
  };
  CUDA_MEMCPY2D plane{};
  plane.srcMemoryType = plane.dstMemoryType = CU_MEMORYTYPE_DEVICE;
  plane.srcDevice = address_of(from);
  plane.dstDevice = address_of(to);
  plane.srcPitch = plane.dstPitch = plane.WidthInBytes = kPitch;
  plane.Height = rows;
  copied("a plane", [&] { return DRIVER(cuMemcpy2DAsync_v2)(&plane, stream); });
  CUDA_MEMCPY3D volume{};
  volume.srcMemoryType = volume.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
  volume.srcDevice = address_of(from);
  volume.dstDevice = address_of(to);
  volume.srcPitch = volume.dstPitch = volume.WidthInBytes = kPitch;
  volume.srcHeight = volume.dstHeight = volume.Height = kRows;
  volume.Depth = rows / kRows;
  copied("a volume", [&] { return DRIVER(cuMemcpy3DAsync_v2)(&volume, stream); });
#if CUDA_VERSION >= 13000
  CUdeviceptr targets[] = {address_of(to), address_of(to + bytes / 2)};
  CUdeviceptr sources[] = {address_of(from), address_of(from + bytes / 2)};
  size_t sizes[] = {bytes / 2, bytes - bytes / 2};
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  size_t first = 0;
  copied("a batch", [&] {
    return DRIVER(cuMemcpyBatchAsync_v2)(targets, sources, sizes, 2, &attributes, &first, 1,
                                         stream);
  });
  CUDA_MEMCPY3D_BATCH_OP operation{};
  operation.src.type = operation.dst.type = CU_MEMCPY_OPERAND_TYPE_POINTER;
  operation.src.op.ptr.ptr = address_of(from);
  operation.dst.op.ptr.ptr = address_of(to);
  operation.extent = {kPitch, kRows, rows / kRows};
  operation.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  copied("a batch of volumes",
         [&] { return DRIVER(cuMemcpy3DBatchAsync_v2)(1, &operation, 0, stream); });
#endif
}

// Memory of one device while another is current, as programs that think of unified addresses use
// it.
void copies_reach_memory_of_every_device() {
  int devices = 0;
  OK(cudaGetDeviceCount(&devices));
  if (devices < 2) return;
  constexpr size_t kBytes = 3 * kMiB;
  OK(cudaSetDevice(1));
  char* there = static_cast<char*>(allocate_tagged("weights", kBytes));
  char* there_untagged = static_cast<char*>(allocate(kBytes));
  OK(cudaSetDevice(0));
  char* here = static_cast<char*>(allocate_tagged("weights", kBytes));
  char* here_untagged = static_cast<char*>(allocate(kBytes));
  cudaStream_t stream = nullptr;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  write(there, kBytes, 1);
  check(there, kBytes, 1);
  unsigned seed = 2;
  for (char* other : {here, here_untagged, there_untagged}) {
    write(other, kBytes, seed);
    OK(cudaMemcpy(there, other, kBytes, cudaMemcpyDeviceToDevice));
    check(there, kBytes, seed);
    write(there, kBytes, ++seed);
    OK(cudaMemcpyAsync(other, there, kBytes, cudaMemcpyDefault, stream));
    OK(cudaStreamSynchronize(stream));
    check(other, kBytes, seed++);
  }
  for (char* other : {here, here_untagged, there_untagged}) {
    copy_in_every_shape(there, other, kMiB, stream);
    copy_in_every_shape(other, there, kMiB, stream);
  }
  // In stream order, between host memory and the other device.
  std::vector<char> from(kBytes, 5);
  std::vector<char> to(kBytes);
  OK(cudaMemcpyAsync(there, from.data(), kBytes, cudaMemcpyHostToDevice, stream));
  OK(cudaMemcpyAsync(to.data(), there, kBytes, cudaMemcpyDeviceToHost, stream));
  OK(cudaStreamSynchronize(stream));
  EXPECT(to == from, "what went there and back");
  OK(cudaMemcpy2D(to.data(), 512, there, 1024, 256, 16, cudaMemcpyDeviceToHost));
  OK(cudaStreamDestroy(stream));
  OK(dormouse_sleep(nullptr, 0, 0));
  OK(dormouse_wake(nullptr, 0));
  OK(cudaMemcpy(to.data(), there, kBytes, cudaMemcpyDeviceToHost));
  EXPECT(to == from, "what slept");
  for (char* each : {there, there_untagged, here, here_untagged}) OK(cudaFree(each));
}

void copies_reach_memory_without_peers() {  // with SIMGPU_PEERS=0
  copies_reach_memory_of_every_device();
}

void a_pools_access_reaches_tagged_memory() {
  int devices = 0;
  OK(cudaGetDeviceCount(&devices));
  int can = 0;
  if (devices >= 2) OK(DRIVER(cuDeviceCanAccessPeer)(&can, 1, 0));
  if (can == 0) return;
  CUcontext here = nullptr;
  CUcontext there = nullptr;
  OK(DRIVER(cuDevicePrimaryCtxRetain)(&here, 0));
  OK(DRIVER(cuDevicePrimaryCtxRetain)(&there, 1));
  OK(DRIVER(cuCtxSetCurrent)(here));
  CUmemoryPool pool = nullptr;
  OK(DRIVER(cuDeviceGetDefaultMemPool)(&pool, 0));
  OK(dormouse_region_begin("weights"));
  CUdeviceptr before = 0;
  OK(DRIVER(cuMemAllocAsync)(&before, kMiB, nullptr));
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = 1;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  OK(DRIVER(cuMemPoolSetAccess)(pool, &access, 1));
  CUdeviceptr after = 0;
  OK(DRIVER(cuMemAllocAsync)(&after, 64 * kMiB, nullptr));
  OK(dormouse_region_end());
  OK(dormouse_sleep(nullptr, 0, 0));
  OK(dormouse_wake(nullptr, 0));
  OK(DRIVER(cuCtxSetCurrent)(there));
  OK(DRIVER(cuMemsetD8_v2)(before, 5, kMiB));
  OK(DRIVER(cuMemsetD8_v2)(after, 5, kMiB));
  OK(DRIVER(cuCtxSynchronize)());
  // Another pool, which gives none.
  CUmemPoolProps wanted{};
  wanted.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
  wanted.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  CUmemoryPool own = nullptr;
  OK(DRIVER(cuMemPoolCreate)(&own, &wanted));
  OK(DRIVER(cuDeviceSetMemPool)(0, own));
  EXPECT(DRIVER(cuMemsetD8_v2)(after, 6, kMiB) != CUDA_SUCCESS, "the access has gone");
  OK(DRIVER(cuDeviceSetMemPool)(0, pool));
  OK(DRIVER(cuMemsetD8_v2)(after, 6, kMiB));
#if CUDA_VERSION >= 13000
  CUmemLocation device{};
  device.type = CU_MEM_LOCATION_TYPE_DEVICE;
  OK(DRIVER(cuMemSetMemPool)(&device, CU_MEM_ALLOCATION_TYPE_PINNED, own));
  EXPECT(DRIVER(cuMemsetD8_v2)(after, 7, kMiB) != CUDA_SUCCESS, "the access has gone again");
  OK(DRIVER(cuMemSetMemPool)(&device, CU_MEM_ALLOCATION_TYPE_PINNED, pool));
  OK(DRIVER(cuMemsetD8_v2)(after, 7, kMiB));
#endif
  OK(DRIVER(cuMemPoolDestroy)(own));
  OK(DRIVER(cuCtxSetCurrent)(here));
  OK(DRIVER(cuMemFree_v2)(before));
  OK(DRIVER(cuMemFree_v2)(after));
}

void free_in_the_middle_of_a_block() {
  char* pointer = static_cast<char*>(allocate_tagged("weights", 4 * kMiB));
  write(pointer, 4 * kMiB, 1);
  EXPECT(cudaFree(pointer + 256) == cudaErrorInvalidValue, "the error");
  EXPECT(cudaGetLastError() == cudaErrorInvalidValue, "the last error");
  check(pointer, 4 * kMiB, 1);
  OK(cudaFree(pointer));
  EXPECT(cudaFree(pointer) == cudaErrorInvalidValue, "twice");
}

void free_inside_a_sleeping_pool() {
  void* kept = allocate_tagged("weights", 4 * kMiB);
  void* freed = allocate_tagged("weights", 4 * kMiB);
  write(kept, 4 * kMiB, 2);
  OK(dormouse_sleep(nullptr, 0, 0));
  OK(cudaFree(freed));
  EXPECT(cudaFree(freed) == cudaErrorInvalidValue, "twice");
  EXPECT(stats_of("weights").blocks == 1, "blocks");
  OK(dormouse_wake(nullptr, 0));
  check(kept, 4 * kMiB, 2);
  OK(cudaFree(kept));
}

// --- Sleep and wake

void sleep_frees_and_wake_restores() {
  void* weights = allocate_tagged("weights", 40 * kMiB);
  OK(dormouse_region_begin_with_backup("cache", DORMOUSE_BACKUP_NONE));
  void* cache = allocate(40 * kMiB);
  OK(dormouse_region_end());
  write(weights, 40 * kMiB, 3);
  write(cache, 40 * kMiB, 4);
  const size_t awake = free_bytes();
  OK(dormouse_sleep(nullptr, 0, 0));
  OK(dormouse_sleep(nullptr, 0, 0));  // of what sleeps: nothing to do
  EXPECT(free_bytes() >= awake + 80 * kMiB, "free memory while asleep");
  int sleeping = 0;
  OK(dormouse_is_sleeping(nullptr, 0, &sleeping));
  EXPECT(sleeping == 1, "is_sleeping");
  const char* tags[] = {"weights"};
  OK(dormouse_wake(tags, 1));
  OK(dormouse_is_sleeping(tags, 1, &sleeping));
  EXPECT(sleeping == 0, "weights are awake");
  check(weights, 40 * kMiB, 3);
  OK(dormouse_wake(nullptr, 0));
  OK(dormouse_wake(nullptr, 0));
  std::vector<unsigned char> content(40 * kMiB, 1);
  OK(cudaMemcpy(content.data(), cache, content.size(), cudaMemcpyDeviceToHost));
  EXPECT(content == std::vector<unsigned char>(40 * kMiB, 0), "a discarded cache reads as zero");
  EXPECT(stats_of("weights").sleeps == 1 && stats_of("weights").wakes == 1, "counts");
  OK(cudaFree(weights));
  OK(cudaFree(cache));
}

void unknown_tags_are_named() {
  void* pointer = allocate_tagged("weights", kMiB);
  const char* tags[] = {"weihgts"};
  EXPECT(dormouse_sleep(tags, 1, 0) == DORMOUSE_NOT_FOUND, "sleep");
  const std::string message = dormouse_last_error_message();
  EXPECT(message.find("weihgts") != std::string::npos, "the message: " + message);
  EXPECT(message.find("weights") != std::string::npos, "what there is: " + message);
  EXPECT(dormouse_wake(tags, 1) == DORMOUSE_NOT_FOUND, "wake");
  EXPECT(dormouse_discard(tags, 1) == DORMOUSE_NOT_FOUND, "discard");
  OK(dormouse_sleep(nullptr, 0, 0));
  int sleeping = 7;
  EXPECT(dormouse_is_sleeping(tags, 1, &sleeping) == DORMOUSE_NOT_FOUND, "is_sleeping");
  EXPECT(sleeping == 7, "the result is left alone");
  EXPECT(message_of().find("weihgts") != std::string::npos, message_of());
  OK(dormouse_wake(nullptr, 0));
  OK(cudaFree(pointer));
}

void wake_without_memory_can_be_tried_again() {
  void* weights = allocate_tagged("weights", 96 * kMiB);
  write(weights, 96 * kMiB, 5);
  OK(dormouse_sleep(nullptr, 0, 0));
  void* others = allocate(free_bytes() - 32 * kMiB);
  EXPECT(dormouse_wake(nullptr, 0) == DORMOUSE_OUT_OF_DEVICE_MEMORY, "wake");
  EXPECT(std::string(dormouse_last_error_message()) != "", "its message");
  int sleeping = 0;
  OK(dormouse_is_sleeping(nullptr, 0, &sleeping));
  EXPECT(sleeping == 1, "all stays asleep");
  OK(cudaFree(others));
  OK(dormouse_wake(nullptr, 0));
  check(weights, 96 * kMiB, 5);
  OK(cudaFree(weights));
}

void a_backup_is_kept_for_a_moment() {  // with DORMOUSE_KEEP_BACKUP below a millisecond
  void* weights = allocate_tagged("weights", 4 * kMiB);
  write(weights, 4 * kMiB, 8);
  OK(dormouse_sleep(nullptr, 0, 0));
  EXPECT(stats_of("weights").backed_up >= 4 * kMiB, "asleep");
  OK(dormouse_wake(nullptr, 0));
  for (int i = 0; stats_of("weights").backed_up != 0; ++i) {
    EXPECT(i < 1000, "the backup stays");
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  OK(cudaFree(weights));
}

void discard_drops_the_content() {
  void* weights = allocate_tagged("weights", 4 * kMiB);
  write(weights, 4 * kMiB, 6);
  OK(dormouse_discard(nullptr, 0));
  OK(dormouse_wake(nullptr, 0));
  std::vector<unsigned char> content(4 * kMiB, 1);
  OK(cudaMemcpy(content.data(), weights, content.size(), cudaMemcpyDeviceToHost));
  EXPECT(content == std::vector<unsigned char>(4 * kMiB, 0), "the content");
  OK(cudaFree(weights));
}

// --- The gate

void calls_wait_for_what_sleeps() {
  void* weights = allocate_tagged("weights", 4 * kMiB);
  write(weights, 4 * kMiB, 7);
  OK(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE));
  std::atomic<bool> done{false};
  std::thread reader([&] {
    check(weights, 4 * kMiB, 7);
    done = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT(!done, "a copy during the sleep");
  OK(dormouse_wake(nullptr, 0));
  reader.join();
  OK(cudaFree(weights));
}

void calls_wake_what_sleeps() {  // with DORMOUSE_GATE=wake
  void* weights = allocate_tagged("weights", 4 * kMiB);
  write(weights, 4 * kMiB, 8);
  OK(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE));
  check(weights, 4 * kMiB, 8);
  int sleeping = 1;
  OK(dormouse_is_sleeping(nullptr, 0, &sleeping));
  EXPECT(sleeping == 0, "awake again");
  OK(cudaFree(weights));
}

// With DORMOUSE_GATE=wake; what is said is checked by the test.
void calls_wake_what_sleeps_when_there_is_memory_again() {
  void* weights = allocate_tagged("weights", 96 * kMiB);
  write(weights, 96 * kMiB, 8);
  OK(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE));
  void* others = allocate(free_bytes() - 32 * kMiB);
  std::atomic<bool> done{false};
  std::thread reader([&] {
    check(weights, 96 * kMiB, 8);
    done = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  EXPECT(!done, "without memory");
  OK(cudaFree(others));
  reader.join();
  OK(cudaFree(weights));
}

void calls_fail_on_what_sleeps() {  // with DORMOUSE_GATE=fail
  void* weights = allocate_tagged("weights", 4 * kMiB);
  write(weights, 4 * kMiB, 9);
  OK(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE));
  char byte = 0;
  EXPECT(cudaMemcpy(&byte, weights, 1, cudaMemcpyDeviceToHost) == cudaErrorNotPermitted, "a copy");
  cudaGetLastError();
  EXPECT(cudaMemset(weights, 0, 1) == cudaErrorNotPermitted, "a memset");
  cudaGetLastError();
  OK(dormouse_wake(nullptr, 0));
  check(weights, 4 * kMiB, 9);
  OK(cudaFree(weights));
}

// A graph's nodes look their addresses up when they are made, changed and instantiated.
void graph_nodes_wait_for_what_sleeps() {
  void* weights = allocate_tagged("weights", 4 * kMiB);
  void* host = nullptr;
  CUgraph graph = nullptr;
  CUgraph captured = nullptr;
  CUgraphExec exec = nullptr;
  CUgraphNode set = nullptr;
  CUgraphNode copy = nullptr;
  cudaStream_t stream = nullptr;
  OK(cudaStreamCreate(&stream));
  OK(cudaMallocHost(&host, kMiB));
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  OK(cudaMemsetAsync(weights, 3, kMiB, stream));
  OK(cudaStreamEndCapture(stream, reinterpret_cast<cudaGraph_t*>(&captured)));
  OK(DRIVER(cuGraphCreate)(&graph, 0));
  CUDA_MEMSET_NODE_PARAMS fill{};
  fill.dst = address_of(weights);
  fill.value = 4;
  fill.elementSize = 1;
  fill.width = kMiB;
  fill.height = 1;
  CUDA_MEMCPY3D move{};
  move.srcMemoryType = CU_MEMORYTYPE_DEVICE;
  move.srcDevice = address_of(weights);
  move.dstMemoryType = CU_MEMORYTYPE_HOST;
  move.dstHost = host;
  move.WidthInBytes = kMiB;
  move.Height = 1;
  move.Depth = 1;
  // Each waits for the wake, then does what it does with memory that is awake.
  const auto waits = [](const char* what, auto call) {
    OK(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE));
    std::atomic<bool> done{false};
    CUresult result = CUDA_SUCCESS;
    std::thread caller([&] {
      cudaSetDevice(0);
      result = call();
      done = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    EXPECT(!done, what);
    OK(dormouse_wake(nullptr, 0));
    caller.join();
    EXPECT(result == CUDA_SUCCESS, std::string(what) + ": " + std::to_string(result));
  };
  CUcontext context = nullptr;
  OK(DRIVER(cuCtxGetCurrent)(&context));
  waits("a memset node",
        [&] { return DRIVER(cuGraphAddMemsetNode)(&set, graph, nullptr, 0, &fill, context); });
  waits("a copy node",
        [&] { return DRIVER(cuGraphAddMemcpyNode)(&copy, graph, &set, 1, &move, context); });
  waits("a node's parameters", [&] { return DRIVER(cuGraphMemsetNodeSetParams)(set, &fill); });
  waits("the instantiation", [&] { return DRIVER(cuGraphInstantiateWithFlags)(&exec, graph, 0); });
  waits("an instance's parameters",
        [&] { return DRIVER(cuGraphExecMemsetNodeSetParams)(exec, set, &fill, context); });
  waits("the launch", [&] { return DRIVER(cuGraphLaunch)(exec, stream); });
  OK(cudaStreamSynchronize(stream));
  EXPECT(static_cast<unsigned char*>(host)[kMiB - 1] == 4, "the launch's work");
  OK(DRIVER(cuGraphExecDestroy)(exec));
  waits("the instantiation of what was captured",
        [&] { return DRIVER(cuGraphInstantiateWithFlags)(&exec, captured, 0); });
  OK(DRIVER(cuGraphExecDestroy)(exec));
  OK(cudaFreeHost(host));
  OK(cudaFree(weights));
}

// --- Captures and contexts

void no_sleep_while_a_stream_captures() {
  void* weights = allocate_tagged("weights", kMiB);
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  OK(cudaStreamCreate(&stream));
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  EXPECT(dormouse_sleep(nullptr, 0, 0) == DORMOUSE_BUSY, "during a capture");
  OK(cudaStreamEndCapture(stream, &graph));
  OK(dormouse_sleep(nullptr, 0, 0));
  OK(dormouse_wake(nullptr, 0));
  EXPECT(cudaStreamEndCapture(stream, &graph) != cudaSuccess, "an end without a capture");
  cudaGetLastError();
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  OK(cudaStreamDestroy(stream));  // ends it too
  OK(dormouse_sleep(nullptr, 0, 0));
  OK(dormouse_wake(nullptr, 0));
  OK(cudaFree(weights));
}

void a_capture_waits_to_begin_and_not_to_end() {
  void* weights = allocate_tagged("weights", 4 * kMiB);
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  OK(cudaStreamCreate(&stream));
  OK(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE));
  std::atomic<bool> begun{false};
  std::thread captures([&] {
    OK(cudaSetDevice(0));
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    begun = true;
    OK(cudaMemsetAsync(weights, 1, kMiB, stream));
    OK(cudaStreamEndCapture(stream, &graph));
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT(!begun, "a capture while memory sleeps");
  OK(dormouse_wake(nullptr, 0));
  captures.join();
  OK(cudaGraphDestroy(graph));
  OK(cudaFree(weights));
}

// Whatever ends a capture: afterwards memory sleeps, wakes and is reused as before.
void captures_end_with_what_they_are_in() {
  OK(DRIVER(cuInit)(0));
  void* weights = allocate_tagged("weights", kMiB);
  CUcontext primary = nullptr;
  CUcontext context = nullptr;
  CUstream stream = nullptr;
  CUstream member = nullptr;
  CUevent event = nullptr;
  CUgraph graph = nullptr;
  const auto begin = [&] {
    OK(DRIVER(cuStreamCreate)(&stream, CU_STREAM_NON_BLOCKING));
    OK(driver_function<CUresult (*)(CUstream, CUstreamCaptureMode)>("cuStreamBeginCapture_v2")(
        stream, CU_STREAM_CAPTURE_MODE_RELAXED));
    EXPECT(dormouse_sleep(nullptr, 0, 0) == DORMOUSE_BUSY, "during a capture");
  };
  const auto sleeps_and_wakes = [&](const char* after) {
    EXPECT(dormouse_sleep(nullptr, 0, 0) == DORMOUSE_OK, after);
    OK(dormouse_wake(nullptr, 0));
  };
  OK(DRIVER(cuCtxGetCurrent)(&primary));
  using Create = CUresult (*)(CUcontext*, unsigned int, CUdevice);
  OK(driver_function<Create>("cuCtxCreate_v2")(&context, 0, 0));
  begin();
  OK(driver_function<CUresult (*)(CUcontext)>("cuCtxDestroy_v2")(context));
  OK(DRIVER(cuCtxSetCurrent)(primary));
  sleeps_and_wakes("the context was destroyed");

  // A stream that only takes part ends nothing, and counts for nothing.
  begin();
  OK(DRIVER(cuStreamCreate)(&member, CU_STREAM_NON_BLOCKING));
  OK(DRIVER(cuEventCreate)(&event, CU_EVENT_DISABLE_TIMING));
  OK(DRIVER(cuEventRecord)(event, stream));
  OK(DRIVER(cuStreamWaitEvent)(member, event, 0));
  OK(driver_function<CUresult (*)(CUstream)>("cuStreamDestroy_v2")(member));
  EXPECT(dormouse_sleep(nullptr, 0, 0) == DORMOUSE_BUSY, "its origin still captures");
  EXPECT(DRIVER(cuStreamEndCapture)(stream, &graph) != CUDA_SUCCESS, "it was invalidated");
  sleeps_and_wakes("an invalidated capture ended");

  // Two at once.
  CUstream first = nullptr;
  begin();
  first = stream;
  begin();
  OK(DRIVER(cuStreamEndCapture)(first, &graph));
  EXPECT(dormouse_sleep(nullptr, 0, 0) == DORMOUSE_BUSY, "the other still captures");
  OK(DRIVER(cuStreamEndCapture)(stream, &graph));
  sleeps_and_wakes("both ended");

  begin();
  OK(cudaDeviceReset());
  weights = allocate_tagged("weights", kMiB);
  sleeps_and_wakes("the device was reset");
  OK(cudaFree(weights));
}

void a_reset_takes_the_memory_with_it() {
  void* weights = allocate_tagged("weights", kMiB);
  OK(cudaDeviceReset());
  EXPECT(stats_of("weights").blocks == 0, "blocks after the reset");
  EXPECT(cudaFree(weights) == cudaErrorInvalidValue, "its memory after the reset");
  cudaGetLastError();
  void* again = allocate_tagged("weights", kMiB);
  write(again, kMiB, 10);
  OK(dormouse_sleep(nullptr, 0, 0));
  OK(dormouse_wake(nullptr, 0));
  check(again, kMiB, 10);
  OK(cudaFree(again));
}

void a_destroyed_context_takes_the_memory_with_it() {
  OK(DRIVER(cuInit)(0));
  CUcontext first = nullptr;
  CUcontext second = nullptr;
  using Create = CUresult (*)(CUcontext*, unsigned int, CUdevice);
  auto create = driver_function<Create>("cuCtxCreate_v2");
  OK(create(&first, 0, 0));
  OK(create(&second, 0, 0));
  CUdeviceptr lost = 0;
  CUdeviceptr kept = 0;
  OK(dormouse_region_begin("weights"));
  OK(DRIVER(cuMemAlloc_v2)(&lost, kMiB));
  OK(DRIVER(cuCtxSetCurrent)(first));
  OK(DRIVER(cuMemAlloc_v2)(&kept, kMiB));
  OK(dormouse_region_end());
  OK(DRIVER(cuCtxDestroy_v2)(second));
  EXPECT(stats_of("weights").blocks == 1, "blocks");
  EXPECT(DRIVER(cuMemFree_v2)(lost) == CUDA_ERROR_INVALID_VALUE, "what was lost");
  OK(DRIVER(cuMemsetD8_v2)(kept, 1, kMiB));
  OK(DRIVER(cuMemFree_v2)(kept));
  OK(DRIVER(cuCtxDestroy_v2)(first));
}

// --- The control socket

void socket_is_there() {  // with CASES_SOCKETS, the folder
  const std::string path =
      std::string(std::getenv("CASES_SOCKETS")) + "/" + std::to_string(getpid()) + ".sock";
  EXPECT(access(path.c_str(), F_OK) != 0, "before CUDA is used");
  OK(cudaFree(nullptr));
  EXPECT(access(path.c_str(), F_OK) == 0, path);
  if (fork() == 0) std::exit(0);
  wait(nullptr);
  EXPECT(access(path.c_str(), F_OK) == 0, "after a child's exit");
}

// --- Fork and exit

void a_forked_child_starts_clean() {
  void* weights = allocate_tagged("weights", kMiB);
  write(weights, kMiB, 11);
  OK(dormouse_region_begin("weights"));
  const pid_t child = fork();
  if (child == 0) {
    if (dormouse_sleep(nullptr, 0, 0) != DORMOUSE_NOT_ACTIVE) _exit(2);
    if (dormouse_region_end() != DORMOUSE_NO_REGION) _exit(3);
    if (fork() == 0) _exit(0);  // a child's child
    int status = 0;
    wait(&status);
    std::exit(status);
  }
  int status = 0;
  EXPECT(waitpid(child, &status, 0) == child && status == 0,
         "the child's status " + std::to_string(status));
  OK(dormouse_region_end());
  OK(dormouse_sleep(nullptr, 0, 0));
  OK(dormouse_wake(nullptr, 0));
  check(weights, kMiB, 11);
  OK(cudaFree(weights));
}

// The child of a process that forks before it uses CUDA uses it like any other.
void a_child_can_use_cuda() {
  const pid_t child = fork();
  if (child == 0) {
    void* weights = allocate_tagged("weights", kMiB);
    write(weights, kMiB, 12);
    OK(dormouse_sleep(nullptr, 0, 0));
    OK(dormouse_wake(nullptr, 0));
    check(weights, kMiB, 12);
    std::exit(0);
  }
  int status = 0;
  EXPECT(waitpid(child, &status, 0) == child && status == 0, "the child");
}

struct FreesAtExit {
  void* pointer = nullptr;
  ~FreesAtExit() {
    if (pointer == nullptr) return;
    const cudaError_t result = cudaFree(pointer);
    if (result != cudaSuccess && result != cudaErrorCudartUnloading) _exit(4);
    cudaMemset(pointer, 0, 1);  // must come back, with whatever error
  }
};
FreesAtExit frees_at_exit;

void exit_while_asleep() {
  frees_at_exit.pointer = allocate_tagged("weights", kMiB);
  OK(dormouse_sleep(nullptr, 0, 0));
}

// Nobody can wake the memory any more: exit handlers must not wait for that.
void exit_while_the_gate_is_closed() {
  frees_at_exit.pointer = allocate_tagged("weights", kMiB);
  OK(dormouse_sleep(nullptr, 0, DORMOUSE_SLEEP_GATE));
}

}  // namespace

int main(int argc, char** argv) {
  if (dormouse_version == nullptr) fail("the library is not loaded");
  return run_case(argc, argv,
                  {
                      CASE(regions_nest_and_end),
                      CASE(regions_are_the_threads_own),
                      CASE(an_end_without_a_begin_does_nothing),
                      CASE(bad_arguments_are_refused),
                      CASE(a_dash_is_no_tag),
                      CASE(switched_off),
                      CASE(a_call_without_memory_has_its_own_message),
                      CASE(stats_fit_the_callers_struct),
                      CASE(before_cuda_is_used),
                      CASE(an_initialiser_may_use_cuda_while_cuda_begins),
                      CASE(zero_bytes),
                      CASE(more_than_the_device_has),
                      CASE(every_kind_of_allocation),
                      CASE(without_virtual_memory_the_program_is_served_itself),
                      CASE(without_physical_memory_to_map_the_program_is_served_itself),
                      CASE(memory_of_a_named_pool_stays_in_it),
                      CASE(rules_on_single_allocations),
                      CASE(a_thread_whose_name_fits_is_in_a_region),
                      CASE(memory_that_the_program_maps_is_not_seen_by_size_rules),
                      CASE(memory_that_the_program_maps_sleeps_too),
                      CASE(memory_that_the_program_maps_can_be_left_alone),
                      CASE(memory_that_the_program_maps_may_go_asleep),
                      CASE(kept_memory_counts_as_free),
                      CASE(pointers_answer_as_cudamallocs),
                      CASE(no_ipc_handle_of_tagged_memory),
                      CASE(no_handle_of_tagged_memory),
                      CASE(what_others_hold_stays_awake),
                      CASE(a_buffer_can_be_kept_awake),
                      CASE(attributes_of_a_buffer_are_its_own),
                      CASE(copies_reach_memory_of_every_device),
                      CASE(copies_reach_memory_without_peers),
                      CASE(a_pools_access_reaches_tagged_memory),
                      CASE(free_in_the_middle_of_a_block),
                      CASE(free_inside_a_sleeping_pool),
                      CASE(sleep_frees_and_wake_restores),
                      CASE(unknown_tags_are_named),
                      CASE(wake_without_memory_can_be_tried_again),
                      CASE(a_backup_is_kept_for_a_moment),
                      CASE(discard_drops_the_content),
                      CASE(calls_wait_for_what_sleeps),
                      CASE(calls_wake_what_sleeps),
                      CASE(calls_wake_what_sleeps_when_there_is_memory_again),
                      CASE(calls_fail_on_what_sleeps),
                      CASE(graph_nodes_wait_for_what_sleeps),
                      CASE(no_sleep_while_a_stream_captures),
                      CASE(a_capture_waits_to_begin_and_not_to_end),
                      CASE(captures_end_with_what_they_are_in),
                      CASE(a_reset_takes_the_memory_with_it),
                      CASE(a_destroyed_context_takes_the_memory_with_it),
                      CASE(socket_is_there),
                      CASE(a_forked_child_starts_clean),
                      CASE(a_child_can_use_cuda),
                      CASE(exit_while_asleep),
                      CASE(exit_while_the_gate_is_closed),
                  });
}
