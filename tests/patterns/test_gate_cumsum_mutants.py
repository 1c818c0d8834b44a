"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import gates
from tests.patterns.gate_cumsum_cases import Case
from tests.patterns.gate_cumsum_spellings import SPELLINGS
from tests.support.mutants import captured, check_mutants, mutants, same

NAMES = (
    "cast_first_log_of_one_plus_exp", "library_softplus", "logaddexp_without_bias", "stable_max_plus_log1p",
    "scale_after", "token_major_no_permute", "tail_padded", "tail_by_cat", "grouped_projection",
    "padded_token_major", "bounded_as_released", "bounded_padded_without_bias", "flat_channels_all_along",
)  # fmt: skip
PER_GRAPH = 74  # mutants that run, of about 200
# A rounding to bfloat16 may be dropped, as Inductor drops it.
TOLERANCE = collections.defaultdict(lambda: 1e-4, {"round trip through bfloat16": 2e-2, "cast target bfloat16": 2e-2})
LARGE = (60.0, 100.0, -100.0, 25.0, -25.0, 0.0)


def small(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A spelling with its own inputs: the constants of its body fix their sizes."""
    entry = SPELLINGS[name]
    assert isinstance(entry.case, Case)
    return entry.function, entry.inputs()


def draws(inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Other inputs of the same layout: raw values from -30 to 30 with outliers, small per-head values."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tensor in inputs:
        values = torch.rand(tensor.shape, generator=generator)
        if tensor.numel() > 256:
            chosen = torch.randint(16 * len(LARGE), tensor.shape, generator=generator)
            values = values * 60 - 30
            for i, large in enumerate(LARGE):
                values = torch.where(chosen == i, large, values)
        else:
            values = values * 3 - 1
        found.append(torch.empty_like(tensor).copy_(values))
    return found


def examples() -> Iterator[Any]:
    for name in NAMES:
        yield pytest.param(lambda name=name: small(name), id=name)
    yield pytest.param(lambda: (gates.gate, gates.inputs(channels=8)), id="gate_of_100_tokens")


COUNTS: collections.Counter[str] = collections.Counter()


@pytest.mark.parametrize("example", examples())
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(example: Callable[[], Any]) -> None:
    tracing = captured(*example())
    counts = check_mutants(
        tracing, mutants(tracing.module.graph), lambda seed: draws(tracing.inputs, seed),
        lambda a, b, kind, graph: same(a, b, TOLERANCE[kind]), PER_GRAPH, rounds=2, always_profitable=True,
    )  # fmt: skip
    assert counts["mutants"] == PER_GRAPH and counts["fused"] >= 1, counts
    COUNTS.update(counts)


def test_there_were_enough_mutants(request: pytest.FixtureRequest) -> None:
    wanted = len(list(examples())) + 1
    if sum(item.fspath == request.node.fspath for item in request.session.items) < wanted:
        pytest.skip("only some of the graphs were chosen")
    print(dict(COUNTS))
    assert COUNTS["mutants"] >= 1000, COUNTS
