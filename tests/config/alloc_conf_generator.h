// Allocator configurations made at random: valid ones, nearly valid ones and broken ones. For the
// differential test and the property tests of config/alloc_conf.
#pragma once

#include <random>
#include <string>

namespace dormouse::config::test {

class AllocConfGenerator {
 public:
  explicit AllocConfGenerator(uint64_t seed) : random_(seed) {}

  /// One configuration.
  std::string next();

  /// True once in `n`.
  bool once_in(unsigned n) { return below(n) == 0; }
  size_t below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }

 private:
  std::string number();
  std::string fraction();
  std::string boolean();
  std::string list();
  std::string entry();
  std::string mutate(std::string text);
  char mark();

  std::mt19937_64 random_;
};

}  // namespace dormouse::config::test
