// pthread_setname_np as the program calls it: a thread that is given a name which a rule names is
// in a region from then on. Names that come another way (prctl, or from another thread) are seen
// when the thread allocates (regions.h).
#include <dlfcn.h>
#include <pthread.h>

#include <cerrno>
#include <cstring>

#include "shim/process/export.h"
#include "shim/process/linker.h"
#include "shim/process/settings.h"
#include "shim/rules/regions.h"

namespace {

using SetName = int (*)(pthread_t thread, const char* name);

SetName real_set_name() noexcept {
  static const auto function =
      reinterpret_cast<SetName>(dormouse::shim::real_dlsym(RTLD_NEXT, "pthread_setname_np"));
  return function;
}

}  // namespace

extern "C" DORMOUSE_EXPORT int pthread_setname_np(pthread_t thread, const char* name) {
  const SetName set_name = real_set_name();
  if (set_name == nullptr) return ENOSYS;
  const int result = set_name(thread, name);
  const bool own = std::strncmp(name, "dormouse-", 9) == 0;  // the library's helpers
  if (result == 0 && !own && pthread_equal(thread, pthread_self()) && dormouse::shim::active()) {
    dormouse::shim::thread_renamed();
  }
  return result;
}
