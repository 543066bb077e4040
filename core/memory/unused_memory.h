// What an allocator of the program holds free: of memory that it got from the engine the content
// need not be backed up, and before a sleep from outside it can be given back. Implemented by the
// shim; asked by sleeps, one at a time.
#pragma once

#include "core/range.h"

namespace dormouse {

class UnusedMemory {
 public:
  virtual ~UnusedMemory() = default;

  // A sleep is about to begin and holds up nothing yet: looks at what is free. If the sleep comes
  // `from_outside`, what the allocator caches, tagged or not, is given back first: it is of no use
  // while the program waits. May take some time.
  virtual void look(bool from_outside) noexcept = 0;

  // The device's work has ended, and the gate is closed if it is going to be: what look() saw and
  // has been free all the time since. Whoever gets such a part from the allocator later finds any
  // content in it, as the allocator promises none. In any order; of each range only what lies in
  // one block counts, and only if that block was there before look().
  virtual Ranges unused() noexcept = 0;
};

}  // namespace dormouse
