// Preloaded beside the library under test: at the program's exit, writes what the C interface says
// of the process's tagged memory to the file that WITNESS names, a line per tag and device. So
// programs that know nothing of Dormouse can be checked.
#include <cstdio>
#include <cstdlib>
#include <vector>

#define DORMOUSE_OPTIONAL
#include "shim/abi/dormouse.h"

namespace {

__attribute__((destructor)) void write_report() {
  const char* path = std::getenv("WITNESS");
  if (path == nullptr || dormouse_stats == nullptr) return;
  std::vector<dormouse_tag_stats> stats(16);
  stats[0].size = sizeof(dormouse_tag_stats);
  size_t count = 0;
  if (dormouse_stats(stats.data(), stats.size(), &count) != DORMOUSE_OK) return;
  FILE* file = std::fopen(path, "a");
  if (file == nullptr) return;
  for (size_t i = 0; i < count && i < stats.size(); ++i) {
    std::fprintf(file, "%s device %d allocations %llu frees %llu\n", stats[i].tag, stats[i].device,
                 static_cast<unsigned long long>(stats[i].allocations),
                 static_cast<unsigned long long>(stats[i].frees));
  }
  std::fclose(file);
}

}  // namespace
