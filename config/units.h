// Sizes and durations as people write them. For everything that reads or prints one: options,
// region rules, the command line.
//
// A size is a number and a unit: 20GiB, 512 MiB, 1.5g, 4096 (bytes). Units are powers of 1024
// whatever their spelling (K, KB, KiB; M, G, T likewise; B), in any case, because that is how GPU
// memory, PyTorch's settings and nvidia-smi count.
// A duration is a number and a unit: 500ms, 2s, 5min; ns, us, ms, s, min, h, d. Only 0 may stand
// without a unit; `m` alone is refused because it could be minutes or milliseconds.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "config/result.h"

namespace dormouse::config {

inline constexpr uint64_t kKiB = uint64_t{1} << 10;
inline constexpr uint64_t kMiB = uint64_t{1} << 20;
inline constexpr uint64_t kGiB = uint64_t{1} << 30;
inline constexpr uint64_t kTiB = uint64_t{1} << 40;

using Duration = std::chrono::nanoseconds;

/// Reads a size in bytes. A fraction of a byte is cut off; more than 2^64 - 1 bytes is an error.
Result<uint64_t> parse_size(std::string_view text);

/// Reads a duration. More than 2^63 - 1 nanoseconds (292 years) is an error.
Result<Duration> parse_duration(std::string_view text);

/// The size in its largest unit that holds it exactly (256MiB, 1000, 0); parse_size reads it back.
std::string format_size(uint64_t bytes);

/// The duration in its largest unit that holds it exactly (500ms, 90s, 0s); parse_duration reads
/// back everything that is not negative.
std::string format_duration(Duration duration);

}  // namespace dormouse::config
