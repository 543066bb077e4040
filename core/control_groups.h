// What the control groups of this process (v1 or v2) say, as files below /proc and /sys that tests
// put elsewhere (`root`). Linux only; needs nothing else of core.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace dormouse {

// What the file holds; empty if it cannot be read. Throws std::bad_alloc, which a stream would
// swallow: what could not be read would be no limit.
std::string text_of(const std::string& path);
// The number that it begins with; nothing for the groups' "max".
std::optional<std::uint64_t> number_in(const std::string& path);
// The value behind `key` in a file of "key value" lines.
std::optional<std::uint64_t> value_in(const std::string& path, std::string_view key);

// Calls `visit` with the folder (ends with '/') of the group that `controller` has this process in,
// then with those of the group's parents. `v2` tells which files the folder has.
void for_each_group(const std::string& root, std::string_view controller,
                    const std::function<void(const std::string& folder, bool v2)>& visit);

// Processors' worth of time that the groups grant (cpu.max; v1: cpu.cfs_quota_us), rounded up, at
// least 1; nothing if they set no limit.
std::optional<unsigned> processor_quota(const std::string& root = "");

}  // namespace dormouse
