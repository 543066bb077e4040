// A program that loads Python for itself alone and looks its functions up: runs the code in the
// second argument in the libpython of the first. CUDA starts before the code.
#include <dlfcn.h>

#include <cstdio>

int main(int, char** arguments) {
  void* python = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  void* cuda = dlopen("libcuda.so.1", RTLD_NOW);
  if (python == nullptr || cuda == nullptr) {
    std::puts(dlerror());
    return 1;
  }
  reinterpret_cast<void (*)()>(dlsym(python, "Py_Initialize"))();
  if (reinterpret_cast<int (*)(unsigned)>(dlsym(cuda, "cuInit"))(0) != 0) return 1;
  return reinterpret_cast<int (*)(const char*)>(dlsym(python, "PyRun_SimpleString"))(arguments[2]);
}
