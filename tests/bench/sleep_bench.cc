// Sleep and wake against the machine's own limits: measures the bus, then the engine on the same
// bytes in the same run, and prints one JSON object a line. Runs on whatever libcuda.so.1 the
// loader finds.
//
//   sleep_bench [--gib N] [--block-kib N | --blocks N] [--rounds N] [--changes 0|1] [--hash 0|1]
//               [--prepare 0|1] [--disk DIRECTORY]
//
// The size of a block is given, or follows from their number (rounded down to 4 KiB). With --disk
// the backup is kept there, and the disk is the limit.
#include <cuda.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/log.h"
#include "core/sleep/engine.h"
#include "core/sleep/gate.h"
#include "core/threads.h"
#include "tests/bench/disk_limit.h"
#include "tests/bench/loaded_driver.h"

namespace {

using dormouse::die;
using dormouse::Engine;
using dormouse::EngineOptions;
using dormouse::LoadedDriver;
using dormouse::OperationStats;
using dormouse::Origin;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kKiB = std::size_t{1} << 10;
constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr double kGiB = 1024.0 * 1024 * 1024;

double since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Arguments {
  double gib = 1;
  std::size_t block_kib = 32 * kKiB;
  std::size_t blocks = 0;  // 0: as many as fit into gib
  int rounds = 3;
  bool hash = true;
  bool prepare = false;
  bool changes = true;
  std::string disk;
  unsigned threads = 0;
  std::size_t piece_mib = 64;
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) die(name + " needs a value");
    const char* value = argv[i + 1];
    if (name == "--gib") {
      arguments.gib = std::atof(value);
    } else if (name == "--block-kib") {
      arguments.block_kib = static_cast<std::size_t>(std::atoll(value));
    } else if (name == "--blocks") {
      arguments.blocks = static_cast<std::size_t>(std::atoll(value));
    } else if (name == "--rounds") {
      arguments.rounds = std::atoi(value);
    } else if (name == "--hash") {
      arguments.hash = std::atoi(value) != 0;
    } else if (name == "--log") {
      dormouse::configure_log(value, "");
    } else if (name == "--threads") {
      arguments.threads = static_cast<unsigned>(std::atoi(value));
    } else if (name == "--piece-mib") {
      arguments.piece_mib = static_cast<std::size_t>(std::atoll(value));
    } else if (name == "--changes") {
      arguments.changes = std::atoi(value) != 0;
    } else if (name == "--disk") {
      arguments.disk = value;
    } else if (name == "--prepare") {
      arguments.prepare = std::atoi(value) != 0;
    } else {
      die("unknown argument " + name +
          "; known are --gib, --block-kib, --blocks, --rounds, --changes, --hash, --prepare, "
          "--disk, --threads, --piece-mib, --log");
    }
  }
  if (arguments.blocks != 0) {
    const double block = arguments.gib * kGiB / static_cast<double>(arguments.blocks);
    arguments.block_kib = static_cast<std::size_t>(block) / (4 * kKiB) * 4;
  } else {
    arguments.blocks = static_cast<std::size_t>(arguments.gib * 1024 * 1024) / arguments.block_kib;
  }
  if (arguments.block_kib == 0 || arguments.blocks == 0) die("there is not one whole block");
  return arguments;
}

// Bytes this process holds of the machine's memory.
std::uint64_t resident_bytes() {
  std::ifstream status("/proc/self/statm");
  std::uint64_t pages = 0;
  std::uint64_t resident = 0;
  status >> pages >> resident;
  return resident * 4096;
}

// Host memory that the driver copies from and to at full speed.
class PinnedMemory {
 public:
  PinnedMemory(const LoadedDriver& driver, std::size_t bytes) : driver_(driver), bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) die("mmap");
    madvise(data_, bytes, MADV_HUGEPAGE);
    std::memset(data_, 1, bytes);
    driver.check(driver.functions.cuMemHostRegister_v2(data_, bytes, CU_MEMHOSTREGISTER_PORTABLE),
                 "cuMemHostRegister");
  }
  ~PinnedMemory() {
    driver_.functions.cuMemHostUnregister(data_);
    munmap(data_, bytes_);
  }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  void* data() const { return data_; }

 private:
  const LoadedDriver& driver_;
  const std::size_t bytes_;
  void* data_ = nullptr;
};

struct Bus {
  double to_host = 0;  // GB/s
  double to_device = 0;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// One pinned buffer of up to 4 GiB copied again and again.
Bus measure_bus(const LoadedDriver& driver, std::size_t bytes) {
  bytes = std::min<std::size_t>(bytes, std::size_t{4} << 30);
  const PinnedMemory host(driver, bytes);
  CUdeviceptr device = 0;
  driver.check(driver.allocate(&device, bytes), "cuMemAlloc");
  std::vector<double> out;
  std::vector<double> in;
  for (int i = 0; i < 5; ++i) {
    auto begin = Clock::now();
    driver.check(driver.functions.cuMemcpyDtoHAsync_v2(host.data(), device, bytes, nullptr),
                 "copy");
    driver.check(driver.functions.cuStreamSynchronize(nullptr), "copy");
    out.push_back(static_cast<double>(bytes) / 1e9 / since(begin));
    begin = Clock::now();
    driver.check(driver.functions.cuMemcpyHtoDAsync_v2(device, host.data(), bytes, nullptr),
                 "copy");
    driver.check(driver.functions.cuStreamSynchronize(nullptr), "copy");
    in.push_back(static_cast<double>(bytes) / 1e9 / since(begin));
  }
  driver.check(driver.free(device), "cuMemFree");
  return {median(out), median(in)};
}

// Memory of this size touched by all threads, GB/s: what a first sleep cannot exceed. A virtual
// machine may have to get its memory first, which the first of two times shows.
double measure_touch(std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) die("mmap");
  madvise(memory, bytes, MADV_HUGEPAGE);
  const auto begin = Clock::now();
  std::atomic<std::size_t> next{0};
  dormouse::run_on_threads(dormouse::default_threads(), [&] {
    constexpr std::size_t kPiece = 64 * kMiB;
    for (std::size_t at; (at = next.fetch_add(kPiece)) < bytes;) {
      const std::size_t end = std::min(at + kPiece, bytes);
      for (; at < end; at += 4096) static_cast<volatile char*>(memory)[at] = 1;
    }
  });
  const double seconds = since(begin);
  munmap(memory, bytes);
  return static_cast<double>(bytes) / 1e9 / seconds;
}

// Blocks of one tag, filled with random content.
class Workload {
 public:
  Workload(const LoadedDriver& driver, Engine& engine, dormouse::TagId tag,
           const Arguments& arguments)
      : driver_(driver),
        engine_(engine),
        block_(arguments.block_kib * kKiB),
        noise_(driver, kNoise) {
    std::mt19937_64 random(1);
    auto* words = static_cast<std::uint64_t*>(noise_.data());
    std::generate(words, words + kNoise / 8, random);
    const auto begin = Clock::now();
    for (std::size_t i = 0; i < arguments.blocks; ++i) {
      CUdeviceptr address = 0;
      driver.check(engine.allocate(tag, block_, &address), "allocate");
      blocks_.push_back(address);
    }
    allocate_seconds_ = since(begin);
  }

  ~Workload() {
    for (const CUdeviceptr address : blocks_) engine_.free(address);
  }
  Workload(const Workload&) = delete;
  Workload& operator=(const Workload&) = delete;

  std::size_t bytes() const { return blocks_.size() * block_; }
  double allocate_seconds() const { return allocate_seconds_; }

  // New content everywhere: every piece is another stretch of the noise than at other seeds.
  void fill(std::size_t seed) {
    std::size_t place = seed * 8;
    for (const CUdeviceptr address : blocks_) {
      for (std::size_t at = 0; at < block_; at += kPiece) {
        const std::size_t piece = std::min(kPiece, block_ - at);
        copy(address + at, place, piece);
        place = (place + 4104) % (kNoise - kPiece);
      }
    }
    synchronize();
  }

  // 1% of the bytes, in stretches of 64 KiB (or whole blocks, if these are smaller) at random
  // places.
  void change_one_percent() {
    std::mt19937_64 random(7);
    const std::size_t stretch = std::min(64 * kKiB, block_);
    for (std::size_t i = 0; i < bytes() / 100 / stretch; ++i) {
      const CUdeviceptr block = blocks_[random() % blocks_.size()];
      copy(block + random() % (block_ / stretch) * stretch, random() % ((kNoise - kPiece) / 8) * 8,
           stretch);
    }
    synchronize();
  }

 private:
  static constexpr std::size_t kNoise = 64 * kMiB;
  static constexpr std::size_t kPiece = 2 * kMiB;

  void copy(CUdeviceptr to, std::size_t from, std::size_t bytes) {
    const char* source = static_cast<const char*>(noise_.data()) + from;
    driver_.check(driver_.functions.cuMemcpyHtoDAsync_v2(to, source, bytes, nullptr), "fill");
  }
  void synchronize() { driver_.check(driver_.functions.cuStreamSynchronize(nullptr), "fill"); }

  const LoadedDriver& driver_;
  Engine& engine_;
  const std::size_t block_;
  const PinnedMemory noise_;
  std::vector<CUdeviceptr> blocks_;
  double allocate_seconds_ = 0;
};

class Bench {
 public:
  Bench(const LoadedDriver& driver, const Arguments& arguments)
      : arguments_(arguments),
        bus_(measure_bus(driver, arguments.blocks * arguments.block_kib * kKiB)),
        engine_(driver.functions, tags_, options()),
        tag_(tags_.intern(
            "weights", arguments.disk.empty() ? dormouse::Backup::kHost : dormouse::Backup::kDisk)),
        work_(driver, engine_, tag_, arguments) {
    std::printf(
        "{\"what\":\"bus\",\"to_host_gb_per_s\":%.2f,\"to_device_gb_per_s\":%.2f,\"threads\":%u}\n",
        bus_.to_host, bus_.to_device, dormouse::default_threads());
    if (!arguments.disk.empty()) {
      const dormouse::DiskLimit disk = dormouse::measure_disk(arguments.disk, work_.bytes());
      limit_ = {disk.write, disk.read};
      std::printf(
          "{\"what\":\"disk\",\"write_gb_per_s\":%.2f,\"read_gb_per_s\":%.2f,\"direct\":%s}\n",
          disk.write, disk.read, disk.direct ? "true" : "false");
    }
    std::printf("{\"what\":\"allocate\",\"blocks\":%zu,\"seconds\":%.6f}\n", arguments.blocks,
                work_.allocate_seconds());
  }

  void run() {
    // The first use of the gate makes the process known to the kernel: some milliseconds, which
    // under the library fall on the program's first call into the driver.
    if (!dormouse::gate::close(std::chrono::seconds(1))) die("the gate does not close");
    dormouse::gate::open();
    const double first = measure_touch(work_.bytes());
    std::printf("{\"what\":\"touch\",\"first_gb_per_s\":%.2f,\"again_gb_per_s\":%.2f}\n", first,
                measure_touch(work_.bytes()));
    work_.fill(1);
    const std::uint64_t resident_before = resident_bytes();
    if (arguments_.prepare) prepare();
    sleep(arguments_.prepare ? "first sleep, prepared" : "first sleep");
    report_host_memory(resident_before);
    wake();
    for (int round = 0; round < arguments_.rounds; ++round) {
      sleep("sleep again, unchanged");
      wake();
    }
    if (arguments_.rounds == 0 || !arguments_.changes) return;
    // The driver scrubs what a sleep released, and a wake that follows at once shares the memory
    // with that.
    sleep("sleep again, unchanged");
    std::this_thread::sleep_for(std::chrono::seconds(1));
    wake("wake, a second later");
    sleep("sleep again, unchanged", Origin::kProgram);
    wake("wake, asked for by the program");
    work_.change_one_percent();
    sleep("sleep again, 1% changed");
    wake();
    work_.fill(2);
    sleep("sleep again, all changed");
    wake();
  }

 private:
  EngineOptions options() const {
    EngineOptions options;
    options.hash = arguments_.hash;
    options.prepare = arguments_.prepare;
    options.disk_directory = arguments_.disk;
    options.copy_threads = arguments_.threads;
    options.piece_bytes = arguments_.piece_mib * 1024 * kKiB;
    return options;
  }

  // Until host memory for all of it is there, or no more comes for some seconds.
  void prepare() {
    engine_.region_ended(tag_);
    const auto begin = Clock::now();
    auto grown = begin;
    std::uint64_t before = backed_up();
    while (before < work_.bytes() && since(grown) < 3) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      const std::uint64_t now = backed_up();
      if (now != before) grown = Clock::now();
      before = now;
    }
    std::printf("{\"what\":\"prepare\",\"seconds\":%.2f,\"prepared_bytes\":%llu}\n", since(begin),
                static_cast<unsigned long long>(before));
  }

  std::uint64_t backed_up() const {
    std::uint64_t bytes = 0;
    for (const dormouse::TagStats& stats : engine_.stats()) bytes += stats.backed_up;
    return bytes;
  }

  // As from outside, unless it says otherwise: then the gate is closed until the wake.
  void sleep(const char* what, Origin origin = Origin::kOutside) {
    OperationStats stats;
    const auto begin = Clock::now();
    const dormouse::Status status = engine_.sleep({.tags = {}, .origin = origin}, &stats);
    const double seconds = since(begin);
    if (!status.is_ok()) die(std::string(what) + ": " + status.message());
    report(what, stats, seconds, limit_.to_host);
  }

  void wake(const char* what = "wake") {
    OperationStats stats;
    const auto begin = Clock::now();
    const dormouse::Status status = engine_.wake({}, &stats);
    const double seconds = since(begin);
    if (!status.is_ok()) die("wake: " + status.message());
    report(what, stats, seconds, limit_.to_device);
  }

  void report(const char* what, const OperationStats& stats, double seconds, double limit) const {
    const double rate = static_cast<double>(work_.bytes()) / 1e9 / seconds;
    std::printf(
        "{\"what\":\"%s\",\"gib\":%.2f,\"blocks\":%zu,\"block_kib\":%zu,\"seconds\":%.6f,\"gb_per_"
        "s\":"
        "%.2f,\"of_limit\":%.3f,\"copied_bytes\":%llu,\"unchanged_bytes\":%llu,\"chunks\":%u}\n",
        what, static_cast<double>(work_.bytes()) / kGiB, arguments_.blocks, arguments_.block_kib,
        seconds, rate, limit > 0 ? rate / limit : 0,
        static_cast<unsigned long long>(stats.copied_bytes),
        static_cast<unsigned long long>(stats.unchanged_bytes), stats.chunks);
    std::fflush(stdout);
  }

  // What the process took beside the backup itself.
  void report_host_memory(std::uint64_t before) const {
    const auto held = static_cast<double>(backed_up());
    const double taken = static_cast<double>(resident_bytes()) - static_cast<double>(before);
    std::printf("{\"what\":\"host memory\",\"backed_up_mib\":%.1f,\"beyond_backup_mib\":%.1f}\n",
                held / kMiB, (taken - held) / kMiB);
  }

  const Arguments& arguments_;
  const Bus bus_;
  Bus limit_ = bus_;  // of where the backup is
  dormouse::TagTable tags_;
  Engine engine_;
  const dormouse::TagId tag_;
  Workload work_;
};

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments = parse(argc, argv);
  Bench bench(dormouse::loaded_driver(), arguments);
  bench.run();
  return 0;
}
