// Writes inputs that a fuzz target begins from: write_seeds FOLDER COUNT. Linked with the target by
// scripts/fuzz.
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "tests/fuzz/target.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s FOLDER COUNT\n", argv[0]);
    return 2;
  }
  const unsigned long count = std::strtoul(argv[2], nullptr, 10);
  for (unsigned long seed = 0; seed < count; ++seed) {
    std::ofstream file(std::string(argv[1]) + "/" + std::to_string(seed), std::ios::binary);
    file << dormouse::fuzz::make_input(seed);
    if (!file.flush()) {
      std::perror(argv[1]);
      return 1;
    }
  }
  return 0;
}
