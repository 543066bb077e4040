// As an extension module that keeps the GIL during its calls, which pybind11's functions do: called
// through ctypes.PyDLL. gil.py tells what is expected.
#include <nvtx3/nvToolsExt.h>

#include <thread>

#define DORMOUSE_OPTIONAL
#include "shim/abi/dormouse.h"

#pragma GCC visibility push(default)
extern "C" {

// Waits for two threads of its own, which begin and end regions.
int load_in_threads() {
  int good = 0;
  std::thread by_range([] {
    nvtxRangePushA("load weights");
    nvtxRangePop();
  });
  std::thread by_call(
      [&] { good = dormouse_region_begin("weights") == 0 && dormouse_region_end() == 0 ? 1 : 0; });
  by_range.join();
  by_call.join();
  return good;
}

// With the GIL given back (ctypes.CDLL): begins a region while `keep_gil` runs, which waits for it.
int region_while_it_is_kept(volatile int* kept, volatile int* begun) {
  while (*kept == 0) std::this_thread::yield();
  const int good = dormouse_region_begin("weights") == 0 && dormouse_region_end() == 0 ? 1 : 0;
  *begun = 1;
  return good;
}

void keep_gil(volatile int* kept, const volatile int* begun) {
  *kept = 1;
  while (*begun == 0) std::this_thread::yield();
}
}
#pragma GCC visibility pop
