// See units.h.
#include "config/units.h"

#include <array>
#include <limits>
#include <optional>

#include "config/text.h"

namespace dormouse::config {

namespace {

struct Unit {
  std::string_view name;
  uint64_t factor;
};

constexpr std::array<Unit, 14> kSizeUnits = {{{"", 1},
                                              {"b", 1},
                                              {"k", kKiB},
                                              {"kb", kKiB},
                                              {"kib", kKiB},
                                              {"m", kMiB},
                                              {"mb", kMiB},
                                              {"mib", kMiB},
                                              {"g", kGiB},
                                              {"gb", kGiB},
                                              {"gib", kGiB},
                                              {"t", kTiB},
                                              {"tb", kTiB},
                                              {"tib", kTiB}}};

constexpr uint64_t kSecond = 1'000'000'000;
constexpr std::array<Unit, 7> kDurationUnits = {{{"ns", 1},
                                                 {"us", 1'000},
                                                 {"ms", 1'000'000},
                                                 {"s", kSecond},
                                                 {"min", 60 * kSecond},
                                                 {"h", 3600 * kSecond},
                                                 {"d", 86400 * kSecond}}};

constexpr std::string_view kSizeHelp =
    "write a number and B, KiB, MiB, GiB or TiB, such as 512MiB or 20GiB";
constexpr std::string_view kDurationHelp =
    "write a number and ns, us, ms, s, min, h or d, such as 500ms, 2s or 5min";

Result<uint64_t> failure(std::string_view text, std::string_view problem, std::string_view help) {
  return Result<uint64_t>::failure(in_quotes(text) + " " + std::string(problem) + "; " +
                                   std::string(help));
}

template <size_t N>
std::optional<uint64_t> find_factor(const std::array<Unit, N>& units, std::string_view name) {
  const std::string lower_name = to_lower(name);
  for (const Unit& unit : units) {
    if (unit.name == lower_name) return unit.factor;
  }
  return std::nullopt;
}

/// A number as it is written: digits, and digits after the point if there is one.
struct Number {
  std::string_view whole;
  std::string_view fraction;
  std::string_view rest;  // the unit
};

std::string_view take_digits(std::string_view& text) {
  size_t count = 0;
  while (count < text.size() && is_digit(text[count])) ++count;
  const std::string_view digits = text.substr(0, count);
  text.remove_prefix(count);
  return digits;
}

Number split_number(std::string_view text) {
  Number number;
  number.whole = take_digits(text);
  if (text.size() > 1 && text[0] == '.' && is_digit(text[1])) {
    text.remove_prefix(1);
    number.fraction = take_digits(text);
  }
  number.rest = trim(text);
  return number;
}

/// whole.fraction * factor, or nothing if it is more than `limit`. Exact: no floating point.
std::optional<uint64_t> scale(const Number& number, uint64_t factor, uint64_t limit) {
  unsigned __int128 value = 0;
  for (char digit : number.whole) {
    value = value * 10 + static_cast<unsigned>(digit - '0');
    if (value > limit) return std::nullopt;
  }
  value *= factor;
  // Digits beyond the 18th after the point are below any unit here.
  unsigned __int128 numerator = 0;
  unsigned __int128 denominator = 1;
  for (char digit : number.fraction.substr(0, 18)) {
    numerator = numerator * 10 + static_cast<unsigned>(digit - '0');
    denominator *= 10;
  }
  value += numerator * factor / denominator;
  if (value > limit) return std::nullopt;
  return static_cast<uint64_t>(value);
}

template <size_t N>
std::string format_exact(const std::array<Unit, N>& units, uint64_t value) {
  const Unit* best = &units.front();
  for (const Unit& unit : units) {
    if (value % unit.factor == 0 && unit.factor >= best->factor) best = &unit;
  }
  return std::to_string(value / best->factor) + std::string(best->name);
}

}  // namespace

Result<uint64_t> parse_size(std::string_view text) {
  const std::string_view trimmed = trim(text);
  if (trimmed.empty()) return failure(text, "is not a size", kSizeHelp);
  if (trimmed[0] == '-') return failure(text, "is negative", kSizeHelp);
  const Number number = split_number(trimmed);
  if (number.whole.empty()) return failure(text, "is not a size", kSizeHelp);
  const auto factor = find_factor(kSizeUnits, number.rest);
  if (!factor) {
    return failure(text, "has the unknown unit " + in_quotes(number.rest), kSizeHelp);
  }
  if (!number.fraction.empty() && *factor == 1) {
    return failure(text, "is a fraction of a byte", kSizeHelp);
  }
  const auto value = scale(number, *factor, std::numeric_limits<uint64_t>::max());
  if (!value) return failure(text, "is too large", "at most 16777215TiB fit");
  return *value;
}

Result<Duration> parse_duration(std::string_view text) {
  const auto fail = [&](std::string_view problem, std::string_view help) {
    return Result<Duration>::failure(failure(text, problem, help).error());
  };
  const std::string_view trimmed = trim(text);
  if (trimmed.empty()) return fail("is not a duration", kDurationHelp);
  if (trimmed[0] == '-') return fail("is negative", kDurationHelp);
  const Number number = split_number(trimmed);
  if (number.whole.empty()) return fail("is not a duration", kDurationHelp);
  const bool zero =
      (std::string(number.whole) + std::string(number.fraction)).find_first_not_of('0') ==
      std::string::npos;
  if (zero && number.rest.empty()) return Duration{0};
  if (number.rest.empty()) return fail("has no unit", kDurationHelp);
  const auto factor = find_factor(kDurationUnits, number.rest);
  if (!factor) {
    const bool minute = number.rest == "m" || number.rest == "M";
    return fail("has the unknown unit " + in_quotes(number.rest),
                minute ? "write min for minutes or ms for milliseconds" : kDurationHelp);
  }
  const auto value = scale(number, *factor, std::numeric_limits<int64_t>::max());
  if (!value) return fail("is too long", "at most 106751d fit");
  return Duration{static_cast<int64_t>(*value)};
}

std::string format_size(uint64_t bytes) {
  constexpr std::array<Unit, 5> kPrinted = {
      {{"", 1}, {"KiB", kKiB}, {"MiB", kMiB}, {"GiB", kGiB}, {"TiB", kTiB}}};
  return bytes == 0 ? "0" : format_exact(kPrinted, bytes);
}

std::string format_duration(Duration duration) {
  const int64_t count = duration.count();
  if (count == 0) return "0s";
  const bool negative = count < 0;
  const uint64_t magnitude =
      negative ? ~static_cast<uint64_t>(count) + 1 : static_cast<uint64_t>(count);
  return (negative ? "-" : "") + format_exact(kDurationUnits, magnitude);
}

}  // namespace dormouse::config
