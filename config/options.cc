// See options.h. Each type of option has three functions here, read(), print() and type_name();
// what a row allows is one of the small types below. The table ties them together.
#include "config/options.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "config/text.h"

namespace dormouse::config {

namespace {

// What a row allows.
struct Anything {};
struct Sizes {
  uint64_t from, to, step;
};
struct Numbers {
  int from, to;
};
struct AbsolutePath {};

Anything anything() {
  return {};
}
Sizes sizes(uint64_t from, uint64_t to, uint64_t step) {
  return {from, to, step};
}
Numbers numbers(int from, int to) {
  return {from, to};
}
AbsolutePath absolute_path() {
  return {};
}

constexpr std::array<std::string_view, 3> kGateNames = {"wait", "wake", "fail"};
constexpr std::array<std::string_view, 5> kLogLevelNames = {"off", "error", "warn", "info",
                                                            "debug"};
constexpr std::array<std::string_view, 2> kTorchNames = {"auto", "off"};

const auto& names_of(Gate) {
  return kGateNames;
}
const auto& names_of(LogLevel) {
  return kLogLevelNames;
}
const auto& names_of(Torch) {
  return kTorchNames;
}

template <typename T>
concept Choice = std::is_enum_v<T>;

// describe(): what a row allows, for the table and for warnings.

template <Choice T>
std::string describe(T value, Anything) {
  std::vector<std::string> names;
  for (std::string_view name : names_of(value)) names.emplace_back(name);
  return one_of(names);
}

std::string describe(bool, Anything) {
  return "on or off";
}
std::string describe(const std::string&, Anything) {
  return "any text";
}
std::string describe(const std::string&, AbsolutePath) {
  return "an absolute path";
}
std::string describe(const KeepTime&, Anything) {
  return "always, never or a time such as 30s or 5min";
}
std::string describe(int, Numbers allowed) {
  return "a whole number from " + std::to_string(allowed.from) + " to " +
         std::to_string(allowed.to);
}
std::string describe(uint64_t, Sizes allowed) {
  std::string result = "a size";
  if (allowed.from > 0) result += " from " + format_size(allowed.from);
  if (allowed.to < kNoLimit) result += " to " + format_size(allowed.to);
  if (allowed.step > 1) result += ", a multiple of " + format_size(allowed.step);
  return result + (allowed.from == 0 && allowed.to == kNoLimit ? " such as 512MiB or 20GiB" : "");
}

// type_name() and print().

template <Choice T>
std::string type_name(T) {
  return "choice";
}
std::string type_name(bool) {
  return "switch";
}
std::string type_name(uint64_t) {
  return "size";
}
std::string type_name(int) {
  return "number";
}
std::string type_name(const KeepTime&) {
  return "time";
}
std::string type_name(const std::string&) {
  return "text";
}

template <Choice T>
std::string print(T value) {
  return std::string(name_of(value));
}
std::string print(bool value) {
  return value ? "on" : "off";
}
std::string print(uint64_t value) {
  return format_size(value);
}
std::string print(int value) {
  return std::to_string(value);
}
std::string print(const std::string& value) {
  return value;
}
std::string print(const KeepTime& value) {
  if (value.is_always()) return "always";
  return value.is_never() ? "never" : format_duration(value.time());
}

// read(): the value of a text, or a failure whose message says what was wrong beyond not being
// among what is allowed (empty if nothing).

template <Choice T>
Result<T> read(T example, std::string_view text, Anything) {
  const auto& names = names_of(example);
  const auto found = std::find(names.begin(), names.end(), to_lower(text));
  if (found == names.end()) return Result<T>::failure("");
  return static_cast<T>(found - names.begin());
}

Result<bool> read(bool, std::string_view text, Anything) {
  const std::string word = to_lower(text);
  for (const char* yes : {"1", "on", "true", "yes"}) {
    if (word == yes) return true;
  }
  for (const char* no : {"0", "off", "false", "no"}) {
    if (word == no) return false;
  }
  return Result<bool>::failure("");
}

Result<uint64_t> read(uint64_t, std::string_view text, Sizes allowed) {
  Result<uint64_t> size = parse_size(text);
  if (!size) return size;
  if (*size < allowed.from) return Result<uint64_t>::failure("it is too small");
  if (*size > allowed.to) return Result<uint64_t>::failure("it is too large");
  if (*size % allowed.step != 0) {
    return Result<uint64_t>::failure("it is not a multiple of " + format_size(allowed.step));
  }
  return size;
}

Result<int> read(int, std::string_view text, Numbers allowed) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (!whole || value < allowed.from || value > allowed.to) return Result<int>::failure("");
  return value;
}

Result<std::string> read(const std::string&, std::string_view text, Anything) {
  return std::string(text);
}

Result<std::string> read(const std::string&, std::string_view text, AbsolutePath) {
  if (text.front() == '/') return std::string(text);
  return Result<std::string>::failure(
      text.front() == '~' ? "~ is not expanded here, write the home directory out" : "");
}

Result<KeepTime> read(const KeepTime&, std::string_view text, Anything) {
  const std::string word = to_lower(text);
  if (word == "always") return KeepTime::always();
  if (word == "never") return KeepTime::never();
  const Result<Duration> time = parse_duration(text);
  if (!time) return Result<KeepTime>::failure(time.error());
  return KeepTime::for_time(*time);
}

// The variables of one row, looked up.
struct Setting {
  std::string variable;
  std::string text;  // empty: not set
};

Setting find_setting(const Lookup& lookup, std::string_view name,
                     std::span<const DeprecatedName> deprecated,
                     std::vector<std::string>& warnings) {
  const auto look = [&](std::string_view variable) {
    const char* text = lookup(std::string(variable).c_str());
    return std::string(trim(text == nullptr ? "" : text));
  };
  Setting setting{std::string(name), look(name)};
  for (const DeprecatedName& row : deprecated) {
    if (row.name != name) continue;
    const std::string text = look(row.old_name);
    if (text.empty()) continue;
    const bool used = setting.text.empty();
    warnings.push_back(
        std::string(row.old_name) + " is the old name of " + std::string(name) +
        (used ? "; use the new name" : ", which is set too; the old name is ignored"));
    if (used) setting = {std::string(row.old_name), text};
  }
  return setting;
}

template <typename T, typename Allowed>
OptionValue read_row(const Setting& setting, const Allowed& allowed, T& field,
                     std::vector<std::string>& warnings) {
  OptionValue value{print(field), Source::kDefault, "", ""};
  if (setting.text.empty()) return value;
  const Result<T> result = read(field, setting.text, allowed);
  if (!result) {
    value.problem = setting.variable + "=" + in_quotes(setting.text) +
                    " is not valid: allowed is " + describe(field, allowed);
    if (!result.error().empty()) value.problem += " (" + result.error() + ")";
    warnings.push_back(value.problem + "; the default " +
                       (value.value.empty() ? "(empty)" : value.value) + " holds");
    return value;
  }
  field = *result;
  return {print(field), Source::kEnvironment, setting.variable, ""};
}

/// Every name that is read by somebody: the table's, and the one that tells the command where the
/// library is.
std::vector<std::string> known_names() {
  std::vector<std::string> names = {"DORMOUSE_LIBRARY"};
  for (const OptionInfo& info : option_table()) names.push_back(info.environment);
  return names;
}

std::string shown(const std::string& value) {
  return value.empty() ? "(empty)" : value;
}

/// `|` would end a cell of a markdown table.
std::string cell(const std::string& text) {
  std::string result;
  for (char c : text) {
    if (c == '|') result += '\\';
    result += c;
  }
  return result;
}

std::string pad(std::string text, size_t width) {
  if (text.size() < width) text.resize(width, ' ');
  return text;
}

}  // namespace

std::string_view name_of(Gate gate) {
  return kGateNames[static_cast<size_t>(gate)];
}
std::string_view name_of(LogLevel level) {
  return kLogLevelNames[static_cast<size_t>(level)];
}
std::string_view name_of(Torch torch) {
  return kTorchNames[static_cast<size_t>(torch)];
}

const std::vector<OptionInfo>& option_table() {
  // Never destroyed: threads may log with it while the process ends.
  static const std::vector<OptionInfo>& table = *[] {
    const Options options;
    return new std::vector<OptionInfo>{
#define OPTION(group, field, environment, type, unit, default_value, allowed, help) \
  {group, environment,          type_name(options.field),                           \
   unit,  print(options.field), describe(options.field, allowed),                   \
   help},
#include "config/options.def"
    };
  }();
  return table;
}

std::span<const DeprecatedName> deprecated_names() {
#define OPTION(group, field, environment, type, unit, default_value, allowed, help)
#define DEPRECATED(old_name, name) {old_name, name},
  static constexpr DeprecatedName kNames[] = {
#include "config/options.def"
      {"", ""}};
  return std::span(kNames, std::size(kNames) - 1);
}

ParsedOptions parse_options(const Lookup& lookup, std::vector<std::string>& warnings,
                            std::span<const DeprecatedName> deprecated) {
  ParsedOptions parsed;
#define OPTION(group, field, environment, type, unit, default_value, allowed, help)         \
  parsed.values.push_back(read_row(find_setting(lookup, environment, deprecated, warnings), \
                                   allowed, parsed.options.field, warnings));
#include "config/options.def"
  if (parsed.options.verify && !parsed.options.hash) {
    warnings.push_back(
        "DORMOUSE_VERIFY=on has no hashes to check woken memory against with DORMOUSE_HASH=off: "
        "leave one of the two out");
  }
  return parsed;
}

void check_unknown_names(const char* const* environment, std::vector<std::string>& warnings,
                         std::span<const DeprecatedName> deprecated) {
  constexpr std::string_view kPrefix = "dormouse";
  const std::vector<std::string> known = known_names();
  for (; environment != nullptr && *environment != nullptr; ++environment) {
    const std::string_view entry(*environment);
    const std::string name(entry.substr(0, entry.find('=')));
    if (to_lower(name.substr(0, kPrefix.size())) != kPrefix) continue;
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    if (std::any_of(deprecated.begin(), deprecated.end(),
                    [&](const DeprecatedName& row) { return row.old_name == name; })) {
      continue;
    }
    const std::string suggestion = nearest(name, known);
    warnings.push_back(in_quotes(name) + " is not an option of Dormouse and does nothing; " +
                       (suggestion.empty() ? "`dormouse options` lists them"
                                           : "did you mean " + suggestion + "?"));
  }
}

std::string print_options(const ParsedOptions& parsed) {
  const std::vector<OptionInfo>& table = option_table();
  size_t name_width = 0;
  size_t value_width = 0;
  for (size_t i = 0; i < table.size(); ++i) {
    name_width = std::max(name_width, table[i].environment.size());
    value_width = std::max(value_width, shown(parsed.values[i].value).size());
  }
  constexpr size_t kWidestValue = 32;  // a long list of regions must not push all else away
  value_width = std::min(value_width, kWidestValue);
  std::string result;
  for (size_t i = 0; i < table.size(); ++i) {
    const OptionInfo& info = table[i];
    const OptionValue& value = parsed.values[i];
    if (i == 0 || table[i - 1].group != info.group) {
      result += (i == 0 ? "" : "\n") + info.group + "\n";
    }
    std::string origin = "default";
    if (value.source == Source::kEnvironment) {
      origin = "environment";
      if (value.variable != info.environment) origin += " (" + value.variable + ")";
    }
    result += "  " + pad(info.environment, name_width) + "  " +
              pad(shown(value.value), value_width) + "  " + origin + "\n";
    result += "      " + info.help + "\n";
    result += "      Allowed: " + info.allowed + ". Default: " + shown(info.default_value) + ".\n";
  }
  return result;
}

std::string print_options_markdown() {
  std::string result =
      "# Options\n\n"
      "Dormouse is set by environment variables, read once when the library is loaded. For a bad "
      "value there is one warning, and the default is used. `dormouse options` prints this table "
      "with the values "
      "in force.\n\n"
      "Sizes take B, KiB, MiB, GiB and TiB (KB and K mean KiB, and so on); times take ns, us, ms, "
      "s, min, h and d; switches take on, off, true, false, yes, no, 1 and 0. A variable that is "
      "set to nothing counts as not set.\n";
  std::string group;
  for (const OptionInfo& info : option_table()) {
    if (info.group != group) {
      group = info.group;
      result += "\n## " + group +
                "\n\n| variable | type | default | allowed | meaning |\n| --- | --- | --- | --- | "
                "--- |\n";
    }
    const std::string type = info.unit == "path" ? "path" : info.type;
    result += "| `" + info.environment + "` | " + type + " | " +
              (info.default_value.empty() ? "empty" : "`" + info.default_value + "`") + " | " +
              cell(info.allowed) + " | " + cell(info.help) + " |\n";
  }
  return result;
}

}  // namespace dormouse::config
