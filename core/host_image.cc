// Images in anonymous huge pages; see host_image.h.
#include "core/host_image.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <string>

#include "core/context.h"
#include "core/log.h"
#include "core/pool.h"
#include "core/system_memory.h"

namespace dormouse {
namespace {

// What the machine keeps for itself and the program when no limit is configured.
constexpr std::uint64_t kMarginBytes = std::uint64_t{256} << 20;

constexpr std::size_t kPageBytes = 4096;

// CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, which headers have since CUDA 12.3.
constexpr auto kHostNumaId = static_cast<CUdevice_attribute>(134);

// The NUMA node next to the context's device; -1 if the driver does not know.
int numa_node_of(const Driver& driver, CUcontext context) noexcept {
  ScopedContext current(driver, context);
  CUdevice device = 0;
  int node = -1;
  if (!current.ok() || driver.cuCtxGetDevice(&device) != CUDA_SUCCESS ||
      driver.cuDeviceGetAttribute(&node, kHostNumaId, device) != CUDA_SUCCESS) {
    return -1;
  }
  return node;
}

std::string in_gib(std::uint64_t bytes) {
  return fmt::format("{:.2f} GiB", static_cast<double>(bytes) / (1u << 30));
}

}  // namespace

HostMemory::HostMemory(std::uint64_t limit_bytes, bool huge_pages, std::size_t piece_bytes)
    : limit_bytes_(limit_bytes), huge_pages_(huge_pages), piece_bytes_(piece_bytes) {}

Status HostMemory::admit(std::uint64_t bytes) {
  if (bytes == 0) return Status::ok();
  const std::uint64_t available = limit_bytes_ != 0 ? 0 : available_host_memory();
  const std::uint64_t held = held_.fetch_add(bytes) + bytes;
  if (limit_bytes_ != 0) {
    if (held <= limit_bytes_) return Status::ok();
    held_.fetch_sub(bytes);
    return {Code::kOutOfHostMemory,
            fmt::format("the backup needs {} more of host memory, {} are held, and "
                        "DORMOUSE_HOST_LIMIT is {}: raise it, "
                        "or sleep fewer tags",
                        in_gib(bytes), in_gib(held - bytes), in_gib(limit_bytes_))};
  }
  if (bytes + kMarginBytes <= available) return Status::ok();
  held_.fetch_sub(bytes);
  return {Code::kOutOfHostMemory,
          fmt::format(
              "the backup needs {} of host memory, and the machine or a control group has only {} "
              "left: free "
              "some, sleep fewer tags, or set DORMOUSE_HOST_LIMIT if you know that more can be had",
              in_gib(bytes), in_gib(available))};
}

bool HostMemory::fits(std::uint64_t bytes) const {
  if (limit_bytes_ != 0) return held_bytes() + bytes <= limit_bytes_;
  return bytes + kMarginBytes <= available_host_memory();
}

void HostMemory::give_back(std::uint64_t bytes) noexcept {
  held_.fetch_sub(bytes);
}

std::unique_ptr<HostImage> HostImage::reserve(const Driver& driver, HostMemory& budget,
                                              CUcontext context, std::size_t bytes) {
  // Huge pages need an aligned start: reserve one unit more and cut the ends off.
  const std::size_t padded = bytes + kUnitBytes;
  void* raw = mmap(nullptr, padded, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(raw);
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const std::size_t front = (kUnitBytes - address % kUnitBytes) % kUnitBytes;
  if (front != 0) munmap(begin, front);
  if (front != kUnitBytes) munmap(begin + front + bytes, kUnitBytes - front);
  std::byte* data = begin + front;
  // Copies from another node's memory share the processors' link.
  const int node = numa_node_of(driver, context);
  if (node >= 0 && !prefer_numa_node(data, bytes, node) && first_time("numa")) {
    log().info("backups cannot be placed on NUMA node {}, next to the device: {}", node,
               std::strerror(errno));
  }
  if (budget.huge_pages()) madvise(data, bytes, MADV_HUGEPAGE);
  // A child never uses it, and forking with this many page-locked pages would copy them.
  madvise(data, bytes, MADV_DONTFORK);
  try {
    return std::unique_ptr<HostImage>(new HostImage(driver, budget, context, data, bytes));
  } catch (const std::bad_alloc&) {
    munmap(data, bytes);
    return nullptr;
  }
}

HostImage::HostImage(const Driver& driver, HostMemory& budget, CUcontext context, std::byte* data,
                     std::size_t bytes)
    : driver_(driver),
      budget_(budget),
      context_(context),
      data_(data),
      bytes_(bytes),
      has_memory_((bytes + kUnitBytes - 1) / kUnitBytes, false) {}

HostImage::~HostImage() {
  {
    ScopedContext current(driver_, context_);
    for (const Piece& piece : pieces_) {
      if (!piece.registered) continue;
      const CUresult result =
          give_back([&] { return driver_.cuMemHostUnregister(data_ + piece.offset); });
      if (result != CUDA_SUCCESS)
        log().error("cuMemHostUnregister failed with {}", error_name(driver_, result));
    }
  }
  munmap(data_, bytes_);
  budget_.give_back(held_bytes_);
}

std::vector<bool> HostImage::wanted_units(const std::vector<LiveRange>& ranges) const {
  std::vector<bool> wanted(has_memory_.size(), false);
  for (const LiveRange& range : ranges) {
    const std::size_t last = (range.offset + range.bytes - 1) / kUnitBytes;
    for (std::size_t unit = range.offset / kUnitBytes; unit <= last; ++unit)
      wanted[unit] = !has_memory_[unit];
  }
  return wanted;
}

std::uint64_t HostImage::missing_bytes(const std::vector<LiveRange>& ranges) const {
  const std::vector<bool> wanted = wanted_units(ranges);
  return static_cast<std::uint64_t>(std::count(wanted.begin(), wanted.end(), true)) * kUnitBytes;
}

std::uint64_t HostImage::add_pieces(const std::vector<LiveRange>& ranges) {
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
    pieces.push_back({offset, std::min(end * kUnitBytes, bytes_) - offset, false, false});
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

bool HostImage::is_ready(const std::vector<LiveRange>& ranges) const {
  return missing_bytes(ranges) == 0 && std::all_of(pieces_.begin(), pieces_.end(),
                                                   [](const Piece& piece) { return piece.ready; });
}

void HostImage::make_ready(Piece& piece) noexcept {
  if (piece.ready) return;
  std::byte* begin = data_ + piece.offset;
  // Not MADV_POPULATE_WRITE: 16 threads that call it get a third of the rate at which they touch
  // pages, and registering untouched memory a tenth.
  for (std::size_t at = 0; at < piece.bytes; at += kPageBytes) begin[at] = std::byte{0};
  const CUresult result =
      driver_.cuMemHostRegister_v2(begin, piece.bytes, CU_MEMHOSTREGISTER_PORTABLE);
  piece.registered = result == CUDA_SUCCESS;
  piece.ready = true;
  if (!piece.registered && first_time("register")) {
    log().warn(
        "the driver refused to page-lock host memory ({}): copies are slower. A memlock limit "
        "(ulimit -l) is the "
        "usual cause",
        error_name(driver_, result));
  }
}

}  // namespace dormouse
