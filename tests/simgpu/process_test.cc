// Whole programs on the simulated libraries, one process each: what they print, what they leave
// behind, what the environment changes. Their libraries are found by LD_LIBRARY_PATH, as a GPU
// machine's are.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

namespace {

struct Outcome {
  int status = -1;     // as of waitpid
  std::string output;  // standard output and error
  std::string leaks;   // the leak report
};

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// Runs a program of tests/programs, with `input` on its standard input.
Outcome run(const std::string& program, const std::map<std::string, std::string>& environment = {},
            const std::string& input = "") {
  std::string base = std::string(getenv("TEST_TMPDIR")) + "/run";
  std::string report = base + ".leaks";
  std::remove(report.c_str());
  std::ofstream(base + ".in") << input;
  std::string command = "cd " + std::string(getenv("PWD")) + " && env LD_LIBRARY_PATH=tests/simgpu";
  command += " SIMGPU_LEAK_REPORT=" + report;
  for (const auto& [name, value] : environment) command += " '" + name + "=" + value + "'";
  command += " tests/programs/" + program + " < " + base + ".in > " + base + ".out 2>&1";
  Outcome outcome;
  outcome.status = std::system(command.c_str());
  outcome.output = read_file(base + ".out");
  outcome.leaks = access(report.c_str(), F_OK) == 0 ? read_file(report) : "no report";
  return outcome;
}

TEST(ProcessTest, EveryWayToReachTheDriverGivesTheSameResult) {
  Outcome first = run("alloc_check_driver");
  EXPECT_EQ(first.status, 0) << first.output;
  EXPECT_NE(first.output.find("checksum"), std::string::npos);
  EXPECT_EQ(first.leaks, "");
  for (const char* program : {"alloc_check_dynamic", "alloc_check_dynamic_12", "alloc_check_static",
                              "alloc_check_dlsym", "alloc_check_dlsym proc"}) {
    Outcome other = run(program);
    EXPECT_EQ(other.status, 0) << program << other.output;
    EXPECT_EQ(other.output, first.output) << program;
    EXPECT_EQ(other.leaks, "") << program;
  }
}

TEST(ProcessTest, NewMemoryIsNotReliedOn) {
  EXPECT_EQ(run("alloc_check_dynamic", {{"SIMGPU_POISON", "1"}}).output,
            run("alloc_check_dynamic").output);
}

TEST(ProcessTest, ThreadsShareTheDevice) {
  Outcome outcome = run("threads 8 100");
  EXPECT_EQ(outcome.output, "passed 800\n");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.leaks, "");
}

TEST(ProcessTest, AForkDisturbsNothing) {
  Outcome outcome = run("pinned_fork");
  EXPECT_EQ(outcome.output, "parent ok\n");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.leaks, "");
}

TEST(ProcessTest, ServingStepsAreReproducible) {
  const std::string steps = "info\nstep\nstep\nstep\nquit\n";
  Outcome first = run("serve 16 4", {}, steps);
  EXPECT_EQ(first.status, 0) << first.output;
  EXPECT_NE(first.output.find("step 3 checksum"), std::string::npos) << first.output;
  EXPECT_EQ(first.leaks, "");
  EXPECT_EQ(run("serve 16 4", {}, steps).output, first.output);
  EXPECT_NE(run("serve 17 4", {}, steps).output, first.output);
}

TEST(ProcessTest, WhatIsLeftAtExitIsReportedAndNothingElseIsPrinted) {
  Outcome outcome = run("exit_allocated");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.output, "leaving\n");
  EXPECT_NE(outcome.leaks.find("leaked allocation"), std::string::npos) << outcome.leaks;
  EXPECT_NE(outcome.leaks.find("size 100\n"), std::string::npos) << outcome.leaks;
  EXPECT_NE(outcome.leaks.find("leaked host allocation"), std::string::npos) << outcome.leaks;
}

TEST(ProcessTest, AThreadInTheMiddleOfACallDoesNotDisturbTheExit) {
  for (int i = 0; i < 20; ++i) {
    Outcome outcome = run("exit_allocated thread");
    EXPECT_EQ(outcome.status, 0);
    EXPECT_EQ(outcome.output, "leaving\n");
  }
}

TEST(ProcessTest, TheEnvironmentSetsTheMachine) {
  Outcome small =
      run("serve 16 4", {{"SIMGPU_DEVICES", "1"}, {"SIMGPU_MEMORY", "64MiB"}}, "info\n");
  EXPECT_NE(small.output.find("total 67108864\n"), std::string::npos) << small.output;
  Outcome none = run("serve", {{"SIMGPU_DEVICES", "0"}});
  EXPECT_NE(none.output.find("error 100"), std::string::npos) << none.output;
  Outcome old = run("serve", {{"SIMGPU_DRIVER_VERSION", "12080"}});
  EXPECT_NE(old.output.find("error 35"), std::string::npos) << old.output;
  Outcome bad = run("serve", {{"SIMGPU_MEMORY", "plenty"}});
  EXPECT_NE(bad.output.find("SIMGPU_MEMORY=plenty"), std::string::npos) << bad.output;
  EXPECT_NE(bad.status, 0);
  Outcome kernels = run("serve", {{"SIMGPU_KERNELS", "/nonexistent.so"}});
  EXPECT_NE(kernels.output.find("cannot be loaded"), std::string::npos) << kernels.output;
}

TEST(ProcessTest, TheEnvironmentMakesCallsFail) {
  Outcome outcome = run("threads 1 10", {{"SIMGPU_FAIL", "cuMemAlloc:3:CUDA_ERROR_OUT_OF_MEMORY"}});
  EXPECT_NE(outcome.output.find("error 2\n"), std::string::npos) << outcome.output;
  Outcome pinned = run("pinned_fork", {{"SIMGPU_PIN_LIMIT", "4MiB"}});
  EXPECT_NE(pinned.output.find("cudaHostRegister"), std::string::npos) << pinned.output;
  Outcome piece = run("pinned_fork", {{"SIMGPU_REGISTER_LIMIT", "1MiB"}});
  EXPECT_NE(piece.output.find("error 1\n"), std::string::npos) << piece.output;
}

}  // namespace
