// NVTX ranges as regions: an unmodified program with NVTX's header, under the preloaded library.
// Which region the thread is in is asked of an allocation: the tag whose figures it changes. Run by
// run.sh, one process a case, on the simulated GPU or a real one.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <nvtx3/nvToolsExt.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#define DORMOUSE_OPTIONAL
#include "shim/abi/dormouse.h"

namespace {

std::map<std::string, uint64_t> allocations() {
  size_t count = 0;
  dormouse_stats(nullptr, 0, &count);
  std::vector<dormouse_tag_stats> stats(count);
  if (count > 0) stats[0].size = sizeof(dormouse_tag_stats);
  dormouse_stats(stats.data(), stats.size(), &count);
  std::map<std::string, uint64_t> result;
  for (const dormouse_tag_stats& each : stats) result[each.tag] += each.allocations;
  return result;
}

// The tag that an allocation on this thread gets now; "" for none.
std::string tag() {
  const auto before = allocations();
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, 1 << 20), cudaSuccess);
  const auto after = allocations();
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  for (const auto& [name, count] : after) {
    const auto found = before.find(name);
    if (count != (found == before.end() ? 0 : found->second)) return name;
  }
  return "";
}

std::string tag_on_another_thread() {
  std::string result;
  std::thread([&] { result = tag(); }).join();
  return result;
}

nvtxEventAttributes_t event(nvtxMessageType_t type) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = type;
  return attributes;
}

nvtxEventAttributes_t event(const char* message) {
  nvtxEventAttributes_t attributes = event(NVTX_MESSAGE_TYPE_ASCII);
  attributes.message.ascii = message;
  return attributes;
}

nvtxEventAttributes_t event(const wchar_t* message) {
  nvtxEventAttributes_t attributes = event(NVTX_MESSAGE_TYPE_UNICODE);
  attributes.message.unicode = message;
  return attributes;
}

nvtxEventAttributes_t event(nvtxStringHandle_t message) {
  nvtxEventAttributes_t attributes = event(NVTX_MESSAGE_TYPE_REGISTERED);
  attributes.message.registered = message;
  return attributes;
}

// Cases run with DORMOUSE_REGIONS=weights: nvtx(load*), nvtx(größe); kv_cache=none:
// nvtx(cache@engine);
// -: nvtx(scratch); plain: nvtx(plain@); unless run.sh says otherwise.

TEST(Ranges, APushedRangeIsARegionUntilItsPop) {
  EXPECT_EQ(tag(), "");
  nvtxRangePushA("load_model");
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();
  EXPECT_EQ(tag(), "");
}

TEST(Ranges, ARangeThatNoRuleNamesIsNone) {
  nvtxRangePushA("compute");
  EXPECT_EQ(tag(), "");
  nvtxRangePop();
}

TEST(Ranges, PopsMatchTheirPushes) {
  nvtxRangePushA("compute");
  nvtxRangePushA("load a");
  nvtxRangePushA("compute");
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();
  EXPECT_EQ(tag(), "");
  nvtxRangePop();
  nvtxRangePushA("load b");
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();
  EXPECT_EQ(tag(), "");
}

TEST(Ranges, APopWithoutAPushEndsNoRegionOfOthers) {
  ASSERT_EQ(dormouse_region_begin("own"), DORMOUSE_OK);
  nvtxRangePop();
  nvtxRangePop();
  EXPECT_EQ(tag(), "own");
  EXPECT_EQ(dormouse_region_end(), DORMOUSE_OK);
}

TEST(Ranges, EveryKindOfMessageIsRead) {
  nvtxRangePushW(L"größe");
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();

  const nvtxEventAttributes_t ascii = event("load");
  nvtxRangePushEx(&ascii);
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();

  const nvtxEventAttributes_t unicode = event(L"load");
  nvtxRangePushEx(&unicode);
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();

  const nvtxEventAttributes_t registered = event(nvtxDomainRegisterStringA(nullptr, "load it"));
  nvtxRangePushEx(&registered);
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();

  const nvtxEventAttributes_t registered_wide = event(nvtxDomainRegisterStringW(nullptr, L"größe"));
  nvtxRangePushEx(&registered_wide);
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();

  const nvtxEventAttributes_t nothing = event(NVTX_MESSAGE_UNKNOWN);
  nvtxRangePushEx(&nothing);
  EXPECT_EQ(tag(), "");
  nvtxRangePop();
  nvtxRangePushA(nullptr);
  EXPECT_EQ(tag(), "");
  nvtxRangePop();
}

TEST(Ranges, ARuleCanNameTheDomain) {
  const nvtxDomainHandle_t engine = nvtxDomainCreateA("engine");
  const nvtxDomainHandle_t other = nvtxDomainCreateW(L"other");
  ASSERT_NE(engine, nullptr);
  const nvtxEventAttributes_t cache = event("cache");
  nvtxDomainRangePushEx(engine, &cache);
  EXPECT_EQ(tag(), "kv_cache");
  nvtxDomainRangePop(engine);
  EXPECT_EQ(tag(), "");
  nvtxDomainRangePushEx(other, &cache);
  EXPECT_EQ(tag(), "");
  nvtxDomainRangePop(other);
  nvtxRangePushA("cache");
  EXPECT_EQ(tag(), "");
  nvtxRangePop();

  // A rule without a domain is about all of them; one with @ and nothing, about the nameless one.
  const nvtxEventAttributes_t load = event(nvtxDomainRegisterStringA(other, "load"));
  nvtxDomainRangePushEx(other, &load);
  EXPECT_EQ(tag(), "weights");
  nvtxDomainRangePop(other);
  const nvtxEventAttributes_t plain = event("plain");
  nvtxDomainRangePushEx(other, &plain);
  EXPECT_EQ(tag(), "");
  nvtxDomainRangePop(other);
  nvtxRangePushEx(&plain);
  EXPECT_EQ(tag(), "plain");
  nvtxRangePop();
  nvtxDomainDestroy(engine);
}

TEST(Ranges, DomainsMayOverlap) {
  const nvtxDomainHandle_t engine = nvtxDomainCreateA("engine");
  const nvtxEventAttributes_t cache = event("cache");
  nvtxRangePushA("load");
  nvtxDomainRangePushEx(engine, &cache);
  EXPECT_EQ(tag(), "kv_cache");
  nvtxRangePop();
  EXPECT_EQ(tag(), "kv_cache");
  nvtxDomainRangePop(engine);
  EXPECT_EQ(tag(), "");
  EXPECT_EQ(dormouse_region_end(), DORMOUSE_NO_REGION);
}

TEST(Ranges, RegionsOfOthersInsideARangeOutliveIt) {
  nvtxRangePushA("load");
  ASSERT_EQ(dormouse_region_begin("own"), DORMOUSE_OK);
  ASSERT_EQ(dormouse_region_begin("inner"), DORMOUSE_OK);
  nvtxRangePop();
  EXPECT_EQ(tag(), "inner");
  EXPECT_EQ(dormouse_region_end(), DORMOUSE_OK);
  EXPECT_EQ(tag(), "own");
  EXPECT_EQ(dormouse_region_end(), DORMOUSE_OK);
  EXPECT_EQ(tag(), "");
  EXPECT_EQ(dormouse_region_end(), DORMOUSE_NO_REGION);
}

TEST(Ranges, ARangeCanExcludeMemory) {
  nvtxRangePushA("load");
  nvtxRangePushA("scratch");
  EXPECT_EQ(tag(), "");
  nvtxRangePop();
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();
}

TEST(Ranges, AStartedRangeIsARegionOfItsThread) {
  const nvtxRangeId_t outer = nvtxRangeStartA("load");
  const nvtxEventAttributes_t scratch = event("scratch");
  const nvtxRangeId_t inner = nvtxRangeStartEx(&scratch);
  EXPECT_NE(outer, inner);
  EXPECT_EQ(tag(), "");
  EXPECT_EQ(tag_on_another_thread(), "");
  nvtxRangeEnd(outer);  // in the order that they began
  EXPECT_EQ(tag(), "");
  nvtxRangeEnd(inner);
  EXPECT_EQ(tag(), "");
  nvtxRangeEnd(inner);
  const nvtxRangeId_t wide = nvtxRangeStartW(L"load");
  EXPECT_EQ(tag(), "weights");
  nvtxRangeEnd(wide);
  EXPECT_EQ(tag(), "");
}

TEST(Ranges, AStartedRangeOfADomainEndsByItsNumber) {
  const nvtxDomainHandle_t engine = nvtxDomainCreateA("engine");
  const nvtxEventAttributes_t cache = event("cache");
  const nvtxRangeId_t id = nvtxDomainRangeStartEx(engine, &cache);
  EXPECT_EQ(tag(), "kv_cache");
  nvtxDomainRangeEnd(engine, id);
  EXPECT_EQ(tag(), "");
}

TEST(Ranges, AStartedRangeThatAnotherThreadEndsIsOverAtTheNextCall) {
  const nvtxRangeId_t id = nvtxRangeStartA("load");
  EXPECT_EQ(tag(), "weights");
  std::thread([&] { nvtxRangeEnd(id); }).join();
  nvtxRangePushA("compute");
  EXPECT_EQ(tag(), "");
  nvtxRangePop();
}

TEST(Ranges, ThreadsHaveTheirOwn) {
  nvtxRangePushA("load");
  EXPECT_EQ(tag_on_another_thread(), "");
  std::thread([] {
    nvtxRangePop();
    nvtxRangePushA("load");
    nvtxRangeStartA("load");
    EXPECT_EQ(tag(), "weights");
  }).join();
  EXPECT_EQ(tag_on_another_thread(), "");
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();
  EXPECT_EQ(tag(), "");
}

// A fork can fall where another thread holds a lock, the dynamic linker's too.
TEST(Ranges, ChildrenBeginAndEndThem) {
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      while (!done) nvtxRangeEnd(nvtxRangeStartA("load"));
    });
  }
  for (int i = 0; i < 200 && !testing::Test::HasFailure(); ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);
      nvtxRangeEnd(nvtxRangeStartA("load"));
      nvtxRangePushA("load");
      nvtxRangePop();
      _exit(0);
    }
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0) << "child " << i;
  }
  done = true;
  for (std::thread& thread : threads) thread.join();
}

TEST(Ranges, WithoutAToolReturnsWhatNvtxReturnsAlone) {
  EXPECT_EQ(nvtxRangePushA("load"), NVTX_NO_PUSH_POP_TRACKING);
  EXPECT_EQ(nvtxRangePop(), NVTX_NO_PUSH_POP_TRACKING);
}

// run.sh: DORMOUSE_NVTX=off
TEST(SwitchedOff, RangesAreNoRegions) {
  nvtxRangePushA("load");
  EXPECT_EQ(tag(), "");
  nvtxRangePop();
  EXPECT_EQ(std::getenv("NVTX_INJECTION64_PATH"), nullptr);
}

// run.sh: not preloaded, but named to NVTX, as a parent's environment may have it
TEST(LoadedByNvtxAlone, NoRegionBegins) {
  nvtxRangePushA("load");
  void* library = dlopen(std::getenv("NVTX_INJECTION64_PATH"), RTLD_LAZY | RTLD_NOLOAD);
  if (library != nullptr) {
    const auto current =
        reinterpret_cast<const char* (*)()>(dlsym(library, "dormouse_current_tag"));
    ASSERT_NE(current, nullptr);
    EXPECT_STREQ(current(), "");
  }
  nvtxRangePop();
}

// run.sh: a rule that is not about ranges
TEST(WithoutARule, NvtxIsLeftAlone) {
  EXPECT_EQ(std::getenv("NVTX_INJECTION64_PATH"), nullptr);
  nvtxRangePushA("load");
  EXPECT_EQ(tag(), "");
  nvtxRangePop();
}

// --- With a tool that was named before: tool.cc. run.sh: NVTX_INJECTION64_PATH, TOOL

template <typename Function>
Function tools(const char* name) {
  void* tool = dlopen(std::getenv("TOOL"), RTLD_LAZY | RTLD_NOLOAD);
  return tool == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(tool, name));
}

TEST(WithATool, BothHearOfEveryRange) {
  EXPECT_EQ(nvtxRangePushA("load"), 100);
  EXPECT_EQ(tag(), "weights");
  EXPECT_EQ(nvtxRangePushA("compute"), 101);
  EXPECT_EQ(nvtxRangePop(), 101);
  EXPECT_EQ(nvtxRangePop(), 100);
  EXPECT_EQ(tag(), "");
  const auto last_message = tools<const char* (*)()>("tool_last_message");
  ASSERT_NE(last_message, nullptr);
  EXPECT_STREQ(last_message(), "compute");
}

TEST(WithATool, ItsHandlesAreTheProgramsAndNamesAreKnownByThem) {
  const nvtxDomainHandle_t engine = nvtxDomainCreateA("engine");
  EXPECT_EQ(engine, tools<void* (*)()>("tool_last_domain")());
  const nvtxStringHandle_t cache = nvtxDomainRegisterStringA(engine, "cache");
  const nvtxEventAttributes_t attributes = event(cache);
  nvtxDomainRangePushEx(engine, &attributes);
  EXPECT_EQ(tag(), "kv_cache");
  nvtxDomainRangePop(engine);
  const nvtxRangeId_t id = nvtxRangeStartA("load");
  EXPECT_EQ(id, 7000U);
  EXPECT_EQ(tag(), "weights");
  nvtxRangeEnd(id);
  EXPECT_EQ(tag(), "");
  EXPECT_EQ(tools<int (*)()>("tool_ranges_ended")(), 1);
}

TEST(WithATool, FunctionsThatItLeavesOutWorkForUsAlone) {
  nvtxRangePushW(L"load");  // the tool has no RangePushW
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();
  EXPECT_EQ(tag(), "");
}

// run.sh: NVTX_INJECTION64_PATH names a file that does not exist
TEST(WithAToolThatDoesNotLoad, RangesAreRegionsAllTheSame) {
  nvtxRangePushA("load");
  EXPECT_EQ(tag(), "weights");
  nvtxRangePop();
}

// A program that this one starts has the same tool.
TEST(WithATool, IsPassedOnToProgramsThatThisOneStarts) {
  if (std::getenv("STARTED") != nullptr) {
    EXPECT_EQ(nvtxRangePushA("load"), 100);
    EXPECT_EQ(tag(), "weights");
    return;
  }
  setenv("STARTED", "1", 1);
  const std::string command =
      "/proc/" + std::to_string(getpid()) +
      "/exe --gtest_filter=WithATool.IsPassedOnToProgramsThatThisOneStarts >&2";
  EXPECT_EQ(std::system(command.c_str()), 0);
}

}  // namespace
