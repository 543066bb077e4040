// Where the control sockets live: one directory per user that nobody else can enter, one socket per
// process in it. For the control server, its client and whoever starts them. Environment variables
// are read by the caller and handed in.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dormouse::control {

/// The directory a process of `uid` puts its socket in: `given` if not empty; else
/// `xdg_runtime_dir`/dormouse if that variable names an existing directory of this user; else
/// /tmp/dormouse-UID.
std::string socket_directory(std::string_view given, std::string_view xdg_runtime_dir, uid_t uid);

/// Where a client looks for the sockets of `uid`: `given` alone if not empty; else every directory
/// that socket_directory() can have chosen, since the server's environment may differ from the
/// client's. Each once; they need not exist.
std::vector<std::string> search_directories(std::string_view given,
                                            std::string_view xdg_runtime_dir, uid_t uid);

/// Makes the directory (not its parents) with mode 0700 if it is not there. Returns why it cannot
/// be used, with what to do, or nothing. Refused: a symbolic link, something else than a directory,
/// another owner than `uid`, or permissions for anyone but the owner.
std::optional<std::string> make_directory(const std::string& path, uid_t uid);

/// Why a client should not trust this directory, or nothing: the same checks, but only root may use
/// one of another owner. A directory that does not exist is an error, with `missing` set.
std::optional<std::string> directory_problem(const std::string& path, uid_t uid,
                                             bool* missing = nullptr);

/// DIRECTORY/PID.sock.
std::string socket_path(const std::string& directory, pid_t pid);

struct SocketFile {
  std::string path;
  pid_t pid =
      0;  // as in the file's name; in another PID namespace the kernel knows the process by another
};

/// The sockets in a directory, by PID. Left-over ones, at which nobody listens, are removed and not
/// listed.
std::vector<SocketFile> live_sockets(const std::string& directory);

}  // namespace dormouse::control
