// Programs under the library, one process per case: those without CUDA are as they were, those with
// CUDA are served whichever way they reach it, and what goes wrong goes wrong as it should.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "tests/preload/process.h"

namespace {

using preload::built;
using preload::Command;
using preload::library;
using preload::Result;
using preload::run;
using preload::run_plain;
using preload::run_with_library;

using Environment = std::map<std::string, std::string>;

// A folder of the test's own, removed afterwards.
class Folder {
 public:
  Folder() {
    std::string path = "/tmp/preload.XXXXXX";  // short: a socket's path has 107 bytes at most
    path_ = mkdtemp(path.data());
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

std::string content_of(const std::string& path) {
  std::ostringstream content;
  content << std::ifstream(path).rdbuf();
  return content.str();
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t found = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++found;
  }
  return found;
}

std::string shown(const Result& result) {
  return "exit code " + std::to_string(result.exit_code) + (result.timed_out ? ", too slow" : "") +
         "\n" + result.out + result.err;
}

void expect_same(const Result& with, const Result& without) {
  EXPECT_EQ(with.exit_code, without.exit_code);
  EXPECT_EQ(with.out, without.out);
  EXPECT_EQ(with.err, without.err);
  EXPECT_FALSE(with.timed_out);
}

// --- Programs without CUDA

class WithoutCuda : public testing::TestWithParam<std::vector<std::string>> {};

TEST_P(WithoutCuda, IsAsItWas) {
  Command command{GetParam(), {{"DORMOUSE_CONTROL", ""}}, {}};
  if (command.arguments[0].find('/') == std::string::npos || command.arguments[0][0] != '/') {
    const std::string own = built("tests/preload/" + command.arguments[0]);
    if (std::filesystem::exists(own)) command.arguments[0] = own;
  }
  const Result without = run(command);
  command.preload = {library()};
  expect_same(run(command), without);
  // Nor do rules, or mistakes in them, make it say or do anything.
  command.environment = {{"DORMOUSE_REGIONS", "all: process; broken: nvtx("}, {"DORMOUSE", "what"}};
  expect_same(run(command), without);
}

INSTANTIATE_TEST_SUITE_P(
    Programs, WithoutCuda,
    testing::Values(std::vector<std::string>{"/bin/true"}, std::vector<std::string>{"/bin/false"},
                    std::vector<std::string>{"python3", "-c", "pass"},
                    std::vector<std::string>{
                        "python3", "-c",
                        "import ctypes, subprocess, sys, threading\n"
                        "t = threading.Thread(target=print, args=('thread',)); t.start(); "
                        "t.join()\n"
                        "print(subprocess.check_output(['echo', 'child']))\n"
                        "print(ctypes.CDLL('libc.so.6').abs(-7))\n"
                        "sys.exit(9)"},
                    std::vector<std::string>{
                        "bash", "-c",
                        "set -o pipefail; echo one | cat; (echo two >&2); x=$(echo three); "
                        "echo $x; false | true; echo $?; exit 4"},
                    std::vector<std::string>{"git", "-c", "safe.directory=*", "--version"},
                    std::vector<std::string>{"threaded"}));

TEST(WithoutCudaToo, GitStatusIsAsItWas) {
  Folder folder;
  const std::string repository = folder / "repository";
  const Command init{{"git", "init", "-q", repository}, {{"HOME", folder / "home"}}, {}};
  if (run(init).exit_code != 0) GTEST_SKIP() << "no git here";
  std::ofstream(repository + "/file") << "content";
  Command status{{"git", "-C", repository, "status"}, {{"HOME", folder / "home"}}, {}};
  const Result without = run(status);
  EXPECT_EQ(without.exit_code, 0);
  status.preload = {library()};
  expect_same(run(status), without);
}

TEST(WithoutCudaToo, NoSocketAppears) {
  Folder folder;
  const Result result =
      run({{"python3", "-c", "pass"}, {{"DORMOUSE_SOCKET_DIR", folder / "sockets"}}, {library()}});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_FALSE(std::filesystem::exists(folder / "sockets"));
}

// --- Programs with CUDA

// How a program reaches CUDA: its file below tests/programs, and its arguments.
class Program : public testing::TestWithParam<std::vector<std::string>> {
 protected:
  void SetUp() override {
    // A machine with a GPU need not have every version of libcudart.
    if (preload::real_driver() && run_plain(command()).exit_code != 0) {
      GTEST_SKIP() << "does not run here without the library either";
    }
  }
  std::vector<std::string> command() const {
    std::vector<std::string> arguments = GetParam();
    arguments[0] = built("tests/programs/" + arguments[0]);
    return arguments;
  }
};

TEST_P(Program, IsAsItWasWithoutRules) {
  expect_same(run_with_library(command()), run_plain(command()));
}

TEST_P(Program, IsAsItWasWhenSwitchedOff) {
  expect_same(
      run_with_library(command(), {{"DORMOUSE", "off"}, {"DORMOUSE_REGIONS", "all: process"}}),
      run_plain(command()));
}

Result run_with_witness(std::vector<std::string> arguments, Environment environment,
                        const std::string& report, std::vector<std::string> libraries) {
  environment.merge(preload::driver_environment());
  environment["WITNESS"] = report;
  libraries.push_back(built("tests/preload/libwitness.so"));
  return run({std::move(arguments), std::move(environment), std::move(libraries)});
}

// All memory of the process is tagged, and the program notices nothing.
TEST_P(Program, ComesFromThePoolUnderAProcessRule) {
  Folder folder;
  const Result with = run_with_witness(command(), {{"DORMOUSE_REGIONS", "all: process"}},
                                       folder / "report", {library()});
  expect_same(with, run_plain(command()));
  EXPECT_NE(content_of(folder / "report").find("all device 0 allocations "), std::string::npos)
      << content_of(folder / "report") << shown(with);
}

TEST_P(Program, ComesFromTheDriverWithoutARule) {
  Folder folder;
  const Result with = run_with_witness(command(), {}, folder / "report", {library()});
  EXPECT_EQ(with.exit_code, 0) << shown(with);
  EXPECT_EQ(content_of(folder / "report"), "");
}

INSTANTIATE_TEST_SUITE_P(Programs, Program,
                         testing::Values(std::vector<std::string>{"alloc_check_dynamic"},
                                         std::vector<std::string>{"alloc_check_dynamic_12"},
                                         std::vector<std::string>{"alloc_check_static"},
                                         std::vector<std::string>{"alloc_check_driver"},
                                         std::vector<std::string>{"alloc_check_dlsym"},
                                         std::vector<std::string>{"alloc_check_dlsym", "proc"},
                                         std::vector<std::string>{"threads"},
                                         std::vector<std::string>{"pinned_fork"},
                                         std::vector<std::string>{"exit_allocated"}),
                         [](const auto& info) {
                           std::string name;
                           for (const std::string& part : info.param)
                             name += (name.empty() ? "" : "_") + part;
                           return name;
                         });

// A call that passes the runtime's hook and the driver's is one allocation.
TEST(Allocations, AreCountedOnce) {
  for (const char* name : {"alloc_check_dynamic", "alloc_check_static", "alloc_check_driver"}) {
    Folder folder;
    const Result with =
        run_with_witness({built(std::string("tests/programs/") + name)},
                         {{"DORMOUSE_REGIONS", "all: process"}}, folder / "report", {library()});
    EXPECT_EQ(with.exit_code, 0) << shown(with);
    EXPECT_EQ(content_of(folder / "report"), "all device 0 allocations 24 frees 24\n") << name;
  }
}

// --- Two copies

class TwoCopies : public testing::Test {
 protected:
  TwoCopies() { std::filesystem::copy_file(library(), copy()); }
  std::string copy() const { return folder_ / "libdormouse-copy.so"; }

  Folder folder_;
};

TEST_F(TwoCopies, OnlyTheFirstActsAndItIsSaidOnce) {
  for (const char* name : {"alloc_check_dynamic", "alloc_check_static", "alloc_check_dlsym"}) {
    const std::string report = folder_ / (std::string("report ") + name);
    const std::string program = built(std::string("tests/programs/") + name);
    const Result result = run_with_witness({program}, {{"DORMOUSE_REGIONS", "all: process"}},
                                           report, {library(), copy()});
    EXPECT_EQ(result.exit_code, 0) << shown(result);
    EXPECT_EQ(result.out, run_plain({program}).out);
    EXPECT_EQ(count(result.err, "\n"), 1u) << result.err;
    EXPECT_NE(result.err.find("two copies"), std::string::npos) << result.err;
    EXPECT_EQ(content_of(report), "all device 0 allocations 24 frees 24\n") << name;
  }
}

// --- Other preloaded libraries

struct Beside {
  const char* name;
  const char* other;  // below tests/preload
  std::vector<std::string> program;
};

void PrintTo(const Beside& tested, std::ostream* out) {
  *out << tested.name;
}

class OtherLibraries : public testing::TestWithParam<Beside> {
 protected:
  Result run_beside(bool ours_in_front, Environment environment) const {
    std::vector<std::string> libraries = {library()};
    const std::string other = built(std::string("tests/preload/") + GetParam().other);
    libraries.insert(ours_in_front ? libraries.end() : libraries.begin(), other);
    return run_program(std::move(libraries), std::move(environment));
  }
  Result run_program(std::vector<std::string> libraries, Environment environment = {}) const {
    std::vector<std::string> arguments = GetParam().program;
    arguments[0] = built("tests/" + arguments[0]);
    environment.merge(preload::driver_environment());
    return run({std::move(arguments), std::move(environment), std::move(libraries)});
  }
};

// In front of ours or behind it, it sees what it would have seen without ours.
TEST_P(OtherLibraries, AreAsWithoutOurs) {
  const Result alone = run_program({built(std::string("tests/preload/") + GetParam().other)});
  EXPECT_EQ(alone.exit_code, 0) << shown(alone);
  for (const bool ours_in_front : {true, false}) {
    SCOPED_TRACE(ours_in_front ? "ours in front" : "ours behind");
    expect_same(run_beside(ours_in_front, {}), alone);
    expect_same(
        run_beside(ours_in_front, {{"DORMOUSE", "off"}, {"DORMOUSE_REGIONS", "all: process"}}),
        alone);
    const Result tagged = run_beside(ours_in_front, {{"DORMOUSE_REGIONS", "all: process"}});
    EXPECT_EQ(tagged.exit_code, 0) << shown(tagged);
    if (GetParam().program[0] != "preload/limited") {
      EXPECT_EQ(tagged.out, alone.out);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Libraries, OtherLibraries,
    testing::Values(
        Beside{"hooker", "libhooker.so", {"programs/alloc_check_dynamic"}},
        Beside{"hooker_without_the_rest", "libhooker.so", {"preload/whole_runtime"}},
        Beside{"hooker_by_handle", "libhooker_by_handle.so", {"preload/whole_runtime"}},
        Beside{"hooker_of_errors", "libhooker_of_errors.so", {"preload/whole_runtime"}},
        Beside{"hooker_of_another_runtime", "libhooker.so", {"programs/alloc_check_dynamic_12"}},
        Beside{"limiter", "liblimiter.so", {"preload/limited"}},
        Beside{"limiter_under_a_runtime", "liblimiter.so", {"programs/alloc_check_dynamic"}},
        Beside{"limiter_of_the_linked_driver", "liblimiter.so", {"programs/alloc_check_driver"}},
        Beside{"versioned_limiter", "liblimiter_versioned.so", {"preload/limited"}},
        Beside{"versioned_limiter_under_a_runtime",
               "liblimiter_versioned.so",
               {"programs/alloc_check_dynamic"}},
        Beside{"versioned_limiter_by_name",
               "liblimiter_versioned.so",
               {"programs/alloc_check_dlsym", "proc"}}),
    [](const auto& info) { return std::string(info.param.name); });

// As on WSL2, where libcuda.so.1 looks up each function of the driver with dlsym.
TEST(LoaderOfTheDriver, IsServedAsTheDriverIs) {
  if (preload::real_driver()) GTEST_SKIP() << "of the simulated driver";
  Environment environment = preload::driver_environment();
  environment["LD_LIBRARY_PATH"] =
      built("tests/preload/wsl") + ":" + environment["LD_LIBRARY_PATH"];
  for (std::vector<std::string> program :
       std::vector<std::vector<std::string>>{{"alloc_check_dynamic"},
                                             {"alloc_check_driver"},
                                             {"alloc_check_dlsym"},
                                             {"alloc_check_dlsym", "proc"}}) {
    SCOPED_TRACE(program[0]);
    program[0] = built("tests/programs/" + program[0]);
    Command command{program, environment, {}};
    const Result without = run(command);
    EXPECT_EQ(without.exit_code, 0) << shown(without);
    command.preload = {library()};
    expect_same(run(command), without);
    command.environment["DORMOUSE"] = "off";
    expect_same(run(command), without);
    Folder folder;
    command.environment["DORMOUSE"] = "on";
    command.environment["DORMOUSE_REGIONS"] = "all: process";
    command.environment["WITNESS"] = folder / "report";
    command.preload.push_back(built("tests/preload/libwitness.so"));
    expect_same(run(command), without);
    EXPECT_EQ(content_of(folder / "report"), "all device 0 allocations 24 frees 24\n");
  }
}

// --- Bad input from the environment

TEST(Options, AMalformedRuleIsOneWarningAndTheOthersHold) {
  Folder folder;
  const std::string program = built("tests/programs/alloc_check_dynamic");
  const Result result =
      run_with_witness({program}, {{"DORMOUSE_REGIONS", "weights: nvtx(; all: process"}},
                       folder / "report", {library()});
  EXPECT_EQ(result.exit_code, 0) << shown(result);
  EXPECT_EQ(result.out, run_plain({program}).out);
  EXPECT_EQ(count(result.err, "DORMOUSE_REGIONS"), 1u) << result.err;
}

TEST(Options, WhatContradictsItselfIsSaidOnceWithWhatHolds) {
  struct Said {
    const char* regions;
    Environment environment;
    const char* message;
  };
  for (const Said& each : std::initializer_list<Said>{
           {"a=disk: nvtx(x); a=disk: nvtx(y)", {}, "its content is kept in host memory"},
           {"a: nvtx(x), nvtx(y); b: nvtx(z)",
            {{"DORMOUSE_NVTX", "off"}},
            "DORMOUSE_NVTX=off: the rules nvtx(...) of DORMOUSE_REGIONS begin no regions"},
           {"a: nvtx(x); b: nvtx(x)", {}, "that one holds, and 'b' gets no region by it"},
           {"a{prority:3}: api",
            {},
            "'prority' is not a setting of a region and is ignored; did you"},
           {"a: nvtx(", {}, "; this item is ignored"},
           {"-{max_split_size_mb:300}: nvtx(x)", {}, "leave max_split_size_mb out; this item is"},
           {"",
            {{"DORMOUSE_VERIFY", "on"}, {"DORMOUSE_HASH", "off"}},
            "DORMOUSE_VERIFY=on has no hashes to check woken memory against"},
           {"",
            {{"DORMOUSE_DISK_DIR", "/nowhere"}},
            "create it (mkdir -m 700). Until then, sleeps that need it are refused"}}) {
    Environment environment = each.environment;
    environment["DORMOUSE_REGIONS"] = each.regions;
    const Result result =
        run_with_library({built("tests/programs/alloc_check_dynamic")}, environment);
    EXPECT_EQ(result.exit_code, 0) << shown(result);
    EXPECT_EQ(count(result.err, "\n"), 1u) << result.err;
    EXPECT_NE(result.err.find(each.message), std::string::npos) << result.err;
  }
}

TEST(Options, ABadValueIsOneWarningThatNamesIt) {
  const std::string program = built("tests/programs/alloc_check_dynamic");
  const Result result = run_with_library({program}, {{"DORMOUSE_CHUNK_SIZE", "banana"}});
  EXPECT_EQ(result.exit_code, 0) << shown(result);
  EXPECT_EQ(result.out, run_plain({program}).out);
  EXPECT_EQ(count(result.err, "\n"), 1u) << result.err;
  EXPECT_NE(result.err.find("DORMOUSE_CHUNK_SIZE='banana'"), std::string::npos) << result.err;
}

// What is said before CUDA is used and by a forked child, too.
TEST(Options, TheLogGoesWhereItWasToldFromTheFirstMessageOn) {
  const Folder folder;
  const std::string log = folder / "log";
  for (const char* name : {"an_end_without_a_begin_does_nothing", "a_forked_child_starts_clean"}) {
    const std::vector<std::string> program = {built("tests/preload/cases"), name};
    const Result to_file = run_with_library(program, {{"DORMOUSE_LOG_FILE", log}});
    EXPECT_EQ(to_file.exit_code, 0) << shown(to_file);
    EXPECT_EQ(to_file.err, "") << name;
    EXPECT_EQ(count(content_of(log), "in none; nothing was done"), 1u) << content_of(log);
    std::filesystem::remove(log);
    const Result silent = run_with_library(program, {{"DORMOUSE_LOG_LEVEL", "off"}});
    EXPECT_EQ(silent.exit_code, 0) << shown(silent);
    EXPECT_EQ(silent.err, "") << name;
  }
}

TEST(Options, AnUnknownVariableIsOneWarning) {
  const Result result = run_with_library({built("tests/programs/alloc_check_dynamic")},
                                         {{"DORMOUSE_REGION", "weights"}});
  EXPECT_EQ(result.exit_code, 0) << shown(result);
  EXPECT_EQ(count(result.err, "\n"), 1u) << result.err;
  EXPECT_NE(result.err.find("DORMOUSE_REGIONS"), std::string::npos) << result.err;
}

TEST(Options, AnUnknownPresetIsOneWarning) {
  const Result result = run_with_library({built("tests/programs/alloc_check_dynamic")},
                                         {{"DORMOUSE_REGIONS", "@nobody; all: process"}});
  EXPECT_EQ(result.exit_code, 0) << shown(result);
  EXPECT_EQ(count(result.err, "\n"), 1u) << result.err;
  EXPECT_NE(result.err.find("nobody"), std::string::npos) << result.err;
}

// --- The control socket

TEST(Socket, IsThereWhileCudaIsInUseAndGoneAfterwards) {
  Folder folder;
  const std::string sockets = folder / "sockets";
  Environment environment = {
      {"DORMOUSE_CONTROL", "on"}, {"DORMOUSE_SOCKET_DIR", sockets}, {"CASES_SOCKETS", sockets}};
  const Result result =
      run_with_library({built("tests/preload/cases"), "socket_is_there"}, environment);
  EXPECT_EQ(result.out, "ok\n") << shown(result);
  EXPECT_TRUE(std::filesystem::exists(sockets));
  EXPECT_TRUE(std::filesystem::is_empty(sockets));
}

// --- Cases of cases.cc and lookups.cc

struct Case {
  const char* program;
  const char* name;
  Environment environment = {};
  const char* said = "";  // on standard error, once
};

void PrintTo(const Case& tested, std::ostream* out) {
  *out << tested.name;
}

class Cases : public testing::TestWithParam<Case> {};

TEST_P(Cases, IsAsItShouldBe) {
  const Case& tested = GetParam();
  const Result result = run_with_library(
      {built(std::string("tests/preload/") + tested.program), tested.name}, tested.environment);
  EXPECT_EQ(result.out, "ok\n") << shown(result);
  EXPECT_EQ(result.exit_code, 0) << shown(result);
  if (*tested.said == '\0') {
    EXPECT_EQ(result.err, "");
  } else {
    EXPECT_EQ(count(result.err, tested.said), 1u) << result.err;
  }
}

std::string name_of_case(const testing::TestParamInfo<Case>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(Lookups, Cases,
                         testing::Values(Case{"lookups", "every_driver_row_by_dlsym"},
                                         Case{"lookups", "every_driver_row_by_get_proc_address"},
                                         Case{"lookups", "get_proc_address_of_itself"},
                                         Case{"lookups", "entry_points_of_the_runtime"},
                                         Case{"lookups", "other_libraries_keep_theirs"},
                                         Case{"lookups", "nothing_without_cuda"},
                                         Case{"lookups", "default_order_with_cuda"},
                                         Case{"lookups", "errors_are_dlsyms_own"},
                                         Case{"lookups",
                                              "an_unknown_function_is_named",
                                              {{"DORMOUSE_LOG_LEVEL", "info"}},
                                              "the program asked for cuMem"},
                                         Case{"lookups",
                                              "every_gate_pass_is_refused_while_memory_sleeps",
                                              {{"DORMOUSE_GATE", "fail"}},
                                              "a GPU call was refused"},
                                         Case{"lookups",
                                              "every_call_that_needs_memory_gets_what_pools_keep"},
                                         Case{"lookups", "many_threads"}),
                         name_of_case);

INSTANTIATE_TEST_SUITE_P(
    Interface, Cases,
    testing::Values(
        Case{"cases", "regions_nest_and_end"}, Case{"cases", "regions_are_the_threads_own"},
        Case{"cases", "an_end_without_a_begin_does_nothing", {}, "in none; nothing was done"},
        Case{"cases", "bad_arguments_are_refused", {}, "in none; nothing was done"},
        Case{"cases", "a_dash_is_no_tag"},
        Case{"cases",
             "switched_off",
             {{"DORMOUSE", "off"}, {"DORMOUSE_REGIONS", "all: process; broken: nvtx("}}},
        Case{"cases", "a_call_without_memory_has_its_own_message"},
        Case{"cases", "stats_fit_the_callers_struct"}, Case{"cases", "before_cuda_is_used"},
        Case{"cases", "an_initialiser_may_use_cuda_while_cuda_begins"}, Case{"cases", "zero_bytes"},
        Case{"cases", "more_than_the_device_has"}, Case{"cases", "every_kind_of_allocation"},
        Case{"cases",
             "without_virtual_memory_the_program_is_served_itself",
             {{"SIMGPU_FAIL", "cuMemAddressReserve:*:CUDA_ERROR_NOT_SUPPORTED"}},
             "has no virtual memory management"},
        Case{"cases",
             "without_physical_memory_to_map_the_program_is_served_itself",
             {{"SIMGPU_FAIL", "cuMemCreate:*:CUDA_ERROR_NOT_SUPPORTED"}},
             "has no virtual memory management"},
        Case{"cases",
             "memory_of_a_named_pool_stays_in_it",
             {},
             "allocates from a memory pool (cudaMallocFromPoolAsync) inside a region"},
        Case{"cases",
             "rules_on_single_allocations",
             {{"DORMOUSE_REGIONS", "big: size(>=4MiB); io: thread(io-*)"}}},
        Case{"cases",
             "a_thread_whose_name_fits_is_in_a_region",
             {{"DORMOUSE_REGIONS", "io: thread(io-*); -: thread(none*)"}}},
        Case{"cases",
             "memory_that_the_program_maps_is_not_seen_by_size_rules",
             {{"DORMOUSE_REGIONS", "big: size(>=4MiB)"}},
             "such memory stays untagged"},
        Case{"cases", "memory_that_the_program_maps_sleeps_too"},
        Case{"cases", "memory_that_the_program_maps_may_go_asleep"},
        Case{"cases",
             "memory_that_the_program_maps_can_be_left_alone",
             {{"DORMOUSE_MAPPED_MEMORY", "off"}}},
        Case{"cases", "kept_memory_counts_as_free", {{"DORMOUSE_RETAIN", "256MiB"}}},
        Case{"cases", "pointers_answer_as_cudamallocs"},
        Case{"cases", "no_ipc_handle_of_tagged_memory", {}, "IPC handle"},
        Case{"cases", "no_handle_of_tagged_memory"}, Case{"cases", "what_others_hold_stays_awake"},
        Case{"cases", "a_buffer_can_be_kept_awake"},
        Case{"cases", "attributes_of_a_buffer_are_its_own"},
        Case{"cases", "copies_reach_memory_of_every_device"},
        Case{"cases", "copies_reach_memory_without_peers", {{"SIMGPU_PEERS", "0"}}},
        Case{"cases", "a_pools_access_reaches_tagged_memory"},
        Case{"cases", "free_in_the_middle_of_a_block"},
        Case{"cases", "free_inside_a_sleeping_pool"},
        Case{"cases", "sleep_frees_and_wake_restores"}, Case{"cases", "unknown_tags_are_named"},
        Case{"cases", "wake_without_memory_can_be_tried_again"},
        Case{"cases", "a_backup_is_kept_for_a_moment", {{"DORMOUSE_KEEP_BACKUP", "500us"}}},
        Case{"cases", "discard_drops_the_content"}, Case{"cases", "calls_wait_for_what_sleeps"},
        Case{"cases", "calls_wake_what_sleeps", {{"DORMOUSE_GATE", "wake"}}},
        Case{"cases",
             "calls_wake_what_sleeps_when_there_is_memory_again",
             {{"DORMOUSE_GATE", "wake"}},
             "the wake is retried"},
        Case{"cases",
             "calls_fail_on_what_sleeps",
             {{"DORMOUSE_GATE", "fail"}},
             "a GPU call was refused: memory is asleep and DORMOUSE_GATE=fail; wake it with"},
        Case{"cases", "graph_nodes_wait_for_what_sleeps"},
        Case{"cases", "no_sleep_while_a_stream_captures"},
        Case{"cases", "a_capture_waits_to_begin_and_not_to_end"},
        Case{"cases", "captures_end_with_what_they_are_in"},
        Case{"cases", "a_reset_takes_the_memory_with_it"},
        Case{"cases", "a_destroyed_context_takes_the_memory_with_it"},
        Case{"cases", "a_forked_child_starts_clean", {}, "in none; nothing was done"},
        Case{"cases", "a_child_can_use_cuda"}, Case{"cases", "exit_while_asleep"},
        Case{"cases", "exit_while_the_gate_is_closed"}),
    name_of_case);

INSTANTIATE_TEST_SUITE_P(Direct, Cases,
                         testing::Values(Case{
                             "direct", "a_runtime_past_the_hooks", {}, "uses CUDA past this"}),
                         name_of_case);

// The same results with and without the library, and those that "next" means.
TEST(Lookups, RelativeToTheCallerStaySo) {
  const std::string program = built("tests/preload/relative");
  const Result with = run_with_library({program});
  expect_same(with, run_plain({program}));
  EXPECT_NE(with.out.find("shared_name, next after the asker: libanswerer.so"), std::string::npos)
      << with.out;
  EXPECT_NE(with.out.find("cuMemAlloc_v2, next after the asker: libanswerer.so"), std::string::npos)
      << with.out;
}

}  // namespace
