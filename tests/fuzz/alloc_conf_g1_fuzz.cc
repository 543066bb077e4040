// Fuzzes the reader and editor of PyTorch's allocator configuration, generation 1: with the keys
// that it knows, and with any key.
#include "tests/config/alloc_conf_generator.h"
#include "tests/fuzz/alloc_conf_properties.h"

namespace dormouse::fuzz {

std::string make_input(uint64_t seed) {
  return config::test::AllocConfGenerator(seed).next();
}

}  // namespace dormouse::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using dormouse::config::AllocDialect;
  static const AllocDialect known = AllocDialect::g1();
  static const AllocDialect any = {known.generation, std::nullopt, false};
  const std::string text(reinterpret_cast<const char*>(data), size);
  dormouse::fuzz::check_alloc_conf(known, text);
  dormouse::fuzz::check_alloc_conf(any, text);
  return 0;
}
