// Parts of DORMOUSE_REGIONS with their places, and the rules of one item. For regions.cc alone.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "config/regions.h"

namespace dormouse::config::regions {

inline constexpr std::array<std::string_view, 3> kPolicyNames = {"host", "none", "disk"};
inline constexpr char kRulesAllowed[] =
    "allowed are nvtx(PATTERN), nvtx(PATTERN@DOMAIN), python(module:qualname), process, "
    "size(>=SIZE), size(<SIZE), thread(PATTERN) and api";

/// Text together with where it stands in the whole list.
struct Piece {
  std::string_view text;
  size_t position = 0;

  bool empty() const { return text.empty(); }
  Piece from(size_t offset) const { return {text.substr(offset), position + offset}; }
  Piece first(size_t count) const { return {text.substr(0, count), position}; }
  Piece middle(size_t begin, size_t end) const { return from(begin).first(end - begin); }
};

/// The text of a fault travels as an exception inside regions.cc and region_rules.cc only: an item
/// is abandoned at its first one, from any depth.
struct Fault {
  size_t position;
  std::string message;
};

[[noreturn]] void fail(const Piece& at, std::string message);
/// Without white space around it, but for a blank at the end that a \ takes.
Piece trimmed(Piece piece);

/// Splits at each `mark` that is not escaped and, if `nested`, not in parentheses.
std::vector<Piece> split(const Piece& piece, char mark, bool nested);

/// Throws Fault. `tag` is for its message.
Rule read_rule(const Piece& piece, const std::string& tag);

/// The least number of bytes that a text needs to match.
size_t shortest_match(std::string_view pattern);

}  // namespace dormouse::config::regions
