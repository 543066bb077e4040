// See http.h. Boost.Beast parses and prints; the socket is read and written here.
#include "core/control/http.h"

// Boost.System and Boost.Beast as headers alone: the library must not need anything beyond glibc.
#include <array>
#include <boost/asio/buffer.hpp>
#include <boost/beast/core/buffers_range.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/serializer.hpp>
#include <boost/beast/http/string_body.hpp>
#include <nlohmann/json.hpp>

namespace dormouse::control {

namespace {

namespace http = boost::beast::http;

MessageError transfer_error(Io io, bool began) {
  if (io == Io::kTimeout) return {408, "the message did not arrive in time"};
  if (io == Io::kClosed) {
    // A peer that connects and leaves, to see whether anybody listens, is not an error worth a
    // message.
    return {began ? 400u : 0u, "the connection ended before the message did", true};
  }
  return {0, error_text(errno)};
}

MessageError parse_error(const boost::beast::error_code& error) {
  if (error == http::error::header_limit) return {431, "the message's header is too large"};
  if (error == http::error::body_limit) return {413, "the message's body is too large"};
  return {400, "malformed HTTP: " + error.message()};
}

/// Receives until the parser has a whole message.
template <typename Parser>
std::optional<MessageError> fill(Parser& parser, const UniqueFd& fd, Deadline deadline) {
  parser.eager(true);
  parser.header_limit(kMaxHeaderBytes);
  std::array<char, 16 * 1024> chunk;
  std::string pending;  // received, not yet consumed: the parser wants whole header lines
  boost::beast::error_code error;
  while (!parser.is_done()) {
    std::size_t received = 0;
    const Io io = receive_some(fd, chunk.data(), chunk.size(), deadline, received);
    if (io == Io::kClosed && parser.got_some()) {
      parser.put_eof(error);  // a body without a length ends so
      if (!error && parser.is_done()) break;
    }
    if (io != Io::kDone) return transfer_error(io, parser.got_some() || !pending.empty());
    pending.append(chunk.data(), received);
    while (!pending.empty() && !parser.is_done()) {
      const std::size_t used = parser.put(boost::asio::buffer(pending), error);
      pending.erase(0, used);
      if (error == http::error::need_more) {
        error = {};
        break;
      }
      if (error) return parse_error(error);
    }
  }
  return std::nullopt;
}

template <typename Message>
bool send_message(const UniqueFd& fd, Message& message, Deadline deadline) {
  http::serializer<Message::is_request::value, typename Message::body_type> serializer(message);
  boost::beast::error_code error;
  while (!serializer.is_done()) {
    bool sent = true;
    std::size_t size = 0;
    serializer.next(error, [&](boost::beast::error_code&, const auto& buffers) {
      for (const auto buffer : boost::beast::buffers_range_ref(buffers)) {
        sent = sent && send_all(fd, {static_cast<const char*>(buffer.data()), buffer.size()},
                                deadline) == Io::kDone;
        size += buffer.size();
      }
    });
    if (error || !sent) return false;
    serializer.consume(size);
  }
  return true;
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::optional<std::string> decode(std::string_view text) {
  std::string result;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      result += text[i] == '+' ? ' ' : text[i];
      continue;
    }
    const int high = i + 2 < text.size() ? hex_digit(text[i + 1]) : -1;
    const int low = i + 2 < text.size() ? hex_digit(text[i + 2]) : -1;
    if (high < 0 || low < 0) return std::nullopt;
    result += static_cast<char>(high * 16 + low);
    i += 2;
  }
  return result;
}

}  // namespace

std::variant<Request, MessageError> read_request(const UniqueFd& fd, Deadline deadline) {
  http::request_parser<http::string_body> parser;
  parser.body_limit(kMaxRequestBody);
  if (auto error = fill(parser, fd, deadline)) return *error;
  auto& message = parser.get();
  return Request{std::string(message.method_string()), std::string(message.target()),
                 std::move(message.body()), [&fd] { return peer_is_gone(fd); }};
}

std::variant<Response, MessageError> read_response(const UniqueFd& fd, Deadline deadline) {
  http::response_parser<http::string_body> parser;
  parser.body_limit(kMaxResponseBody);
  if (auto error = fill(parser, fd, deadline)) return *error;
  auto& message = parser.get();
  return Response{message.result_int(), std::move(message.body()),
                  std::string(message[http::field::content_type]),
                  std::string(message[http::field::allow])};
}

bool write_response(const UniqueFd& fd, const Response& response, Deadline deadline) {
  http::response<http::string_body> message;
  message.result(response.status);
  message.set(http::field::server, "dormouse");
  message.set(http::field::content_type, response.content_type);
  if (!response.allow.empty()) message.set(http::field::allow, response.allow);
  message.keep_alive(false);
  message.body() = response.body;
  message.prepare_payload();
  return send_message(fd, message, deadline);
}

bool write_request(const UniqueFd& fd, const Request& request, Deadline deadline) {
  http::request<http::string_body> message;
  message.method_string(request.method);
  message.target(request.target);
  message.set(http::field::host, "localhost");
  message.keep_alive(false);
  message.body() = request.body;
  message.prepare_payload();
  return send_message(fd, message, deadline);
}

Response error_response(unsigned status, std::string_view error, std::string_view message) {
  const nlohmann::json body = {{"error", error}, {"message", message}};
  return {status, body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n"};
}

Target parse_target(std::string_view target) {
  Target result;
  const std::size_t mark = target.find('?');
  const auto path = decode(target.substr(0, mark));
  if (!path || !path->starts_with('/')) {
    result.error = "the target is not a path";
    return result;
  }
  result.path = *path;
  std::string_view query = mark == target.npos ? std::string_view() : target.substr(mark + 1);
  while (!query.empty()) {
    const std::string_view piece = query.substr(0, query.find('&'));
    query.remove_prefix(std::min(query.size(), piece.size() + 1));
    if (piece.empty()) continue;
    const std::size_t equals = piece.find('=');
    const auto name = decode(piece.substr(0, equals));
    const auto value = decode(equals == piece.npos ? std::string_view() : piece.substr(equals + 1));
    if (!name || !value) {
      result.error = "'%' in the query is not followed by two hexadecimal digits";
      return result;
    }
    result.parameters.emplace_back(*name, *value);
  }
  return result;
}

std::string encode(std::string_view text) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/:";
  constexpr char kHex[] = "0123456789ABCDEF";
  std::string result;
  for (const char c : text) {
    if (kPlain.find(c) != kPlain.npos) {
      result += c;
    } else {
      const auto byte = static_cast<unsigned char>(c);
      result += {'%', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return result;
}

}  // namespace dormouse::control
