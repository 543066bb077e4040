// Sleep and wake again and again with content written at random in between, every byte compared
// with a copy that the host keeps. Runs on whatever libcuda.so.1 the loader finds; prints one JSON
// object.
//
//   engine_cycles [--cycles N] [--mib N] [--seconds N] [--seed N] [--disk DIRECTORY]
//
// Ends with 0 if all cycles ran and nothing differed, 1 if something differed or the time was over
// before, 77 without a driver.
#include <cuda.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/sleep/engine.h"
#include "core/threads.h"
#include "tests/bench/loaded_driver.h"

namespace {

using dormouse::Backup;
using dormouse::die;
using dormouse::Engine;
using dormouse::EngineOptions;
using dormouse::LoadedDriver;
using dormouse::OperationStats;
using dormouse::TagId;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kStaging = 64 * kMiB;

struct Arguments {
  int cycles = 1000;
  std::size_t mib = 512;
  double seconds = 300;
  std::uint64_t seed = 1;
  std::string disk;
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) die(name + " needs a value");
    const char* value = argv[i + 1];
    if (name == "--cycles") {
      arguments.cycles = std::atoi(value);
    } else if (name == "--mib") {
      arguments.mib = static_cast<std::size_t>(std::atoll(value));
    } else if (name == "--seconds") {
      arguments.seconds = std::atof(value);
    } else if (name == "--seed") {
      arguments.seed = static_cast<std::uint64_t>(std::atoll(value));
    } else if (name == "--disk") {
      arguments.disk = value;
    } else {
      die("unknown argument " + name + "; known are --cycles, --mib, --seconds, --seed, --disk");
    }
  }
  return arguments;
}

struct Block {
  CUdeviceptr address = 0;
  std::size_t tag = 0;             // index into Cycles::tags_
  std::vector<std::uint8_t> copy;  // what the block must hold
  std::size_t bytes() const { return copy.size(); }
};

struct NamedTag {
  std::string name;
  Backup backup;
  TagId id = dormouse::kNoTag;
};

class Cycles {
 public:
  Cycles(const LoadedDriver& driver, const Arguments& arguments)
      : driver_(driver), arguments_(arguments), random_(arguments.seed) {
    EngineOptions options;
    options.max_chunk_bytes = std::max<std::size_t>(2 * kMiB, arguments.mib / 16 * kMiB / 2);
    options.max_chunk_bytes = options.max_chunk_bytes / (2 * kMiB) * (2 * kMiB);
    options.retain_bytes = options.max_chunk_bytes;
    options.disk_directory = arguments.disk;
    named_ = {{"weights", Backup::kHost}, {"optimizer", Backup::kHost}, {"cache", Backup::kNone}};
    if (!arguments.disk.empty()) named_.push_back({"archive", Backup::kDisk});
    for (NamedTag& tag : named_) tag.id = tags_.intern(tag.name, tag.backup);
    engine_ = std::make_unique<Engine>(driver.functions, tags_, options);
    staging_ = mmap(nullptr, kStaging, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (staging_ == MAP_FAILED) die("no memory for the staging buffer");
    driver.check(driver.functions.cuMemHostRegister_v2(staging_, kStaging, 0), "cuMemHostRegister");
    noise_.resize(kStaging / 8);
    for (std::uint64_t& word : noise_) word = random_();
  }

  ~Cycles() {
    for (const Block& block : blocks_) engine_->free(block.address);
    engine_.reset();
    driver_.functions.cuMemHostUnregister(staging_);
    munmap(staging_, kStaging);
  }

  int run() {
    while (live_ < arguments_.mib * kMiB) allocate();
    const auto begin = Clock::now();
    int done = 0;
    for (; done < arguments_.cycles; ++done) {
      if (std::chrono::duration<double>(Clock::now() - begin).count() > arguments_.seconds) break;
      cycle_ = done;
      cycle();
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    std::printf(
        "{\"cycles\":%d,\"asked\":%d,\"seconds\":%.1f,\"bytes\":%zu,\"blocks\":%zu,\"slept_bytes\":"
        "%llu,\"copied_bytes\":%llu,\"unchanged_bytes\":%llu,\"compared_bytes\":%llu,\"differing\":"
        "0,\"seed\":%llu}\n",
        done, arguments_.cycles, seconds, live_, blocks_.size(), as_unsigned(slept_),
        as_unsigned(copied_), as_unsigned(unchanged_), as_unsigned(compared_),
        as_unsigned(arguments_.seed));
    return done == arguments_.cycles ? 0 : 1;
  }

 private:
  static unsigned long long as_unsigned(std::uint64_t value) { return value; }
  std::size_t below(std::size_t limit) { return static_cast<std::size_t>(random_() % limit); }
  bool chance(int percent) { return below(100) < static_cast<std::size_t>(percent); }
  Block& any_block() { return blocks_[below(blocks_.size())]; }

  [[noreturn]] void fail(const std::string& what) const {
    die("cycle " + std::to_string(cycle_) + ", seed " + std::to_string(arguments_.seed) + ": " +
        what);
  }

  void require(const dormouse::Status& status, const char* what) const {
    if (!status.is_ok()) fail(std::string(what) + ": " + status.message());
  }

  void synchronize() const {
    driver_.check(driver_.functions.cuStreamSynchronize(nullptr), "cuStreamSynchronize");
  }

  // From 512 bytes to an eighth of all, small ones more often.
  std::size_t any_size() {
    const std::size_t largest = arguments_.mib * kMiB / 8;
    const std::size_t scale = std::size_t{512} << below(18);
    return std::min(largest, (scale + below(scale)) / 16 * 16);
  }

  void allocate() {
    Block block;
    block.tag = below(named_.size());
    const std::size_t bytes = any_size();
    driver_.check(engine_->allocate(named_[block.tag].id, bytes, &block.address), "allocate");
    block.copy.assign(bytes, 0);
    blocks_.push_back(std::move(block));
    live_ += bytes;
    write(blocks_.back(), 0, bytes);
  }

  void release(std::size_t index) {
    const CUresult result = engine_->free(blocks_[index].address);
    if (result != CUDA_SUCCESS) fail("free failed");
    live_ -= blocks_[index].bytes();
    std::swap(blocks_[index], blocks_.back());
    blocks_.pop_back();
  }

  // Random bytes from the host.
  void write(Block& block, std::size_t from, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes;) {
      const std::size_t piece = std::min(bytes - at, kStaging / 2);
      const auto* source =
          reinterpret_cast<const std::uint8_t*>(noise_.data()) + below(kStaging / 2);
      std::memcpy(block.copy.data() + from + at, source, piece);
      driver_.check(
          driver_.functions.cuMemcpyHtoDAsync_v2(block.address + from + at, source, piece, nullptr),
          "copy to the device");
      at += piece;
    }
    synchronize();
  }

  void write_somewhere() {
    Block& block = any_block();
    const std::size_t from = below(block.bytes());
    const std::size_t bytes = 1 + below(std::min(block.bytes() - from, 4 * kMiB));
    switch (below(3)) {
      case 0:
        write(block, from, bytes);
        return;
      case 1: {
        const auto value = static_cast<unsigned char>(random_());
        std::memset(block.copy.data() + from, value, bytes);
        driver_.check(
            driver_.functions.cuMemsetD8Async(block.address + from, value, bytes, nullptr),
            "memset");
        break;
      }
      default: {
        const Block& source = any_block();
        if (&source == &block) return;
        const std::size_t length = std::min(bytes, source.bytes());
        std::memcpy(block.copy.data() + from, source.copy.data(), length);
        driver_.check(driver_.copy_on_device(block.address + from, source.address, length, nullptr),
                      "copy on the device");
      }
    }
    synchronize();
  }

  std::vector<std::string> any_tags() {
    std::vector<std::string> names;
    if (chance(30)) return names;  // all
    for (const NamedTag& tag : named_) {
      if (chance(60)) names.push_back(tag.name);
    }
    if (names.empty()) names.push_back(named_[below(named_.size())].name);
    std::shuffle(names.begin(), names.end(), random_);
    return names;
  }

  void cycle() {
    for (std::size_t i = below(6); i > 0; --i) release(below(blocks_.size()));
    while (live_ < arguments_.mib * kMiB) allocate();
    for (std::size_t i = below(24); i > 0; --i) write_somewhere();
    sleep();
    if (chance(30)) sleep();
    if (chance(30)) change_while_asleep();
    wake();
    compare();
    if (chance(2)) require(engine_->trim(true), "trim");
  }

  void sleep() {
    dormouse::SleepRequest request;
    request.tags = any_tags();
    if (chance(20)) request.at_least_bytes = 1 + below(live_);
    // Behind the gate that the one closes a kernel copies too.
    request.origin = chance(50) ? dormouse::Origin::kOutside : dormouse::Origin::kProgram;
    OperationStats report;
    require(engine_->sleep(request, &report), "sleep");
    slept_ += report.bytes;
    copied_ += report.copied_bytes;
    unchanged_ += report.unchanged_bytes;
    for (Block& block : blocks_) {
      dormouse::BlockInfo info;
      if (!engine_->find(block.address, &info)) fail("a live block is not found");
      if (info.asleep && named_[block.tag].backup == Backup::kNone) {
        std::fill(block.copy.begin(), block.copy.end(), std::uint8_t{0});
      }
    }
  }

  void change_while_asleep() {
    for (std::size_t i = below(4); i > 0; --i) release(below(blocks_.size()));
    for (std::size_t i = below(4); i > 0; --i) allocate();
  }

  void wake() {
    if (chance(50)) require(engine_->wake({any_tags()}, nullptr), "wake of some");
    require(engine_->wake({}, nullptr), "wake");
    if (engine_->is_sleeping({})) fail("something is asleep after waking all");
  }

  // Every byte of every block against the host's copy.
  void compare() {
    for (const Block& block : blocks_) {
      for (std::size_t at = 0; at < block.bytes(); at += kStaging) {
        const std::size_t piece = std::min(kStaging, block.bytes() - at);
        driver_.check(
            driver_.functions.cuMemcpyDtoHAsync_v2(staging_, block.address + at, piece, nullptr),
            "copy to the host");
        synchronize();
        const std::size_t place = first_difference(block.copy.data() + at, piece);
        if (place != piece) {
          fail("byte " + std::to_string(at + place) + " of a block of " +
               std::to_string(block.bytes()) + " bytes of the tag " + named_[block.tag].name +
               " differs");
        }
        compared_ += piece;
      }
    }
  }

  // Between the staging buffer and `expected`; `bytes` if there is none.
  std::size_t first_difference(const std::uint8_t* expected, std::size_t bytes) const {
    constexpr std::size_t kPart = 4 * kMiB;
    const auto* found = static_cast<const std::uint8_t*>(staging_);
    std::atomic<std::size_t> next{0};
    std::atomic<bool> same{true};
    const auto work = [&] {
      for (std::size_t at = next.fetch_add(kPart); at < bytes; at = next.fetch_add(kPart)) {
        if (std::memcmp(found + at, expected + at, std::min(kPart, bytes - at)) != 0) same = false;
      }
    };
    if (bytes > kPart) {
      dormouse::run_on_threads(dormouse::default_threads(), work);
    } else {
      work();
    }
    if (same) return bytes;
    return static_cast<std::size_t>(std::mismatch(found, found + bytes, expected).first - found);
  }

  const LoadedDriver& driver_;
  const Arguments& arguments_;
  std::mt19937_64 random_;
  dormouse::TagTable tags_;
  std::vector<NamedTag> named_;
  std::unique_ptr<Engine> engine_;
  std::vector<Block> blocks_;
  std::size_t live_ = 0;
  void* staging_ = nullptr;
  std::vector<std::uint64_t> noise_;
  int cycle_ = 0;
  std::uint64_t slept_ = 0;
  std::uint64_t copied_ = 0;
  std::uint64_t unchanged_ = 0;
  std::uint64_t compared_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments = parse(argc, argv);
  Cycles cycles(dormouse::loaded_driver(), arguments);
  return cycles.run();
}
