#include "tests/simgpu/settings.h"

#include <charconv>
#include <cstdlib>

namespace simgpu {
namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin <= text.size()) {
    size_t end = text.find(separator, begin);
    if (end == std::string::npos) end = text.size();
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

bool parse_int(const std::string& text, int* value) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

class Reader {
 public:
  explicit Reader(Settings* settings) : settings_(settings) {}

  static std::string text(const char* name) {
    const char* value = std::getenv(name);
    return value == nullptr ? "" : value;
  }

  void size(const char* name, size_t* bytes) {
    std::string value = text(name);
    if (!value.empty() && !parse_size(value, bytes)) fail(name, value);
  }

  void number(const char* name, int* value) {
    std::string given = text(name);
    if (!given.empty() && (!parse_int(given, value) || *value < 0)) fail(name, given);
  }

  void fail(const char* name, const std::string& value) {
    settings_->error = std::string(name) + "=" + value + " is not understood";
  }

 private:
  Settings* settings_;
};

void read_devices(Reader& reader, Settings* settings) {
  int count = static_cast<int>(settings->device_memory.size());
  reader.number("SIMGPU_DEVICES", &count);
  if (count > 64) return reader.fail("SIMGPU_DEVICES", std::to_string(count));
  settings->device_memory.assign(count, size_t{1} << 30);
  std::string memory = Reader::text("SIMGPU_MEMORY");
  if (memory.empty()) return;
  std::vector<std::string> sizes = split(memory, ',');
  for (int i = 0; i < count; ++i) {
    // One size is every device's; of several, the last one given serves the devices that have none
    // of their own.
    const std::string& size = sizes[std::min<size_t>(i, sizes.size() - 1)];
    if (!parse_size(size, &settings->device_memory[i])) reader.fail("SIMGPU_MEMORY", memory);
  }
}

Settings read_settings() {
  Settings result;
  Reader reader(&result);
  read_devices(reader, &result);
  if (std::string name = Reader::text("SIMGPU_NAME"); !name.empty()) result.device_name = name;
  reader.size("SIMGPU_REGISTER_LIMIT", &result.register_limit);
  reader.size("SIMGPU_PIN_LIMIT", &result.pin_limit);
  reader.number("SIMGPU_DRIVER_VERSION", &result.driver_version);
  int peers = 1;
  reader.number("SIMGPU_PEERS", &peers);
  result.peers = peers != 0;
  int poison = 0;
  reader.number("SIMGPU_POISON", &poison);
  result.poison = poison != 0;
  result.leak_report = Reader::text("SIMGPU_LEAK_REPORT");
  result.kernels = Reader::text("SIMGPU_KERNELS");
  result.failures = Reader::text("SIMGPU_FAIL");
  return result;
}

}  // namespace

bool parse_size(const std::string& text, size_t* bytes) {
  size_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return false;
  std::string unit(end, text.data() + text.size());
  int shift = 0;
  if (unit == "KiB" || unit == "K") {
    shift = 10;
  } else if (unit == "MiB" || unit == "M") {
    shift = 20;
  } else if (unit == "GiB" || unit == "G") {
    shift = 30;
  } else if (!unit.empty() && unit != "B") {
    return false;
  }
  if (value > (std::numeric_limits<size_t>::max() >> shift)) return false;
  *bytes = value << shift;
  return true;
}

const Settings& settings() {
  static const Settings* instance = new Settings(read_settings());
  return *instance;
}

}  // namespace simgpu
