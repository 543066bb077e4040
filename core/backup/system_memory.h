// How much host memory this process may still take: the machine's and its control groups' word.
// Linux only. Used by host images and by the command line; needs nothing else of core.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace dormouse {

// Bytes that can be taken without pushing the machine or a control group of this process (v1 or v2,
// its parents included) out of memory; page cache that can be dropped counts as available. `root`
// is where /proc and /sys are found (tests hand in a made-up tree). The largest number if nothing
// can be read. Takes some tens of microseconds. Throws std::bad_alloc. Thread-safe.
std::uint64_t available_host_memory(const std::string& root = "");

// Memory of [begin, begin + bytes), whole pages that have not been touched, comes from the NUMA
// node if it has some left. False if the system refuses (containers may forbid mbind): then it
// comes from where the touching thread runs. Thread-safe.
bool prefer_numa_node(void* begin, std::size_t bytes, int node) noexcept;

}  // namespace dormouse
