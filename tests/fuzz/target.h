// What every fuzz target defines: the function that libFuzzer calls, and inputs to begin from.
//
// Each target is a plain file, so that it runs in two ways: under GoogleTest over generated inputs
// (corpus_test.cc, everywhere), and under libFuzzer where clang is installed (scripts/fuzz).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace dormouse::fuzz {

/// An input that the target's grammar takes, or nearly does; equal seeds give equal inputs.
std::string make_input(uint64_t seed);

/// Ends the process if a property does not hold, which both drivers report with the input.
inline void require(bool holds, const char* property) {
  if (holds) return;
  std::fprintf(stderr, "violated: %s\n", property);
  std::abort();
}

}  // namespace dormouse::fuzz
