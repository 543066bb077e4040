// An NVTX tool such as a profiler brings: counts what it hears. It leaves out RangePushW.
#include <nvtx3/nvToolsExt.h>

#include <atomic>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

thread_local int level = 0;
std::string last_message;
nvtxDomainHandle_t last_domain = nullptr;
std::atomic<int> ranges_ended{0};

int push(const char* message) {
  last_message = message == nullptr ? "" : message;
  return 100 + level++;
}
int pop() {
  return 100 + --level;
}
int domain_push(nvtxDomainHandle_t, const nvtxEventAttributes_t*) {
  return 100 + level++;
}
int domain_pop(nvtxDomainHandle_t) {
  return 100 + --level;
}
nvtxRangeId_t start(const char*) {
  return 7000;
}
void end(nvtxRangeId_t) {
  ++ranges_ended;
}
nvtxDomainHandle_t create(const char*) {
  return last_domain = reinterpret_cast<nvtxDomainHandle_t>(new int);
}
nvtxStringHandle_t register_string(nvtxDomainHandle_t, const char*) {
  return reinterpret_cast<nvtxStringHandle_t>(new int);
}

template <typename Function>
void put(NvtxFunctionTable table, int number, Function function) {
  *table[number] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

EXPORT const char* tool_last_message() {
  return last_message.c_str();
}
EXPORT void* tool_last_domain() {
  return last_domain;
}
EXPORT int tool_ranges_ended() {
  return ranges_ended;
}

EXPORT int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_export_table) {
  const auto* callbacks =
      static_cast<const NvtxExportTableCallbacks*>(get_export_table(NVTX_ETID_CALLBACKS));
  if (callbacks == nullptr) return 0;
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size) == 0) return 0;
  put(table, NVTX_CBID_CORE_RangePushA, &push);
  put(table, NVTX_CBID_CORE_RangePop, &pop);
  put(table, NVTX_CBID_CORE_RangeStartA, &start);
  put(table, NVTX_CBID_CORE_RangeEnd, &end);
  if (callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0) return 0;
  put(table, NVTX_CBID_CORE2_DomainRangePushEx, &domain_push);
  put(table, NVTX_CBID_CORE2_DomainRangePop, &domain_pop);
  put(table, NVTX_CBID_CORE2_DomainCreateA, &create);
  put(table, NVTX_CBID_CORE2_DomainRegisterStringA, &register_string);
  return 1;
}
