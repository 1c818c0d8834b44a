"""Small post-grad-like graphs for tests, and the values to compare an evaluation with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_passes.evaluate import Evaluator, Leaf
from fusion_passes.sizes import Sizes, assignments


def draw(*shape: int, low: float = -3.0, high: float = 3.0, seed: int = 0) -> Tensor:
    """Reproducible uniform float32 values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * (high - low) + low


def trace(function: Callable[..., Any], *inputs: Any, symbolic: bool = False, decompose: bool = True) -> GraphModule:
    """The ATen graph of a function with FakeTensor metadata, decomposed as by Inductor and without mutations."""
    table = select_decomp_table() if decompose else None
    if decompose:
        function = torch.func.functionalize(function, remove="mutations")
    return make_fx(function, decomposition_table=table, tracing_mode="symbolic" if symbolic else "fake")(*inputs)


def result(module: GraphModule, which: int = 0) -> Node:
    """The node that the graph returns, or one of them."""
    (returned,) = module.graph.output_node().args
    node = returned[which] if isinstance(returned, (list, tuple)) else returned
    assert isinstance(node, Node)
    return node


def placeholders(graph: Graph) -> list[Node]:
    """The tensor inputs of a graph, in order."""
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    return [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def table(values: Tensor) -> Leaf:
    """A leaf with the elements of a tensor."""
    flat = values.contiguous().reshape(-1)
    return lambda index: flat[index]


def tables(graph: Graph, inputs: Sequence[Tensor]) -> dict[Node, Leaf]:
    """Leaves for all inputs of a graph."""
    return {n: table(x) for n, x in zip(placeholders(graph), inputs, strict=True)}


def evaluate_all(node: Node, leaves: dict[Node, Leaf], sizes: Sizes) -> Tensor:
    """Every element of a node, asked for in a scrambled order in two portions."""
    count = sizes.numel(node)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    evaluator = Evaluator(leaves, sizes)
    parts = [evaluator.values(node, order[: count // 3]), evaluator.values(node, order[count // 3 :])]
    values = torch.empty(count, dtype=parts[1].dtype)
    values[order] = torch.cat(parts)
    return values.reshape(sizes.shape(node))


def check(function: Callable[..., Any], *inputs: Tensor, which: int = 0, decompose: bool = True) -> None:
    """The evaluated graph of a function equals the function itself in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = function(*wide)
    expected = expected[which] if isinstance(expected, (list, tuple)) else expected
    module = trace(function, *inputs, decompose=decompose)
    (sizes,) = assignments(module.graph)
    actual = evaluate_all(result(module, which), tables(module.graph, wide), sizes)
    compare(actual, expected)


def compare(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float64 rounding, with the dtype class kept and NaN in the same places."""
    floating = expected.is_floating_point()
    kept = torch.float64 if floating else torch.bool if expected.dtype == torch.bool else torch.int64
    torch.testing.assert_close(actual, expected.to(kept), rtol=1e-11, atol=1e-12, equal_nan=True)


def call(target: Any, *args: Any, **kwargs: Any) -> tuple[Node, dict[Node, Leaf]]:
    """A graph of a single operator call, and leaves with the given tensors."""
    graph, mode = Graph(), FakeTensorMode()
    leaves: dict[Node, Leaf] = {}

    def lift(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [lift(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"input_{len(leaves)}")
        node.meta["val"] = mode.from_tensor(value)
        leaves[node] = table(value)
        return node

    given, named = [lift(a) for a in args], {k: lift(v) for k, v in kwargs.items()}
    node = graph.call_function(target, tuple(given), named)

    def fake(value: Any) -> Any:
        if isinstance(value, list):
            return [fake(v) for v in value]
        return value.meta["val"] if isinstance(value, Node) else value

    with mode:
        node.meta["val"] = target(*map(fake, given), **{k: fake(v) for k, v in named.items()})
    return node, leaves
