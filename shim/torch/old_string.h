// std::string as libstdc++ laid it out before its C++11 form: what PyTorch's wheels before 2.6 pass
// to setAllocatorSettings. Read one of the program's, or make one that is handed to the program.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>

namespace dormouse::shim::torch {

// The object itself is one pointer, to the first character; length, capacity and a count of further
// owners stand before that, as three words.
struct OldString {
  const char* text;

  struct Header {
    std::size_t length;
    std::size_t capacity;
    std::int32_t further_owners;
  };

  std::string_view view() const noexcept {
    return {text, reinterpret_cast<const Header*>(text)[-1].length};
  }
};

static_assert(sizeof(OldString::Header) == 3 * sizeof(std::size_t));

// A string that is never freed: the callee may keep the characters, and counts as a further owner.
// Null when there is no memory.
inline const OldString* make_old_string(std::string_view text) noexcept {
  void* storage = std::malloc(sizeof(OldString) + sizeof(OldString::Header) + text.size() + 1);
  if (storage == nullptr) return nullptr;
  auto* string = new (storage) OldString;
  auto* header = new (string + 1) OldString::Header{text.size(), text.size(), 0};
  char* characters = reinterpret_cast<char*>(header + 1);
  std::memcpy(characters, text.data(), text.size());
  characters[text.size()] = '\0';
  string->text = characters;
  return string;
}

}  // namespace dormouse::shim::torch
