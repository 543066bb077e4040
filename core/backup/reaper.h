// Gives images of chunks back on a thread of its own. Unregistering host memory waits for what the
// device runs, which may itself wait for the program's next call, and giving back a file's space is
// I/O. So whoever drops an image, under whatever lock, only hands it over here.
#pragma once

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <thread>

#include "core/backup/image.h"
#include "core/thread_annotations.h"

namespace dormouse {

// All functions are thread-safe.
class Reaper {
 public:
  Reaper() = default;
  // Gives back all that is left, on this thread.
  ~Reaper();
  Reaper(const Reaper&) = delete;
  Reaper& operator=(const Reaper&) = delete;

  // Never waits, but after stop(), when the image is given back here. In a forked child the image
  // is left alone: its memory and its file are the parent's.
  void take(Image* image) noexcept;

  // Returns when what was taken so far has been given back; false after `limit`. For threads that
  // need the memory, or whose caller was promised it.
  bool wait(std::chrono::milliseconds limit) noexcept;

  // Ends the thread after the image that it works on; after `at_most` it is left to itself, which
  // only the end of the process allows.
  void stop(std::chrono::milliseconds at_most) noexcept;

 private:
  void run() noexcept;
  bool start() noexcept REQUIRES(reaper_mutex_);

  const pid_t process_ = getpid();
  Mutex reaper_mutex_;
  std::condition_variable changed_;
  Image* first_ GUARDED_BY(reaper_mutex_) = nullptr;  // the latest; linked by Image::next_dropped
  std::size_t taken_ GUARDED_BY(reaper_mutex_) = 0;
  std::size_t given_back_ GUARDED_BY(reaper_mutex_) = 0;
  bool stopped_ GUARDED_BY(reaper_mutex_) = false;
  bool running_ GUARDED_BY(reaper_mutex_) = false;
  std::thread thread_ GUARDED_BY(reaper_mutex_);  // started at first need
};

// What a chunk holds its image by: the image ends at the reaper. Without one it ends in place.
struct HandToReaper {
  Reaper* reaper = nullptr;
  void operator()(Image* image) const noexcept {
    if (reaper != nullptr) {
      reaper->take(image);
    } else {
      delete image;
    }
  }
};

template <typename AnImage>
using ImagePtr = std::unique_ptr<AnImage, HandToReaper>;

template <typename AnImage>
ImagePtr<AnImage> reaped(Reaper& reaper, std::unique_ptr<AnImage> image) noexcept {
  return {image.release(), HandToReaper{&reaper}};
}

}  // namespace dormouse
