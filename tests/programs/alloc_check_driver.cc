// alloc_check on the bare driver, linked to libcuda.so.1.
#include "tests/programs/alloc_check_body.h"
#include "tests/programs/driver_gpu.h"

int main() {
  programs::DriverFunctions functions;
#define F(name, version) functions.name = &name;
  PROGRAM_DRIVER_FUNCTIONS(F)
#undef F
  functions.synchronize = [] { return cuCtxSynchronize(); };
  programs::DriverGpu gpu(functions);
  return programs::alloc_check(gpu);
}
