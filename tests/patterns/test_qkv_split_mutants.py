"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps every bit."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from tests.patterns.qkv_split_spellings import SPELLINGS
from tests.support.mutants import Change, captured, check_mutants, other_operators, single_changes
from tests.support.qkv_split import numbered

aten = torch.ops.aten

NAMES = (
    "split_view_contiguous", "slices", "unbind_middle", "einops_qkv", "as_strided_windows", "heads_first",
    "repeated_keys", "repeated_heads_first", "in_front_of_a_gate", "sequence_first_input", "interleaved_heads",
    "strided_split", "strided_causal_tail", "strided_heads_first", "strided_repeated", "strided_as_strided",
    "in_front_of_a_matrix_product",
)  # fmt: skip
PER_GRAPH = 60
FUSED: collections.Counter[str] = collections.Counter()


def others(node: Node) -> Iterator[tuple[str, Change]]:
    return other_operators(node, {aten.clone.default: (aten.neg.default,)})


def equal(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    # Strides of axes of length one mean nothing, and a mutant may well make one.
    return len(actual) == len(wanted) and all(
        a.shape == b.shape and a.is_contiguous() == b.is_contiguous() and torch.equal(a, b)
        for a, b in zip(actual, wanted)
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_every_bit(name: str) -> None:
    entry = SPELLINGS[name]
    tracing = captured(entry.function, entry.inputs())
    inputs = [numbered(*tensor.shape) for tensor in tracing.inputs]
    counts = check_mutants(
        tracing, single_changes(tracing.module.graph, others), lambda seed: inputs, lambda a, b, *_: equal(a, b),
        PER_GRAPH, always_profitable=True, fusions="qkv_split",
    )  # fmt: skip
    assert counts["mutants"] >= 15, (name, counts)
    FUSED.update({name: counts["fused"]} if counts["fused"] else {})


def test_enough_of_them_were_fused(request: pytest.FixtureRequest) -> None:
    if sum(item.fspath == request.node.fspath for item in request.session.items) <= len(NAMES):
        pytest.skip("only some of the graphs were chosen")
    assert sum(FUSED.values()) >= 100 and len(FUSED) >= len(NAMES) - 2, FUSED
