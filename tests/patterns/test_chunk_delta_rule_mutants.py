"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.patterns.chunk_delta_rule_lookalikes import rule
from tests.patterns.chunk_delta_rule_spellings import SPELLINGS
from tests.support.delta_rule import operands
from tests.support.mutants import captured, check_mutants, mutants, same

# A rounding to bfloat16 may be dropped, as Inductor drops it.
TOLERANCE = collections.defaultdict(lambda: 1e-4, {"round trip through bfloat16": 3e-2, "cast target bfloat16": 3e-2})


def normalised(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The loop with q and k normalised, a result and the last state."""

    def unit(x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-4)

    def both(result: Tensor, state: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        return result, state

    return rule(q, k, v, g, beta, chunks=lambda p: (unit(p[0]) * 0.125, unit(p[1]), *p[2:]), result=both)


# function, sizes, mutants that run
GRAPHS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "normalised_with_state": (normalised, {"tokens": 40}, 40),
    "forward_substitution": (SPELLINGS["forward_substitution"].function, {"tokens": 24, "batch": 1}, 14),
    "heads_in_one_tensor": (SPELLINGS["powers_of_two"].function, {"tokens": 64, "batch": 1}, 40),
    "channels": (SPELLINGS["channels"].function, {"tokens": 24, "batch": 1, "per_channel": True}, 6),
}


def drawn(sizes: dict[str, Any], seed: int) -> list[Tensor]:
    """Operands with some short rows of q and k, strong decays and a beta of zero."""
    found = operands(**{"key_heads": 2, "value_heads": 2, "key": 64, "value": 64, **sizes}, seed=seed)
    for name in ("q", "k"):
        found[name][:, ::5] *= 1e-2
    found["g"][:, ::7] *= 30
    found["beta"][:, 3] = 0
    return list(found.values())


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(name: str) -> None:
    function, sizes, wanted = GRAPHS[name]
    tracing = captured(function, tuple(drawn(sizes, 0)))
    given = tracing.inputs
    order = [next(i for i, t in enumerate(drawn(sizes, 0)) if torch.equal(t, x)) for x in given]
    counts = check_mutants(
        tracing, mutants(tracing.module.graph), lambda seed: [drawn(sizes, 1 + seed)[i] for i in order],
        lambda a, b, kind, graph: same(a, b, TOLERANCE[kind]), wanted, fusions="chunk_delta_rule",
    )  # fmt: skip
    assert counts["mutants"] == wanted and counts["fused"] >= 1, counts
