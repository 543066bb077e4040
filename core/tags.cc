// The table of tags; see tags.h.
#include "core/tags.h"

#include <algorithm>
#include <cctype>

namespace dormouse {

const char* backup_name(Backup backup) noexcept {
  switch (backup) {
    case Backup::kHost:
      return "host";
    case Backup::kNone:
      return "none";
    case Backup::kDisk:
      return "disk";
  }
  return "unknown";
}

bool TagTable::valid_name(std::string_view name) noexcept {
  if (name.empty() || name.size() > 64) return false;
  return std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c == '-' || c == '.' || c == '/' || c == ':';
  });
}

TagId TagTable::intern(std::string_view name, Backup backup) {
  if (!valid_name(name)) return kNoTag;
  MutexLock lock(tags_mutex_);
  for (std::size_t i = 0; i < tags_.size(); ++i) {
    if (tags_[i].name == name && tags_[i].backup == backup) return static_cast<TagId>(i);
  }
  tags_.push_back({std::string(name), backup, priority_of(name)});
  return static_cast<TagId>(tags_.size() - 1);
}

TagId TagTable::intern(std::string_view name) {
  {
    MutexLock lock(tags_mutex_);
    for (std::size_t i = 0; i < tags_.size(); ++i) {
      if (tags_[i].name == name) return static_cast<TagId>(i);
    }
  }
  return intern(name, Backup::kHost);
}

int TagTable::priority_of(std::string_view name) const {
  for (const auto& [known, priority] : priorities_) {
    if (known == name) return priority;
  }
  return 0;
}

void TagTable::set_priority(std::string_view name, int priority) {
  MutexLock lock(tags_mutex_);
  std::erase_if(priorities_, [&](const auto& entry) { return entry.first == name; });
  priorities_.emplace_back(name, priority);
  for (Tag& tag : tags_) {
    if (tag.name == name) tag.priority = priority;
  }
}

Tag TagTable::get(TagId id) const {
  MutexLock lock(tags_mutex_);
  if (id < 0 || static_cast<std::size_t>(id) >= tags_.size()) return {};
  return tags_[static_cast<std::size_t>(id)];
}

bool TagTable::known(std::string_view name) const {
  MutexLock lock(tags_mutex_);
  return std::any_of(tags_.begin(), tags_.end(), [&](const Tag& tag) { return tag.name == name; });
}

std::vector<std::string> TagTable::names() const {
  MutexLock lock(tags_mutex_);
  std::vector<std::string> names;
  for (const Tag& tag : tags_) {
    if (std::find(names.begin(), names.end(), tag.name) == names.end()) names.push_back(tag.name);
  }
  return names;
}

}  // namespace dormouse
