// A program without CUDA that uses what a preloaded library can disturb: threads, thread-local
// objects, exceptions across threads, dlopen and dlsym, fork, atexit. Prints what it computed.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

thread_local std::string name = "main";

int work(int number) {
  name = "worker " + std::to_string(number);
  void* math = dlopen("libm.so.6", RTLD_NOW);
  auto cosine = reinterpret_cast<double (*)(double)>(dlsym(math, "cos"));
  const int result = static_cast<int>(1000 * cosine(number));
  dlclose(math);
  if (number % 3 == 0) throw std::runtime_error(name + " gave up at " + std::to_string(result));
  return result;
}

}  // namespace

int main() {
  std::atexit([] { std::printf("goodbye\n"); });
  std::vector<std::string> said(8);
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&said, i] {
      try {
        said[i] = name + std::to_string(work(i));
      } catch (const std::exception& error) {
        said[i] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : said) std::printf("%s\n", text.c_str());
  std::fflush(stdout);
  if (fork() == 0) _exit(3);
  int status = 0;
  wait(&status);
  std::printf("%s, child %d\n", name.c_str(), WEXITSTATUS(status));
  std::fprintf(stderr, "to standard error\n");
  return 5;
}
