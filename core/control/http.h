// HTTP/1.1 messages over a connected socket, one request a connection. For the control server, its
// client and tests.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "core/control/socket.h"

namespace dormouse::control {

/// The most that a peer may send, in bytes.
inline constexpr std::size_t kMaxHeaderBytes = 16 * 1024;
inline constexpr std::size_t kMaxRequestBody = 64 * 1024;
inline constexpr std::size_t kMaxResponseBody = std::size_t{64} * 1024 * 1024;

struct Request {
  std::string method;  // "GET", "POST", ...
  std::string target;  // path and query, as sent
  std::string body;
  // Of a server's: whether the client has gone meanwhile, so that what waits need not be begun.
  std::function<bool()> is_abandoned;
};

struct Response {
  unsigned status = 200;
  std::string body;
  std::string content_type = "application/json";
  std::string allow;  // the header of this name, if not empty
};

/// Why no message came.
struct MessageError {
  unsigned status = 0;  // for a server: what to answer; 0: nothing, the peer has gone
  std::string message;
  bool closed = false;  // the peer ended the connection
};

/// Receives a whole request. Thread-safe for different descriptors.
std::variant<Request, MessageError> read_request(const UniqueFd& fd, Deadline deadline);

/// Sends a response and says that the connection ends. False if the peer did not take all of it in
/// time.
bool write_response(const UniqueFd& fd, const Response& response, Deadline deadline);

/// The client's side of the same.
bool write_request(const UniqueFd& fd, const Request& request, Deadline deadline);
std::variant<Response, MessageError> read_response(const UniqueFd& fd, Deadline deadline);

/// {"error": error, "message": message} with this status.
Response error_response(unsigned status, std::string_view error, std::string_view message);

/// A target's path and its parameters in their order, both with %XX and + decoded. `error` if it is
/// malformed.
struct Target {
  std::string path;
  std::vector<std::pair<std::string, std::string>> parameters;
  std::string error;
};
Target parse_target(std::string_view target);

/// The text with everything but letters, digits and -._~/: as %XX, for a query's value.
std::string encode(std::string_view text);

}  // namespace dormouse::control
