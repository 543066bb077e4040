// The `dormouse` executable, from outside, on this test's own process: a real engine on the
// simulated driver behind a real control server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "core/control/listener.h"
#include "core/control/paths.h"
#include "core/control/server.h"
#include "tests/cli/subprocess.h"
#include "tests/control/scratch.h"
#include "tests/core/simulated_engine.h"

namespace dormouse::cli {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::Not;

const std::string kDormouse = std::filesystem::absolute("cli/dormouse").string();

class CommandTest : public SimulatedEngine {
 protected:
  void SetUp() override {
    SimulatedEngine::SetUp();
    start_server();
    address_ = allocate(weights, 6 * kMiB);
    fill(address_, 6 * kMiB, 1);
  }
  void TearDown() override {
    server_.stop();
    EXPECT_TRUE(engine->wake({}, nullptr).is_ok());
    EXPECT_EQ(engine->free(address_), CUDA_SUCCESS);
    SimulatedEngine::TearDown();
  }

  void start_server() {
    ASSERT_TRUE(server_.start(*engine, {scratch_.path(),
                                        "1.2.3",
                                        "python serve.py",
                                        {{"DORMOUSE_GATE", "wake", "DORMOUSE_GATE"},
                                         {"DORMOUSE_DISK_DIR", "/d", "TMS_DISK_BACKUP_DIR"}}}));
  }

  /// Begins again with these options and another block of memory.
  void restart_with(const EngineOptions& options) {
    EXPECT_EQ(engine->free(address_), CUDA_SUCCESS);
    server_.stop();
    restart(options);
    start_server();
    address_ = allocate(weights, 6 * kMiB);
    fill(address_, 6 * kMiB, 1);
  }

  Outcome dormouse(std::vector<std::string> arguments, bool on_terminal = false) const {
    arguments.insert(arguments.begin(), kDormouse);
    return run_command(arguments, {{"DORMOUSE_SOCKET_DIR", scratch_.path()}, {"LD_PRELOAD", ""}},
                       on_terminal);
  }

  control::Scratch scratch_;
  ControlServer server_;
  const std::string pid_ = std::to_string(getpid());
  CUdeviceptr address_ = 0;
};

TEST_F(CommandTest, SleepsAndWakes) {
  const Outcome slept = dormouse({"sleep", pid_});
  EXPECT_EQ(slept.exit_code, 0) << slept.error;
  EXPECT_THAT(slept.out, testing::MatchesRegex(
                             "process " + pid_ +
                             ": .* MiB asleep in .* \\(.* GB/s; .* copied, .* unchanged\\)\n"));
  EXPECT_EQ(slept.error, "") << "no progress where there is no terminal";
  EXPECT_TRUE(engine->is_sleeping({}));
  const Outcome again = dormouse({"sleep", pid_});
  EXPECT_EQ(again.exit_code, 0);
  EXPECT_THAT(again.out, HasSubstr("nothing to do"));
  const Outcome woken = dormouse({"wake", pid_});
  EXPECT_EQ(woken.exit_code, 0) << woken.error;
  EXPECT_THAT(woken.out, HasSubstr("MiB awake in "));
  EXPECT_TRUE(holds(address_, 6 * kMiB, 1));
}

TEST_F(CommandTest, SleepsOnlyTheTagsThatAreNamed) {
  const CUdeviceptr cache = allocate(kv_cache, 2 * kMiB);
  EXPECT_EQ(dormouse({"sleep", "--tags", "kv_cache", pid_}).exit_code, 0);
  EXPECT_FALSE(engine->is_sleeping({"weights"}));
  EXPECT_EQ(dormouse({"sleep", "--tags=weights,kv_cache", pid_}).exit_code, 0);
  EXPECT_TRUE(engine->is_sleeping({"weights"}));
  EXPECT_EQ(dormouse({"wake", pid_, "--tags", "weights"}).exit_code, 0);
  EXPECT_TRUE(engine->is_sleeping({"kv_cache"}));
  EXPECT_FALSE(engine->is_sleeping({"weights"}));
  EXPECT_EQ(dormouse({"wake", "--all"}).exit_code, 0);
  EXPECT_EQ(engine->free(cache), CUDA_SUCCESS);
}

TEST_F(CommandTest, DiscardDropsTheContent) {
  EXPECT_EQ(dormouse({"sleep", "--discard", pid_}).exit_code, 0);
  EXPECT_EQ(dormouse({"wake", pid_}).exit_code, 0);
  EXPECT_TRUE(is_zero(address_, 6 * kMiB));
}

TEST_F(CommandTest, MoreBytesThanThereAreIsSaid) {
  const Outcome slept = dormouse({"sleep", "--bytes", "20GiB", pid_});
  EXPECT_EQ(slept.exit_code, 0) << slept.error;
  EXPECT_THAT(slept.out, HasSubstr(" MiB asleep, all there was (20.0 GiB asked), in "));
  EXPECT_THAT(dormouse({"sleep", "--bytes", "20GiB", pid_}).out,
              HasSubstr("nothing to do, all of it is asleep (20.0 GiB asked)"));
  ASSERT_EQ(dormouse({"wake", pid_}).exit_code, 0);
  EXPECT_THAT(dormouse({"sleep", "--bytes", "1MiB", pid_}).out, Not(HasSubstr("asked")));
}

TEST_F(CommandTest, AWakeThatFindsOtherContentFails) {
  EngineOptions options = small_options();
  options.verify = true;
  restart_with(options);
  ASSERT_EQ(dormouse({"sleep", pid_}).exit_code, 0);
  *static_cast<char*>(const_cast<void*>(engine->host_backup(address_ + 3 * kMiB, 1))) ^= 4;
  const Outcome woken = dormouse({"wake", pid_});
  EXPECT_EQ(woken.exit_code, 1);
  EXPECT_THAT(woken.out, HasSubstr(" MiB awake in "));
  EXPECT_THAT(woken.error,
              HasSubstr("process " + pid_ +
                        ": 262144 bytes differ from what fell asleep: do not trust their content"));
  EXPECT_THAT(dormouse({"status", pid_}).out,
              HasSubstr("; 262144 bytes DIFFER from what fell asleep\n"));
}

TEST_F(CommandTest, AnUnknownTagFailsAndChangesNothing) {
  const Outcome outcome = dormouse({"sleep", "--tags", "wieghts", pid_});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.error, HasSubstr("wieghts"));
  EXPECT_FALSE(engine->is_sleeping({}));
}

TEST_F(CommandTest, AMissingProcessIsExitCode3AndNothingIsDoneToTheOthers) {
  const Outcome outcome = dormouse({"sleep", pid_, "99999999"});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_THAT(outcome.error, HasSubstr("99999999"));
  EXPECT_THAT(outcome.error, HasSubstr("nothing was done to the others"));
  EXPECT_FALSE(engine->is_sleeping({}));
  EXPECT_THAT(dormouse({"sleep", "99999999"}).error, Not(HasSubstr("others")));
  EXPECT_EQ(dormouse({"status", "99999999"}).exit_code, 3);
  EXPECT_EQ(dormouse({"metrics", "99999999"}).exit_code, 3);
  EXPECT_EQ(dormouse({"--socket-dir", "/does/not/exist", "sleep", "--all"}).exit_code, 3);
}

TEST_F(CommandTest, AWrongCommandLineIsExitCode2AndDoesNothing) {
  const std::vector<std::vector<std::string>> wrong = {
      {},
      {"hibernate"},
      {"sleep"},
      {"sleep", "--all", pid_},
      {"sleep", "abc"},
      {"sleep", "0"},
      {"sleep", "99999999999"},
      {"sleep", "--tags", ",", pid_},
      {"sleep", "--tags", "", pid_},
      {"sleep", "--tags", "weights", "--tags=,", pid_},
      {"sleep", "--tags=", pid_},
      {"sleep", "--bytes=", pid_},
      {"sleep", pid_, "--bytes", "much"},
      {"sleep", pid_, "--bytes", "0"},
      {"sleep", pid_, "--tag", "weights"},
      {"wake", pid_, "--discard"},
      {"status"},
      {"top", "--interval", "0"},
      {"run"},
      {"run", "--option", "colour=red", "true"},
      {"run", "--regions", "weights: nvxt(x)", "true"},
  };
  for (const auto& arguments : wrong) {
    const Outcome outcome = dormouse(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << testing::PrintToString(arguments);
    EXPECT_NE(outcome.error, "");
    EXPECT_EQ(outcome.out, "");
  }
  EXPECT_FALSE(engine->is_sleeping({}));
}

TEST_F(CommandTest, AWrongCommandLineIsToldWhatIsWrong) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> wrong = {
      {{"slep", "1"}, "dormouse: there is no command 'slep'; did you mean sleep?\n"},
      {{"--socket-dir", "/x", "wkae"}, "there is no command 'wkae'; did you mean wake?"},
      {{"hibernate"}, "there is no command 'hibernate'; 'dormouse --help' lists them"},
      {{"sleep", "abc"}, "'abc' is not a PID"},
      {{"sleep", "99999999999"}, "'99999999999' is not a PID"},
      {{"status", "-1"}, "-1"},
      {{"metrics", "1x"}, "'1x' is not a PID"},
      {{"sleep", "--tags", ",", pid_}, "--tags is empty"},
      {{"sleep", "--tags=", pid_}, "--tags is empty"},
      {{"run", "--option", "gate=zzz", "true"},
       "DORMOUSE_GATE='zzz' is not valid: allowed is wait, wake or fail\n"},
  };
  for (const auto& [arguments, text] : wrong) {
    const Outcome outcome = dormouse(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << testing::PrintToString(arguments);
    EXPECT_THAT(outcome.error, HasSubstr(text));
  }
}

TEST_F(CommandTest, AFailedOperationIsExitCode1) {
  ASSERT_EQ(dormouse({"sleep", pid_}).exit_code, 0);
  ASSERT_EQ(simgpu_fail_at("cuMemCreate", 0, CUDA_ERROR_OUT_OF_MEMORY), 0);
  const Outcome failed = dormouse({"wake", pid_});
  simgpu_clear_failures();
  EXPECT_EQ(failed.exit_code, 1);
  EXPECT_THAT(failed.error, HasSubstr("process " + pid_ + ": "));
  EXPECT_EQ(dormouse({"wake", pid_}).exit_code, 0);
  EXPECT_TRUE(holds(address_, 6 * kMiB, 1));
}

TEST_F(CommandTest, ShowsProgressOnATerminal) {
  simgpu_hold_streams();
  std::thread releaser([] {
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    simgpu_release_streams();
  });
  const Outcome outcome = dormouse({"sleep", pid_}, true);
  releaser.join();
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.error, HasSubstr("sleep: "));
  EXPECT_THAT(outcome.error, testing::EndsWith("\r\033[K")) << "the line is taken back";
  EXPECT_THAT(outcome.out, HasSubstr(" asleep in "));
}

TEST_F(CommandTest, PsListsProcessesWithTheirMemory) {
  const Outcome outcome = dormouse({"ps"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, HasSubstr("PID"));
  EXPECT_THAT(
      outcome.out,
      testing::ContainsRegex(pid_ + " +weights +[0-9.]+ MiB +0 +[^\n]* awake +python serve.py\n"));
  ASSERT_EQ(dormouse({"sleep", pid_}).exit_code, 0);
  EXPECT_THAT(dormouse({"ps"}).out,
              testing::ContainsRegex(pid_ + " +weights +0 +[0-9.]+ MiB +[0-9.]+ MiB +0 +asleep"));
}

TEST_F(CommandTest, PsShowsMemoryOnDisk) {
  EngineOptions options = small_options();
  options.disk_directory = scratch_.path();
  restart_with(options);
  const CUdeviceptr block = allocate(tags.intern("archive", Backup::kDisk), 2 * kMiB);
  fill(block, 2 * kMiB, 2);
  ASSERT_EQ(dormouse({"sleep", "--tags", "archive", pid_}).exit_code, 0);
  EXPECT_THAT(dormouse({"ps"}).out,
              testing::ContainsRegex("TAGS +AWAKE +ASLEEP +HOST +DISK +STATE"));
  EXPECT_THAT(dormouse({"ps"}).out, testing::ContainsRegex(" MiB +0 +2.0 MiB +partly asleep"));
  ASSERT_EQ(dormouse({"wake", pid_}).exit_code, 0);
  EXPECT_EQ(engine->free(block), CUDA_SUCCESS);
}

TEST_F(CommandTest, PsAsJsonHasEachStatus) {
  const json list = json::parse(dormouse({"ps", "--json"}).out);
  ASSERT_EQ(list.size(), 1u);
  EXPECT_EQ(list.at(0).at("pid"), getpid());
  EXPECT_EQ(list.at(0).at("version"), "1.2.3");
}

TEST_F(CommandTest, PsShowsAProcessThatDoesNotAnswerAndRemovesLeftOverSockets) {
  std::string error;
  const UniqueFd deaf = control::listen_at(control::socket_path(scratch_.path(), 1), error);
  ASSERT_TRUE(control::listen_at(control::socket_path(scratch_.path(), 2), error).is_open());
  const Outcome outcome = dormouse({"ps"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, HasSubstr("process 1 did not answer in time"));
  EXPECT_THAT(outcome.out, HasSubstr("python serve.py"));
  EXPECT_FALSE(std::filesystem::exists(scratch_ / "2.sock"));
}

TEST_F(CommandTest, PsIsEmptyAndSucceedsWhereNothingRuns) {
  const Outcome outcome = dormouse({"ps", "--socket-dir", "/does/not/exist"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.out, "PID  TAGS  AWAKE  ASLEEP  HOST  DISK  STATE  COMMAND\n");
  EXPECT_EQ(dormouse({"ps", "--json", "--socket-dir", "/does/not/exist"}).out, "[]\n");
}

TEST_F(CommandTest, ADirectoryOpenToOthersIsNotTrusted) {
  ASSERT_EQ(chmod(scratch_.path().c_str(), 0755), 0);
  const Outcome listed = dormouse({"ps"});
  EXPECT_THAT(listed.error, HasSubstr("chmod 700"));
  EXPECT_THAT(listed.out, Not(HasSubstr("python")));
  const Outcome slept = dormouse({"sleep", pid_});
  EXPECT_EQ(slept.exit_code, 1);
  EXPECT_FALSE(engine->is_sleeping({}));
  ASSERT_EQ(chmod(scratch_.path().c_str(), 0700), 0);
}

TEST_F(CommandTest, StatusTellsWhatAPersonWantsToKnow) {
  ASSERT_EQ(dormouse({"sleep", pid_}).exit_code, 0);
  const Outcome outcome = dormouse({"status", pid_});
  EXPECT_EQ(outcome.exit_code, 0);
  for (const char* text : {"Dormouse 1.2.3", "python serve.py", "asleep; the gate is closed",
                           "weights on GPU 0 (backup host)", "6.0 MiB in 1 blocks", "last slept"}) {
    EXPECT_THAT(outcome.out, HasSubstr(text));
  }
  EXPECT_THAT(outcome.out, Not(HasSubstr(" 0.0 ms")));
  EXPECT_THAT(outcome.out, Not(HasSubstr("DORMOUSE_")));
  EXPECT_THAT(outcome.out, Not(HasSubstr("last woke")));
  EXPECT_EQ(json::parse(dormouse({"status", "--json", pid_}).out).at("pid"), getpid());
}

TEST_F(CommandTest, StatusShowsTheOptionsThatDifferFromTheirDefaults) {
  const Outcome outcome = dormouse({"status", "--verbose", pid_});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, testing::ContainsRegex("DORMOUSE_GATE +wake +the environment\n"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("DORMOUSE_DISK_DIR +/d +TMS_DISK_BACKUP_DIR\n"));
}

TEST_F(CommandTest, TopPrintsTablesUntilItsCount) {
  const Outcome outcome = dormouse({"top", "--count", "2", "--interval", "0.1"});
  EXPECT_EQ(outcome.exit_code, 0);
  const std::size_t first = outcome.out.find("python serve.py");
  ASSERT_NE(first, std::string::npos);
  EXPECT_NE(outcome.out.find("python serve.py", first + 1), std::string::npos);
  EXPECT_THAT(outcome.out, Not(HasSubstr("\033"))) << "not a terminal";
}

TEST_F(CommandTest, MetricsPrintsThePage) {
  const Outcome outcome = dormouse({"metrics", pid_});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, HasSubstr("# TYPE dormouse_mapped_bytes gauge\n"));
}

TEST_F(CommandTest, TrimSucceeds) {
  const Outcome outcome = dormouse({"trim", "--backups", pid_});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.error;
  EXPECT_EQ(outcome.out, "process " + pid_ + ": trimmed\n");
}

TEST_F(CommandTest, OptionsListsTheTableWithPresentValues) {
  const Outcome outcome =
      run_command({kDormouse, "options"}, {{"DORMOUSE_GATE", "wake"}, {"DORMOUSE_GTAE", "wake"}});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, testing::ContainsRegex("DORMOUSE_GATE +wake"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("@vllm:replace +.vLLM, 0"));
  EXPECT_THAT(outcome.error, HasSubstr("DORMOUSE_GTAE"));
  const Outcome page = dormouse({"options", "--markdown"});
  EXPECT_EQ(page.exit_code, 0);
  EXPECT_THAT(page.out, HasSubstr("DORMOUSE_REGIONS"));
  EXPECT_THAT(dormouse({"options", "--help"}).out, HasSubstr("presets"));
}

TEST_F(CommandTest, HelpAndVersionSucceed) {
  EXPECT_EQ(dormouse({"--help"}).exit_code, 0);
  EXPECT_THAT(dormouse({"--help"}).out, HasSubstr("Exit codes: 0 done"));
  EXPECT_EQ(dormouse({"sleep", "--help"}).exit_code, 0);
  EXPECT_THAT(dormouse({"--version"}).out, testing::MatchesRegex("dormouse [0-9.]+\n"));
}

TEST_F(CommandTest, DoctorSaysWhatIsWrongAndWhatToDo) {
  const Outcome outcome = run_command({kDormouse, "doctor", "--library", "/none/libdormouse.so"},
                                      {{"DORMOUSE_SOCKET_DIR", scratch_.path()},
                                       {"DORMOUSE_GATE", "perhaps"},
                                       {"DORMOUSE_VERIFY", "on"},
                                       {"DORMOUSE_HASH", "off"},
                                       {"PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:true"},
                                       {"PYTORCH_ALLOC_CONF", "expandable_segments:True"}});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.out, testing::ContainsRegex("ok +glibc"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("FAIL +library +none of /none/libdormouse.so"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("warn +options +.*DORMOUSE_GATE"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("warn +options +.*DORMOUSE_VERIFY=on has no"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("warn +PyTorch +.*PYTORCH_ALLOC_CONF"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("FAIL +PyTorch +.*expandable_segments:true"));
  EXPECT_THAT(outcome.out, testing::ContainsRegex("note +processes +1 can be controlled"));
}

/// A server that answers as told, reached as two processes: this one and process 1.
class AnswersTest : public testing::Test {
 protected:
  void start(control::Listener::Handler handler) {
    ASSERT_EQ(listener_.start(scratch_.path(), std::move(handler)), std::nullopt);
    ASSERT_EQ(link(listener_.path().c_str(), (scratch_ / "1.sock").c_str()), 0);
  }

  Outcome dormouse(std::vector<std::string> arguments) const {
    arguments.insert(arguments.begin(), kDormouse);
    return run_command(arguments, {{"DORMOUSE_SOCKET_DIR", scratch_.path()}, {"LD_PRELOAD", ""}});
  }

  control::Scratch scratch_;
  control::Listener listener_;
};

TEST_F(AnswersTest, ProcessesSleepAndWakeTogether) {
  std::atomic<int> sleeping{0}, waking{0};
  start([&](const control::Request& request) -> control::Response {
    if (request.target == "/sleep" || request.target == "/wake_up") {
      std::atomic<int>& asked = request.target == "/sleep" ? sleeping : waking;
      asked.fetch_add(1);
      for (int i = 0; i < 20000 && asked < 2; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
    return {200, R"({"bytes": 1048576, "seconds": 0.1})"};
  });
  const Outcome slept = dormouse({"sleep", "--all"});
  EXPECT_EQ(slept.exit_code, 0) << slept.error;
  EXPECT_THAT(slept.out, HasSubstr("process 1: 1.0 MiB asleep"));
  EXPECT_THAT(slept.out, HasSubstr("process " + std::to_string(getpid()) + ": 1.0 MiB asleep"));
  EXPECT_EQ(sleeping.load(), 2);
  EXPECT_EQ(dormouse({"wake", "--all"}).exit_code, 0);
  EXPECT_EQ(waking.load(), 2);
}

TEST_F(AnswersTest, ASleepThatFailsDoesNotKeepTheNextProcessAwake) {
  std::atomic<int> asked{0};
  start([&](const control::Request& request) -> control::Response {
    if (request.target != "/sleep") return {200, "{}"};
    if (asked.fetch_add(1) == 0) return control::error_response(409, "busy", "captures");
    return {200, R"({"bytes": 1048576, "seconds": 0.1})"};
  });
  const Outcome slept = dormouse({"sleep", "--all"});
  EXPECT_EQ(slept.exit_code, 1);
  EXPECT_THAT(slept.error, HasSubstr(": captures"));
  EXPECT_THAT(slept.out, HasSubstr(": 1.0 MiB asleep"));
  EXPECT_THAT(slept.error, Not(HasSubstr("woken again")))
      << "nobody said that they belong together";
}

TEST_F(AnswersTest, ASleepThatOneOfTheNamedRefusesIsTakenBack) {
  std::atomic<int> asked{0}, woken{0};
  std::atomic<bool> slept_before{false};
  start([&](const control::Request& request) -> control::Response {
    if (request.target == "/is_sleeping") {
      return {200, slept_before ? R"({"is_sleeping": true})" : R"({"is_sleeping": false})"};
    }
    if (request.target == "/wake_up") ++woken;
    if (request.target.starts_with("/sleep") && asked.fetch_add(1) == 0) {
      return control::error_response(409, "busy", "still running");
    }
    return {200, R"({"bytes": 1048576, "seconds": 0.1})"};
  });
  const std::string self = std::to_string(getpid());
  const Outcome outcome = dormouse({"sleep", "1", self});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.error, HasSubstr(": still running"));
  EXPECT_THAT(outcome.error, HasSubstr(" is woken again, since not all could sleep"));
  EXPECT_THAT(outcome.out, HasSubstr(": 1.0 MiB awake in "));
  EXPECT_EQ(woken.load(), 1);
  asked = 0;
  slept_before = true;
  EXPECT_THAT(dormouse({"sleep", "1", self}).error, HasSubstr("some of it was asleep already"));
  asked = 0;
  EXPECT_THAT(dormouse({"sleep", "--discard", "1", self}).error, HasSubstr("was dropped"));
  EXPECT_EQ(woken.load(), 1);
}

TEST_F(AnswersTest, ASleepThatFindsTooLittleHostMemoryBesideOthersIsTriedAlone) {
  std::atomic<int> asked{0};
  start([&](const control::Request& request) -> control::Response {
    if (request.target == "/sleep" && asked.fetch_add(1) < 2) {
      return control::error_response(507, "out_of_host_memory", "full");
    }
    return {200, R"({"bytes": 1048576, "seconds": 0.1})"};
  });
  const Outcome slept = dormouse({"sleep", "--all"});
  EXPECT_EQ(slept.exit_code, 0) << slept.error;
  EXPECT_EQ(asked.load(), 4);
}

TEST_F(AnswersTest, AStoppedProcessHoldsNobodyUp) {
  start([&](const control::Request&) -> control::Response {
    return {200, R"({"bytes": 1048576, "seconds": 0.1})"};
  });
  std::string error;
  const UniqueFd deaf = control::listen_at(control::socket_path(scratch_.path(), 2), error);
  const Outcome all = dormouse({"sleep", "--all"});
  EXPECT_EQ(all.exit_code, 1);
  EXPECT_THAT(all.error, HasSubstr("process 2 did not answer in time"));
  EXPECT_THAT(all.out, HasSubstr("process 1: "));
  const Outcome named = dormouse({"sleep", "1", "2"});
  EXPECT_EQ(named.exit_code, 1);
  EXPECT_THAT(named.error, HasSubstr("nothing was done to the others"));
}

TEST_F(AnswersTest, ASleepThatMovesNothingSaysWhy) {
  std::string tags = "[]";
  start([&](const control::Request& request) -> control::Response {
    if (request.target == "/status") return {200, R"({"tags": )" + tags + "}"};
    return {200, R"({"bytes": 0})"};
  });
  EXPECT_THAT(dormouse({"sleep", "1"}).out, HasSubstr("none of its memory has a tag"));
  tags =
      R"([{"tag": "a", "mapped": 0, "asleep": 0}, {"tag": "b", "mapped": 1048576, "asleep": 0}])";
  EXPECT_THAT(dormouse({"sleep", "--tags", "a", "1"}).out, HasSubstr("its tags hold no memory"));
  EXPECT_THAT(dormouse({"sleep", "1"}).out, HasSubstr("nothing was released: 1.0 MiB stay awake"));
  EXPECT_THAT(dormouse({"wake", "1"}).out, HasSubstr("nothing to do, all of it is awake"));
}

TEST_F(AnswersTest, ADiscardSaysWhatItDroppedOfSleepingMemory) {
  std::string answer = R"({"bytes": 1048576, "seconds": 0.1, "dropped_bytes": 67108864})";
  start([&](const control::Request&) -> control::Response { return {200, answer}; });
  EXPECT_THAT(dormouse({"sleep", "--discard", "1"}).out,
              HasSubstr("unchanged); 64.0 MiB of kept content dropped\n"));
  answer = R"({"bytes": 0, "dropped_bytes": 67108864})";
  EXPECT_EQ(dormouse({"sleep", "--discard", "1"}).out,
            "process 1: 64.0 MiB of kept content dropped\n");
}

TEST_F(AnswersTest, WhatOthersHoldIsListedWithTheReason) {
  std::string answer =
      R"({"bytes": 1048576, "seconds": 0.1, "held": [{"by": "dma-buf export", "bytes": 2097152}]})";
  start([&](const control::Request&) -> control::Response { return {200, answer}; });
  EXPECT_THAT(dormouse({"sleep", "1"}).out,
              HasSubstr("unchanged); held: 2.0 MiB (dma-buf export)\n"));
  answer = R"({"bytes": 0, "held": [{"by": "dma-buf export", "bytes": 2097152}]})";
  EXPECT_EQ(dormouse({"sleep", "1"}).out,
            "process 1: nothing more falls asleep; held: 2.0 MiB (dma-buf export)\n");
}

class RunTest : public testing::Test {
 protected:
  RunTest() {
    std::ofstream(scratch_ / "libdormouse.so") << "no library: the loader passes it over";
  }

  Outcome run(std::vector<std::string> arguments, Variables variables = {}) {
    arguments.insert(arguments.begin(), {kDormouse, "run"});
    variables.emplace_back("DORMOUSE_LIBRARY", scratch_ / "libdormouse.so");
    return run_command(arguments, variables);
  }

  control::Scratch scratch_;
};

TEST_F(RunTest, SetsTheEnvironmentAndBecomesTheProgram) {
  const Outcome outcome =
      run({"--regions", "weights: process", "--option", "log-level=debug", "--socket-dir", "/s",
           "--", "sh", "-c",
           "echo $DORMOUSE_REGIONS $DORMOUSE_LOG_LEVEL $DORMOUSE_SOCKET_DIR $LD_PRELOAD; exit 7"},
          {{"LD_PRELOAD", ""}});
  EXPECT_EQ(outcome.exit_code, 7);
  EXPECT_EQ(outcome.out, "weights: process debug /s " + (scratch_ / "libdormouse.so") + "\n");
}

TEST_F(RunTest, LeavesTheProgramsArgumentsAlone) {
  const Outcome outcome = run({"printf", "%s|", "--help", "--regions", "-x", "--", "--json", ""});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.out, "--help|--regions|-x|--|--json||");
}

TEST_F(RunTest, PutsTheLibraryInFrontOfAnLdPreloadAndNamesTheOthers) {
  const Outcome outcome = run({"sh", "-c", "echo $LD_PRELOAD"}, {{"LD_PRELOAD", "libnone.so"}});
  EXPECT_EQ(outcome.out, (scratch_ / "libdormouse.so") + ":libnone.so\n");
  EXPECT_THAT(outcome.error, HasSubstr("LD_PRELOAD has other libraries too: libnone.so"));
}

TEST_F(RunTest, ChecksRegionsOfTheEnvironmentToo) {
  const Outcome outcome = run({"true"}, {{"DORMOUSE_REGIONS", "weights: nvxt(x)"}});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.error, HasSubstr("nvxt"));
}

TEST_F(RunTest, TellsAProgramThatCannotBeStarted) {
  EXPECT_EQ(run({"no-such-program-here"}).exit_code, 127);
  EXPECT_EQ(run({scratch_ / "libdormouse.so"}).exit_code, 126);
  const Outcome outcome = run({"--library", "/none.so", "true"});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.error, HasSubstr("/none.so"));
}

}  // namespace
}  // namespace dormouse::cli
