// Why memory stays awake: who else holds its physical memory, or that the program wants it so. For
// pools, the program's own mappings, and the figures of both.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dormouse {

enum class Holder : std::uint8_t {
  kNobody,
  kProgram,    // dormouse_keep_awake() and kin
  kHandle,     // exported to other processes
  kDmaBuf,     // exported to other drivers: RDMA, file systems
  kMulticast,  // bound to a multicast object
  kEndpoint,   // bound to a logical endpoint
  kArray,      // tiles of a sparse array
  kMappings,   // mapped in part, or at two addresses
  kAccess,     // a part has access of its own, or its device has none, or the processor has some
};

// As in 'held: 256 MiB (dma-buf export)'.
constexpr const char* holder_name(Holder holder) noexcept {
  switch (holder) {
    case Holder::kNobody:
      break;
    case Holder::kProgram:
      return "kept awake by the program";
    case Holder::kHandle:
      return "exported handle";
    case Holder::kDmaBuf:
      return "dma-buf export";
    case Holder::kMulticast:
      return "multicast object";
    case Holder::kEndpoint:
      return "logical endpoint";
    case Holder::kArray:
      return "sparse array";
    case Holder::kMappings:
      return "mapped in part or twice";
    case Holder::kAccess:
      return "unusual access rights";
  }
  return "nobody";
}

// Physical memory that stays awake, for one reason.
struct HeldBytes {
  Holder by = Holder::kNobody;
  std::uint64_t bytes = 0;
};

inline void add_held(std::vector<HeldBytes>* to, Holder by, std::uint64_t bytes) {
  const auto at =
      std::find_if(to->begin(), to->end(), [by](const HeldBytes& each) { return each.by == by; });
  at == to->end() ? to->push_back({by, bytes}) : (void)(at->bytes += bytes);
}

// A block that was held, by its place and its number: the place may have become another's.
struct HeldBlock {
  CUdeviceptr address = 0;
  std::uint64_t number = 0;
};

}  // namespace dormouse
