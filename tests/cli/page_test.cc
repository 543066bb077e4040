// docs/control.md names every command, option, path, parameter, field and metric that there is, and
// none that there is not: the lists come from the command's help and from what the paths answer.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "core/control/api.h"
#include "tests/cli/subprocess.h"
#include "tests/core/simulated_engine.h"

namespace dormouse::cli {
namespace {

using nlohmann::json;
using Names = std::set<std::string>;

/// What the pattern's first group matches in each line of the text.
Names matches(const std::string& text, const std::string& pattern) {
  Names found;
  const std::regex regex(pattern);
  std::istringstream lines(text);
  std::smatch match;
  for (std::string line; std::getline(lines, line);) {
    if (std::regex_search(line, match, regex)) found.insert(match[1]);
  }
  return found;
}

std::string page() {
  std::ifstream file("docs/control.md");
  return {std::istreambuf_iterator<char>(file), {}};
}

/// The part of the page under this heading.
std::string section(const std::string& heading) {
  const std::string text = page();
  const std::size_t begin = text.find("\n" + heading + "\n");
  if (begin == text.npos) return "";
  const std::size_t inside = begin + heading.size() + 2;
  return text.substr(inside, text.find("\n##", inside) - inside);
}

std::string help(std::vector<std::string> command) {
  command.insert(command.begin(), std::filesystem::absolute("cli/dormouse").string());
  command.push_back("--help");
  return run_command(command, {{"LD_PRELOAD", ""}}).out;
}

Names options_in_help(const std::string& text) {
  Names options = matches(text, "^  (?:-[a-z],)?(--[a-z-]+)");
  options.erase("--help");
  return options;
}

TEST(ControlPage, HasEveryCommandWithItsOptions) {
  const std::string overview = help({});
  const std::string row = "^\\| `(--[a-z-]+)";
  EXPECT_EQ(matches(section("## The command"), row), options_in_help(overview));
  const Names commands =
      matches(overview.substr(overview.find("Subcommands:")), "^  ([a-z]+)  +[A-Z]");
  EXPECT_GE(commands.size(), 10u);
  EXPECT_EQ(matches(page(), "^### `dormouse ([a-z]+)`$"), commands);
  for (const std::string& command : commands) {
    const std::string part = section("### `dormouse " + command + "`");
    EXPECT_EQ(matches(part, row), options_in_help(help({command}))) << command;
    EXPECT_THAT(part, testing::HasSubstr("    $ dormouse " + command)) << "an example";
  }
}

class ControlPageTest : public SimulatedEngine {
 protected:
  void SetUp() override {
    SimulatedEngine::SetUp();
    control::ProcessInfo process = control::this_process();
    process.options = {{"DORMOUSE_GATE", "wake", "DORMOUSE_GATE"}};
    api_ = std::make_unique<control::Api>(*engine, std::move(process));
    address_ = allocate(weights, 2 * kMiB);
  }
  void TearDown() override {
    EXPECT_EQ(engine->free(address_), CUDA_SUCCESS);
    SimulatedEngine::TearDown();
  }

  control::Response ask(const std::string& method, const std::string& target) {
    return api_->handle({method, target, ""});
  }
  static json body(const control::Response& response) { return json::parse(response.body); }
  std::string message(const std::string& method, const std::string& target) {
    return body(ask(method, target)).at("message").get<std::string>();
  }

  std::unique_ptr<control::Api> api_;
  CUdeviceptr address_ = 0;
};

/// "a, b" after the last word in front of it.
std::vector<std::string> list_after(const std::string& text, const std::string& word) {
  std::vector<std::string> items;
  std::istringstream stream(text.substr(text.rfind(word) + word.size()));
  for (std::string item; stream >> item;) {
    if (item.back() == ',') item.pop_back();
    items.push_back(item);
  }
  return items;
}

/// The names of all members, at any depth.
void add_names(const json& value, Names& names) {
  for (const auto& [key, member] : value.items()) {
    if (value.is_object()) names.insert(key);
    if (member.is_structured()) add_names(member, names);
  }
}

TEST_F(ControlPageTest, HasEveryPathWithItsParameters) {
  Names rows;
  for (const std::string& path : list_after(message("GET", "/"), "there are ")) {
    const std::string method = ask("GET", path + "?none").status == 405 ? "POST" : "GET";
    std::string row = "| `" + method + " " + path + "` |";
    const char* separator = " ";
    for (const std::string& parameter : list_after(message(method, path + "?none"), " takes ")) {
      row += separator + (parameter == "none" ? parameter : "`" + parameter + "`");
      separator = ", ";
    }
    rows.insert(row + " |");
  }
  EXPECT_GE(rows.size(), 8u);
  EXPECT_EQ(matches(page(), "^(\\| `(?:GET|POST) [^|]*\\|[^|]*\\|)"), rows);
}

TEST_F(ControlPageTest, HasEveryFieldOfTheAnswers) {
  Names names;
  for (const char* target : {"/sleep", "/wake_up", "/trim", "/sleep?tags=none"}) {
    add_names(body(ask("POST", target)), names);
  }
  for (const char* target : {"/is_sleeping", "/health", "/status"}) {
    add_names(body(ask("GET", target)), names);
  }
  EXPECT_GE(names.size(), 40u);
  EXPECT_EQ(matches(section("### Fields"), "^\\| `([a-z_]+)` \\|"), names);
}

TEST_F(ControlPageTest, HasEveryMetric) {
  const Names metrics = matches(ask("GET", "/metrics").body, "^# TYPE ([a-z_]+) ");
  EXPECT_GE(metrics.size(), 25u);
  EXPECT_EQ(matches(section("### Metrics"), "^\\| `([a-z_]+)` \\|"), metrics);
}

}  // namespace
}  // namespace dormouse::cli
