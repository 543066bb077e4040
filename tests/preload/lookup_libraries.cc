// Small libraries that lookups and relative load: one that asks, one that answers, one whose
// initialiser uses CUDA, one that only looks like CUDA's. Which, says the macro it is compiled
// with.
#include <dlfcn.h>
#include <unistd.h>

#define EXPORTED extern "C" __attribute__((visibility("default")))

#if defined(ASKER)

EXPORTED int shared_name() {
  return 1;
}
EXPORTED int cuMemAlloc_v2() {
  return 1;
}
// volatile: the call must not become a jump, which would make the caller's caller the caller.
EXPORTED void* ask_next(const char* name) {
  void* volatile found = dlsym(RTLD_NEXT, name);
  return found;
}
EXPORTED void* ask_default(const char* name) {
  void* volatile found = dlsym(RTLD_DEFAULT, name);
  return found;
}

#elif defined(ANSWERER)

EXPORTED int shared_name() {
  return 2;
}
EXPORTED int only_answered() {
  return 2;
}
EXPORTED int cuMemAlloc_v2() {
  return 2;
}

#elif defined(INITIALISER)

// Runs under the dynamic linker's lock, while another thread begins to use CUDA.
extern "C" int cuInit(unsigned);
__attribute__((constructor)) static void initialise() {
  usleep(300'000);
  cuInit(0);
}

#else

EXPORTED int cudnnCreate() {
  return 3;
}
EXPORTED int cuMemAlloc_v2() {
  return 3;
}

#endif
