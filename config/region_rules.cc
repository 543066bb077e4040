// The rules of DORMOUSE_REGIONS: reading, printing and matching; see region_rules.h and regions.h.
#include "config/region_rules.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "config/result.h"
#include "config/text.h"
#include "config/units.h"

namespace dormouse::config {

namespace regions {

void fail(const Piece& at, std::string message) {
  throw Fault{at.position, std::move(message)};
}

namespace {

/// Whether the character at `index` has a \ in front that is not itself taken by another.
bool is_escaped(std::string_view text, size_t index) {
  size_t slashes = 0;
  while (slashes < index && text[index - 1 - slashes] == '\\') ++slashes;
  return slashes % 2 == 1;
}

}  // namespace

Piece trimmed(Piece piece) {
  while (!piece.empty() && is_space(piece.text.front())) piece = piece.from(1);
  while (!piece.empty() && is_space(piece.text.back()) &&
         !is_escaped(piece.text, piece.text.size() - 1)) {
    piece = piece.first(piece.text.size() - 1);
  }
  return piece;
}

std::vector<Piece> split(const Piece& piece, char mark, bool nested) {
  std::vector<Piece> parts;
  size_t begin = 0;
  int depth = 0;
  for (size_t i = 0; i < piece.text.size(); ++i) {
    const char c = piece.text[i];
    if (c == '\\') {
      ++i;
      continue;
    }
    if (nested && c == '(') ++depth;
    if (nested && c == ')') --depth;
    if (c != mark || depth > 0) continue;
    parts.push_back(piece.middle(begin, i));
    begin = i + 1;
  }
  parts.push_back(piece.from(begin));
  return parts;
}

size_t shortest_match(std::string_view pattern) {
  size_t count = 0;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '*') continue;
    if (pattern[i] == '\\' && i + 1 < pattern.size()) ++i;
    ++count;
  }
  return count;
}

namespace {

bool is_word_character(char c) {
  return is_letter(c) || is_digit(c) || c == '_' || static_cast<unsigned char>(c) >= 0x80;
}

bool is_dotted_name(std::string_view text) {
  bool at_start = true;
  for (char c : text) {
    if (c == '.' ? at_start : !is_word_character(c) || (at_start && is_digit(c))) return false;
    at_start = c == '.';
  }
  return !at_start;
}

std::string read_pattern(const Piece& piece, std::string_view rule) {
  const std::string_view text = piece.text;
  const std::string name(rule);
  if (text.empty()) {
    fail(piece, name + " needs a pattern, such as " + name + "(load*); * alone matches every name");
  }
  if (text.back() == '\\' && !is_escaped(text, text.size() - 1)) {
    fail(piece, "the pattern " + in_quotes(text) +
                    " ends with a \\ that takes nothing; write \\\\ for a backslash");
  }
  const char quote = text.front();
  if (text.size() > 1 && (quote == '"' || quote == '\'') && text.back() == quote) {
    fail(piece, "patterns take no quotes: write " + std::string(text.substr(1, text.size() - 2)) +
                    ", or \\" + quote + " for a quote in the name");
  }
  return std::string(text);
}

Rule nvtx_rule(const Piece& arguments) {
  size_t at = arguments.text.size();
  while (at > 0 && (arguments.text[at - 1] != '@' || is_escaped(arguments.text, at - 1))) --at;
  if (at == 0) return NvtxRule{read_pattern(arguments, "nvtx"), std::nullopt};
  const Piece domain = trimmed(arguments.from(at));
  NvtxRule rule{read_pattern(trimmed(arguments.first(at - 1)), "nvtx"), std::string()};
  if (!domain.empty()) rule.domain = read_pattern(domain, "nvtx");
  return rule;
}

Rule python_rule(const Piece& arguments) {
  constexpr char kForm[] =
      "write python(module:qualname), such as "
      "python(transformers.modeling_utils:PreTrainedModel.from_pretrained)";
  const size_t colon = arguments.text.find(':');
  if (colon == std::string_view::npos) {
    fail(arguments, "python(" + std::string(arguments.text) +
                        ") has no ':' between module and function; " + kForm);
  }
  const Piece module = trimmed(arguments.first(colon));
  const Piece qualname = trimmed(arguments.from(colon + 1));
  for (const Piece& part : {module, qualname}) {
    if (is_dotted_name(part.text)) continue;
    fail(part, in_quotes(part.text) + " is not a dotted Python name; " + kForm);
  }
  return PythonRule{std::string(module.text), std::string(qualname.text)};
}

Rule size_rule(const Piece& arguments) {
  constexpr char kForm[] = "write size(>=20MiB), size(<2MiB) or size(>=2MiB,<20MiB)";
  SizeRule rule;
  bool has_from = false;
  for (const Piece& part : split(arguments, ',', false)) {
    const Piece bound = trimmed(part);
    const bool from = bound.text.starts_with(">=");
    if (!from && !(bound.text.starts_with("<") && !bound.text.starts_with("<="))) {
      fail(bound, in_quotes(bound.text) + " is not a comparison; " + kForm);
    }
    if (from ? has_from : rule.below.has_value()) {
      fail(bound, "the comparison " + in_quotes(bound.text) + " is one too many; " + kForm);
    }
    const Piece number = trimmed(bound.from(from ? 2 : 1));
    const Result<uint64_t> size = parse_size(number.text);
    if (!size) fail(number, size.error());
    if (from) {
      rule.from = *size;
      has_from = true;
    } else {
      rule.below = *size;
    }
  }
  if (rule.below && *rule.below <= rule.from) {
    fail(arguments, "no size is in size(" + std::string(arguments.text) + ")");
  }
  return rule;
}

Rule word_rule(const Piece& word, const std::string& tag) {
  const std::string name = to_lower(word.text);
  if (name == "process") return ProcessRule{};
  if (name == "api") return ApiRule{};
  if (name == "nvtx" || name == "thread") {
    fail(word, name + " needs a pattern: write " + name + "(load*)");
  }
  if (name == "python") fail(word, "python needs a function: write python(module:qualname)");
  if (name == "size") fail(word, "size needs a comparison: write size(>=20MiB)");
  if (std::find(kPolicyNames.begin(), kPolicyNames.end(), name) != kPolicyNames.end()) {
    fail(word, "a policy follows '=': write " + tag + "=" + name);
  }
  const size_t mark = word.text.find_first_of(":={");
  if (mark != std::string_view::npos && mark > 0) {
    fail(word, in_quotes(word.text) +
                   " is not a rule; if it begins another item, put ';' in front of " +
                   "it and not ','; " + kRulesAllowed);
  }
  fail(word, in_quotes(word.text) + " is not a rule; " + kRulesAllowed);
}

/// What stands in the parentheses of a rule, the first of which is at `open`.
Piece read_arguments(const Piece& rule, size_t open) {
  int depth = 0;
  for (size_t i = open; i < rule.text.size(); ++i) {
    const char c = rule.text[i];
    if (c == '\\') {
      ++i;
    } else if (c == '(') {
      ++depth;
    } else if (c == ')' && --depth == 0) {
      if (i + 1 == rule.text.size()) return trimmed(rule.middle(open + 1, i));
      fail(rule.from(i + 1), "expected ',' or ';' after ')' but found " +
                                 in_quotes(rule.text.substr(i + 1)) +
                                 "; a ')' in a pattern is written \\)");
    }
  }
  fail(rule, in_quotes(rule.text) +
                 " has no closing ')'; in a pattern ';' is written \\; and a single parenthesis "
                 "\\( or \\)");
}

}  // namespace

Rule read_rule(const Piece& piece, const std::string& tag) {
  const size_t open = piece.text.find('(');
  const Piece name = trimmed(piece.first(std::min(open, piece.text.size())));
  const bool is_name =
      std::all_of(name.text.begin(), name.text.end(), [](char c) { return is_word_character(c); });
  if (open == std::string_view::npos || !is_name) return word_rule(piece, tag);
  const Piece arguments = read_arguments(piece, open);
  const std::string word = to_lower(name.text);
  if (word == "nvtx") return nvtx_rule(arguments);
  if (word == "python") return python_rule(arguments);
  if (word == "size") return size_rule(arguments);
  if (word == "thread") return ThreadRule{read_pattern(arguments, "thread")};
  if ((word == "process" || word == "api") && arguments.empty()) return word_rule(name, tag);
  if (word == "process" || word == "api") {
    fail(arguments, word + " takes nothing in parentheses; write " + word);
  }
  const std::string meant = nearest(word, {"nvtx", "python", "process", "size", "thread", "api"});
  fail(name, in_quotes(name.text) + " is not a rule" +
                 (meant.empty() ? "" : ", did you mean " + meant + "?") + "; " + kRulesAllowed);
}

}  // namespace regions

namespace {

struct RulePrinter {
  std::string operator()(const NvtxRule& rule) const {
    return "nvtx(" + rule.pattern + (rule.domain ? "@" + *rule.domain : "") + ")";
  }
  std::string operator()(const PythonRule& rule) const {
    return "python(" + rule.module + ":" + rule.qualname + ")";
  }
  std::string operator()(const ProcessRule&) const { return "process"; }
  std::string operator()(const SizeRule& rule) const {
    if (!rule.below) return "size(>=" + format_size(rule.from) + ")";
    const std::string below = "<" + format_size(*rule.below);
    return rule.from == 0 ? "size(" + below + ")"
                          : "size(>=" + format_size(rule.from) + "," + below + ")";
  }
  std::string operator()(const ThreadRule& rule) const { return "thread(" + rule.pattern + ")"; }
  std::string operator()(const ApiRule&) const { return "api"; }
};

}  // namespace

std::string print_rule(const Rule& rule) {
  return std::visit(RulePrinter(), rule);
}

bool glob_match(std::string_view pattern, std::string_view text) {
  constexpr size_t kNone = std::string_view::npos;
  size_t p = 0;
  size_t t = 0;
  size_t star = kNone;   // the pattern behind the last *
  size_t star_text = 0;  // where its text ends so far
  while (t < text.size()) {
    const bool escape = p + 1 < pattern.size() && pattern[p] == '\\';
    const size_t at = escape ? p + 1 : p;
    if (!escape && p < pattern.size() && pattern[p] == '*') {
      star = ++p;
      star_text = t;
    } else if (at < pattern.size() && (pattern[at] == text[t] || (!escape && pattern[at] == '?'))) {
      p = at + 1;
      ++t;
    } else if (star != kNone) {
      p = star;
      t = ++star_text;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

}  // namespace dormouse::config
