// How figures and tables look on a terminal. For cli/ alone.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace dormouse::cli {

/// "0", "512 B", "1.5 GiB": three to four digits, powers of 1024.
std::string human_size(std::uint64_t bytes);

/// "53.2 GB/s" (powers of 1000, as buses are measured); "-" if no time passed.
std::string human_rate(std::uint64_t bytes, double seconds);

/// "held: 256.0 MiB (dma-buf export), 2.0 MiB (multicast object)": memory that stays awake, as a
/// process lists it; "" if there is none.
std::string held_text(const nlohmann::json& held);

/// "3.2 ms", "1.25 s", "2 min 5 s".
std::string human_time(double seconds);

/// How long ago something was, in whole seconds: "just now", "5 s ago", "2 min 5 s ago".
std::string human_ago(double seconds);

/// The text in at most `width` characters, the end replaced by "..." if it is longer; control
/// characters as '?', since a program chooses its own command line.
std::string clipped(const std::string& text, std::size_t width);

/// Columns as wide as their content, two spaces between. Cells of columns in `right` stand at the
/// right.
class Table {
 public:
  Table(std::vector<std::string> header, std::vector<bool> right);
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string print() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<bool> right_;
};

}  // namespace dormouse::cli
