// Images in anonymous huge pages; see host_image.h.
#include "core/backup/host_image.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <new>
#include <optional>
#include <string>

#include "core/backup/system_memory.h"
#include "core/context.h"
#include "core/log.h"
#include "core/round_up.h"

namespace dormouse {
namespace {

// So many processes can touch memory at the same time, each trusting what it read, and not take
// more than there is: each takes its part of what is left and asks again. Under 200 reads from
// 100 GiB to the margin.
constexpr std::uint64_t kProcesses = 16;

// How long a process trusts what it read. Programs can take 2 GiB in this time, of which its part
// fits into the margin.
constexpr std::chrono::milliseconds kTrustTime{10};

constexpr std::size_t kPageBytes = 4096;

// CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, which headers have since CUDA 12.3.
constexpr auto kHostNumaId = static_cast<CUdevice_attribute>(134);

// The NUMA node next to the device; -1 if the driver does not know.
int numa_node_of(const Driver& driver, int device) noexcept {
  int node = -1;
  return driver.cuDeviceGetAttribute(&node, kHostNumaId, device) == CUDA_SUCCESS ? node : -1;
}

// Where the number of mappings is at its limit, one that lies between others cannot be taken out:
// then at least its memory goes back.
void unmap(std::byte* begin, std::size_t bytes) noexcept {
  if (munmap(begin, bytes) == 0) return;
  const int error = errno;
  const bool given_back = madvise(begin, bytes, MADV_DONTNEED) == 0;
  if (!first_time("munmap")) return;
  log().error("munmap of {} bytes failed with {}: {}", bytes, std::strerror(error),
              given_back ? "the address space stays taken" : "the memory stays taken");
}

// Huge pages need an aligned start: one unit more is reserved, and the ends are cut off. Null if
// the system refuses.
std::byte* map_aligned(std::size_t bytes) noexcept {
  constexpr std::size_t kUnit = HostImage::kUnitBytes;
  void* raw = mmap(nullptr, bytes + kUnit, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(raw);
  const std::size_t front = (kUnit - reinterpret_cast<std::uintptr_t>(begin) % kUnit) % kUnit;
  if (front != 0) unmap(begin, front);
  if (front != kUnit) unmap(begin + front + bytes, kUnit - front);
  return begin + front;
}

void log_unplaced(int node, int error) noexcept {
  if (!first_time("numa")) return;
  log().info("backups cannot be placed on NUMA node {}, next to the device: {}", node,
             std::strerror(error));
}

std::string human_size(std::uint64_t bytes) {
  const double mib = static_cast<double>(bytes) / (1u << 20);
  return mib < 1024 ? fmt::format("{:.0f} MiB", std::ceil(mib))
                    : fmt::format("{:.2f} GiB", mib / 1024);
}

Status none_left() noexcept {
  try {
    return {Code::kOutOfHostMemory,
            "the machine or a control group has no host memory left for the backup: other "
            "programs took theirs while it was made. Free some, or sleep fewer tags"};
  } catch (const std::bad_alloc&) {
    return {Code::kOutOfHostMemory, {}};
  }
}

}  // namespace

void HostMemory::take(std::uint64_t bytes) noexcept {
  held_.fetch_add(bytes);
  untouched_.fetch_add(bytes);
}

HostMemory::HostMemory(std::uint64_t limit_bytes, bool huge_pages, std::size_t piece_bytes,
                       std::uint64_t touch_margin_bytes)
    : limit_bytes_(limit_bytes),
      huge_pages_(huge_pages),
      piece_bytes_(piece_bytes),
      touch_margin_bytes_(touch_margin_bytes) {}

// What is being touched may count twice, as used and as untouched, but never not at all: the order
// of the two reads matters.
std::uint64_t HostMemory::unpromised_bytes() const {
  const std::uint64_t taken = untouched_.load() + kMarginBytes;
  const std::uint64_t available = available_host_memory();
  return available > taken ? available - taken : 0;
}

Status HostMemory::admit(std::uint64_t bytes) {
  if (bytes == 0) return Status::ok();
  MutexLock lock(admit_mutex_);
  const std::uint64_t held = held_bytes();
  const std::uint64_t left =
      limit_bytes_ != 0 ? limit_bytes_ - std::min(limit_bytes_, held) : unpromised_bytes();
  if (bytes <= left) {
    take(bytes);
    return Status::ok();
  }
  if (limit_bytes_ != 0) {
    return {
        Code::kOutOfHostMemory,
        fmt::format("the backup needs {} more of host memory, {} are held, and {} is {}: raise "
                    "it, or sleep fewer tags",
                    human_size(bytes), human_size(held), limit_option_, human_size(limit_bytes_))};
  }
  return {
      Code::kOutOfHostMemory,
      fmt::format("the backup needs {} of host memory, and of what the machine or a control "
                  "group has left it can have only {}: free some, sleep fewer tags, or set {} if "
                  "you know that more can be had",
                  human_size(bytes), human_size(left), limit_option_)};
}

bool HostMemory::fits(std::uint64_t bytes) const {
  if (limit_bytes_ != 0) return held_bytes() + bytes <= limit_bytes_;
  return bytes <= unpromised_bytes();
}

void HostMemory::give_back(std::uint64_t bytes, std::uint64_t untouched) noexcept {
  untouched_.fetch_sub(untouched);
  held_.fetch_sub(bytes);
}

bool HostMemory::begin_touch(std::uint64_t bytes) noexcept {
  MutexLock lock(trust_mutex_);
  if (!take_trusted(bytes)) return false;
  touching_.fetch_add(bytes);
  return true;
}

// If there is not even memory to ask with, none is left.
bool HostMemory::take_trusted(std::uint64_t bytes) noexcept {
  const Clock::time_point now = Clock::now();
  if (trusted_ < bytes || now >= trusted_until_) {
    trusted_ = 0;
    const std::uint64_t taken = touching_.load() + touch_margin_bytes_;
    std::uint64_t available = 0;
    try {
      available = available_host_memory();
    } catch (const std::exception&) {
      return false;
    }
    if (available < taken + bytes) return false;
    trusted_ = std::max(bytes, (available - taken) / kProcesses);
    trusted_until_ = now + kTrustTime;
  }
  trusted_ -= bytes;
  return true;
}

void HostMemory::end_touch(std::uint64_t bytes) noexcept {
  untouched_.fetch_sub(bytes);
  touching_.fetch_sub(bytes);
}

std::unique_ptr<HostImage> HostImage::reserve(const Driver& driver, Contexts& contexts,
                                              HostMemory& budget, int device, std::size_t bytes) {
  std::byte* data = map_aligned(bytes);
  if (data == nullptr) return nullptr;
  // A child never uses it, and forking with this many page-locked pages would copy them. Older
  // kernels would also give the parent a copy where it writes first, and the device keeps the
  // original.
  if (madvise(data, bytes, MADV_DONTFORK) != 0) {
    unmap(data, bytes);
    return nullptr;
  }
  // Copies from another node's memory share the processors' link.
  const int node = numa_node_of(driver, device);
  if (node >= 0 && !prefer_numa_node(data, bytes, node)) log_unplaced(node, errno);
  if (budget.huge_pages()) madvise(data, bytes, MADV_HUGEPAGE);
  try {
    return std::unique_ptr<HostImage>(new HostImage(driver, contexts, budget, data, bytes));
  } catch (const std::bad_alloc&) {
    unmap(data, bytes);
    return nullptr;
  }
}

HostImage::HostImage(const Driver& driver, Contexts& contexts, HostMemory& budget, std::byte* data,
                     std::size_t bytes)
    : driver_(driver),
      contexts_(contexts),
      budget_(budget),
      data_(data),
      bytes_(bytes),
      has_memory_((bytes + kUnitBytes - 1) / kUnitBytes, false),
      touched_(has_memory_.size(), 0) {}

HostImage::~HostImage() {
  for (const Piece& piece : pieces_) unregister(piece);
  unmap(data_, bytes_);
  budget_.give_back(held_bytes_, untouched_bytes());
}

// Not needed where the context has gone: the driver has done it then.
void HostImage::unregister(const Piece& piece) noexcept {
  if (!piece.registered()) return;
  contexts_.wait_while_retiring(piece.registered_in);
  const ContextPin pin(contexts_, piece.registered_in);
  if (!pin) return;
  std::optional<ScopedContext> current(std::in_place, driver_, pin.context());
  if (!current->ok()) current.emplace(driver_, pin.context());
  const CUresult result =
      give_back([&] { return driver_.cuMemHostUnregister(data_ + piece.offset); });
  if (result != CUDA_SUCCESS)
    log().error("cuMemHostUnregister failed with {}", error_name(driver_, result));
}

void HostImage::forget_other_contexts(const ContextPins& pins) noexcept {
  for (Piece& piece : pieces_) {
    if (!piece.registered() || pins.has(piece.registered_in)) continue;
    piece.registered_in = 0;
    piece.ready = false;
  }
}

std::uint64_t HostImage::untouched_bytes() const noexcept {
  std::uint64_t units = 0;
  for (std::size_t unit = 0; unit < touched_.size(); ++unit)
    units += has_memory_[unit] && touched_[unit] == 0 ? 1 : 0;
  return units * kUnitBytes;
}

std::vector<bool> HostImage::wanted_units(const Ranges& ranges) const {
  std::vector<bool> wanted(has_memory_.size(), false);
  for (const Range& range : ranges) {
    const std::size_t last = (range.end() - 1) / kUnitBytes;
    for (std::size_t unit = range.begin / kUnitBytes; unit <= last; ++unit)
      wanted[unit] = !has_memory_[unit];
  }
  return wanted;
}

std::uint64_t HostImage::missing_bytes(const Ranges& ranges) const {
  const std::vector<bool> wanted = wanted_units(ranges);
  return static_cast<std::uint64_t>(std::count(wanted.begin(), wanted.end(), true)) * kUnitBytes;
}

std::uint64_t HostImage::add_pieces(const Ranges& ranges) {
  const std::vector<bool> wanted = wanted_units(ranges);
  std::vector<Piece> pieces = pieces_;
  std::uint64_t added = 0;
  for (std::size_t unit = 0; unit < wanted.size();) {
    if (!wanted[unit]) {
      ++unit;
      continue;
    }
    std::size_t end = unit;
    while (end < wanted.size() && wanted[end] &&
           (end - unit) * kUnitBytes < budget_.piece_bytes()) {
      ++end;
    }
    const std::size_t offset = unit * kUnitBytes;
    pieces.push_back({offset, std::min(end * kUnitBytes, bytes_) - offset});
    added += (end - unit) * kUnitBytes;
    unit = end;
  }
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
  pieces_ = std::move(pieces);
  for (std::size_t unit = 0; unit < wanted.size(); ++unit)
    has_memory_[unit] = has_memory_[unit] || wanted[unit];
  held_bytes_ += added;
  return added;
}

// Parts without memory were never written to.
void HostImage::write_zeros(std::size_t offset, std::size_t bytes) noexcept {
  const std::size_t stop = offset + bytes;
  for (const ContentUnit& unit : content()) {
    if (unit.stored()) continue;
    const std::size_t end = std::min(stop, unit.offset + unit.bytes);
    for (std::size_t at = std::max(offset, unit.offset); at < end;) {
      const std::size_t next = std::min(end, (at / kUnitBytes + 1) * kUnitBytes);
      if (has_memory_[at / kUnitBytes]) std::memset(data_ + at, 0, next - at);
      at = next;
    }
  }
}

bool HostImage::is_ready(const Ranges& ranges) const {
  return missing_bytes(ranges) == 0 && std::all_of(pieces_.begin(), pieces_.end(),
                                                   [](const Piece& piece) { return piece.ready; });
}

// Not MADV_POPULATE_WRITE: 16 threads that call it get a third of the rate at which they touch
// pages, and registering untouched memory a tenth.
Status HostImage::touch(std::size_t offset, std::size_t bytes) noexcept {
  const std::size_t stop = (offset + bytes + kUnitBytes - 1) / kUnitBytes;
  for (std::size_t unit = offset / kUnitBytes; unit < stop; ++unit) {
    if (touched_[unit] != 0) continue;
    if (!budget_.begin_touch(kUnitBytes)) return none_left();
    const std::size_t end = std::min((unit + 1) * kUnitBytes, bytes_);
    for (std::size_t at = unit * kUnitBytes; at < end; at += kPageBytes) data_[at] = std::byte{0};
    touched_[unit] = 1;
    budget_.end_touch(kUnitBytes);
  }
  return Status::ok();
}

Status HostImage::make_ready(Piece& piece, ContextId context) noexcept {
  if (piece.ready) return Status::ok();
  Status touched = touch(piece.offset, piece.bytes);
  if (!touched.is_ok()) return touched;
  const CUresult result =
      driver_.cuMemHostRegister_v2(data_ + piece.offset, piece.bytes, CU_MEMHOSTREGISTER_PORTABLE);
  piece.registered_in = result == CUDA_SUCCESS ? context : 0;
  piece.ready = true;
  if (!piece.registered() && first_time("register")) {
    log().warn(
        "the driver refused to page-lock host memory ({}): copies are slower. A memlock limit "
        "(ulimit -l) is the "
        "usual cause",
        error_name(driver_, result));
  }
  return Status::ok();
}

}  // namespace dormouse
