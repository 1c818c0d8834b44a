"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.patterns.test_topk_mask import KEYS, SPELLINGS, scores
from tests.support.mutants import captured, check_mutants, mutants, same

PER_GRAPH = 24
COUNTS: collections.Counter[str] = collections.Counter()


def drawn(seed: int) -> list[Tensor]:
    """Scores of which no two in a row are equal: PyTorch leaves open which of those are selected."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(scores().shape, generator=generator).argsort(-1) / KEYS - 0.4]


@pytest.mark.parametrize("function", SPELLINGS)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(function: Any) -> None:
    tracing = captured(function, (scores(),))
    # Scores that are rounded, or all the same number, are equal to others.
    changes = [
        change
        for change in mutants(tracing.module.graph)
        if "round trip" not in change[1] and change[:2] != ("topk", "other operand")
    ]
    counts = check_mutants(
        tracing, changes, drawn, lambda a, b, *_: same(a, b, 1e-6), PER_GRAPH,
        fusions="topk_mask", always_profitable=True,
    )  # fmt: skip
    assert counts["mutants"] >= 8, counts
    COUNTS.update(counts)


def test_there_were_enough_mutants(request: pytest.FixtureRequest) -> None:
    if sum(item.fspath == request.node.fspath for item in request.session.items) <= len(SPELLINGS):
        pytest.skip("only some of the graphs were chosen")
    print(dict(COUNTS))
    assert COUNTS["mutants"] >= 60 and 20 <= COUNTS["fused"] < COUNTS["mutants"], COUNTS
