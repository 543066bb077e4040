// A configuration as text that is changed key by key; see alloc_conf.h.
#include "config/alloc_conf.h"

#include <algorithm>
#include <cctype>

#include "config/alloc_conf_tokens.h"

namespace dormouse::config {

namespace alloc_conf {

Tokens tokenize(Generation generation, std::string_view text) {
  Tokens tokens;
  std::string word;
  for (char c : text) {
    const bool dropped =
        generation == Generation::kG1 ? c == ' ' : std::isspace(static_cast<unsigned char>(c)) != 0;
    if (is_mark(c)) {
      if (!word.empty()) tokens.push_back(std::move(word));
      word.clear();
      tokens.emplace_back(1, c);
    } else if (!dropped) {
      word += c;
    }
  }
  if (!word.empty()) tokens.push_back(std::move(word));
  return tokens;
}

}  // namespace alloc_conf

namespace {

using namespace alloc_conf;

std::string join(Tokens::const_iterator begin, Tokens::const_iterator end) {
  std::string result;
  for (; begin != end; ++begin) result += *begin;
  return result;
}

}  // namespace

Result<AllocConf> AllocConf::read(Generation generation, std::string_view text) {
  AllocConf conf;
  conf.generation_ = generation;
  conf.tokens_ = tokenize(generation, text);
  if (const auto error = conf.find_spans()) return Result<AllocConf>::failure(*error);
  return conf;
}

std::optional<std::string> AllocConf::find_spans() {
  spans_.clear();
  Reader reader(generation_, tokens_);
  while (!reader.at_end()) {
    Span span{reader.position(), 0, 0, false};
    const bool division_list = reader.is("roundup_power2_divisions");
    if (Error error = reader.value()) return error;
    span.value = reader.position();
    if (division_list && reader.is("[")) {
      const auto take = [](const std::string&, const std::string&) { return Error(); };
      if (Error error = reader.division_list(take)) return error;
      // G1 takes a list that ends with the text; closed, it can be followed by other keys.
      if (reader.at_end()) tokens_.emplace_back("]");
    } else if (Error error = reader.skip_value()) {
      return error;
    }
    span.end = reader.position() + 1;
    span.separated = reader.has_next();
    spans_.push_back(span);
    if (Error error = reader.next_key()) return error;
  }
  return std::nullopt;
}

std::vector<AllocConf::Entry> AllocConf::entries() const {
  std::vector<Entry> result;
  for (const Span& span : spans_) {
    const auto begin = tokens_.begin();
    result.push_back({tokens_[span.key], join(begin + static_cast<ptrdiff_t>(span.value),
                                              begin + static_cast<ptrdiff_t>(span.end))});
  }
  return result;
}

std::optional<std::string> AllocConf::get(std::string_view key) const {
  std::optional<std::string> value;
  for (const Entry& entry : entries()) {
    if (entry.key == key) value = entry.value;
  }
  return value;
}

void AllocConf::set(std::string_view key, std::string_view value) {
  const Tokens added = tokenize(generation_, value);
  const auto last = std::find_if(spans_.rbegin(), spans_.rend(),
                                 [&](const Span& span) { return tokens_[span.key] == key; });
  if (last != spans_.rend()) {
    const auto begin = tokens_.begin() + static_cast<ptrdiff_t>(last->value);
    const auto end = tokens_.begin() + static_cast<ptrdiff_t>(last->end);
    tokens_.insert(tokens_.erase(begin, end), added.begin(), added.end());
  } else {
    Tokens entry = {std::string(key), ":"};
    entry.insert(entry.end(), added.begin(), added.end());
    if (!spans_.empty() && !spans_.back().separated) tokens_.emplace_back(",");
    if (tokens_.empty() || is_mark(tokens_.back()[0])) {
      tokens_.insert(tokens_.end(), entry.begin(), entry.end());
    } else {
      // G2 takes any token for a separator; a word at the end would grow together with the key.
      entry.emplace_back(",");
      tokens_.insert(tokens_.begin(), entry.begin(), entry.end());
    }
  }
  find_spans();
}

void AllocConf::remove(std::string_view key) {
  for (size_t i = spans_.size(); i-- > 0;) {
    const Span span = spans_[i];
    if (tokens_[span.key] != key) continue;
    // The separator may be gone already, with a later occurrence.
    const size_t end = std::min(span.end + (span.separated ? 1 : 0), tokens_.size());
    tokens_.erase(tokens_.begin() + static_cast<ptrdiff_t>(span.key),
                  tokens_.begin() + static_cast<ptrdiff_t>(end));
    if (span.key == 0) continue;
    // What now stands before the next key: a separator, which must not grow together with it.
    if (span.key < tokens_.size()) {
      tokens_[span.key - 1] = ",";
    } else {
      tokens_.pop_back();
    }
  }
  find_spans();
}

std::string AllocConf::print() const {
  return join(tokens_.begin(), tokens_.end());
}

const std::vector<std::string>& alloc_conf_variables(Generation generation) {
  // Never destroyed: a process asks until its very end.
  using Names = std::vector<std::string>;
  static const Names& g1 = *new Names{"PYTORCH_CUDA_ALLOC_CONF"};
  static const Names& g2 =
      *new Names{"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"};
  return generation == Generation::kG1 ? g1 : g2;
}

std::optional<AllocConfVariable> winning_alloc_conf(Generation generation, const Lookup& lookup) {
  for (const std::string& name : alloc_conf_variables(generation)) {
    const char* text = lookup(name.c_str());
    if (text != nullptr) return AllocConfVariable{name, text};
  }
  return std::nullopt;
}

}  // namespace dormouse::config
