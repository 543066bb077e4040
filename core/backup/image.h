// What an image of a chunk's content is, wherever it is kept: in host memory (host_image.h) or in a
// file (disk_file.h). Byte i of a chunk is kept at byte i of its image.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/backup/content_hash.h"

namespace dormouse {

// A stretch of a chunk whose content the image knows: it holds a copy, or the content is all zero
// and needs none.
struct ContentUnit {
  std::size_t offset = 0;
  std::size_t bytes = 0;
  ContentHash hash;  // where `hashed`
  bool hashed = false;

  bool stored() const noexcept { return !(hashed && hash.zero); }
};

class Image {
 public:
  Image() = default;
  virtual ~Image() = default;
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;

  // What the image holds, sorted by offset; kept true by the operation that copies.
  std::vector<ContentUnit>& content() noexcept { return content_; }
  const std::vector<ContentUnit>& content() const noexcept { return content_; }

  Image* next_dropped = nullptr;  // the reaper's: the next of those that it gives back

 private:
  std::vector<ContentUnit> content_;
};

}  // namespace dormouse
