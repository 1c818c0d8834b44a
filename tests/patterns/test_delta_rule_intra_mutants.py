"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.patterns.delta_rule_intra_spellings import SPELLINGS
from tests.support.mutants import captured, check_mutants, mutants, same

# A rounding to bfloat16 may be dropped, as Inductor drops it.
TOLERANCE = collections.defaultdict(lambda: 1e-4, {"round trip through bfloat16": 3e-2, "cast target bfloat16": 3e-2})

# spelling, mutants that run
GRAPHS = {
    "solved_apart": 40,
    "solved_together": 30,
    "forward_substitution": 4,
    "pairs_chunk_by_chunk": 10,
    "channels_with_pairs": 20,
}


def drawn(name: str, seed: int) -> list[Tensor]:
    """Operands with some short rows of k and q, strong decays and a beta of zero."""
    k, v, g, beta, q = SPELLINGS[name].inputs(seed=seed, tokens=24, batch=1, key=32)
    for rows in (k, q):
        rows[:, ::5] *= 1e-2
    g[:, ::7] *= 30
    beta[:, 3] = 0
    return [k, v, g, beta, q]


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(name: str) -> None:
    function: Callable[..., Any] = SPELLINGS[name].function
    tracing = captured(function, tuple(drawn(name, 0)))
    order = [next(i for i, t in enumerate(drawn(name, 0)) if torch.equal(t, x)) for x in tracing.inputs]
    counts = check_mutants(
        tracing, mutants(tracing.module.graph), lambda seed: [drawn(name, 1 + seed)[i] for i in order],
        lambda a, b, kind, graph: same(a, b, TOLERANCE[kind]), GRAPHS[name], fusions="delta_rule_intra",
    )  # fmt: skip
    assert counts["mutants"] == GRAPHS[name] and counts["fused"] >= 1, counts
