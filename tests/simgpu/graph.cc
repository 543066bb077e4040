#include "tests/simgpu/graph.h"

namespace simgpu {

Node* Graph::add(Work work, std::vector<Node*> after) {
  nodes.push_back(std::make_unique<Node>(Node{this, std::move(work), std::move(after)}));
  return nodes.back().get();
}

bool is_joined(const Capture& capture, const std::vector<Node*>& ends) {
  std::set<Node*> reached;
  std::vector<Node*> open = ends;
  while (!open.empty()) {
    Node* node = open.back();
    open.pop_back();
    if (!reached.insert(node).second) continue;
    open.insert(open.end(), node->after.begin(), node->after.end());
  }
  for (Stream* stream : capture.members) {
    for (Node* node : stream->capture_tail) {
      if (!reached.contains(node)) return false;
    }
  }
  return true;
}

}  // namespace simgpu
