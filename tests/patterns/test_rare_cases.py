"""Subgraphs that differ from a fusion's in one element, or for values that random draws hardly ever have."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.support.adversary import Function, assert_kept

INF = math.inf

# --- head_gate: rows x, weights ---------------------------------------------------------------------------------------

TOKENS, HEADS, COLUMNS = 512, 8, 256
SCALE = HEADS**-0.5


def rows() -> tuple[Tensor, ...]:
    return torch.randn(TOKENS, COLUMNS), torch.randn(HEADS, COLUMNS) * COLUMNS**-0.5


def gate(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight) * SCALE


def only_token(index: int, there: float, elsewhere: float) -> Tensor:
    return torch.where(torch.arange(TOKENS) == index, there, elsewhere)[:, None]


def one_element(there: float) -> Tensor:
    chosen = (torch.arange(TOKENS) == 123)[:, None] & (torch.arange(HEADS) == 3)
    return torch.where(chosen, there, 1.0)


GATES: dict[str, Function] = {
    "one_token_hidden": lambda x, w: functional.linear(x, w) * only_token(123, 0.0, SCALE),
    "last_token_hidden": lambda x, w: functional.linear(x, w) * only_token(TOKENS - 1, 0.0, SCALE),
    "one_element_doubled": lambda x, w: functional.linear(x, w) * SCALE * one_element(2.0),
    "one_token_shifted": lambda x, w: gate(x, w) + only_token(77, 1.0, 0.0),
    "bounded_far_away": lambda x, w: (gate(x, w) * 1e4).clamp(max=2e4),
}


@pytest.mark.parametrize("name", GATES)
def test_head_gates(name: str) -> None:
    assert_kept(GATES[name], rows)


# --- index_score: q, k, w ---------------------------------------------------------------------------------------------

S, T, H, D = 6, 300, 8, 16


def large() -> tuple[Tensor, ...]:
    return torch.randn(S, H, D) * 4, torch.randn(T, D) * 4, torch.randn(S, H)


def with_nan() -> tuple[Tensor, ...]:
    q, k, w = large()
    q[2, 1, 5] = math.nan
    return q, k, w


def scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return ((q @ k.T).relu() * w[..., None]).sum(1)


def sorted_all(x: Tensor) -> Tensor:
    return x.topk(x.shape[-1]).values


def without_one(x: Tensor, query: int = 3, key: int = 123) -> Tensor:
    """Zero for one query and key, put together from slices."""
    row = x[query : query + 1]
    row = torch.cat([row[..., :key], torch.zeros_like(row[..., :1]), row[..., key + 1 :]], -1)
    return torch.cat([x[:query], row, x[query + 1 :]], 0)


def within(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where((x > low) & (x < high), 0.0, x)


def scores_of_bits(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Positions in int32 that wrap around."""
    last = 2**31 - 1
    keys = torch.arange(T, dtype=torch.int32) + (last - 200)
    queries = torch.arange(S, dtype=torch.int32) + (last - 100)
    return scores(q, k, w).masked_fill(keys[None] > queries[:, None], -INF)


INDEXERS: dict[str, Function] = {
    "bounded_above": lambda q, k, w: scores(q, k, w).clamp(max=10.0),
    "bounded_below": lambda q, k, w: scores(q, k, w).clamp(min=-100.0),
    "without_nan": lambda q, k, w: torch.nan_to_num(scores(q, k, w)),
    "band_of_zeros": lambda q, k, w: within(50.0, 500.0)(scores(q, k, w)),
    "bounded_with_a_factor_per_key": lambda q, k, w: (scores(q, k, w) * k[:, 0].sigmoid()).clamp(max=15.0),
    "masked_then_bounded": lambda q, k, w: (
        scores(q, k, w).masked_fill(torch.arange(T) % 2 == 0, -1e4).clamp(-1e4, 20.0)),
    "one_product_hidden": lambda q, k, w: (without_one((q @ k.T).relu()) * w[..., None]).sum(1),
    "one_score_hidden": lambda q, k, w: without_one(scores(q, k, w)),
    "mask_with_one_more_element": lambda q, k, w: scores(q, k, w).masked_fill(
        (torch.arange(T)[None] > torch.arange(S)[:, None] + T - S)
        | ((torch.arange(T)[None] == 7) & (torch.arange(S)[:, None] == 3)), -INF),
    "mask_of_wrapping_positions": scores_of_bits,
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXERS)
def test_index_scores(name: str) -> None:
    function = INDEXERS[name]
    report = assert_kept(lambda q, k, w: sorted_all(function(q, k, w)), with_nan if name == "without_nan" else large)
    # What resembles one up to the mask may be fused up to there.
    assert report.counts["index_score"] == (name != "one_product_hidden"), report


# --- redundant_copy: x rotated in place by cos and sin ----------------------------------------------------------------

ROTATED = (2, 8, 3, 16)
HALF = ROTATED[-1] // 2


def angles() -> tuple[Tensor, ...]:
    x = torch.randn(ROTATED)
    x[0, 2, 1, 3] = math.nan
    return x, torch.randn(ROTATED[1], 1, HALF), torch.randn(ROTATED[1], 1, HALF)


def rotated(change: Callable[[Tensor], Tensor]) -> Function:
    """Rotary embedding in place, the first numbers of all pairs changed somehow."""

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., :HALF].clone(), x[..., HALF:].clone()
        x[..., :HALF] = change(a * cos - b * sin)
        x[..., HALF:] = b * cos + a * sin
        return x * 1

    return run


def without_one_pair(x: Tensor) -> Tensor:
    row = x[:1, 5:6]
    row = torch.cat([row[..., :3], row[..., 3:4] * 0, row[..., 4:]], -1)
    return torch.cat([torch.cat([x[:1, :5], row, x[:1, 6:]], 1), x[1:]], 0)


ROTATIONS: dict[str, Function] = {
    "without_nan": rotated(torch.nan_to_num),
    "small_ones_hidden": rotated(lambda x: torch.where(x.abs() < 1e-2, 0.0, x)),
    "bounded": rotated(lambda x: (x * 1e5).clamp(-1e5, 1e5) / 1e5),
    "one_pair_hidden": rotated(without_one_pair),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_in_place(name: str) -> None:
    report = assert_kept(ROTATIONS[name], angles)
    assert not any("rotated" in record.reason for record in report.fused), report


def test_tables_that_the_graph_computes_are_factors() -> None:
    """Constants that differ from place to place, and are drawn as leaves."""

    def run(x: Tensor) -> Tensor:
        angle = torch.arange(ROTATED[1])[:, None, None] * 10000.0 ** (-torch.arange(HALF) / HALF)
        return rotated(lambda y: y)(x, angle.cos(), angle.sin())

    report = assert_kept(run, lambda: angles()[:1])
    assert any("rotated" in record.reason for record in report.fused), report
