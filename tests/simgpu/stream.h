// Streams of the simulation: queues whose work a thread of their own does in order, after the
// completions that each piece of work waits for. Ordering between streams is decided in
// simulation.cc; here it is only obeyed. For the simulated driver's sources only.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "tests/simgpu/driver_headers.h"

namespace simgpu {

class Context;
struct Capture;
struct Node;

// The end of one piece of work. Thread-safe.
class Completion {
 public:
  void finish() {
    finished_.store(true, std::memory_order_release);
    finished_.notify_all();
  }
  bool finished() const { return finished_.load(std::memory_order_acquire); }
  void wait() const { finished_.wait(false, std::memory_order_acquire); }

 private:
  std::atomic<bool> finished_{false};
};
using CompletionPtr = std::shared_ptr<Completion>;

// What a stream or a graph's node does; its result becomes the context's lasting error if it is
// none of success.
using Action = std::function<CUresult()>;

// Stops all streams between two pieces of work while held.
class Gate {
 public:
  void hold();
  void release();
  void pass();

 private:
  std::mutex mutex_;  // protects holders_
  std::condition_variable opened_;
  int holders_ = 0;
};
Gate& gate();

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  enum class Kind { kLegacy, kPerThread, kCreated };

  Stream(Context* context, Kind kind, unsigned flags, int priority);

  // Appends work that starts after everything in `after`. The simulation's order lock must be held,
  // so that work and its predecessors are in one order everywhere.
  CompletionPtr push(Action action, std::vector<CompletionPtr> after);

  // The completion of the last work pushed; null if there was none.
  CompletionPtr tail();

  // Lets the thread end when its queue is empty. Work in the queue is still done.
  void close();

  Context* context() const { return context_; }
  Kind kind() const { return kind_; }
  unsigned flags() const { return flags_; }
  int priority() const { return priority_; }
  uint64_t id() const { return id_; }
  // Whether it waits for the legacy default stream and that one for it.
  bool blocking() const { return (flags_ & CU_STREAM_NON_BLOCKING) == 0; }

  // Capture in progress and the nodes that the next one follows; the simulation's order lock
  // protects both.
  std::shared_ptr<Capture> capture;
  std::vector<Node*> capture_tail;

 private:
  struct Item {
    Action action;
    std::vector<CompletionPtr> after;
    CompletionPtr done;
  };
  static void work(std::shared_ptr<Stream> self);
  bool next(Item* item);

  Context* const context_;
  const Kind kind_;
  const unsigned flags_;
  const int priority_;
  const uint64_t id_;
  std::mutex mutex_;  // protects what follows
  std::condition_variable filled_;
  std::deque<Item> queue_;
  CompletionPtr tail_;
  bool started_ = false;
  bool closing_ = false;
};
using StreamPtr = std::shared_ptr<Stream>;

}  // namespace simgpu
