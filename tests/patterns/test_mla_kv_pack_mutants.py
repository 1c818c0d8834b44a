"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from tests.patterns.mla_kv_pack_cases import assert_same_bytes
from tests.patterns.mla_kv_pack_spellings import SPELLINGS
from tests.support.mutants import Change, captured, check_mutants, other_operators, round_trips, single_changes
from tests.support.versions import not_on_2_11

aten = torch.ops.aten

NAMES = (
    "serving_call_site", "concatenation_of_casts", "heads_first_as_in_hugging_face", "two_scales_in_float32",
    "clamped_below_the_range", "divided_by_one_scale", "python_scales",
)  # fmt: skip
FEWEST, PER_GRAPH = 20, 48  # mutants that run
ROUNDINGS = ("round trip through bfloat16", "cast target bfloat16")

SWAPS: dict[Any, tuple[Any, ...]] = {
    aten.mul.Tensor: (aten.add.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.maximum.default),
    aten.div.Tensor: (aten.mul.Tensor, aten.add.Tensor),
    aten.clamp_min.default: (aten.clamp_max.default,),
    aten.clamp_max.default: (aten.clamp_min.default,),
    aten.expand.default: (aten.repeat.default,),
}


def others(node: Node) -> Iterator[tuple[str, Change]]:
    """Other operators, and roundings behind the node."""
    yield from other_operators(node, SWAPS)
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float32):
        yield from round_trips(node, torch.int32, torch.float8_e5m2, torch.float64, torch.bfloat16)


def draws(inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Other inputs of the same layout, with values in and beyond the range of float8; scales near one."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tensor in inputs:
        values = torch.randn(tensor.shape, generator=generator) * 3
        if tensor.numel() > 1:
            values = torch.where(torch.rand(tensor.shape, generator=generator) < 0.05, values * 200, values)
        else:
            values = values.abs() + 0.25
        found.append(torch.empty_like(tensor).copy_(values))
    return found


def differs(actual: Any, expected: Any, loose: bool) -> bool:
    try:
        for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
            assert_same_bytes(a, b, loose)
    except AssertionError:
        return True
    return False


COUNTS: collections.Counter[str] = collections.Counter()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(name: str) -> None:
    not_on_2_11("makes NaN of what is too large for float8, and the fused op the largest number")
    entry = SPELLINGS[name]
    tracing = captured(entry.function, entry.inputs())
    # A rounding to bfloat16 may be dropped, as Inductor drops it.
    counts = check_mutants(
        tracing, single_changes(tracing.module.graph, others), lambda seed: draws(tracing.inputs, seed),
        lambda a, b, kind, graph: not differs(a, b, loose=kind in ROUNDINGS), PER_GRAPH,
        always_profitable=True, fusions="mla_kv_pack",
    )  # fmt: skip
    assert counts["mutants"] >= FEWEST and counts["fused"] >= 1, counts
    COUNTS.update(counts)


def test_there_were_enough_mutants(request: pytest.FixtureRequest) -> None:
    not_on_2_11("skips the others")
    if sum(item.fspath == request.node.fspath for item in request.session.items) <= len(NAMES):
        pytest.skip("only some of the graphs were chosen")
    assert COUNTS["mutants"] >= 300, COUNTS
