"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from tests.patterns.head_gate_spellings import SPELLINGS
from tests.support.mutants import Change, captured, check_mutants, other_operators, round_trips, single_changes

aten, prims = torch.ops.aten, torch.ops.prims

NAMES = (
    "hugging_face", "serving_engine", "einsum", "heads_first_with_scales", "scaled_in_float32_before_the_product",
    "scale_per_head", "rounded_in_between", "upcast_after_a_view",
)  # fmt: skip
PER_GRAPH = 24
# A number that was half way between two of these types before a rounding was dropped.
COARSE = ("round trip through float8_e4m3fn", "round trip through int32")
ROUNDINGS = ("round trip through bfloat16", "cast target bfloat16")

SWAPS: dict[Any, tuple[Any, ...]] = {
    aten.mul.Tensor: (aten.add.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.maximum.default, aten.pow.Tensor_Tensor),
    aten.div.Tensor: (aten.mul.Tensor, aten.add.Tensor),
    prims.convert_element_type.default: (),
}


def others(node: Node) -> Iterator[tuple[str, Change]]:
    """Other operators, and roundings behind the node."""
    yield from other_operators(node, SWAPS)
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_floating_point():
        yield from round_trips(node, torch.int32, torch.float8_e4m3fn, torch.float64, torch.bfloat16)


def draws(inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Other inputs of the same layout."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator)) for t in inputs]


def differs(actual: Any, expected: Any, tolerance: float) -> bool:
    """Is the L2 error above the tolerance, or something infinite elsewhere?"""
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return True
        a, b = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
        if float((a - b).norm()) > tolerance * float(b.norm()):
            return True
    return False


COUNTS: collections.Counter[str] = collections.Counter()


def agrees(actual: Any, expected: Any, kind: str, graph: Graph) -> bool:
    """Sums in another order may round to another neighbour in bfloat16; a rounding behind them may be dropped."""
    half = any(n.meta["val"].dtype == torch.bfloat16 for n in graph.nodes if n.op == "call_function")
    tolerance = 2e-6 if not (half or kind in ROUNDINGS) else 3e-2 if kind in COARSE else 6e-3
    return not differs(actual, expected, tolerance)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(name: str) -> None:
    entry = SPELLINGS[name]
    tracing = captured(entry.function, entry.inputs())
    counts = check_mutants(
        tracing, single_changes(tracing.module.graph, others), lambda seed: draws(tracing.inputs, seed), agrees,
        PER_GRAPH, always_profitable=True, fusions="head_gate",
    )  # fmt: skip
    assert counts["mutants"] >= 12 and counts["fused"] >= 1, counts
    COUNTS.update(counts)


def test_there_were_enough_mutants(request: pytest.FixtureRequest) -> None:
    if sum(item.fspath == request.node.fspath for item in request.session.items) <= len(NAMES):
        pytest.skip("only some of the graphs were chosen")
    assert COUNTS["mutants"] >= 150, COUNTS
    # Other constants make other head gates; another operator or operand makes none.
    assert COUNTS["fused"] >= 60 and COUNTS["mutants"] - COUNTS["fused"] >= 20, COUNTS
