// See doctor.h.
#include "cli/doctor.h"

#include <cuda.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <gnu/libc-version.h>
#include <linux/membarrier.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <sstream>

#include "cli/run.h"
#include "cli/text.h"
#include "config/alloc_conf.h"
#include "config/options.h"
#include "core/backup/system_memory.h"

extern char** environ;

namespace dormouse::cli {

namespace {

enum class Verdict { kOk, kNote, kWarning, kFailure };

class Report {
 public:
  void add(Verdict verdict, const char* subject, const std::string& text) {
    constexpr std::array<const char*, 4> kNames = {"ok", "note", "warn", "FAIL"};
    fmt::print("{:<4}  {:<12}  {}\n", kNames[static_cast<std::size_t>(verdict)], subject, text);
    failed_ = failed_ || verdict == Verdict::kFailure;
  }
  bool failed() const { return failed_; }

 private:
  bool failed_ = false;
};

void check_glibc(Report& report) {
  int major = 0, minor = 0;
  const char* version = gnu_get_libc_version();
  const bool new_enough = std::sscanf(version, "%d.%d", &major, &minor) == 2 &&
                          (major > 2 || (major == 2 && minor >= 34));
  report.add(new_enough ? Verdict::kOk : Verdict::kFailure, "glibc",
             new_enough ? version : fmt::format("{} is too old: 2.34 or later is needed", version));
}

/// What a command prints to standard error, and its wait status; nothing if it cannot be started.
std::optional<std::pair<std::string, int>> errors_of(std::vector<std::string> command,
                                                     std::vector<std::string> variables) {
  int ends[2];
  if (pipe(ends) != 0) return std::nullopt;
  const auto pointers = [](std::vector<std::string>& texts) {
    std::vector<char*> result;
    for (std::string& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
  };
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
  posix_spawn_file_actions_addclose(&actions, ends[0]);
  posix_spawn_file_actions_addclose(&actions, ends[1]);
  pid_t child = 0;
  const int error = posix_spawnp(&child, command[0].c_str(), &actions, nullptr,
                                 pointers(command).data(), pointers(variables).data());
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  std::string text;
  std::array<char, 4096> buffer;
  for (ssize_t count; error == 0 && (count = read(ends[0], buffer.data(), buffer.size())) > 0;) {
    text.append(buffer.data(), static_cast<std::size_t>(count));
  }
  close(ends[0]);
  int status = 0;
  if (error != 0 || waitpid(child, &status, 0) != child) return std::nullopt;
  return std::pair(text.substr(0, text.find('\n')), status);
}

void check_library(Report& report, const std::string& given) {
  std::string looked_at;
  const auto library = find_library(given, looked_at);
  if (!library) {
    report.add(Verdict::kFailure, "library",
               "none of " + looked_at + " is there; set DORMOUSE_LIBRARY or give --library");
    return;
  }
  report.add(Verdict::kOk, "library", *library);
  // The loader ignores what it cannot preload, and says so to standard error alone.
  const auto tried = errors_of({"true"}, {"LD_PRELOAD=" + *library, "PATH=/usr/bin:/bin"});
  if (!tried) {
    report.add(Verdict::kWarning, "preloading", "could not be tried: 'true' cannot be started");
  } else if (tried->second != 0 || !tried->first.empty()) {
    report.add(Verdict::kFailure, "preloading",
               tried->first.empty() ? fmt::format("'true' ended with status {}", tried->second)
                                    : tried->first);
  } else {
    report.add(Verdict::kOk, "preloading", "a program starts with the library preloaded");
  }
}

void check_preload(Report& report) {
  const std::string preload = environment("LD_PRELOAD");
  if (preload.empty()) {
    report.add(Verdict::kNote, "LD_PRELOAD", "not set here: start programs with 'dormouse run'");
    return;
  }
  std::string separated = preload;
  for (char& c : separated) c = c == ':' ? ' ' : c;
  std::istringstream entries(separated);
  bool found = false;
  for (std::string entry; entries >> entry;) {
    found = found || entry.find("dormouse") != entry.npos;
    if (entry.find('/') != entry.npos && access(entry.c_str(), R_OK) != 0) {
      report.add(Verdict::kWarning, "LD_PRELOAD", entry + " cannot be read and will be ignored");
    }
    if (entry.find("torch_memory_saver") != entry.npos && entry.find("dormouse") == entry.npos) {
      report.add(Verdict::kWarning, "LD_PRELOAD",
                 entry + " hooks the same functions; Dormouse takes its place, leave it out");
    }
  }
  report.add(found ? Verdict::kOk : Verdict::kNote, "LD_PRELOAD",
             found ? preload : preload + " does not name Dormouse: 'dormouse run' adds it");
}

template <typename Function>
Function driver_function(void* driver, const char* name) {
  return reinterpret_cast<Function>(dlsym(driver, name));
}

void check_devices(Report& report, void* driver) {
  const auto count_of = driver_function<decltype(&cuDeviceGetCount)>(driver, "cuDeviceGetCount");
  const auto attribute =
      driver_function<decltype(&cuDeviceGetAttribute)>(driver, "cuDeviceGetAttribute");
  const auto name_of = driver_function<decltype(&cuDeviceGetName)>(driver, "cuDeviceGetName");
  int count = 0;
  if (count_of == nullptr || attribute == nullptr || name_of == nullptr ||
      count_of(&count) != CUDA_SUCCESS || count == 0) {
    report.add(Verdict::kFailure, "GPUs", "the driver reports none; see CUDA_VISIBLE_DEVICES");
    return;
  }
  for (int device = 0; device < count; ++device) {
    int supported = 0;
    std::array<char, 256> name{};
    if (attribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) !=
        CUDA_SUCCESS) {
      supported = 0;
    }
    if (name_of(name.data(), static_cast<int>(name.size()) - 1, device) != CUDA_SUCCESS)
      name[0] = '?';
    report.add(
        supported ? Verdict::kOk : Verdict::kFailure, "GPU",
        fmt::format("{}: {}{}", device, name.data(),
                    supported ? "" : " has no virtual memory management; its memory cannot sleep"));
  }
}

void check_driver(Report& report) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) {
    report.add(Verdict::kFailure, "driver",
               fmt::format("{}: install NVIDIA's driver, or start the container with its GPUs",
                           dlerror()));
    return;
  }
  const auto init = driver_function<decltype(&cuInit)>(driver, "cuInit");
  const auto version_of =
      driver_function<decltype(&cuDriverGetVersion)>(driver, "cuDriverGetVersion");
  const CUresult result = init == nullptr ? CUDA_ERROR_NOT_FOUND : init(0);
  if (result != CUDA_SUCCESS) {
    report.add(Verdict::kFailure, "driver",
               fmt::format("libcuda.so.1 is there but cuInit gives error {}; try nvidia-smi",
                           static_cast<int>(result)));
    return;
  }
  int version = 0;
  if (version_of == nullptr || version_of(&version) != CUDA_SUCCESS) version = 0;
  const bool new_enough = version >= 11020;
  report.add(new_enough ? Verdict::kOk : Verdict::kFailure, "driver",
             fmt::format("for CUDA {}.{}{}", version / 1000, version % 1000 / 10,
                         new_enough ? "" : ": a driver for CUDA 11.2 or later is needed"));
  check_devices(report, driver);
}

void check_huge_pages(Report& report) {
  std::string setting;
  std::getline(std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled"), setting);
  if (setting.find("[always]") != setting.npos || setting.find("[madvise]") != setting.npos) {
    report.add(Verdict::kOk, "huge pages", setting);
  } else {
    report.add(Verdict::kWarning, "huge pages",
               (setting.empty() ? std::string("unknown") : setting) +
                   ": a first sleep is slower; as root: echo madvise > "
                   "/sys/kernel/mm/transparent_hugepage/enabled");
  }
}

void check_memlock(Report& report) {
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return;
  if (limit.rlim_cur == RLIM_INFINITY) {
    report.add(Verdict::kOk, "memlock", "unlimited");
  } else {
    report.add(Verdict::kWarning, "memlock",
               human_size(limit.rlim_cur) +
                   ": if backups are slow, raise it (ulimit -l unlimited; docker run --ulimit "
                   "memlock=-1)");
  }
}

void check_membarrier(Report& report) {
  const long commands = syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
  const bool there = commands >= 0 && (commands & MEMBARRIER_CMD_PRIVATE_EXPEDITED) != 0;
  report.add(there ? Verdict::kOk : Verdict::kWarning, "membarrier",
             there
                 ? "the gate costs next to nothing while it is open"
                 : "not available (kernel or container profile): every GPU call pays for a fence");
}

void check_host_memory(Report& report) {
  report.add(Verdict::kNote, "host memory", host_memory_text(""));
}

void check_sockets(Report& report, const Global& global) {
  const auto directories = socket_directories(global);
  for (std::size_t i = 0; i < directories.size(); ++i) {
    bool missing = false;
    const auto problem = control::directory_problem(directories[i], geteuid(), &missing);
    if (problem && !missing) {
      report.add(Verdict::kFailure, "sockets", *problem);
    } else if (i == 0) {  // the one that programs started here use
      report.add(Verdict::kOk, "sockets",
                 directories[i] + (missing ? " (made when the first program starts)" : ""));
    }
  }
  const std::size_t count = make_client(global).processes().size();
  report.add(Verdict::kNote, "processes", fmt::format("{} can be controlled", count));
}

void check_options(Report& report) {
  std::vector<std::string> warnings;
  const config::ParsedOptions parsed = config::parse_options(&std::getenv, warnings);
  config::check_unknown_names(environ, warnings);
  std::vector<std::string> errors = check_regions(parsed.options.regions, warnings);
  for (const std::string& error : errors) report.add(Verdict::kFailure, "options", error);
  for (const std::string& warning : warnings) report.add(Verdict::kWarning, "options", warning);
  if (errors.empty() && warnings.empty()) {
    report.add(Verdict::kOk, "options", "no bad value ('dormouse options' shows all)");
  }
  if (const std::string& folder = parsed.options.disk_dir; !folder.empty()) {
    const bool usable = access(folder.c_str(), W_OK | X_OK) == 0;
    report.add(usable ? Verdict::kOk : Verdict::kFailure, "disk",
               folder + (usable ? "" : " cannot be written to; see DORMOUSE_DISK_DIR"));
  }
}

/// The variables that PyTorch reads: which one wins differs between its versions.
void check_torch(Report& report) {
  std::vector<std::string> set;
  for (const std::string& name : config::alloc_conf_variables(config::Generation::kG2)) {
    if (std::getenv(name.c_str()) != nullptr) set.push_back(name);
  }
  if (set.empty()) {
    report.add(Verdict::kOk, "PyTorch", "no allocator setting in the environment");
    return;
  }
  const auto winner = config::winning_alloc_conf(config::Generation::kG2, &std::getenv);
  const auto old_winner = config::winning_alloc_conf(config::Generation::kG1, &std::getenv);
  if (!old_winner || old_winner->name != winner->name) {
    report.add(
        Verdict::kWarning, "PyTorch",
        winner->name +
            " is read by PyTorch 2.10 and later only; earlier ones read PYTORCH_CUDA_ALLOC_CONF");
  }
  if (set.size() > 1) {
    report.add(Verdict::kWarning, "PyTorch",
               fmt::format("{} are set; PyTorch 2.10 and later reads {} alone",
                           fmt::join(set, ", "), winner->name));
  }
  config::AllocSettings settings;
  const auto problem =
      config::apply_alloc_conf(config::AllocDialect::g2_cuda(), winner->text, settings);
  if (problem) {
    report.add(Verdict::kFailure, "PyTorch",
               fmt::format("{}={}: {}", winner->name, winner->text, *problem));
  } else {
    report.add(Verdict::kOk, "PyTorch",
               fmt::format("{}={} (expandable segments {})", winner->name, winner->text,
                           settings.expandable_segments ? "on, but in regions" : "off"));
  }
}

}  // namespace

std::string host_memory_text(const std::string& root) {
  const std::uint64_t available = available_host_memory(root);
  const bool known = available != std::numeric_limits<std::uint64_t>::max();
  return (known ? human_size(available) +
                      " available (of the machine, and of the memory cgroups that this shell is in)"
                : std::string("unknown")) +
         "; backups of policy host need as much as sleeps";
}

int doctor(const Global& global, const std::string& library) {
  Report report;
  check_glibc(report);
  check_library(report, library);
  check_preload(report);
  check_driver(report);
  check_huge_pages(report);
  check_memlock(report);
  check_membarrier(report);
  check_host_memory(report);
  check_sockets(report, global);
  check_options(report);
  check_torch(report);
  return report.failed() ? kFailed : kOk;
}

}  // namespace dormouse::cli
