// See command.h.
#include "cli/command.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace dormouse::cli {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

std::vector<std::string> socket_directories(const Global& global) {
  const std::string given = !global.socket_directory.empty() ? global.socket_directory
                                                             : environment("DORMOUSE_SOCKET_DIR");
  return control::search_directories(given, environment("XDG_RUNTIME_DIR"), geteuid());
}

control::ControlClient make_client(const Global& global) {
  return {socket_directories(global), geteuid()};
}

void print_error(const std::string& message) {
  std::fprintf(stderr, "dormouse: %s\n", message.c_str());
}

int report_failure(pid_t pid, const control::Reply& reply) {
  if (reply.kind == control::Reply::Kind::kAnswered) {
    print_error("process " + std::to_string(pid) + ": " + control::message_of(reply.response));
    return kFailed;
  }
  print_error(reply.message);
  return reply.kind == control::Reply::Kind::kNoSuchProcess ? kNoSuchProcess : kFailed;
}

}  // namespace dormouse::cli
