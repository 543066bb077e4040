// Programs of cases: `program CASE` runs one and prints "ok", or says what was not as it should be
// and exits with 1. For the programs in this folder.
#pragma once

#include <errno.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#define CASE(name) \
  { #name, &name }
#define EXPECT(condition, what)                            \
  do {                                                     \
    if (!(condition)) fail_at(__LINE__, #condition, what); \
  } while (false)

inline void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

inline void fail_at(int line, const char* condition, const std::string& what) {
  fail("line " + std::to_string(line) + ": " + what + ": not " + condition);
}

inline bool on_real_driver() {
  const char* driver = std::getenv("DORMOUSE_TEST_DRIVER");
  return driver != nullptr && std::strcmp(driver, "real") == 0;
}

/// With a slash at the end.
inline std::string program_folder() {
  const std::string path = program_invocation_name;
  return path.substr(0, path.rfind('/') + 1);
}

inline int run_case(int argc, char** argv, const std::map<std::string, void (*)()>& cases) {
  const auto found = argc > 1 ? cases.find(argv[1]) : cases.end();
  if (found == cases.end()) fail("no such case");
  found->second();
  std::printf("ok\n");
  return 0;
}
