// A value or the reason why there is none. Every reader in config/ returns one; nothing here throws
// on bad input. For all of Dormouse.
#pragma once

#include <optional>
#include <string>
#include <utility>

namespace dormouse::config {

/// A value, or a message for a person: what was read, what is wrong with it, what is allowed.
template <typename T>
class Result {
 public:
  Result(T value) : value_(std::move(value)) {}

  static Result failure(std::string message) {
    Result result;
    result.error_ = std::move(message);
    return result;
  }

  bool ok() const { return value_.has_value(); }
  explicit operator bool() const { return ok(); }
  const T& operator*() const { return *value_; }
  const T* operator->() const { return &*value_; }

  /// Empty when ok().
  const std::string& error() const { return error_; }

 private:
  Result() = default;

  std::optional<T> value_;
  std::string error_;
};

}  // namespace dormouse::config
