// Exported functions of the simulated driver: graphs. Copies and fills are checked when their node
// is made or changed and when the graph is instantiated, as the real driver does.
#include "tests/simgpu/copy.h"

namespace simgpu {
namespace {

// The device of the context that a node is to run in.
CUresult device_of(CUcontext handle, int* device) {
  Context* context = nullptr;
  if (handle == nullptr) {
    SIMGPU_TRY(simulation().current(&context));
  } else {
    context = simulation().find_context(handle);
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  }
  *device = context->device();
  return CUDA_SUCCESS;
}

CUresult copy_work(const CUDA_MEMCPY3D* params, CUcontext context, Work* work) {
  SIMGPU_REQUIRE(params != nullptr);
  int device = 0;
  Copy copy;
  SIMGPU_TRY(device_of(context, &device));
  SIMGPU_TRY(volume_of(*params, &copy));
  *work = work_of(copy, device);
  return work->check();
}

CUresult fill_work(const CUDA_MEMSET_NODE_PARAMS* params, CUcontext context, Work* work) {
  SIMGPU_REQUIRE(params != nullptr);
  int device = 0;
  SIMGPU_TRY(device_of(context, &device));
  Fill fill;
  fill.to = {params->dst, params->pitch, 0, true, -1};
  fill.element = params->elementSize;
  fill.value = params->value;
  fill.width = params->width;
  fill.height = params->height;
  SIMGPU_REQUIRE(fill.element == 1 || fill.element == 2 || fill.element == 4);
  *work = work_of(fill, device);
  return work->check();
}

}  // namespace
}  // namespace simgpu

using namespace simgpu;  // NOLINT: the functions below carry the real driver's names

SIMGPU_API CUresult CUDAAPI cuGraphCreate(CUgraph* phGraph, unsigned int flags) {
  SIMGPU_ENTER(cuGraphCreate);
  SIMGPU_REQUIRE(phGraph != nullptr && flags == 0);
  return simulation().create_graph(phGraph);
}

SIMGPU_API CUresult CUDAAPI cuGraphDestroy(CUgraph hGraph) {
  SIMGPU_ENTER(cuGraphDestroy);
  return simulation().destroy_graph(hGraph);
}

SIMGPU_API CUresult CUDAAPI cuGraphGetNodes(CUgraph hGraph, CUgraphNode* nodes, size_t* numNodes) {
  SIMGPU_ENTER(cuGraphGetNodes);
  SIMGPU_REQUIRE(numNodes != nullptr);
  return simulation().graph_nodes(hGraph, nodes, numNodes, false);
}

SIMGPU_API CUresult CUDAAPI cuGraphGetRootNodes(CUgraph hGraph, CUgraphNode* rootNodes,
                                                size_t* numRootNodes) {
  SIMGPU_ENTER(cuGraphGetRootNodes);
  SIMGPU_REQUIRE(numRootNodes != nullptr);
  return simulation().graph_nodes(hGraph, rootNodes, numRootNodes, true);
}

SIMGPU_API CUresult CUDAAPI cuGraphNodeGetType(CUgraphNode hNode, CUgraphNodeType* type) {
  SIMGPU_ENTER(cuGraphNodeGetType);
  SIMGPU_REQUIRE(type != nullptr);
  Work work;
  SIMGPU_TRY(simulation().node(hNode, &work));
  *type = work.type;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuGraphKernelNodeGetParams_v2(CUgraphNode hNode,
                                                          CUDA_KERNEL_NODE_PARAMS* nodeParams) {
  SIMGPU_ENTER(cuGraphKernelNodeGetParams);
  SIMGPU_REQUIRE(nodeParams != nullptr);
  Work work;
  SIMGPU_TRY(simulation().node(hNode, &work));
  SIMGPU_REQUIRE(work.type == CU_GRAPH_NODE_TYPE_KERNEL);
  *nodeParams = work.kernel;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec* phGraphExec, CUgraph hGraph,
                                                        unsigned long long flags) {
  SIMGPU_ENTER(cuGraphInstantiateWithFlags);
  SIMGPU_REQUIRE(phGraphExec != nullptr);
  return simulation().instantiate(hGraph, flags, phGraphExec);
}

SIMGPU_API CUresult CUDAAPI cuGraphInstantiateWithParams(
    CUgraphExec* phGraphExec, CUgraph hGraph, CUDA_GRAPH_INSTANTIATE_PARAMS* instantiateParams) {
  SIMGPU_ENTER(cuGraphInstantiateWithParams);
  SIMGPU_REQUIRE(phGraphExec != nullptr && instantiateParams != nullptr);
  CUresult result = simulation().instantiate(hGraph, instantiateParams->flags, phGraphExec);
  instantiateParams->hErrNode_out = nullptr;
  instantiateParams->result_out =
      result == CUDA_SUCCESS ? CUDA_GRAPH_INSTANTIATE_SUCCESS : CUDA_GRAPH_INSTANTIATE_ERROR;
  return result;
}

SIMGPU_API CUresult CUDAAPI cuGraphInstantiateWithParams_ptsz(
    CUgraphExec* phGraphExec, CUgraph hGraph, CUDA_GRAPH_INSTANTIATE_PARAMS* instantiateParams) {
  return cuGraphInstantiateWithParams(phGraphExec, hGraph, instantiateParams);
}

SIMGPU_API CUresult CUDAAPI cuGraphInstantiate_v2(CUgraphExec* phGraphExec, CUgraph hGraph,
                                                  CUgraphNode* phErrorNode, char* logBuffer,
                                                  size_t bufferSize) {
  SIMGPU_ENTER(cuGraphInstantiate);
  SIMGPU_REQUIRE(phGraphExec != nullptr);
  if (phErrorNode != nullptr) *phErrorNode = nullptr;
  if (logBuffer != nullptr && bufferSize > 0) logBuffer[0] = '\0';
  return simulation().instantiate(hGraph, 0, phGraphExec);
}

SIMGPU_API CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec hGraphExec) {
  SIMGPU_ENTER(cuGraphExecDestroy);
  return simulation().destroy_exec(hGraphExec);
}

SIMGPU_API CUresult CUDAAPI cuGraphExecGetFlags(CUgraphExec hGraphExec, cuuint64_t* flags) {
  SIMGPU_ENTER(cuGraphExecGetFlags);
  SIMGPU_REQUIRE(flags != nullptr);
  unsigned long long found = 0;
  SIMGPU_TRY(simulation().exec_flags(hGraphExec, &found));
  *flags = found;
  return CUDA_SUCCESS;
}

SIMGPU_API CUresult CUDAAPI cuGraphUpload(CUgraphExec hGraphExec, CUstream hStream) {
  SIMGPU_ENTER(cuGraphUpload);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  unsigned long long flags = 0;
  return simulation().exec_flags(hGraphExec, &flags);  // there is nothing to upload
}

SIMGPU_API CUresult CUDAAPI cuGraphLaunch(CUgraphExec hGraphExec, CUstream hStream) {
  SIMGPU_ENTER(cuGraphLaunch);
  Context* context = nullptr;
  StreamPtr stream;
  SIMGPU_TRY(current_stream(hStream, &context, &stream));
  return simulation().launch_graph(hGraphExec, stream);
}

SIMGPU_API CUresult CUDAAPI cuGraphUpload_ptsz(CUgraphExec hGraphExec, CUstream hStream) {
  return cuGraphUpload(hGraphExec, per_thread(hStream));
}

SIMGPU_API CUresult CUDAAPI cuGraphLaunch_ptsz(CUgraphExec hGraphExec, CUstream hStream) {
  return cuGraphLaunch(hGraphExec, per_thread(hStream));
}

// Nodes of copies and fills.

SIMGPU_API CUresult CUDAAPI cuGraphAddMemcpyNode(CUgraphNode* phGraphNode, CUgraph hGraph,
                                                 const CUgraphNode* dependencies,
                                                 size_t numDependencies,
                                                 const CUDA_MEMCPY3D* copyParams, CUcontext ctx) {
  SIMGPU_ENTER(cuGraphAddMemcpyNode);
  SIMGPU_REQUIRE(phGraphNode != nullptr);
  Work work;
  SIMGPU_TRY(copy_work(copyParams, ctx, &work));
  return simulation().add_node(hGraph, dependencies, numDependencies, std::move(work), phGraphNode);
}

SIMGPU_API CUresult CUDAAPI cuGraphAddMemsetNode(CUgraphNode* phGraphNode, CUgraph hGraph,
                                                 const CUgraphNode* dependencies,
                                                 size_t numDependencies,
                                                 const CUDA_MEMSET_NODE_PARAMS* memsetParams,
                                                 CUcontext ctx) {
  SIMGPU_ENTER(cuGraphAddMemsetNode);
  SIMGPU_REQUIRE(phGraphNode != nullptr);
  Work work;
  SIMGPU_TRY(fill_work(memsetParams, ctx, &work));
  return simulation().add_node(hGraph, dependencies, numDependencies, std::move(work), phGraphNode);
}

SIMGPU_API CUresult CUDAAPI cuGraphMemcpyNodeSetParams(CUgraphNode hNode,
                                                       const CUDA_MEMCPY3D* nodeParams) {
  SIMGPU_ENTER(cuGraphMemcpyNodeSetParams);
  Work work;
  SIMGPU_TRY(copy_work(nodeParams, nullptr, &work));
  return simulation().set_node(hNode, std::move(work));
}

SIMGPU_API CUresult CUDAAPI cuGraphMemsetNodeSetParams(CUgraphNode hNode,
                                                       const CUDA_MEMSET_NODE_PARAMS* nodeParams) {
  SIMGPU_ENTER(cuGraphMemsetNodeSetParams);
  Work work;
  SIMGPU_TRY(fill_work(nodeParams, nullptr, &work));
  return simulation().set_node(hNode, std::move(work));
}

SIMGPU_API CUresult CUDAAPI cuGraphExecMemcpyNodeSetParams(CUgraphExec hGraphExec,
                                                           CUgraphNode hNode,
                                                           const CUDA_MEMCPY3D* copyParams,
                                                           CUcontext ctx) {
  SIMGPU_ENTER(cuGraphExecMemcpyNodeSetParams);
  Work work;
  SIMGPU_TRY(copy_work(copyParams, ctx, &work));
  return simulation().set_exec_node(hGraphExec, hNode, std::move(work));
}

SIMGPU_API CUresult CUDAAPI
cuGraphExecMemsetNodeSetParams(CUgraphExec hGraphExec, CUgraphNode hNode,
                               const CUDA_MEMSET_NODE_PARAMS* memsetParams, CUcontext ctx) {
  SIMGPU_ENTER(cuGraphExecMemsetNodeSetParams);
  Work work;
  SIMGPU_TRY(fill_work(memsetParams, ctx, &work));
  return simulation().set_exec_node(hGraphExec, hNode, std::move(work));
}

SIMGPU_API CUresult CUDAAPI cuGraphExecUpdate_v2(CUgraphExec hGraphExec, CUgraph hGraph,
                                                 CUgraphExecUpdateResultInfo* resultInfo) {
  SIMGPU_ENTER(cuGraphExecUpdate);
  SIMGPU_REQUIRE(resultInfo != nullptr);
  *resultInfo = {};
  const CUresult result = simulation().update_exec(hGraphExec, hGraph);
  resultInfo->result =
      result == CUDA_SUCCESS ? CU_GRAPH_EXEC_UPDATE_SUCCESS : CU_GRAPH_EXEC_UPDATE_ERROR;
  return result;
}
