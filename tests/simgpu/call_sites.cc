#include "tests/simgpu/call_sites.h"

#include <charconv>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>

#include "tests/simgpu/errors.h"

namespace simgpu {
namespace {

struct Failure {
  std::string function;
  uint64_t first;
  uint64_t last;
  CUresult result;
  uint64_t seen = 0;
};

struct Registry {
  std::mutex mutex;  // protects sites and failures
  std::map<std::string, std::unique_ptr<CallSite>> sites;
  std::vector<Failure> failures;
};

Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

// Whether any failure is injected, so that a use without one takes no lock.
std::atomic<bool> armed{false};

CUresult injected(const std::string& function) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  CUresult result = CUDA_SUCCESS;
  for (Failure& failure : r.failures) {
    if (failure.function != "*" && failure.function != function) continue;
    ++failure.seen;
    bool hit =
        failure.first == 0 || (failure.seen >= failure.first && failure.seen <= failure.last);
    if (hit && result == CUDA_SUCCESS) result = failure.result;
  }
  return result;
}

bool parse_which(const std::string& text, uint64_t* first, uint64_t* last) {
  if (text == "*") {
    *first = *last = 0;
    return true;
  }
  const char* end = text.data() + text.size();
  auto [after, error] = std::from_chars(text.data(), end, *first);
  if (error != std::errc() || *first == 0) return false;
  *last = *first;
  if (after == end) return true;
  if (*after != '-') return false;
  auto [after_last, last_error] = std::from_chars(after + 1, end, *last);
  return last_error == std::errc() && after_last == end && *last >= *first;
}

}  // namespace

std::string base_name(const std::string& function) {
  std::string name = function;
  for (const char* suffix : {"_ptds", "_ptsz"}) {
    if (name.ends_with(suffix)) name.resize(name.size() - 5);
  }
  size_t version = name.rfind("_v");
  if (version != std::string::npos && version + 3 == name.size() &&
      std::isdigit(name[version + 2])) {
    name.resize(version);
  }
  return name;
}

CUresult CallSite::use() {
  count_.fetch_add(1, std::memory_order_relaxed);
  if (!armed.load(std::memory_order_relaxed)) return CUDA_SUCCESS;
  return injected(name_);
}

CallSite& call_site(const char* function) {
  Registry& r = registry();
  std::string name = base_name(function);
  std::lock_guard<std::mutex> lock(r.mutex);
  std::unique_ptr<CallSite>& site = r.sites[name];
  if (site == nullptr) site = std::make_unique<CallSite>(name);
  return *site;
}

std::vector<CallSite*> all_call_sites() {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  std::vector<CallSite*> sites;
  for (auto& [name, site] : r.sites) sites.push_back(site.get());
  return sites;
}

void inject_failure(const std::string& function, uint64_t first, uint64_t last, CUresult result) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.failures.push_back({base_name(function), first, last, result});
  armed.store(true, std::memory_order_relaxed);
}

void clear_failures() {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.failures.clear();
  armed.store(false, std::memory_order_relaxed);
}

bool inject_failures(const std::string& specification) {
  std::stringstream entries(specification);
  std::string entry;
  while (std::getline(entries, entry, ',')) {
    std::stringstream fields(entry);
    std::string name, which, code;
    std::getline(fields, name, ':');
    std::getline(fields, which, ':');
    std::getline(fields, code);
    uint64_t first = 0, last = 0;
    CUresult result = CUDA_ERROR_UNKNOWN;
    if (name.empty() || !parse_which(which, &first, &last)) return false;
    if (!code.empty() && !parse_result(code, &result)) return false;
    inject_failure(name, first, last, result);
  }
  return true;
}

}  // namespace simgpu
