// Reads from a module's PTX text what a launch needs: the kernels' names and their parameters.
// For the simulated driver's sources only.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace simgpu {

struct PtxParameter {
  size_t size;    // bytes
  size_t offset;  // in a packed argument buffer
};

struct PtxEntry {
  std::string name;
  std::vector<PtxParameter> parameters;
  size_t packed_size = 0;  // bytes of a packed argument buffer
};

// The entries of PTX text. False if it is not PTX (no .version directive, or an entry that cannot
// be read).
bool parse_ptx(const std::string& text, std::vector<PtxEntry>* entries);

}  // namespace simgpu
