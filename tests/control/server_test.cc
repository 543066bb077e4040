// The server over a real engine, spoken to through its socket as the command line does.
#include "core/control/server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "core/control/client.h"
#include "core/sleep/gate.h"
#include "tests/control/scratch.h"
#include "tests/core/simulated_engine.h"

namespace dormouse {
namespace {

using control::Reply;
using nlohmann::json;
using namespace std::chrono_literals;

class ControlServerTest : public SimulatedEngine {
 protected:
  Reply ask(const std::string& method, const std::string& target) {
    return client_.request(getpid(), {method, target, ""}, 20s);
  }

  control::Scratch scratch_;
  const control::ControlClient client_{{scratch_.path()}, geteuid()};
};

TEST_F(ControlServerTest, SleepsAndWakesThroughTheSocket) {
  const CUdeviceptr address = allocate(weights, 4 * kMiB);
  fill(address, 4 * kMiB, 9);
  ControlServer server;
  ASSERT_TRUE(server.start(*engine, {scratch_.path(), "1.2.3", "python serve.py", {}}));
  const Reply slept = ask("POST", "/sleep?tags=weights");
  ASSERT_TRUE(slept.is_ok()) << slept.message << slept.response.body;
  EXPECT_TRUE(engine->is_sleeping({}));
  const json status = json::parse(ask("GET", "/status").response.body);
  EXPECT_EQ(status.at("command"), "python serve.py");
  EXPECT_EQ(status.at("version"), "1.2.3");
  ASSERT_TRUE(ask("POST", "/wake_up").is_ok());
  EXPECT_TRUE(holds(address, 4 * kMiB, 9));
  EXPECT_EQ(message_of(ask("POST", "/sleep?tags=x").response).empty(), false);
  server.stop();
  EXPECT_EQ(ask("GET", "/status").kind, Reply::Kind::kNoSuchProcess);
  EXPECT_EQ(engine->free(address), CUDA_SUCCESS);
}

TEST_F(ControlServerTest, WakesWhileAThreadOfTheProgramWaitsAtTheGate) {
  const CUdeviceptr address = allocate(weights, 4 * kMiB);
  ControlServer server;
  ASSERT_TRUE(server.start(*engine, {scratch_.path(), "", "", {}}));
  ASSERT_TRUE(ask("POST", "/sleep").is_ok());
  std::thread program([] {
    EXPECT_EQ(gate::enter(), CUDA_SUCCESS);
    gate::leave();
  });
  json now = json::object();
  for (int i = 0; i < 5000 && now.value("/gate/waiting_threads"_json_pointer, 0) == 0; ++i) {
    now = json::parse(ask("GET", "/status").response.body);
  }
  EXPECT_EQ(now.value("/gate/waiting_threads"_json_pointer, 0), 1);
  EXPECT_TRUE(ask("POST", "/wake_up").is_ok());
  program.join();
  EXPECT_EQ(engine->free(address), CUDA_SUCCESS);
}

TEST_F(ControlServerTest, GoesOnWithoutAServerIfItCannotStart) {
  ASSERT_EQ(chmod(scratch_.path().c_str(), 0755), 0);
  ControlServer server;
  EXPECT_FALSE(server.start(*engine, {scratch_.path(), "", "", {}}));
  EXPECT_EQ(server.path(), "");
  server.stop();
  server.remove_socket();
  server.forget_after_fork();
}

}  // namespace
}  // namespace dormouse
