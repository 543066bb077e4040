// One of several copies of a libc10, as far as its settings go: COPY is its number, and its object
// is larger than that of the copy before. See copies_test.cc.
#include <string>

#pragma GCC visibility push(default)
namespace c10::CachingAllocator {

class AcceleratorAllocatorConfig {
 public:
  AcceleratorAllocatorConfig();
  static AcceleratorAllocatorConfig& instance();
  void parseArgs(const std::string& text);

  long copy = COPY;
  long parsed[COPY] = {};
  bool expandable = true;
};

AcceleratorAllocatorConfig::AcceleratorAllocatorConfig() = default;

void AcceleratorAllocatorConfig::parseArgs(const std::string& text) {
  ++parsed[COPY - 1];
  expandable = text.find("False") == std::string::npos;
}

AcceleratorAllocatorConfig& AcceleratorAllocatorConfig::instance() {
  static auto* instance = new AcceleratorAllocatorConfig;
  return *instance;
}

}  // namespace c10::CachingAllocator

using Config = c10::CachingAllocator::AcceleratorAllocatorConfig;

extern "C" {
long copy_seen() {
  return Config::instance().copy;
}

bool expandable_seen() {
  return Config::instance().expandable;
}

long texts_parsed(const char* text) {
  Config::instance().parseArgs(text);
  return Config::instance().parsed[COPY - 1];
}
}
#pragma GCC visibility pop
