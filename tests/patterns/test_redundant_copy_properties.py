"""Random programs of reads and writes: what is rewritten computes what eager computes, inputs included.

The most important test of this fusion: a write in place that should not have been one is silent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes.testing import run_fused
from tests.support.redundant_copy import run_after_passes

ROWS, COLUMNS = 12, 8
OWN: dict[str, Any] = {"fusions": "redundant_copy", "always_profitable": True}

# A region: rows a:b:step, columns c:d.
COLUMN_RANGES = [(0, 8), (0, 4), (4, 8), (2, 6)]
REGIONS = st.tuples(
    st.integers(0, ROWS - 1), st.integers(1, ROWS), st.sampled_from([1, 1, 1, 2, 3]), st.sampled_from(COLUMN_RANGES)
)
KINDS = "fill move scale add same index indexed_move join row later return clone viewed through".split()
TENSORS = st.integers(0, 2)
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), TENSORS, TENSORS, REGIONS, REGIONS), min_size=1, max_size=6)
Step = tuple[str, int, int, Any, Any]


def part(x: Tensor, region: Any) -> Tensor:
    first, last, step, (left, right) = region
    return x[min(first, last - 1) : last : step, left:right]


def fitted(source: Tensor, like: Tensor) -> Tensor:
    """A part of `source` with the shape of `like`, or as much as broadcasts to it."""
    rows = source[: like.shape[0], : like.shape[1]]
    if rows.shape[0] < like.shape[0]:
        rows = rows[:1]
    return rows if rows.shape[1] == like.shape[1] else rows[:, :1]


def program(steps: list[Step]) -> Callable[..., Any]:
    """A function of two inputs and an intermediate that runs the steps."""

    def run(a: Tensor, b: Tensor) -> list[Tensor]:
        tensors = [a, b, a @ a.new_ones(COLUMNS, COLUMNS)]
        kept: list[Tensor] = []
        results = []
        for kind, i, j, one, two in steps:
            target, source = part(tensors[i], one), part(tensors[j], two)
            if kind == "fill":
                target.copy_(a.new_full((), 2.5))
            elif kind == "move":
                target.copy_(fitted(source, target).clone())
            elif kind == "scale":
                target.copy_(fitted(source, target) * 0.5)
            elif kind == "add":
                target.add_(1)
            elif kind == "same":
                target.copy_(part(tensors[i], one))
            elif kind == "index":
                rows = torch.arange(two[0] + 1, device=a.device) % ROWS
                tensors[i].index_put_((rows,), a.new_ones(COLUMNS) * i)
            elif kind == "indexed_move":
                # On an intermediate stock's own write in place fails where the source is a part of the target.
                moved = tensors[j][4:7] * 2 if i == j == 2 else tensors[j][4:7].clone()
                tensors[i].index_put_((torch.arange(3, device=a.device),), moved)
            elif kind == "join":
                x = tensors[j]
                target.copy_(fitted(torch.cat([x[:5], x[5:]]), target))
            elif kind == "row":
                tensors[i][one[0]] = tensors[j][two[0]] + 1
            elif kind == "later":
                kept.append(source)
            elif kind == "return":
                results.append(source.sum() if one[0] % 2 else source * 2)
            elif kind == "clone":
                results.append(source.clone())
            elif kind == "viewed":
                tensors[i].view(ROWS // 2, 2, COLUMNS)[one[0] // 2, two[0] % 2] = 7.0
            else:
                tensors[i].t()[one[0] % COLUMNS, :4] = tensors[j][:4, two[0] % COLUMNS].clone()
        return results + [k.mean() for k in kept] + [tensors[2] + 0]

    return run


def inputs() -> list[Tensor]:
    values = torch.arange(2.0 * ROWS * COLUMNS).sin()
    return [v.view(ROWS, COLUMNS).clone() for v in values.chunk(2)]


Outcome = list[Tensor] | str


def outcome(run: Callable[..., Any], steps: list[Step]) -> Outcome:
    """Results and inputs after a call, and the results again after the inputs were changed: they must not alias.

    The name of the error where the call fails.
    """
    args = inputs()
    try:
        results = run(program(steps), args)
    except RuntimeError as error:
        return type(error).__name__
    after = [t.clone() for t in (*results, *args)]
    for t in args:
        t.fill_(-1)
    return after + [t.clone() for t in results]


def differ(one: list[Tensor], other: list[Tensor]) -> list[int]:
    """Which of the tensors differ."""
    pairs = enumerate(zip(one, other, strict=True))
    return [i for i, (a, b) in pairs if not torch.allclose(a, b, rtol=1e-5, atol=1e-5)]


def wrong(got: Outcome, expected: Outcome) -> list[int] | str:
    """What differs from eager: the numbers of the tensors, or the error; empty if nothing does."""
    assert not isinstance(expected, str), expected
    return got if isinstance(got, str) else differ(got, expected)


def eager(function: Callable[..., Any], args: list[Tensor]) -> Any:
    return function(*args)


def stock(function: Callable[..., Any], args: list[Tensor]) -> Any:
    return run_after_passes(function, args, fusions="none")[0]


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_the_rewritten_graph(steps: list[Step]) -> None:
    """The graph right behind our pass."""
    got = outcome(lambda f, args: run_fused(f, *args, **OWN)[0], steps)
    assert wrong(got, outcome(eager, steps)) == []


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_behind_all_passes(steps: list[Step]) -> None:
    """The graph behind all of Inductor's passes, which move and drop copies and write in place themselves."""
    reports = []

    def ours(function: Callable[..., Any], args: list[Tensor]) -> Any:
        result, report = run_after_passes(function, args, **OWN)
        reports.append(report)
        return result

    expected = outcome(eager, steps)
    found = wrong(outcome(ours, steps), expected)
    if found:
        # Stock goes wrong in the same way, and not because of what was rewritten.
        assert found == wrong(outcome(stock, steps), expected), (found, str(reports))
        assert all(report.counts["redundant_copy"] == 0 for report in reports), str(reports[0])
