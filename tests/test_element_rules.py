"""Every operator rule of the evaluator against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_passes import aten as semantics
from fusion_passes.evaluate import Evaluator, hashed
from fusion_passes.sizes import Sizes
from tests import tracing
from tests.tracing import check, draw

aten = torch.ops.aten


def _operands(target: Any, kind: str) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by the schema of an operator: tensors of one kind, and numbers."""
    tensors = {
        "float": draw(2, 7, seed=1).double(),
        "positive": draw(2, 7, low=0.1, high=3.0, seed=1).double(),
        "unit": draw(2, 7, low=-0.9, high=0.9, seed=1).double(),
        "int": torch.arange(-6, 8).reshape(2, 7),
        "bool": torch.arange(14).reshape(2, 7) % 3 == 0,
    }
    args: list[Any] = []
    for i, argument in enumerate(target._schema.arguments):
        if argument.kwarg_only:
            break
        spec = str(argument.type)
        if spec == "Tensor" and argument.name in ("mask", "condition", "pred"):
            args.append(torch.arange(14).reshape(2, 7) % 2 == 0)
        elif spec in ("Tensor", "Optional[Tensor]"):
            rows = 2 if "prims" in str(target) else 1  # prims do not broadcast
            other = tensors[kind].flip(1)[:rows] if kind == "bool" else tensors[kind].flip(1)[:rows] * 2
            if kind == "int":
                other = torch.where(other == 0, 3, other)
            value = tensors[kind] if i == 0 else other
            args.append(value.sum() if target is aten.masked_fill.Tensor and i == 2 else value)
        elif argument.has_default_value() and "number" not in spec:
            break
        elif spec == "str":
            args.append("floor")
        else:
            args.append({"bool": True, "int": 2}.get(kind, 0.75))
    named = {"rounding_mode": "floor", "decimals": 1}
    return args, {a.name: named[a.name] for a in target._schema.arguments if a.name in named}


@pytest.mark.parametrize("target", semantics.POINTWISE, ids=str)
def test_pointwise_targets(target: Any) -> None:
    tried = 0
    for kind in ("float", "positive", "unit", "int", "bool"):
        args, kwargs = _operands(target, kind)
        try:
            expected = target(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            continue  # torch has no such operator for this kind
        node, leaves = tracing.call(target, *args, **kwargs)
        if expected.dtype != node.meta["val"].dtype:
            continue  # prims of integers, whose metadata is wrong
        if expected.is_floating_point() and expected.dtype != torch.float64:
            wide = [a.double() if isinstance(a, Tensor) and a.dtype != torch.bool else a for a in args]
            wide = [a.double() if isinstance(a, Tensor) and kind == "bool" else a for a in wide]
            expected = target(*wide, **kwargs)  # torch computes functions of integers in float32
        tracing.compare(tracing.evaluate_all(node, leaves, Sizes()), expected)
        tried += 1
    assert tried


@pytest.mark.parametrize("mode", [None, "floor", "trunc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_division_modes(mode: str | None, dtype: torch.dtype) -> None:
    a, b = torch.tensor([7, -7, 7, -7]).to(dtype), torch.tensor([2, 2, -2, -2]).to(dtype)
    node, leaves = tracing.call(aten.div.Tensor_mode, a, b, rounding_mode=mode)
    expected = torch.div(a.double(), b.double(), rounding_mode=mode)
    whole = dtype == torch.int64 and mode is not None
    tracing.compare(tracing.evaluate_all(node, leaves, Sizes()), expected.long() if whole else expected)


FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "softplus": (lambda x: F.softplus(x * 10, 2.0, 5.0), [(5, 7)]),
    "silu, gelu, erf": (lambda x: F.silu(x) + F.gelu(x) * torch.erf(x), [(5, 7)]),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), [(5, 7)]),
    "log_sigmoid": (F.logsigmoid, [(5, 7)]),
    "softmax": (lambda x: x.softmax(-1) + x.log_softmax(0), [(5, 7)]),
    "logsumexp": (lambda x: x.logsumexp(1), [(5, 7)]),
    "mixed broadcasting": (lambda x, y, z: (x * y - z) / (x.abs() + 1.5), [(2, 1, 7), (3, 1), ()]),
    "alpha": (lambda x, y: torch.add(x, y, alpha=0.3) - torch.rsub(x, y, alpha=2), [(5, 7), (7,)]),
    "addcmul": (lambda x, y: torch.addcmul(x, y, y, value=0.5) + torch.addcdiv(x, y, y.exp(), value=2), [(3,), (3,)]),
    "integer arithmetic": (
        lambda x: (x.long() // 2 * 3 % 5) + torch.arange(7) - (x.long() & 6 | 1 ^ x.long()),
        [(5, 7)],
    ),
    "true division of integers": (lambda x: x.long() / 3 + x.long().double().exp(), [(5, 7)]),
    "float scalar on integers": (lambda x: torch.arange(7) * 0.1 + x, [(5, 7)]),
    "bool arithmetic": (lambda x: (x > 0) * 2 + (x > 1) + ((x > 0) ^ (x > 1)).long().sum(), [(5, 7)]),
    "where": (lambda x, y: torch.where(x > 0, y, float("-inf")).exp(), [(5, 7), (7,)]),
    "where of two scalars": (lambda x: torch.where(x > 0, 1.0, -2.0), [(5, 7)]),
    "masked_fill": (lambda x: x.masked_fill(x > 0, -1e30), [(5, 7)]),
    "clamp": (lambda x, y: x.clamp(-1, 1) + x.clamp(min=y) + x.clamp_max(0.5) + x.clamp_min(y), [(5, 7), (7,)]),
    "full_like": (lambda x: torch.full_like(x, 2.5) + torch.zeros_like(x) + x.new_full((7,), 3.0), [(5, 7)]),
    "new and scalar tensors": (lambda x: x + x.new_ones(7) + x.new_zeros(1) + torch.scalar_tensor(0.3), [(5, 7)]),
    "arange": (lambda x: x[torch.arange(4, 0, -2)] + torch.arange(0.5, 4.0, 0.5), [(5, 7)]),
    "eye and tril": (lambda x: (x + torch.eye(5)).tril(-1) + x.triu(1) + torch.ones(5, 5).tril(), [(5, 5)]),
    "sum": (lambda x: x.sum() + x.sum(-1, keepdim=True) + x.sum((0, 2)), [(2, 3, 3)]),
    "mean, amax, amin": (lambda x: x.mean(1) + x.amax((0, 1)) - x.amin(0, keepdim=True).mean(), [(2, 3, 4)]),
    "prod and any": (lambda x: x.prod(1) + (x > 1).any(1) + (x > 2).any(), [(2, 3)]),
    "var_mean": (lambda x: torch.var_mean(x, 1, correction=0)[0] + torch.var_mean(x, 1)[1] + x.var(1), [(4, 6)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), [(4, 6), (6,), (6,)]),
    "cumsum": (lambda x: x.cumsum(1) + x.cumsum(-1).flip(0), [(2, 5, 3)]),
    "cumsum of integers": (lambda x: (x > 0).cumsum(0), [(6, 2)]),
    "cumsum of rank 0": (lambda x: x.cumsum(0), [()]),
    "mm": (lambda x, y: x @ y, [(3, 4), (4, 5)]),
    "bmm": (lambda x, y: x @ y.transpose(-1, -2), [(2, 3, 4, 5), (2, 3, 6, 5)]),
    "addmm": (lambda x, y, z: torch.addmm(z, x, y, beta=0.5, alpha=2), [(3, 4), (4, 5), (5,)]),
    "baddbmm": (lambda x, y, z: torch.baddbmm(z, x, y, beta=2, alpha=0.5), [(2, 3, 4), (2, 4, 5), (2, 3, 5)]),
    "cat": (lambda x, y: torch.cat([x, y, torch.zeros(0), x[:, :1]], -1), [(3, 4), (3, 2)]),
    "stack": (lambda x, y: torch.stack([x, y, x * 2], 1), [(3, 4), (3, 4)]),
    "index": (lambda x: x[:, torch.arange(4).reshape(2, 2) - 2] * 2, [(3, 4, 2)]),
    "index with two tensors": (lambda x: x[torch.arange(2)[:, None], :, torch.arange(3)], [(2, 3, 4)]),
    "index with adjacent tensors": (lambda x: x[:, torch.arange(2)[:, None], torch.arange(3)], [(2, 3, 4)]),
    "slice assignment": (lambda x, y: _assigned(x, y), [(4, 6), (4, 2)]),
    "strided assignment": (lambda x, y: x.slice_scatter(y, 1, 1, 6, 3), [(4, 6), (4, 2)]),
    "negative slice assignment": (lambda x, y: x.slice_scatter(y, -1, -2), [(4, 6), (4, 2)]),
    "row assignment": (lambda x, y: x.select_scatter(y, 1, -3), [(4, 6), (4,)]),
    "build by copies": (lambda x, y: _built(x, y), [(2, 3, 4), (2, 1, 2)]),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), [(2, 3)]),
    "roll, flip, diagonal": (lambda x: x.roll(1, 0).flip(1).diagonal(1), [(4, 4)]),
    "rms norm": (lambda x, w: x * torch.rsqrt(x.square().mean(-1, True) + 1e-6) * w, [(4, 6), (6,)]),
    "rope": (lambda x: torch.cat([-x[..., 3:], x[..., :3]], -1) * x.sin() + x * x.cos(), [(4, 6)]),
    "powers": (lambda x: x.abs() ** 0.5 + 2.0**x + x.abs() ** x + x**3, [(5, 7)]),
    "logaddexp": (lambda x, y: torch.logaddexp(x, y), [(5, 7), (7,)]),
    "split and unbind": (lambda x: x.split([2, 4], 1)[1].unbind(0)[2].chunk(2)[0] + 1, [(3, 6)]),
    "nan and inf": (lambda x: torch.where((x - 100).log().isnan(), (x * 0).log(), x).isinf(), [(5, 7)]),
    "inverse": (lambda x: torch.linalg.inv_ex(x + 9 * torch.eye(3))[0], [(2, 3, 3)]),
}


def _assigned(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:3] = y
    x[2] = x[1] + 1
    x[..., -1].zero_()
    return x


def _built(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(2, 3, 6)
    out[..., :4] = x
    out[..., 4:] = y
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # factories inside the functions follow
    try:
        check(function, *[x.double() for x in inputs])
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_triangular_solves(upper: bool, left: bool, unit: bool) -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(a, b, upper=upper, left=left, unitriangular=unit)

    a = draw(2, 3, 4, 4) + 4 * torch.eye(4)
    check(function, a, draw(2, 3, 4, 5) if left else draw(2, 3, 5, 4))
    check(function, a[0], draw(1, 3, 4, 1) if left else draw(1, 3, 1, 4))


def test_a_solve_does_not_read_the_other_triangle() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(a, b, upper=False, unitriangular=True)

    module = tracing.trace(function, draw(4, 4), draw(4, 2))
    a, b = tracing.placeholders(module.graph)
    asked: list[Tensor] = []

    def matrix(index: Tensor) -> Tensor:
        asked.append(index)
        return index.double()

    Evaluator({a: matrix, b: hashed(0, -1, 1)}, Sizes()).values(tracing.result(module), torch.arange(8))
    assert {(int(i) // 4, int(i) % 4) for i in torch.cat(asked)} == {(r, c) for r in range(4) for c in range(r)}
