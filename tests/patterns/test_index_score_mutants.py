"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.fx import Node

from tests.patterns.index_score_spellings import SPELLINGS
from tests.support.mutants import Change, Tracing, check_mutants, other_operators, round_trips, same, single_changes
from tests.tracing import trace

aten = torch.ops.aten

NAMES = (
    "hugging_face", "hugging_face_with_a_summand", "two_einsums_with_batches", "keys_first", "where_positive",
    "groups_of_heads", "causal_by_tril", "causal_by_triu_of_infinity", "scales_in_many_places",
    "float8_with_scaled_products",
)  # fmt: skip
PER_GRAPH = 16
TOLERANCE = collections.defaultdict(lambda: 1e-4, {"round trip through bfloat16": 4e-2, "cast target bfloat16": 4e-2})
SWAPS: dict[Any, tuple[Any, ...]] = {
    aten.relu.default: (aten.abs.default, aten.neg.default, aten.sigmoid.default, aten.relu6.default),
    aten.clamp_min.default: (aten.clamp_max.default,),
    aten.mul.Tensor: (aten.add.Tensor, aten.sub.Tensor, aten.maximum.default),
    aten.add.Tensor: (aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default),
    aten.sum.dim_IntList: (aten.amax.default, aten.mean.dim),
    aten.le.Scalar: (aten.lt.Scalar, aten.ge.Scalar, aten.eq.Scalar),
    aten.ge.Scalar: (aten.gt.Scalar, aten.le.Scalar),
    aten.gt.Scalar: (aten.ge.Scalar, aten.lt.Scalar),
    aten.bitwise_not.default: (aten.clone.default,),
}


def others(node: Node) -> Iterator[tuple[str, Change]]:
    """Other operators, and roundings behind the node."""
    yield from other_operators(node, SWAPS)
    value = node.meta.get("val")
    # Infinity has no integer, and float8 saturates here but not in eager PyTorch: leave fill values alone.
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() > 0:
        yield from round_trips(node, torch.int32, torch.float8_e5m2, torch.bfloat16)


def captured(name: str) -> Tracing:
    entry = SPELLINGS[name]
    inputs = entry.inputs()
    names = ", ".join(f"x{i}" for i in range(len(inputs)))
    module = trace(eval(f"lambda {names}: f({names})", {"f": entry.function}), *inputs)
    view_to_reshape(module)
    module.graph.eliminate_dead_code()
    return Tracing(module, list(inputs))


def draws(inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Other inputs of the same layout and dtype."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tensor in inputs:
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.dtype == torch.bool:
            values = values > 0
        elif bool(tensor.float().isinf().any()):
            values = torch.where(values > 0, values, -torch.inf)
        found.append(torch.empty_like(tensor).copy_(values))
    return found


COUNTS: collections.Counter[str] = collections.Counter()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(name: str) -> None:
    tracing = captured(name)
    # A rounding to bfloat16 may be dropped, as Inductor drops it.
    counts = check_mutants(
        tracing, single_changes(tracing.module.graph, others), lambda seed: draws(tracing.inputs, seed),
        lambda a, b, kind, graph: same(a, b, TOLERANCE[kind]), PER_GRAPH, fusions="index_score",
    )  # fmt: skip
    assert counts["mutants"] == PER_GRAPH and counts["fused"] >= 1, counts
    COUNTS.update(counts)


def test_there_were_enough_mutants(request: pytest.FixtureRequest) -> None:
    if sum(item.fspath == request.node.fspath for item in request.session.items) <= len(NAMES):
        pytest.skip("only some of the graphs were chosen")
    assert COUNTS["mutants"] >= 150 and COUNTS["fused"] >= 30, COUNTS
