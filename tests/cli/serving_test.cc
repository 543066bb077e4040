// The whole: an unmodified program under the preloaded library, put to sleep and woken from outside
// by the command.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/cli/subprocess.h"
#include "tests/control/scratch.h"

namespace dormouse::cli {
namespace {

using nlohmann::json;
using namespace std::chrono_literals;
using testing::HasSubstr;

std::string absolute(const std::string& path) {
  return std::filesystem::absolute(path).string();
}

class ServingTest : public testing::Test {
 protected:
  const control::Scratch scratch_;
  const Variables variables_{{"LD_LIBRARY_PATH", absolute("tests/simgpu")},
                             {"DORMOUSE_SOCKET_DIR", scratch_.path()},
                             {"DORMOUSE_LIBRARY", absolute("shim/libdormouse.so")},
                             {"LD_PRELOAD", ""}};

  std::unique_ptr<Child> serve(const std::string& regions = "weights: nvtx(weights)") {
    auto child = std::make_unique<Child>(
        std::vector<std::string>{absolute("cli/dormouse"), "run", "--regions", regions, "--",
                                 absolute("tests/programs/serve"), "64", "8"},
        variables_);
    EXPECT_EQ(child->read_line(), "ready");
    return child;
  }

  Outcome dormouse(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), absolute("cli/dormouse"));
    return run_command(arguments, variables_);
  }

  static std::string step(Child& child) {
    child.write_line("step");
    const std::string line = child.read_line();
    return line.substr(line.find("checksum"));
  }

  static std::uint64_t free_memory(Child& child) {
    child.write_line("info");
    const std::string line = child.read_line();  // "free N total M"
    return line.size() > 5 ? std::stoull(line.substr(5)) : 0;
  }
};

TEST_F(ServingTest, SleepsAndWakesWithTheSameResults) {
  const auto program = serve();
  const auto reference = serve();
  const std::string pid = std::to_string(program->pid());
  for (int round = 0; round < 3; ++round) {
    EXPECT_EQ(step(*program), step(*reference));
    const std::uint64_t before = free_memory(*program);
    const Outcome slept = dormouse({"sleep", "--tags", "weights", pid});
    ASSERT_EQ(slept.exit_code, 0) << slept.error;
    EXPECT_GE(free_memory(*program), before + (64u << 20)) << "the memory is free";
    const json status = json::parse(dormouse({"status", "--json", pid}).out);
    const json regions = {{"name", "DORMOUSE_REGIONS"},
                          {"value", "weights: nvtx(weights)"},
                          {"variable", "DORMOUSE_REGIONS"}};
    EXPECT_EQ(status.at("options").at(0), regions);
    EXPECT_GE(status.at("tags").at(0).at("asleep").get<std::uint64_t>(), 64u << 20);
    const Outcome woken = dormouse({"wake", pid});
    ASSERT_EQ(woken.exit_code, 0) << woken.error;
  }
  EXPECT_EQ(step(*program), step(*reference));
  EXPECT_EQ(program->finish(), 0);
  EXPECT_EQ(reference->finish(), 0);
}

TEST_F(ServingTest, AProgramThatWorksWhileItsMemorySleepsWaitsAndGoesOn) {
  const auto program = serve();
  const auto reference = serve();
  const std::string pid = std::to_string(program->pid());
  ASSERT_EQ(dormouse({"sleep", pid}).exit_code, 0);
  program->write_line("step");
  EXPECT_FALSE(program->has_line(300ms)) << "it waits at the gate";
  EXPECT_THAT(dormouse({"ps"}).out, HasSubstr("1 waiting"));
  ASSERT_EQ(dormouse({"wake", pid}).exit_code, 0);
  const std::string line = program->read_line();
  EXPECT_EQ(line.substr(line.find("checksum")), step(*reference));
  EXPECT_EQ(program->finish(), 0);
}

TEST_F(ServingTest, AllProcessesSleepAndLeaveNoSocketBehind) {
  const auto first = serve();
  const auto second = serve();
  const Outcome slept = dormouse({"sleep", "--all"});
  EXPECT_EQ(slept.exit_code, 0) << slept.error;
  EXPECT_THAT(slept.out, HasSubstr("process " + std::to_string(first->pid()) + ": "));
  EXPECT_THAT(slept.out, HasSubstr("process " + std::to_string(second->pid()) + ": "));
  EXPECT_EQ(dormouse({"wake", "--all"}).exit_code, 0);
  EXPECT_EQ(first->finish(), 0);
  EXPECT_EQ(second->finish(), 0);
  EXPECT_TRUE(std::filesystem::is_empty(scratch_.path()));
}

TEST_F(ServingTest, AProgramWithoutCudaHasNoServerAndIsAsWithoutTheLibrary) {
  const Outcome outcome = dormouse({"run", "--", "sh", "-c", "echo hello; exit 5"});
  EXPECT_EQ(outcome.exit_code, 5);
  EXPECT_EQ(outcome.out, "hello\n");
  EXPECT_EQ(outcome.error, "");
  EXPECT_TRUE(std::filesystem::is_empty(scratch_.path()));
}

TEST_F(ServingTest, DoctorFindsTheLibraryAndTheDriver) {
  const Outcome outcome = dormouse({"doctor"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.out;
  EXPECT_THAT(outcome.out, testing::ContainsRegex("ok +library"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("ok +preloading"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("ok +driver"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("ok +GPU"));
}

}  // namespace
}  // namespace dormouse::cli
