#include "tests/simgpu/ptx.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

namespace simgpu {
namespace {

// Words, numbers and single punctuation characters, without comments and strings.
std::vector<std::string> tokens_of(const std::string& text) {
  std::vector<std::string> tokens;
  auto is_word = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.' ||
           c == '%';
  };
  size_t i = 0;
  while (i < text.size()) {
    if (text.compare(i, 2, "//") == 0) {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.compare(i, 2, "/*") == 0) {
      size_t end = text.find("*/", i + 2);
      i = end == std::string::npos ? text.size() : end + 2;
    } else if (text[i] == '"') {
      size_t end = text.find('"', i + 1);
      i = end == std::string::npos ? text.size() : end + 1;
    } else if (is_word(text[i])) {
      size_t begin = i;
      while (i < text.size() && is_word(text[i])) ++i;
      tokens.push_back(text.substr(begin, i - begin));
    } else {
      if (!std::isspace(static_cast<unsigned char>(text[i]))) tokens.emplace_back(1, text[i]);
      ++i;
    }
  }
  return tokens;
}

// Bytes of a type such as ".u64"; 0 if it is none.
size_t type_size(const std::string& token) {
  if (token.size() < 3 || token[0] != '.' ||
      std::string("usbf").find(token[1]) == std::string::npos)
    return 0;
  int bits = std::atoi(token.c_str() + 2);
  return bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128
             ? static_cast<size_t>(bits) / 8
             : 0;
}

// Adds the parameter that the tokens [begin, end) declare.
bool add_parameter(const std::vector<std::string>& tokens, size_t begin, size_t end,
                   PtxEntry* entry) {
  size_t size = 0, count = 1, alignment = 0;
  for (size_t i = begin; i < end; ++i) {
    if (tokens[i] == ".align" && i + 1 < end) {
      // The alignment of what a pointer points to comes after the type and does not place the
      // parameter.
      if (size == 0) alignment = static_cast<size_t>(std::atoll(tokens[i + 1].c_str()));
    } else if (tokens[i] == "[" && i + 1 < end) {
      count = static_cast<size_t>(std::atoll(tokens[i + 1].c_str()));
    } else if (size == 0) {
      size = type_size(tokens[i]);
    }
  }
  if (size == 0 || count == 0) return false;
  alignment = std::max(alignment, size);
  size_t offset = (entry->packed_size + alignment - 1) / alignment * alignment;
  entry->parameters.push_back({size * count, offset});
  entry->packed_size = offset + size * count;
  return true;
}

}  // namespace

bool parse_ptx(const std::string& text, std::vector<PtxEntry>* entries) {
  std::vector<std::string> tokens = tokens_of(text);
  if (std::find(tokens.begin(), tokens.end(), ".version") == tokens.end()) return false;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] != ".entry") continue;
    if (++i == tokens.size()) return false;
    PtxEntry entry;
    entry.name = tokens[i];
    if (i + 1 < tokens.size() && tokens[i + 1] == "(") {
      size_t begin = i + 2;
      for (i = begin; i < tokens.size(); ++i) {
        bool last = tokens[i] == ")";
        if (!last && tokens[i] != ",") continue;
        if (i > begin && !add_parameter(tokens, begin, i, &entry)) return false;
        begin = i + 1;
        if (last) break;
      }
      if (i == tokens.size()) return false;
    }
    entries->push_back(std::move(entry));
  }
  return true;
}

}  // namespace simgpu
