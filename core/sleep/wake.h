// One wake over several pools, with its way back. Used by Engine, under its operation lock.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "core/sleep/copies.h"
#include "core/sleep/operation.h"

namespace dormouse {

struct WakeChunk : OperationChunk {
  std::uint64_t differing_bytes = 0;  // (verified) what is not what fell asleep
  std::uint64_t unchecked_bytes = 0;  // (verified) what could not be compared
  bool mapped = false;                // has memory and a mapping
};

class WakeOperation : private Operation {
 public:
  WakeOperation(const OperationEnv& env, const Transition& transition, std::vector<Pool*> pools);
  // What was begun and not finished is asleep again.
  ~WakeOperation();

  // Wakes the sleeping chunks that `wanted` is true for.
  Status run(const std::function<bool(const Chunk&)>& wanted, OperationStats* total);

 private:
  // Some chunks of an operation, mapped while those before them are copied.
  using Stage = std::vector<WakeChunk*>;

  // In this order.
  Status begin(const std::function<bool(const Chunk&)>& wanted);
  Status create_all();
  Status restore();
  Status zero();
  void verify();

  Status create_one(WakeChunk& item);
  Status map(const Stage& stage);
  Status set_access(const Stage& stage);
  Status zero_ranges(int device, const Ranges& ranges);
  void undo_mapping();
  void note(OperationStats* total) noexcept;

  std::vector<WakeChunk> chunks_;
  std::map<int, std::uint64_t> bytes_;  // of chunks_, by device
  Clock::duration mapping_{0};          // of the time, part of it beside copies
};

}  // namespace dormouse
