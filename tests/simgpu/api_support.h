// What the files of exported functions share. For the simulated driver's sources only.
#pragma once

#include "tests/simgpu/simulation.h"

namespace simgpu {

inline Simulation& simulation() {
  return Simulation::get();
}
inline Memory& memory() {
  return Simulation::get().memory();
}

// The stream that a function of the per-thread default stream variety means.
inline CUstream per_thread(CUstream stream) {
  return stream == nullptr ? CU_STREAM_PER_THREAD : stream;
}

// The current context, its error included, and one of its streams.
inline CUresult current_stream(CUstream handle, Context** context, StreamPtr* stream) {
  SIMGPU_TRY(simulation().current(context));
  return simulation().find_stream(handle, *context, stream);
}

// Fails while the stream is captured or a capture forbids the call.
inline CUresult current_for_unsafe_call(Context** context) {
  SIMGPU_TRY(simulation().current(context));
  return simulation().check_unsafe_call();
}

}  // namespace simgpu
