"""The CUDA code of functions that write into their inputs, and the memory traffic of its kernels.

`fake_cuda.wrapper_code` traces functions without writes; here the graph comes from a compile on the CPU, functionalised
as always, and is moved to fake CUDA tensors before Inductor's passes see it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from fusion_passes.graph_pass import FusionPass
from fusion_passes.reports import Report
from fusion_passes.settings import snapshot
from tests.support import fake_cuda


@dataclasses.dataclass(frozen=True)
class Code:
    """What Inductor generated for the GPU.

    Attributes:
        wrapper: the source of the wrapper.
        launches: the names of the kernels that it launches, in order; library calls such as a matrix product are not
            counted.
        bytes: of the elements that the kernels load and store, library calls left out. An element that a kernel
            changes in place counts twice, and one that several kernels load counts for each of them.
        allocated: bytes of the buffers that the wrapper allocates.
        sites: how many sites were fused.
    """

    wrapper: str
    launches: tuple[str, ...]
    bytes: int
    allocated: int
    sites: int


def generate(function: Callable[..., Any], args: Sequence[Tensor], *, fused: bool) -> Code:
    """Inductor's code for `function` on CUDA tensors like `args`, with the fusion or as stock has it."""
    from torch._inductor import metrics
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    settings = {"strict": True, "fusions": "redundant_copy" if fused else "none"}
    chosen = FusionPass(snapshot(settings))
    found: list[Code] = []

    def capture(self: Any) -> Any:
        code = self.codegen()[0]
        sites = sum(record.outcome == "fused" for record in chosen.found)
        found.append(measured(self, getattr(code, "value", code), sites))
        raise _Stop

    graph = functional_graph(function, args)
    options = {"force_disable_caches": True, "compile_threads": 1, "post_grad_custom_pre_pass": chosen}
    # The method looks for a CUDA runtime before it looks at the tensor.
    copy = mock.patch.object(Tensor, "copy_", lambda self, source, *_: torch.ops.aten.copy_.default(self, source))
    with fake_cuda.fake_cuda(), copy, mock.patch.object(GraphLowering, "_compile_to_module", capture):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
            fakes = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda:0") for v in values]
        _move(graph, fakes, mode)
        metrics.reset()
        with torch._inductor.config.patch(options), torch._guards.tracing(torch._guards.TracingContext(mode)):
            try:
                compile_fx_inner(graph, fakes)
            except Exception as error:
                if not found:
                    raise error
    return found[0]


class _Stop(Exception):
    pass


def functional_graph(function: Callable[..., Any], args: Sequence[Tensor]) -> GraphModule:
    """The graph of a function after functionalisation, as Inductor gets it for inference."""
    from torch._inductor.compile_fx import compile_fx

    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, example_inputs: Sequence[Any], **unused: Any) -> Callable[..., Any]:
        graphs.append(gm)
        raise _Stop

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return cast(Any, compile_fx)(gm, example_inputs, inner_compile=inner)

    torch._dynamo.reset()
    try:
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(function, backend=backend, fullgraph=True)(*args)
    except Exception as error:
        if not graphs:
            raise error
    finally:
        torch._dynamo.reset()
    return graphs[0]


def run_after_passes(function: Callable[..., Any], args: Sequence[Any], **own: Any) -> tuple[Any, Report]:
    """The result of `function(*args)` as computed by the graph that all of Inductor's passes leave, and the report.

    The graph runs eagerly, node by node, writes included: what the passes do to each other's writes is seen, and no
    code is generated. Settings as for `fusion_passes.testing.run_fused`.
    """
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.virtualized import V

    chosen = FusionPass(snapshot({"strict": True, "reference_on_cpu": True, **own}))

    def inner(gm: GraphModule, example_inputs: Sequence[Any], **unused: Any) -> Callable[..., Any]:
        mode = torch._guards.detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes])
        view_to_reshape(gm)
        with V.set_fake_mode(mode), torch._inductor.config.patch(post_grad_custom_pre_pass=chosen):
            _recursive_post_grad_passes(gm, is_inference=True)
        gm.recompile()
        return make_boxed_func(gm.forward)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with torch._inductor.config.patch(force_disable_caches=True):
            return cast(Any, compile_fx)(gm, example_inputs, inner_compile=inner)

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    finally:
        torch._dynamo.reset()
    return result, Report(tuple(chosen.found))


def _move(graph: GraphModule, inputs: Sequence[Tensor], mode: FakeTensorMode) -> None:
    """Evaluate the graph on fake CUDA tensors, and keep the results as the metadata of its nodes."""

    def on_cuda(value: Any) -> Any:
        return torch.device("cuda:0") if isinstance(value, torch.device) else value

    class Move(Interpreter):
        def run_node(self, n: Node) -> Any:
            n.args, n.kwargs = tree_map(on_cuda, (n.args, n.kwargs))
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    with mode:
        Move(graph).run(*inputs)


def measured(lowered: Any, wrapper: str, sites: int) -> Code:
    """What Inductor has generated for a `GraphLowering`."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    body = [line.strip() for line in wrapper[wrapper.index("def call(") :].splitlines()]
    launches = tuple(line.split(".run(")[0] for line in body if ".run(" in line)
    kernels = [
        node
        for node in lowered.scheduler.nodes
        if not isinstance(node, (ExternKernelSchedulerNode, NopKernelSchedulerNode))
    ]
    moved = sum(_traffic(lowered, node) for node in kernels)
    allocated = sum(
        buffer.get_layout().storage_size() * buffer.get_dtype().itemsize
        for buffer in lowered.buffers
        if f"{buffer.get_name()} = empty_strided" in wrapper
    )
    return Code(wrapper, launches, int(moved), int(allocated), sites)


def _traffic(lowered: Any, kernel: Any) -> int:
    """Bytes that one kernel loads and stores; values that stay in its registers do not count.

    Several loads of one tensor count as one of all of it at most, and a store by index as one for each element stored.
    """
    from torch._inductor.dependencies import MemoryDep

    def moved(deps: Any) -> int:
        sums: dict[str, int] = {}
        for dep in deps:
            if isinstance(dep, MemoryDep) and dep.name not in inside:
                whole = lowered.get_numel(dep.name) * lowered.get_dtype(dep.name).itemsize
                elements = math.prod(dep.size) if dep.is_indirect() else dep.get_numel()
                size = int(elements) * lowered.get_dtype(dep.name).itemsize
                sums[dep.name] = min(sums.get(dep.name, 0) + size, int(whole))
        return sum(sums.values())

    inside = {dep.name for dep in kernel.read_writes.writes} & set(lowered.removed_buffers)
    return moved(kernel.read_writes.reads) + moved(kernel.read_writes.writes)
