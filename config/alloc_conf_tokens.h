// The tokens of PyTorch's allocator configuration and a walk over them, for both generations. For
// alloc_conf*.cc alone.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config/alloc_conf.h"
#include "config/text.h"

namespace dormouse::config::alloc_conf {

using Tokens = std::vector<std::string>;
using Error = std::optional<std::string>;

inline bool is_mark(char c) {
  return c == ',' || c == ':' || c == '[' || c == ']';
}

/// Marks are tokens, and so is what stands between them without white space (G2) or spaces (G1).
Tokens tokenize(Generation generation, std::string_view text);

/// Where the values of a text begin and end, for either generation. next() and position() walk the
/// tokens; the functions that read a value leave the position on its last token.
class Reader {
 public:
  Reader(Generation generation, const Tokens& tokens) : generation_(generation), tokens_(tokens) {}

  size_t position() const { return position_; }
  bool at_end() const { return position_ >= tokens_.size(); }
  const std::string& token() const { return tokens_[position_]; }
  bool is(std::string_view text) const { return !at_end() && token() == text; }
  /// Whether the token after this one is `text`; false at the end.
  bool next_is(std::string_view text) const {
    return position_ + 1 < tokens_.size() && tokens_[position_ + 1] == text;
  }
  bool has_next() const { return position_ + 1 < tokens_.size(); }
  void advance() { ++position_; }
  void move_to(size_t position) { position_ = position; }

  /// Steps on to a separator. G2 takes any token in its place.
  Error separator(std::string_view mark, std::string_view after) {
    advance();
    if (!at_end() && (generation_ == Generation::kG2 || token() == mark)) return std::nullopt;
    return "expected '" + std::string(mark) + "' after " + in_quotes(after) +
           (at_end() ? " but the text ends" : " but found " + in_quotes(token()));
  }

  /// Steps from a key on to its value.
  Error value() {
    const std::string key = token();
    if (Error error = separator(":", key)) return error;
    advance();
    if (at_end()) return "the value of " + in_quotes(key) + " is missing";
    return std::nullopt;
  }

  /// Steps from the first token of a value to its last: a list ends at the first ']'.
  Error skip_value() {
    if (!is("[")) return std::nullopt;
    while (!at_end() && !is("]")) advance();
    if (at_end()) return "a list has no closing ']'";
    return std::nullopt;
  }

  /// Steps over the separator after a value, to the next key or the end.
  Error next_key() {
    if (has_next()) {
      const std::string last = token();
      if (Error error = separator(",", last)) return error;
    }
    advance();
    return std::nullopt;
  }

  /// Walks `[boundary:divisions,...]` from its '['; `take` gets each pair. `take(boundary,
  /// divisions)` returns an error or nothing.
  template <typename Take>
  Error division_list(Take take) {
    for (advance(); !at_end() && !is("]"); advance()) {
      const std::string boundary = token();
      if (Error error = separator(":", boundary)) return error;
      advance();
      if (at_end()) return "roundup_power2_divisions: a division is missing";
      if (Error error = take(boundary, token())) return error;
      // PyTorch looks at the next token without asking whether there is one (G1).
      if (!has_next()) return "roundup_power2_divisions: the list has no closing ']'";
      if (next_is("]")) continue;
      const std::string last = token();
      if (Error error = separator(",", last)) return error;
    }
    if (at_end() && generation_ == Generation::kG2) {
      return "roundup_power2_divisions: the list has no closing ']'";
    }
    return std::nullopt;
  }

 private:
  Generation generation_;
  const Tokens& tokens_;
  size_t position_ = 0;
};

}  // namespace dormouse::config::alloc_conf
