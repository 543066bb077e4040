// The directory in which a process keeps backups on disk: whether it may be used, the files in it,
// and what is left there of processes that died. Used by Engine and Operation.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "core/backup/disk_calls.h"
#include "core/backup/disk_file.h"
#include "core/process_identity.h"
#include "core/status.h"
#include "core/tags.h"
#include "core/thread_annotations.h"

namespace dormouse {

class DiskStore {
 public:
  // `directory` empty: there are no backups on disk. `option` is what messages call the setting.
  DiskStore(const DiskCalls& calls, std::string directory, std::string option);
  DiskStore(const DiskStore&) = delete;
  DiskStore& operator=(const DiskStore&) = delete;

  bool configured() const noexcept;
  // Files are made there from now on; those that there are stay where they are.
  void set_directory(std::string directory) noexcept;
  const DiskCalls& calls() const noexcept { return calls_; }

  // False in a forked child: the files are its parent's, and it leaves them alone.
  bool in_owner() const noexcept;

  // Removes the files of processes that are gone. What cannot be told for sure stays: only files of
  // this kernel and PID namespace go, whose process does not run and which nobody has locked.
  void remove_leftovers() noexcept;

  // The file of a pool, made if there is none, open. kUnsupported without a directory; kIo if the
  // directory is missing or not the user's alone, or a call failed.
  Status file_for(TagId tag, int device, std::shared_ptr<DiskFile>* out);

  // Removes this process's files and makes no more; open ones can still be read. For the end of the
  // process: in a forked child it does nothing.
  void remove_files() noexcept;

  // For DiskFile, which is made and destroyed by any thread: a file has come, and is to go (it is
  // removed unless that happened before).
  void add_path(const std::string& path);
  void remove_path(const std::string& path) noexcept;

 private:
  Status check_directory(const std::string& directory) const;
  std::string directory() const;
  void remove_if_left(const std::string& directory, const std::string& name) noexcept;

  const DiskCalls& calls_;
  const std::string option_;  // that names the directory, for messages
  const ProcessIdentity self_;

  mutable Mutex store_mutex_;
  std::string directory_ GUARDED_BY(store_mutex_);
  bool ended_ GUARDED_BY(store_mutex_) = false;
  std::map<std::pair<TagId, int>, std::weak_ptr<DiskFile>> files_ GUARDED_BY(store_mutex_);
  std::set<std::string> paths_ GUARDED_BY(store_mutex_);
};

}  // namespace dormouse
