"""Mutation test: one node of a graph with copies is changed, and whatever is rewritten keeps results and inputs."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from tests.patterns.redundant_copy_spellings import SPELLINGS, arguments
from tests.patterns.test_redundant_copy_rotations import SPELLINGS as ROTATIONS
from tests.patterns.test_redundant_copy_rotations import inputs as rotated_inputs
from tests.support.mutants import Change, captured, check_mutants, other_operators, result, single_changes

aten = torch.ops.aten

COPIES = (
    "chain_two", "chain_overlapping", "chain_slice_then_index", "chain_accumulated", "chain_stacked_by_index",
    "chain_moved", "chain_read_before", "chain_write_read_elsewhere", "chain_source_from_the_region",
    "chain_copy_returned", "back_nested", "back_in_input_setitem", "back_from_split", "back_after_other_write",
    "joined_three_slices", "joined_nested", "joined_unflattened",
)  # fmt: skip
ROTATED = ("neox", "hugging_face", "interleaved", "by_halves", "on_a_product", "read_before_and_after")
PER_GRAPH = 16
FUSED: collections.Counter[str] = collections.Counter()

SWAPS: dict[Any, tuple[Any, ...]] = {
    aten.slice.Tensor: (aten.neg.default,),
    aten.clone.default: (aten.neg.default,),
    aten.mul.Tensor: (aten.add.Tensor, aten.div.Tensor),
    aten.add.Tensor: (aten.sub.Tensor, aten.mul.Tensor),
    aten.sub.Tensor: (aten.add.Tensor,),
}


def examples() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    copies = {name: (SPELLINGS[name][0], arguments()) for name in COPIES}
    return {**copies, **{name: (ROTATIONS[name], rotated_inputs()) for name in ROTATED}}


def mutants(graph: Graph) -> Iterator[tuple[str, str, Change]]:
    """Every change of a node other than the epilogues, which every graph has like that."""
    return single_changes(graph, lambda node: other_operators(node, SWAPS), leave=aten.copy_.default)


def outcome(module: GraphModule, inputs: list[Tensor]) -> list[Tensor] | None:
    """Results and inputs, and the results once more after the inputs have changed; None where it cannot run."""
    args = [x.clone() for x in inputs]
    found = result(module, args)
    if found is None:  # such as with an index outside of the tensor
        return None
    results = [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]
    seen = [t.clone() for t in (*results, *args)]
    for x in args:
        x.zero_()
    return seen + [t.clone() for t in results]


def same(ours: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(ours) == len(wanted) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True) for a, b in zip(ours, wanted)
    )


@pytest.mark.parametrize("name", [*COPIES, *ROTATED])
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_values(name: str) -> None:
    tracing = captured(*examples()[name])  # type: ignore[arg-type]
    counts = check_mutants(
        tracing, mutants(tracing.module.graph), lambda seed: tracing.inputs, lambda a, b, *_: same(a, b), PER_GRAPH,
        run=outcome, always_profitable=True, fusions="redundant_copy",
    )  # fmt: skip
    assert counts["mutants"] >= 3, (name, counts)
    FUSED.update({name: counts["fused"]} if counts["fused"] else {})


def test_enough_of_them_were_fused(request: pytest.FixtureRequest) -> None:
    if sum(item.fspath == request.node.fspath for item in request.session.items) <= len(COPIES) + len(ROTATED):
        pytest.skip("only some of the graphs were chosen")
    assert sum(FUSED.values()) >= 100 and len(FUSED) >= len(COPIES) + len(ROTATED) - 4, FUSED
