// The version of the library and of the command, for everyone.
#pragma once

namespace dormouse {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace dormouse
