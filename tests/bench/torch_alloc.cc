// Allocations that PyTorch's cache serves, called as PyTorch's own code calls them. Built by
// torch_alloc.py against the PyTorch that it measures.
#include <c10/cuda/CUDACachingAllocator.h>

#include <chrono>

// Nanoseconds for one allocation of `bytes` and its end, over `calls` of them.
extern "C" double allocation_ns(std::size_t bytes, int calls) {
  namespace allocator = c10::cuda::CUDACachingAllocator;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) allocator::raw_delete(allocator::raw_alloc(bytes));
  const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - begin;
  return time.count() / calls;
}
