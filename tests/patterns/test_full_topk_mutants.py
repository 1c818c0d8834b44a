"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.patterns.test_full_topk import SPELLINGS, scores
from tests.support.mutants import captured, check_mutants, mutants, same

PER_GRAPH = 24
COUNTS: collections.Counter[str] = collections.Counter()


def drawn(seed: int) -> list[Tensor]:
    """Scores with ties."""
    x = torch.randn(scores().shape, generator=torch.Generator().manual_seed(seed))
    return [torch.where(x.abs() < 0.3, 0.5, x)]


@pytest.mark.parametrize("function", SPELLINGS)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(function: Any) -> None:
    tracing = captured(function, (scores(),))
    counts = check_mutants(
        tracing, mutants(tracing.module.graph), drawn, lambda a, b, *_: same(a, b, 1e-6), PER_GRAPH,
        fusions="full_topk",
    )  # fmt: skip
    assert counts["mutants"] >= 8, counts
    COUNTS.update(counts)


def test_there_were_enough_mutants(request: pytest.FixtureRequest) -> None:
    if sum(item.fspath == request.node.fspath for item in request.session.items) <= len(SPELLINGS):
        pytest.skip("only some of the graphs were chosen")
    print(dict(COUNTS))
    assert COUNTS["mutants"] >= 100 and 20 <= COUNTS["fused"] < COUNTS["mutants"], COUNTS
