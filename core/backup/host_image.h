// Host memory for backups: a budget for the process, and per chunk an image, address space of the
// chunk's size in which only the parts that are backed up have memory. Byte i of a chunk is backed
// up at byte i of its image. Used by Operation and Transfer.
#pragma once

#include <cuda.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/backup/image.h"
#include "core/contexts.h"
#include "core/driver.h"
#include "core/status.h"
#include "core/thread_annotations.h"

namespace dormouse {

// The budget: what all images of a process hold, and what they may. Without a limit it is what the
// machine and the control groups have left, less a margin: asked when memory is promised (without a
// limit), and again when it is touched (always), since other programs take memory meanwhile and the
// kernel ends processes where there is none.
class HostMemory {
 public:
  // What the machine keeps for itself and the program when no limit is configured.
  static constexpr std::uint64_t kMarginBytes = std::uint64_t{256} << 20;
  // What must be left when memory is touched: less than when it was promised, since page tables and
  // the driver's books about page-locked memory come out of the margin.
  static constexpr std::uint64_t kTouchMarginBytes = kMarginBytes / 2;

  // `limit_bytes` 0: no limit but the machine's. With a limit the machine is asked only before
  // memory is touched. One registration with the driver is at most `piece_bytes`: several threads
  // share the work, and very large ones are known to fail on recent drivers.
  HostMemory(std::uint64_t limit_bytes, bool huge_pages, std::size_t piece_bytes,
             std::uint64_t touch_margin_bytes = kTouchMarginBytes);

  // What messages call the setting of the limit, such as an environment variable.
  void set_limit_option(std::string name) { limit_option_ = std::move(name); }

  // Takes `bytes` from the budget. kOutOfHostMemory if they do not fit beside what was admitted
  // before and has not been touched yet: nothing was taken. Thread-safe.
  Status admit(std::uint64_t bytes);
  // Takes `bytes` whatever the budget: whether they can be had shows when they are touched.
  // Thread-safe.
  void take(std::uint64_t bytes) noexcept;
  // True if admit(bytes) would succeed now. Thread-safe.
  bool fits(std::uint64_t bytes) const;
  // `untouched` of the `bytes` were never touched. Thread-safe.
  void give_back(std::uint64_t bytes, std::uint64_t untouched) noexcept;

  // Around the touching of `bytes` that were admitted. False if so little is left by now that this
  // might end the process: they must not be touched, and end_touch must not be called. Thread-safe.
  bool begin_touch(std::uint64_t bytes) noexcept;
  void end_touch(std::uint64_t bytes) noexcept;

  std::uint64_t held_bytes() const noexcept { return held_.load(std::memory_order_relaxed); }
  bool huge_pages() const noexcept { return huge_pages_; }
  std::size_t piece_bytes() const noexcept { return piece_bytes_; }

 private:
  using Clock = std::chrono::steady_clock;

  std::uint64_t unpromised_bytes() const;
  bool take_trusted(std::uint64_t bytes) noexcept REQUIRES(trust_mutex_);

  const std::uint64_t limit_bytes_;
  const bool huge_pages_;
  const std::size_t piece_bytes_;
  const std::uint64_t touch_margin_bytes_;
  std::string limit_option_ = "the limit on host memory";
  std::atomic<std::uint64_t> held_{0};
  std::atomic<std::uint64_t> untouched_{0};  // of held_: the machine does not know of it yet
  std::atomic<std::uint64_t> touching_{0};   // of untouched_: between begin_touch and end_touch
  Mutex admit_mutex_;  // one asks for what is left and takes it; then the next
  Mutex trust_mutex_;
  std::uint64_t trusted_ GUARDED_BY(trust_mutex_) =
      0;  // may be touched without asking the machine again
  Clock::time_point trusted_until_ GUARDED_BY(trust_mutex_){};
};

// What has been admitted and is not yet held by an image; given back at the end.
class Admitted {
 public:
  Admitted(HostMemory& memory, std::uint64_t bytes) noexcept : memory_(memory), bytes_(bytes) {}
  ~Admitted() { memory_.give_back(bytes_, bytes_); }
  Admitted(const Admitted&) = delete;
  Admitted& operator=(const Admitted&) = delete;

  // An image holds `bytes` of it from now on.
  void held(std::uint64_t bytes) noexcept { bytes_ -= bytes; }

 private:
  HostMemory& memory_;
  std::uint64_t bytes_;
};

class HostImage : public Image {
 public:
  // Images have memory in units of this many bytes (a huge page).
  static constexpr std::size_t kUnitBytes = std::size_t{2} << 20;
  // A stretch of the image that has memory, registered as one. Its offset is one of a unit.
  struct Piece {
    std::size_t offset = 0;
    std::size_t bytes = 0;
    bool ready = false;           // all of it touched, and registered if the driver would
    ContextId registered_in = 0;  // with this context the registration goes

    // Page-locked: copies run at the bus's speed.
    bool registered() const noexcept { return registered_in != 0; }
  };

  // Address space for a chunk of `bytes`; null if the system refuses it, or to keep it from forked
  // children. Memory comes from the NUMA node next to the device if it can.
  static std::unique_ptr<HostImage> reserve(const Driver& driver, Contexts& contexts,
                                            HostMemory& budget, int device, std::size_t bytes);
  ~HostImage() override;

  std::byte* data() const noexcept { return data_; }
  // May be asked while another thread adds pieces.
  std::uint64_t held_bytes() const noexcept { return held_bytes_.load(std::memory_order_relaxed); }

  // Bytes that add_pieces(ranges) would take from the budget.
  std::uint64_t missing_bytes(const Ranges& ranges) const;
  // Adds pieces, not yet ready, so that all of `ranges` is covered; the caller has admitted
  // missing_bytes(ranges), which are returned and from now on held. If there is no memory for that
  // (std::bad_alloc) nothing has changed.
  std::uint64_t add_pieces(const Ranges& ranges);
  // What is known to be zero is not kept, and older content may lie in its place: makes
  // [offset, offset + bytes) read as it was.
  void write_zeros(std::size_t offset, std::size_t bytes) noexcept;
  // True if all of `ranges` has memory that is touched and registered, or was refused registration.
  bool is_ready(const Ranges& ranges) const;
  // Sorted by offset.
  std::vector<Piece>& pieces() noexcept { return pieces_; }

  // Touches the units of [offset, offset + bytes), which has memory, that were not touched before.
  // kOutOfHostMemory if the machine has too little left by now; it can be tried again. Thread-safe
  // for different units.
  Status touch(std::size_t offset, std::size_t bytes) noexcept;
  // Touches what is left of a piece and registers it. A refused registration is no error: copies
  // are slower. On kOutOfHostMemory the piece is not ready, and it can be tried again. Thread-safe
  // for different pieces. The current context has the id `context`.
  Status make_ready(Piece& piece, ContextId context) noexcept;
  // What was registered in other contexts than `pins` has is not, or not for long: the driver ends
  // a context's registrations with it. Those pieces are not ready.
  void forget_other_contexts(const ContextPins& pins) noexcept;

 private:
  HostImage(const Driver& driver, Contexts& contexts, HostMemory& budget, std::byte* data,
            std::size_t bytes);
  void unregister(const Piece& piece) noexcept;
  std::vector<bool> wanted_units(const Ranges& ranges) const;
  std::uint64_t untouched_bytes() const noexcept;

  const Driver& driver_;
  Contexts& contexts_;
  HostMemory& budget_;
  std::byte* const data_;
  const std::size_t bytes_;
  std::atomic<std::uint64_t> held_bytes_{0};
  std::vector<bool> has_memory_;       // per unit, as the next
  std::vector<std::uint8_t> touched_;  // bytes: threads write neighbours at the same time
  std::vector<Piece> pieces_;
};

}  // namespace dormouse
