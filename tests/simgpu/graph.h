// Graphs and the capture of streams into them. The simulation's order lock protects every object
// here. For the simulated driver's sources only.
#pragma once

#include <cstddef>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "tests/simgpu/driver_headers.h"
#include "tests/simgpu/stream.h"

namespace simgpu {

// A piece of work with what queries about graph nodes tell of it.
struct Work {
  CUgraphNodeType type = CU_GRAPH_NODE_TYPE_EMPTY;
  Action action;
  Action check;                      // of copies and fills: whether their memory is there
  CUDA_KERNEL_NODE_PARAMS kernel{};  // of kernel nodes, without parameters
};

struct Graph;

struct Node {
  Graph* graph;
  Work work;
  std::vector<Node*> after;
};

struct Graph {
  Node* add(Work work, std::vector<Node*> after);
  std::vector<std::unique_ptr<Node>> nodes;  // each one after all that it depends on
};

struct GraphExec {
  std::vector<Action> actions;
  std::vector<const Node*> nodes;  // that the actions are of; only to tell them apart
  unsigned long long flags = 0;
};

// One capture: the streams that take part and the graph that grows.
struct Capture {
  uint64_t id;
  CUstreamCaptureMode mode;
  std::thread::id owner;
  Stream* origin;
  std::unique_ptr<Graph> graph;
  std::set<Stream*> members;
  bool invalidated = false;
};

// Whether every tail node of the capture's streams leads to one of `ends`.
bool is_joined(const Capture& capture, const std::vector<Node*>& ends);

}  // namespace simgpu
