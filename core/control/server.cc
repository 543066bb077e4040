// See server.h.
#include "core/control/server.h"

#include <exception>
#include <memory>
#include <utility>

#include "core/log.h"

namespace dormouse {

bool ControlServer::start(Engine& engine, ControlOptions options) noexcept {
  try {
    control::ProcessInfo process = control::this_process();
    process.version = std::move(options.version);
    if (!options.command.empty()) process.command = std::move(options.command);
    process.options = std::move(options.options);
    auto api = std::make_shared<control::Api>(engine, std::move(process));
    const auto problem = listener_.start(
        options.directory, [api](const control::Request& request) { return api->handle(request); });
    if (!problem) return true;
    log().warn("no control server, so the dormouse command cannot reach this process: {}{}",
               *problem,
               options.directory_option.empty()
                   ? ""
                   : fmt::format(" ({} is where to say which)", options.directory_option));
  } catch (const std::exception& error) {
    log().warn("no control server, so the dormouse command cannot reach this process: {}",
               error.what());
  }
  return false;
}

}  // namespace dormouse
