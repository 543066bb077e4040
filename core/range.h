// A stretch of bytes: of a device's addresses, or of a chunk by offset. And what is done with lists
// of them, which are sorted and do not overlap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/round_up.h"

namespace dormouse {

struct Range {
  std::uint64_t begin = 0;
  std::uint64_t bytes = 0;

  constexpr std::uint64_t end() const noexcept { return begin + bytes; }
  constexpr bool contains(std::uint64_t at) const noexcept { return at - begin < bytes; }

  friend bool operator==(const Range&, const Range&) = default;
};

using Ranges = std::vector<Range>;

// Adds what begins where the last one ends or later; neighbours are joined.
inline void append(Range range, Ranges* to) {
  if (!to->empty() && to->back().end() == range.begin) {
    to->back().bytes += range.bytes;
  } else {
    to->push_back(range);
  }
}

// What of `ranges` does not lie in `without`.
inline Ranges subtract(const Ranges& ranges, const Ranges& without) {
  Ranges kept;
  auto skip = without.begin();
  for (const Range& range : ranges) {
    std::uint64_t at = range.begin;
    while (skip != without.end() && skip->end() <= at) ++skip;
    for (; skip != without.end() && skip->begin < range.end(); ++skip) {
      if (skip->begin > at) kept.push_back({at, skip->begin - at});
      at = std::max(at, std::min(skip->end(), range.end()));
      if (skip->end() > range.end()) break;  // the rest of it is the next range's
    }
    if (at < range.end()) kept.push_back({at, range.end() - at});
  }
  return kept;
}

// The whole units that lie in the range.
constexpr Range round_inward(const Range& range, std::uint64_t unit) noexcept {
  const std::uint64_t begin = round_up(range.begin, unit);
  const std::uint64_t end = range.end() / unit * unit;
  return begin < end ? Range{begin, end - begin} : Range{};
}

}  // namespace dormouse
