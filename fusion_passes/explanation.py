"""`explain`: what would be fused in a model, without code generation, caches or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._inductor import config as inductor_config
from torch.fx import Graph, GraphModule

from fusion_passes import arch, records, sketches
from fusion_passes.expectation import graph_breaks
from fusion_passes.graph_pass import FusionPass
from fusion_passes.reports import Report
from fusion_passes.settings import snapshot
from fusion_passes.transformers import kernels_of_others

# Fruitless starts of a search that are named one by one.
_STARTS = 3


def explain(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Run `f(*args, **kwargs)` once, trace it, and report what the fusion pass does with its graphs.

    Nothing is generated, compiled or cached, and the graphs run eagerly as they were traced. Tensors may be on the
    CPU: the report is then the one for the same call on the GPU that the `arch` setting names (an H200 by default).
    The settings in force apply; use `fusion_passes.config.patch(...)` around the call for others. For dynamic
    shapes pass `torch.compile(f, dynamic=True)` or mark the inputs with `torch._dynamo.mark_dynamic`.

    Like `torch._dynamo.explain`, this resets Dynamo before and after: compiled code is dropped and compiled again
    at its next call.

    Args:
        f: a module or function, compiled by `torch.compile` or not.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        The report; `print(report)` is a table, `report.counts["gate_cumsum"]` the number of sites of one fusion.

    Raises:
        ValueError: the settings name an unknown fusion or GPU architecture; the message lists the known ones.
    """
    settings = snapshot()
    arch.by_name(settings.arch)
    explained = FusionPass(settings, as_if_cuda=True)
    f, dynamic = _unwrap(f)
    torch._dynamo.reset()
    breaks = graph_breaks()
    try:
        torch.compile(f, backend=tracing_backend(explained), dynamic=dynamic)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    breaks = graph_breaks() - breaks
    return Report(tuple(explained.found), tuple(_notes(explained, breaks, f)), explained.drawings)


def tracing_backend(explained: FusionPass, run_rewritten: bool = False) -> Callable[..., Any]:
    """A backend that shows every post-grad graph to the pass and then runs it eagerly, without code generation.

    With `run_rewritten` the graph that the pass left is what runs, fused ops included; else the graph as traced.
    """
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def look(
        gm: GraphModule, example_inputs: Sequence[Any], is_inference: bool = False, **unused: Any
    ) -> Callable[..., Any]:
        seen = show_recursively(gm, explained, is_inference)
        return make_boxed_func(seen.forward if run_rewritten else gm.forward)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with inductor_config.patch(force_disable_caches=True):
            compiled: Any = compile_fx(gm, example_inputs, inner_compile=cast(Any, look))
            return compiled

    return backend


def show_recursively(gm: GraphModule, explained: FusionPass, inference: bool) -> GraphModule:
    """A copy of `gm` that the pass has seen, its subgraphs (branches of `torch.cond`) first, as Inductor shows them."""
    from torch._inductor.fx_passes.post_grad import reorder_for_locality, view_to_reshape

    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = GraphModule(gm, graph)
    for name in dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")):
        part = getattr(copy, name, None)
        if isinstance(part, GraphModule):
            setattr(copy, name, show_recursively(part, explained, inference))
    view_to_reshape(copy)
    if inference and inductor_config.reorder_for_locality:
        reorder_for_locality(graph)
    explained(graph)
    copy.recompile()
    return copy


def _unwrap(f: Callable[..., Any]) -> tuple[Callable[..., Any], bool | None]:
    """The function or module behind a `torch.compile` wrapper, and whether it was compiled for dynamic shapes."""
    if isinstance(f, torch._dynamo.eval_frame.OptimizedModule):
        return f._orig_mod, getattr(f.dynamo_ctx, "_dynamic", None)
    if isinstance(f, torch.nn.Module) and f._compiled_call_impl is not None:
        # Compiled in place: calling the module would run that code instead of tracing it.
        return _unwrap(f._compiled_call_impl)
    inner = getattr(f, "_torchdynamo_orig_callable", None)
    if inner is None:
        return f, None
    # The wrapper of a compiled function keeps its settings in the object that it closes over.
    cells = [cell.cell_contents for cell in getattr(f, "__closure__", None) or ()]
    return inner, next((cell._dynamic for cell in cells if hasattr(cell, "_dynamic")), None)


def _notes(explained: FusionPass, breaks: int, f: Callable[..., Any]) -> list[str]:
    notes = []
    if not explained.found:
        notes += _fruitless(explained)
    notes += _hidden(f)
    settings = explained.settings
    if not torch.cuda.is_available():
        assumed = arch.by_name(settings.arch)
        notes.append(f"No GPU on this machine: {assumed.gpu} ({assumed.name}) is assumed.")
    if breaks:
        plural = "s" if breaks > 1 else ""
        notes.append(f"The call has {breaks} graph break{plural}: sites are found within a graph only.")
    return notes


def _hidden(f: Callable[..., Any]) -> list[str]:
    """Which delta rules of a model the search cannot see, because a kernel of others computes them, and what to do."""
    model = f if isinstance(f, torch.nn.Module) else getattr(f, "__self__", None)
    if not isinstance(model, torch.nn.Module):
        return []
    return [
        f"{name} is hidden: {whose}, a kernel of its own, computes it, and no search looks into kernels. "
        "fusion_passes.transformers.bind(model, replace_kernels=True) puts chunk_delta_rule in its place."
        for name, whose in kernels_of_others(model)
    ]


def _fruitless(explained: FusionPass) -> list[str]:
    """Where the searches of a call without a candidate started, or from which operators they would have."""
    if not explained.fusions:
        return []
    starts: dict[str, list[str]] = {}
    for name, anchor in explained.fruitless:
        starts.setdefault(f"{sketches.word(anchor)} ({records.source_of(anchor) or anchor.name})", []).append(name)
    notes = [
        f"Searched from {start} for {', '.join(dict.fromkeys(names))}: nothing of the kind is around it."
        for start, names in list(starts.items())[:_STARTS]
    ]
    if len(starts) > _STARTS:
        notes.append(f"Searched in vain from {len(starts) - _STARTS} more operators.")
    if not starts:
        anchors = {target._opname for fusion in explained.fusions for target in fusion.anchors}
        notes.append(f"No search started: a fusion is looked for from {', '.join(sorted(anchors))}.")
    return notes
