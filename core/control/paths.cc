// See paths.h.
#include "core/control/paths.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <memory>

#include "core/control/socket.h"

namespace dormouse::control {

namespace {

constexpr std::string_view kSuffix = ".sock";

bool is_directory_of(const std::string& path, uid_t uid) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode) && info.st_uid == uid;
}

std::string temporary_directory(uid_t uid) {
  return "/tmp/dormouse-" + std::to_string(uid);
}

std::optional<std::string> problem_of(const std::string& path, const struct stat& info, uid_t uid,
                                      bool root_may) {
  if (S_ISLNK(info.st_mode))
    return path + " is a symbolic link; remove it or choose another directory";
  if (!S_ISDIR(info.st_mode)) return path + " is not a directory; choose another one";
  if (info.st_uid != uid && !(root_may && uid == 0)) {
    return path + " belongs to user " + std::to_string(info.st_uid) + ", not to user " +
           std::to_string(uid) + "; choose another directory";
  }
  if ((info.st_mode & 077) != 0) {
    return path + " can be entered by other users; run: chmod 700 " + path;
  }
  return std::nullopt;
}

/// The PID in a socket's name, or 0.
pid_t pid_of(std::string_view name) {
  if (!name.ends_with(kSuffix)) return 0;
  name.remove_suffix(kSuffix.size());
  pid_t pid = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), pid);
  return error == std::errc() && end == name.data() + name.size() && pid > 0 ? pid : 0;
}

}  // namespace

std::string socket_directory(std::string_view given, std::string_view xdg_runtime_dir, uid_t uid) {
  if (!given.empty()) return std::string(given);
  // After su or sudo the variable may still name the other user's directory.
  if (xdg_runtime_dir.starts_with('/') && is_directory_of(std::string(xdg_runtime_dir), uid)) {
    return std::string(xdg_runtime_dir) + "/dormouse";
  }
  return temporary_directory(uid);
}

std::vector<std::string> search_directories(std::string_view given,
                                            std::string_view xdg_runtime_dir, uid_t uid) {
  if (!given.empty()) return {std::string(given)};
  std::vector<std::string> directories = {socket_directory({}, xdg_runtime_dir, uid)};
  for (const std::string& other :
       {"/run/user/" + std::to_string(uid) + "/dormouse", temporary_directory(uid)}) {
    if (std::find(directories.begin(), directories.end(), other) == directories.end()) {
      directories.push_back(other);
    }
  }
  return directories;
}

std::optional<std::string> make_directory(const std::string& path, uid_t uid) {
  const bool made = mkdir(path.c_str(), 0700) == 0;
  if (!made && errno != EEXIST) {
    return "cannot make the directory " + path + ": " + error_text(errno) +
           "; create its parent, or choose a directory that can be made";
  }
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return "cannot examine " + path + ": " + error_text(errno);
  if (auto problem = problem_of(path, info, uid, false)) return problem;
  if ((info.st_mode & 0700) == 0700) return std::nullopt;
  if (!made || chmod(path.c_str(), 0700) != 0) {  // an unusual umask
    return path + " cannot be used by its owner; run: chmod 700 " + path;
  }
  return std::nullopt;
}

std::optional<std::string> directory_problem(const std::string& path, uid_t uid, bool* missing) {
  struct stat info;
  const int error = lstat(path.c_str(), &info) == 0 ? 0 : errno;
  if (missing != nullptr) *missing = error == ENOENT;
  if (error != 0) return "cannot examine " + path + ": " + error_text(error);
  return problem_of(path, info, uid, true);
}

std::string socket_path(const std::string& directory, pid_t pid) {
  return directory + "/" + std::to_string(pid) + std::string(kSuffix);
}

std::vector<SocketFile> live_sockets(const std::string& directory) {
  std::vector<SocketFile> found;
  const std::unique_ptr<DIR, decltype([](DIR* stream) { closedir(stream); })> stream(
      opendir(directory.c_str()));
  if (stream == nullptr) return found;
  while (const dirent* entry = readdir(stream.get())) {
    const pid_t pid = pid_of(entry->d_name);
    if (pid == 0) continue;
    SocketFile file{directory + "/" + entry->d_name, pid};
    if (presence_of(file.path) == Presence::kStale) {
      unlink(file.path.c_str());
    } else {
      found.push_back(std::move(file));
    }
  }
  std::sort(found.begin(), found.end(),
            [](const SocketFile& a, const SocketFile& b) { return a.pid < b.pid; });
  return found;
}

}  // namespace dormouse::control
