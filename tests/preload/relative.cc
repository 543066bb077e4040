// Lookups that are relative to their caller, from a program that links libasker.so and then
// libanswerer.so, which define the same names: prints where each was found. If the preloaded dlsym
// called the real one on the asker's behalf, "next" would be the asker itself.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

extern "C" void* ask_next(const char* name);
extern "C" void* ask_default(const char* name);
extern "C" int only_answered();

namespace {

void say(const char* what, void* found) {
  Dl_info info{};
  const char* file = "nowhere";
  if (found != nullptr && dladdr(found, &info) != 0) {
    const char* slash = std::strrchr(info.dli_fname, '/');
    file = slash == nullptr ? info.dli_fname : slash + 1;
  }
  std::printf("%s: %s\n", what, file);
}

}  // namespace

int main() {
  only_answered();
  say("shared_name, next after the asker", ask_next("shared_name"));
  say("shared_name, next after the program", dlsym(RTLD_NEXT, "shared_name"));
  say("cuMemAlloc_v2, next after the asker", ask_next("cuMemAlloc_v2"));
  say("shared_name, by default", ask_default("shared_name"));
  say("malloc, next after the asker", ask_next("malloc"));
  say("malloc, by default", ask_default("malloc"));
  return 0;
}
