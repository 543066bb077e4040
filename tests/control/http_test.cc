// HTTP messages over a socket pair: what is taken, what is refused and with which status.
#include "core/control/http.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <chrono>
#include <string>
#include <thread>

namespace dormouse::control {
namespace {

using namespace std::chrono_literals;

struct Connection {
  Connection() {
    int fds[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    server = UniqueFd(fds[0]);
    client = UniqueFd(fds[1]);
  }
  UniqueFd server, client;
};

/// What the server makes of these bytes, after which the client says no more.
std::variant<Request, MessageError> receive(const std::string& bytes, std::size_t piece = 1 << 20) {
  Connection connection;
  std::thread sender([&] {
    for (std::size_t at = 0; at < bytes.size(); at += piece) {
      if (send_all(connection.client, std::string_view(bytes).substr(at, piece), after(5s)) !=
          Io::kDone) {
        break;
      }
    }
    shutdown(connection.client.get(), SHUT_WR);
  });
  auto result = read_request(connection.server, after(5s));
  connection.server.reset();
  sender.join();
  return result;
}

unsigned refusal(const std::string& bytes) {
  const auto result = receive(bytes);
  const auto* error = std::get_if<MessageError>(&result);
  return error != nullptr ? error->status : 200;
}

TEST(ReadRequest, TakesAWholeRequestWithItsBody) {
  const auto result =
      receive("POST /sleep?tags=a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc");
  ASSERT_TRUE(std::holds_alternative<Request>(result));
  const auto& request = std::get<Request>(result);
  EXPECT_EQ(request.method, "POST");
  EXPECT_EQ(request.target, "/sleep?tags=a");
  EXPECT_EQ(request.body, "abc");
}

TEST(ReadRequest, TakesARequestByteByByte) {
  const auto result = receive(
      "POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", 1);
  ASSERT_TRUE(std::holds_alternative<Request>(result)) << std::get<MessageError>(result).message;
  EXPECT_EQ(std::get<Request>(result).body, "abcde");
}

TEST(ReadRequest, RefusesWhatIsNotHttp) {
  EXPECT_EQ(refusal("hello, is this dormouse?\r\n\r\n"), 400u);
  EXPECT_EQ(refusal("GET / HTTP/9.9\r\n\r\n"), 400u);
  EXPECT_EQ(refusal("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"), 400u);
  EXPECT_EQ(refusal(std::string("\0\0\0\0\r\n\r\n", 8)), 400u);
}

TEST(ReadRequest, RefusesAnOversizeHeader) {
  EXPECT_EQ(refusal("GET /" + std::string(kMaxHeaderBytes, 'x') + " HTTP/1.1\r\n\r\n"), 431u);
  EXPECT_EQ(refusal("GET / HTTP/1.1\r\nX: " + std::string(1 << 20, 'x')), 431u);
}

TEST(ReadRequest, RefusesAnOversizeBodyBeforeItArrives) {
  const std::string head = "POST / HTTP/1.1\r\nContent-Length: ";
  EXPECT_EQ(refusal(head + std::to_string(kMaxRequestBody + 1) + "\r\n\r\n"), 413u);
  EXPECT_EQ(refusal(head + std::to_string(kMaxRequestBody) + "\r\n\r\n" +
                    std::string(kMaxRequestBody, 'x')),
            200u);
}

TEST(ReadRequest, RefusesAnOversizeBodyInPieces) {
  std::string chunks;
  for (int i = 0; i < 80; ++i) chunks += "400\r\n" + std::string(1024, 'x') + "\r\n";
  EXPECT_EQ(refusal("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + "0\r\n\r\n"),
            413u);
}

TEST(ReadRequest, SaysNothingToAClientThatOnlyLooked) {
  const auto result = receive("");
  ASSERT_TRUE(std::holds_alternative<MessageError>(result));
  EXPECT_EQ(std::get<MessageError>(result).status, 0u);
  EXPECT_TRUE(std::get<MessageError>(result).closed);
}

TEST(ReadRequest, RefusesHalfARequest) {
  EXPECT_EQ(refusal("POST /sleep HTT"), 400u);
}

TEST(ReadRequest, GivesUpOnASlowClient) {
  Connection connection;
  ASSERT_EQ(send_all(connection.client, "GET / HT", after(1s)), Io::kDone);
  const auto began = std::chrono::steady_clock::now();
  const auto result = read_request(connection.server, after(100ms));
  ASSERT_TRUE(std::holds_alternative<MessageError>(result));
  EXPECT_EQ(std::get<MessageError>(result).status, 408u);
  EXPECT_LT(std::chrono::steady_clock::now() - began, 3s);
}

TEST(WriteResponse, IsReadBackAsItWasWritten) {
  Connection connection;
  Response response{409, "{\"error\": \"busy\"}\n", "application/json", "GET"};
  ASSERT_TRUE(write_response(connection.server, response, after(1s)));
  const auto result = read_response(connection.client, after(1s));
  ASSERT_TRUE(std::holds_alternative<Response>(result)) << std::get<MessageError>(result).message;
  EXPECT_EQ(std::get<Response>(result).status, 409u);
  EXPECT_EQ(std::get<Response>(result).body, response.body);
  EXPECT_EQ(std::get<Response>(result).content_type, "application/json");
  EXPECT_EQ(std::get<Response>(result).allow, "GET");
}

TEST(WriteResponse, GivesUpOnAClientThatDoesNotRead) {
  Connection connection;
  const Response response{200, std::string(16 << 20, 'x'), "text/plain", {}};
  EXPECT_FALSE(write_response(connection.server, response, after(100ms)));
}

TEST(WriteResponse, SurvivesAClientThatHasGone) {
  Connection connection;
  connection.client.reset();
  EXPECT_FALSE(write_response(connection.server, {200, "x", "text/plain", {}}, after(1s)));
}

TEST(WriteRequest, IsReadBackAsItWasWritten) {
  Connection connection;
  ASSERT_TRUE(write_request(connection.client, {"POST", "/wake_up?tags=a%2Cb", ""}, after(1s)));
  const auto result = read_request(connection.server, after(1s));
  ASSERT_TRUE(std::holds_alternative<Request>(result));
  EXPECT_EQ(std::get<Request>(result).target, "/wake_up?tags=a%2Cb");
}

TEST(ErrorResponse, IsJsonWhateverTheText) {
  EXPECT_EQ(error_response(400, "x", "say \"no\"\n").body,
            "{\"error\":\"x\",\"message\":\"say \\\"no\\\"\\n\"}\n");
  EXPECT_NE(error_response(400, "x", "\xff").body, "");
}

TEST(ParseTarget, DecodesPathAndParameters) {
  const Target target = parse_target("/sl%65ep?tags=a%2Cb+c&x&tags=%41&&=v");
  EXPECT_EQ(target.error, "");
  EXPECT_EQ(target.path, "/sleep");
  const std::vector<std::pair<std::string, std::string>> expected = {
      {"tags", "a,b c"}, {"x", ""}, {"tags", "A"}, {"", "v"}};
  EXPECT_EQ(target.parameters, expected);
}

TEST(ParseTarget, RefusesMalformedEscapes) {
  for (const char* bad : {"/a%", "/a%4", "/a%zz", "/?x=%g0", "/?%=1", "*", "", "sleep"}) {
    EXPECT_NE(parse_target(bad).error, "") << bad;
  }
}

TEST(Encode, IsUndoneByParseTarget) {
  std::string all;
  for (int c = 1; c < 256; ++c) all += static_cast<char>(c);
  const Target target = parse_target("/x?name=" + encode(all));
  ASSERT_EQ(target.parameters.size(), 1u);
  EXPECT_EQ(target.parameters[0].second, all);
}

}  // namespace
}  // namespace dormouse::control
