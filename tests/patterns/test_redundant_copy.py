"""The redundant_copy fusion: found whatever the spelling, refused with a reason where the copy is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fusion_passes.reports import Report
from fusion_passes.testing import assert_same, run_fused
from tests.patterns.redundant_copy_lookalikes import LOOKALIKES
from tests.patterns.redundant_copy_spellings import SPELLINGS, arguments
from tests.support.redundant_copy import run_after_passes
from tests.support.redundant_copy_rows import ROWS, Dims, make
from tests.support.versions import not_on_2_11

OWN: dict[str, Any] = {"fusions": "redundant_copy", "always_profitable": True}


def same_as_eager(function: Callable[..., Any], args: list[Tensor], run: Callable[..., Any], **own: Any) -> Report:
    """Results and inputs are those of eager, and no result shares memory with an input unless it does in eager."""
    theirs, ours = [a.clone() for a in args], [a.clone() for a in args]
    expected = function(*theirs)
    actual, report = run(function, ours, **{**OWN, **own})
    assert_same(actual, expected)
    assert_same(ours, theirs)
    assert shared(actual, ours) <= shared(expected, theirs)
    return report


def shared(results: Any, inputs: list[Tensor]) -> set[int]:
    """Which results share memory with an input."""
    memory = {x.untyped_storage()._cdata for x in inputs}
    tensors = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
    return {i for i, x in enumerate(tensors) if x.untyped_storage()._cdata in memory}


def behind_pass(function: Callable[..., Any], args: list[Tensor], **own: Any) -> tuple[Any, Report]:
    return run_fused(function, *args, **own)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, sites = SPELLINGS[name]
    report = same_as_eager(function, arguments(), run_after_passes)
    assert report.counts["redundant_copy"] == sites, report


@pytest.mark.parametrize("name", ROWS)
def test_table(name: str) -> None:
    row = ROWS[name]
    args = make(row.inputs, Dims(tokens=4, heads=2, cache=64), dtype=torch.float32)
    report = same_as_eager(row.function, args, behind_pass)
    assert report.counts["redundant_copy"] == row.sites, report


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes(name: str) -> None:
    not_on_2_11("drops casts there and back before any pass", name == "rounded")
    function, reason = LOOKALIKES[name]
    report = same_as_eager(function, arguments(), behind_pass)
    assert report.counts["redundant_copy"] == 0, report
    reasons = [record.reason for record in (*report.refusals, *report.near_misses)]
    assert any(reason in text for text in reasons) if reason else not reasons, reasons
