// What a user can set: struct Options, its parser and its printing, all from the table options.def.
// The shim parses the process's environment once with it; the command line prints the table.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "config/environment.h"
#include "config/units.h"

namespace dormouse::config {

inline constexpr uint64_t kNoLimit = UINT64_MAX;

enum class Gate { kWait, kWake, kFail };
enum class LogLevel { kOff, kError, kWarn, kInfo, kDebug };
enum class Torch { kAuto, kOff };

std::string_view name_of(Gate gate);
std::string_view name_of(LogLevel level);
std::string_view name_of(Torch torch);

/// How long something is kept: always, never, or a time.
class KeepTime {
 public:
  static constexpr KeepTime always() { return KeepTime(Duration::max()); }
  static constexpr KeepTime never() { return KeepTime(Duration::zero()); }
  static constexpr KeepTime for_time(Duration time) { return KeepTime(time); }

  constexpr bool is_always() const { return time_ == Duration::max(); }
  constexpr bool is_never() const { return time_ == Duration::zero(); }
  /// Duration::max() for always, zero for never.
  constexpr Duration time() const { return time_; }
  constexpr bool operator==(const KeepTime&) const = default;

 private:
  explicit constexpr KeepTime(Duration time) : time_(time) {}

  Duration time_;
};

/// Every option with its default. Sizes are in bytes.
struct Options {
#define OPTION(group, field, environment, type, unit, default_value, allowed, help) \
  type field = default_value;
#include "config/options.def"
};

/// A row of the table as text.
struct OptionInfo {
  std::string group;
  std::string environment;
  std::string type;
  std::string unit;
  std::string default_value;
  std::string allowed;
  std::string help;
};

enum class Source { kDefault, kEnvironment };

/// What an option is now and where that came from.
struct OptionValue {
  std::string value;
  Source source = Source::kDefault;
  std::string variable;  // the variable that it was read from; empty for the default
  std::string problem;   // why that variable's text is not valid; empty if it is, or is not set
};

struct DeprecatedName {
  std::string_view old_name;
  std::string_view name;
};

/// Options with, for each row in the table's order, its value as text.
struct ParsedOptions {
  Options options;
  std::vector<OptionValue> values;
};

/// The table, in its order.
const std::vector<OptionInfo>& option_table();
std::span<const DeprecatedName> deprecated_names();

/// Reads every option. A variable that is set but empty, or only white space, counts as not set. A
/// bad value adds exactly one warning, which names the variable, the value and what is allowed, and
/// the default holds; options that contradict each other add one too. `deprecated` is for tests.
ParsedOptions parse_options(const Lookup& lookup, std::vector<std::string>& warnings,
                            std::span<const DeprecatedName> deprecated = deprecated_names());

/// Adds a warning for each variable of an environ-style list (NAME=value, null at the end; null for
/// none) whose name begins with DORMOUSE, in any case, and is no option's. Other programs'
/// variables are never mentioned.
void check_unknown_names(const char* const* environment, std::vector<std::string>& warnings,
                         std::span<const DeprecatedName> deprecated = deprecated_names());

/// A text table of all options with their present values and where these came from.
std::string print_options(const ParsedOptions& parsed);

/// The content of docs/options.md: all options with type, default, what is allowed, and help.
std::string print_options_markdown();

}  // namespace dormouse::config
