"""Assertions for tests of fusions: what is found, what is refused and why, that meaning is kept, that an op is right.

Those of fusions trace as `torch.compile` does, apply the pass, and run the rewritten graph eagerly, with the ops'
references on CPU tensors: no code is generated, so a check takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

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


def assert_op(
    op: torch._ops.OpOverload, *args: Any, exact: Callable[..., Any] | None = None, bound: float | None = None
) -> None:
    """An op of `torch.library` is registered rightly and gives the right values, on the CPU and on the GPU if any.

    The results are compared with those of `exact`, called with the same arguments in float64; memory that the op takes
    uninitialised starts as NaN, so that an element which it does not write shows. Then `torch.library.opcheck` runs
    with all its checks, infinities and NaN among the arguments replaced by zero.

    Args:
        op: the overload, such as `torch.ops.fusion_passes.head_gate.default`.
        args: its arguments. With tensors on the CPU the op is called with the same tensors on the GPU as well.
        exact: what the op should compute; the op itself by default, which then has to take float64.
        bound: the relative error (L2 norm) that is allowed in each floating result: by default one unit in the last
            place of its dtype, or 1e-6 where that is more. Infinities and NaN must be in the same places, and other
            results equal.

    Raises:
        AssertionError: a result is wrong; the message has the place and the error.
        torch.testing._internal.optests.generate_tests.OpCheckError: the registration is wrong.
    """
    wide = tree_map_only(torch.Tensor, _widened, args)
    with torch.no_grad():
        expected = tree_leaves((op if exact is None else exact)(*wide))
    on_cpu = all(t.device.type == "cpu" for t in tree_leaves(args) if isinstance(t, torch.Tensor))
    for device in ("cpu", "cuda") if on_cpu and torch.cuda.is_available() else (None,):
        placed = args if device is None else tree_map_only(torch.Tensor, operator.methodcaller("to", device), args)
        with poisoned(), torch.no_grad():
            actual = tree_leaves(op(*placed))
        assert len(actual) == len(expected), f"{op} gives {len(actual)} results, expected {len(expected)}"
        for i, (ours, theirs) in enumerate(zip(actual, expected)):
            _assert_near(ours, theirs.to(ours.device), bound, f"result {i} of {op} on {ours.device}")
        # opcheck compares results of its own, for which NaN differs from NaN.
        torch.library.opcheck(op, tree_map_only(torch.Tensor, _finite, placed))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block torch fills memory that it hands out uninitialised: with NaN, or the largest integer."""
    memory: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    special = tensor.is_floating_point() and not bool(tensor.isfinite().all())
    return tensor.nan_to_num(0.0, 0.0, 0.0) if special else tensor


def _assert_near(actual: torch.Tensor, exact: torch.Tensor, bound: float | None, what: str) -> None:
    assert actual.shape == exact.shape, f"{what} has shape {list(actual.shape)}, expected {list(exact.shape)}"
    if not actual.is_floating_point():
        assert torch.equal(actual, exact.to(actual.dtype)), f"{what} differs"
        return
    wanted, given = exact.double(), actual.double()
    finite = wanted.isfinite()
    assert torch.equal(given.isnan(), wanted.isnan()), f"{what} is NaN at other places than expected"
    assert torch.equal(given[~finite].nan_to_num(), wanted[~finite].nan_to_num()), f"{what} has other infinities"
    error = float((given - wanted)[finite].norm() / wanted[finite].norm().clamp_min(1e-300))
    allowed = max(torch.finfo(actual.dtype).eps, 1e-6) if bound is None else bound
    assert error <= allowed, f"{what} is off by {error:.1e} (relative L2), allowed are {allowed:.1e}"
