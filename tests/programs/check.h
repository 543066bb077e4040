// What the small CUDA programs share: failing with a message, patterns, a checksum of what they
// saw.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

// Ends the program unless a call returned 0, which is success in both of CUDA's interfaces.
#define CHECK(call)                                                                            \
  do {                                                                                         \
    int check_result_ = static_cast<int>(call);                                                \
    if (check_result_ != 0) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s: error %d\n", __FILE__, __LINE__, #call, check_result_); \
      std::exit(1);                                                                            \
    }                                                                                          \
  } while (false)

namespace programs {

// A pattern that differs from seed to seed and from byte to byte.
inline std::vector<unsigned char> pattern(size_t bytes, uint32_t seed) {
  std::vector<unsigned char> data(bytes);
  uint32_t state = seed * 2654435761u + 1;
  for (unsigned char& byte : data) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<unsigned char>(state >> 24);
  }
  return data;
}

// FNV-1a, continued from `sum`.
inline uint64_t checksum(const std::vector<unsigned char>& data,
                         uint64_t sum = 14695981039346656037ull) {
  for (unsigned char byte : data) sum = (sum ^ byte) * 1099511628211ull;
  return sum;
}

}  // namespace programs
