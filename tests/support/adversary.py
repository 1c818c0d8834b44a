"""Graphs that differ from a fusion's in a single element or a rare value, and whether they keep their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fusion_passes.reports import Report
from fusion_passes.testing import assert_same, run_fused

Tensor = torch.Tensor
Function = Callable[..., Any]


def assert_kept(function: Function, make: Callable[[], tuple[Tensor, ...]], rtol: float = 1e-4) -> Report:
    """Results and arguments after the call are what eager gives, whatever is fused, profitable or not."""
    torch.manual_seed(0)
    args = make()
    ours, theirs = ([x.clone(memory_format=torch.preserve_format) for x in args] for _ in range(2))
    actual, report = run_fused(function, *ours, always_profitable=True)
    expected = function(*theirs)
    assert len(tree_leaves(actual)) == len(tree_leaves(expected))
    assert_same((actual, ours), (expected, theirs), rtol, rtol)
    return report
