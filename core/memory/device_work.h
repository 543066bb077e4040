// What a pool has to know of the work that the program gives to the device. Implemented by the
// engine.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

namespace dormouse {

class DeviceWork {
 public:
  virtual ~DeviceWork() = default;

  // Calls `call` with no stream capture of the program running or beginning meanwhile: it would be
  // ended with an error. False if one runs, or `call` returns false. Waits for nothing.
  virtual bool outside_captures(const std::function<bool()>& call) = 0;

  // Counts the program's calls that may give work to a device; nothing while one runs. The same
  // number twice: no work was given in between.
  virtual std::optional<std::uint64_t> calls() noexcept = 0;

  // Has another thread call Pool::collect() until it wants no more. Takes no lock of the pool.
  virtual void collect_later() noexcept = 0;
};

}  // namespace dormouse
