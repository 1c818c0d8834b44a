"""Assertions for tests of fusions: what is found, what is refused and why, and that meaning is kept.

They trace as `torch.compile` does, apply the pass, and run the rewritten graph eagerly, with the ops' references on
CPU tensors: no code is generated, so a check takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fusion_passes.explanation import tracing_backend
from fusion_passes.graph_pass import FusionPass
from fusion_passes.reports import Report
from fusion_passes.settings import snapshot


def run_fused(f: Callable[..., Any], *args: Any, dynamic: bool | None = None, **own: Any) -> tuple[Any, Report]:
    """The result of `f(*args)` with the pass applied to its graphs, and the report.

    Args:
        f: a function or module.
        args: its arguments; modules may have parameters on the CPU or a GPU.
        dynamic: as for `torch.compile`.
        own: settings by their short names, such as `fusions="gate_cumsum"`. `strict` is on unless given.
    """
    settings = snapshot({"strict": True, "reference_on_cpu": True, **own})
    explained = FusionPass(settings)
    torch._dynamo.reset()
    try:
        backend = tracing_backend(explained, run_rewritten=True)
        result = torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    finally:
        torch._dynamo.reset()
    return result, Report(tuple(explained.found))


def assert_fuses(
    f: Callable[..., Any], *args: Any, fusion: str, count: int = 1, rtol: float = 1e-5, atol: float = 1e-5, **own: Any
) -> Report:
    """`fusion` is found `count` times in `f(*args)`, and the rewritten graph gives what eager gives.

    Tolerances are relative to the largest absolute value of each result. Returns the report.

    Raises:
        AssertionError: another number of sites, or another result; the message holds the report.
    """
    expected = f(*args)
    actual, report = run_fused(f, *args, **own)
    assert report.counts[fusion] == count, f"expected {count} x {fusion}:\n{report}"
    assert_same(actual, expected, rtol, atol)
    return report


def assert_refuses(f: Callable[..., Any], *args: Any, fusion: str, reason: str = "", **own: Any) -> Report:
    """`fusion` is not found in `f(*args)`, and a refusal or near miss of it says `reason` (a part of the text).

    Without `reason` none has to be recorded: the graph may hold no anchor at all. Returns the report.

    Raises:
        AssertionError: a site was fused, or no recorded reason holds the text; the message holds the report.
    """
    _, report = run_fused(f, *args, **own)
    assert report.counts[fusion] == 0, f"{fusion} must not be found:\n{report}"
    reasons = [r.reason for r in (*report.refusals, *report.near_misses) if r.fusion == fusion]
    assert not reason or any(reason in text for text in reasons), f"no reason says {reason!r}:\n{report}"
    return report


def assert_same(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Two results are equal to rounding; tolerances are relative to the largest absolute value of each tensor."""
    pairs = list(zip(tree_leaves(actual), tree_leaves(expected)))
    assert len(tree_leaves(actual)) == len(tree_leaves(expected))
    for a, b in pairs:
        if isinstance(b, torch.Tensor):
            largest = float(b.detach().double().nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(largest, 1e-30), equal_nan=True)
