"""Fusions from a search function: found in the forms that the overlay passes over, refused wherever values differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fusion_passes import registry, traced
from fusion_passes.fusion import Fusion
from fusion_passes.testing import assert_fuses, assert_refuses, run_fused
from tests import tracing

LIBRARY = torch.library.Library("fusion_passes_test_traced", "FRAGMENT")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh") * up


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """A threshold, and a maximum that commutes."""
    return torch.where(x > 20, x, torch.maximum(torch.tanh(x), gate))


def declared(name: str, search: Callable[..., Tensor], *inputs: Tensor, **own: Any) -> Fusion:
    """The fusion of a search function, and an op that computes it."""
    LIBRARY.define(f"{name}(Tensor a, Tensor b) -> Tensor")
    LIBRARY.impl(name, lambda a, b: search(a, b).contiguous(), "CPU")
    torch.library.register_fake(
        f"fusion_passes_test_traced::{name}", lambda a, b: torch.empty_like(search(a, b)).contiguous(), lib=LIBRARY
    )
    op = getattr(torch.ops.fusion_passes_test_traced, name).default
    return traced.fusion(name, "for tests", search, op, inputs, **own)


FUSIONS = {
    "rms_norm": declared("rms_norm", rms_norm, torch.empty(2, 8), torch.empty(8)),
    "geglu": declared("geglu", geglu, torch.empty(2, 8), torch.empty(2, 8)),
    "gated": declared("gated", gated, torch.empty(2, 8), torch.empty(2, 8)),
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fusions of this file, for the time of one test."""
    monkeypatch.setattr(registry, "_fusions", {**registry.known(), **FUSIONS})
    yield


def rows(*shape: int) -> Tensor:
    return tracing.draw(*shape)


X, Y, W = rows(3, 4, 16), rows(3, 4, 16) * 2, rows(16)

FOUND: dict[str, tuple[str, Callable[..., Any], tuple[Tensor, ...]]] = {
    "as_written": ("rms_norm", rms_norm, (X, W)),
    "commuted": ("rms_norm", lambda x, w: w * (torch.rsqrt(1e-6 + (x * x).mean(-1, keepdim=True)) * x), (X, W)),
    "flattened": ("rms_norm", lambda x, w: rms_norm(x.flatten(0, 1), w).view(x.shape), (X, W)),
    "weight_along_tokens": ("rms_norm", lambda x, w: rms_norm(x, w[:, None]), (rows(16, 16), W)),
    "weight_expanded": ("rms_norm", lambda x, w: rms_norm(x, w[None, None].expand(3, 4, 16)), (X, W)),
    "of_torch": ("rms_norm", lambda x, w: functional.rms_norm(x, (16,), w, 1e-6), (X, W)),
    "behind_a_product": ("rms_norm", lambda x, w: rms_norm(x @ x.mT, w[:4]) + 1, (X, W)),
    "scaled_before": ("rms_norm", lambda x, w: rms_norm(x * 3, w), (X, W)),
    "scaled_after": ("rms_norm", lambda x, w: rms_norm(x, w) * 3, (X, W)),
    "gelu": ("geglu", lambda a, b: b * functional.gelu(a, approximate="tanh"), (X, Y)),
    "flat_halves": ("geglu", lambda a, b: (b.flatten() * geglu(a.flatten(), torch.ones(()))).view(4, 48), (X, Y)),
    "of_one_tensor": ("geglu", lambda a: geglu(a, a), (X,)),
    "split": ("geglu", lambda a, w: geglu(*(a @ w).chunk(2, -1)), (X, rows(16, 32))),
    "constant_divided": ("geglu", lambda a, b: functional.gelu(a, approximate="tanh") / (1 / 2) * b / 2, (X, Y)),
    "maximum_commuted": ("gated", lambda x, g: torch.where(x > 20, x, torch.maximum(g, x.tanh())), (X * 9, Y)),
}

REFUSED: dict[str, tuple[str, Callable[..., Any], tuple[Tensor, ...], str]] = {
    "another_epsilon": (
        "rms_norm", lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w, (X, W), "other values"
    ),
    "another_axis": (
        "rms_norm", lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w, (X, W), "other values"
    ),
    "sum": ("rms_norm", lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w, (X, W), "looks like"),
    "two_tensors": (
        "rms_norm", lambda x, y, w: y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w, (X, Y, W),
        "looks like",
    ),
    "exact_gelu": ("geglu", lambda a, b: functional.gelu(a) * b, (X, Y), ""),
    "another_factor": (
        "geglu", lambda a, b: (y := a * 0.7978) * (torch.tanh(y) + 1) * b, (X, Y), "looks like the search function"
    ),
    "another_threshold": (
        "gated", lambda x, g: torch.where(x > 20.001, x, torch.maximum(g, x.tanh())), (X * 9, Y), "looks like"
    ),
    "scaled_threshold": (
        "gated", lambda x, g: torch.where(x * 1.0001 > 20, x, torch.maximum(g, x.tanh())), (X * 9, Y), "looks like"
    ),
    "returned_as_well": (
        "rms_norm", lambda x, w: ((n := x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * w, n), (X, W),
        "returned by the graph",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    fusion, function, args = FOUND[name]
    assert_fuses(function, *args, fusion=fusion, fusions=fusion)


@pytest.mark.parametrize("name", ["commuted", "flattened", "split"])
def test_found_with_dynamic_shapes(name: str) -> None:
    fusion, function, args = FOUND[name]
    assert_fuses(function, *args, fusion=fusion, fusions=fusion, dynamic=True)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    fusion, function, args, reason = REFUSED[name]
    assert_refuses(function, *args, fusion=fusion, fusions=fusion, reason=reason)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.mT,
        lambda b: functional.pad(b[:, :-1], (0, 1)),
        lambda b: b.tril(-1),
        lambda b: b.flip(0),
        lambda b: b.roll(1, 1),
        lambda b: torch.cat([b[1:], b[:1]]),
        lambda b: b[:1].expand(64, 64),
        lambda b: b.index_fill(0, torch.tensor([7]), 0.0),
    ],
)
def test_elements_that_were_moved_before(change: Callable[[Tensor], Tensor]) -> None:
    """The result is that of the graph, whether the moved tensor is taken for the leaf or the site is refused."""
    a, b = rows(64, 64), rows(64, 64) * 2
    result, _ = run_fused(lambda a, b: geglu(a, change(b)), a, b, fusions="geglu")
    torch.testing.assert_close(result, geglu(a, change(b)))


def test_half_precision_reads_the_half_precision_tensor() -> None:
    x, weight = X.bfloat16(), W.bfloat16()

    report = assert_fuses(rms_norm, x, weight, fusion="rms_norm", fusions="rms_norm", rtol=2e-2, atol=2e-2)
    assert report.fused[0].reason == "x [3, 4, 16], weight [16]"


def test_a_reduction_in_half_precision_is_another_function() -> None:
    def narrow(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    assert_refuses(narrow, X.bfloat16(), W.bfloat16(), fusion="rms_norm", fusions="rms_norm", reason="in another dtype")


def test_two_sites() -> None:
    _, report = run_fused(lambda x, w: rms_norm(rms_norm(x, w).cumsum(1), w), X, W, fusions="rms_norm")
    assert report.counts["rms_norm"] == 2


def test_verify_runs_the_search_functions_graph() -> None:
    assert_fuses(rms_norm, X, W, fusion="rms_norm", fusions="rms_norm", verify=True)


@pytest.mark.parametrize(
    "search, inputs, words",
    [
        (lambda x: x @ x, (torch.empty(4, 4),), r"calls aten\.mm\.default, which is not handled"),
        (lambda x: x.tanh().tril(), (torch.empty(4, 4),), r"calls prims\.iota\.default, which is not handled"),
        (lambda x: x.view(-1) * 2, (torch.empty(4),), "holds no operator to start a search from"),
        (lambda x, y: x.tanh(), (torch.empty(4), torch.empty(4)), "does not use"),
        (lambda x: (x.tanh(), x), (torch.empty(4),), "must return one tensor"),
        (lambda x, y: x.tanh() * y, (torch.empty(4),), "2 parameters, 1 example inputs"),
        (lambda x: x.tanh() * W, (torch.empty(16),), "cannot be traced: Tensor on device cpu"),
    ],
)
def test_search_functions_that_cannot_be_looked_for(
    search: Callable[..., Any], inputs: tuple[Tensor, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        traced.fusion("bad", "for tests", search, FUSIONS["geglu"].anchors[0], inputs)


def test_the_op_must_be_an_overload() -> None:
    op: Any = torch.tanh
    with pytest.raises(TypeError, match="op must be an overload such as"):
        traced.fusion("bad", "for tests", geglu, op, (torch.empty(4), torch.empty(4)))


def test_the_anchor_is_the_rarest_operator() -> None:
    names = {name: {str(anchor) for anchor in fusion.anchors} for name, fusion in FUSIONS.items()}
    assert names == {"rms_norm": {"aten.rsqrt.default"}, "geglu": {"aten.tanh.default"}, "gated": names["gated"]}
    assert names["gated"] & {"aten.tanh.default", "aten.gt.Scalar", "aten.maximum.default"}
