// Small text helpers shared by the readers in config/ and by the command line.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace dormouse::config {

/// ASCII only, whatever the process's locale is.
bool is_space(char c);
bool is_digit(char c);
bool is_letter(char c);

std::string_view trim(std::string_view text);
std::string to_lower(std::string_view text);

/// 'text' for a message: in single quotes, control characters as \xNN, cut after 60 bytes.
std::string in_quotes(std::string_view text);

/// The items between commas; empty ones are left out.
std::vector<std::string> list_items(std::string_view text);

/// "a, b or c".
std::string one_of(const std::vector<std::string>& words);

/// Insertions, deletions, replacements and swaps of neighbours that turn one text into the other;
/// letters that differ only in case are equal.
size_t edit_distance(std::string_view a, std::string_view b);

/// The nearest of `candidates`, or empty if none is near enough to be what was meant.
std::string nearest(std::string_view text, const std::vector<std::string>& candidates);

}  // namespace dormouse::config
