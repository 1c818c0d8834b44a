"""What the operators of a post-grad ATen graph mean: pointwise functions, and the groups that the others fall into.

`POINTWISE` maps a target to a function on float64, bool and int64 tensors. Numbers among the arguments arrive as
zero-dimensional tensors, so that a Python float never lowers the precision of an integer operand; strings and None
arrive as they are. The caller brings the result to the class (float64, bool or int64) of the node's dtype.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.inductor_prims  # registers the prims that Inductor adds
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

aten, prims = torch.ops.aten, torch.ops.prims

Function = Callable[..., Tensor]


def real(x: Tensor) -> Tensor:
    """Floats as they are, bool and integers as float64 (torch itself would choose the default dtype)."""
    return x if x.is_floating_point() else x.double()


def _on_reals(function: Function) -> Function:
    return lambda *args: function(*map(real, args))


def _add(a: Tensor, b: Tensor, alpha: Tensor | int = 1) -> Tensor:
    return a + alpha * b


def _sub(a: Tensor, b: Tensor, alpha: Tensor | int = 1) -> Tensor:
    return a - alpha * b


def _rsub(a: Tensor, b: Tensor, alpha: Tensor | int = 1) -> Tensor:
    return b - alpha * a


def _mul(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def _div(a: Tensor, b: Tensor, rounding_mode: str | None = None) -> Tensor:
    return real(a) / real(b) if rounding_mode is None else torch.div(a, b, rounding_mode=rounding_mode)


def _prims_div(a: Tensor, b: Tensor) -> Tensor:
    integers = not (a.is_floating_point() or b.is_floating_point())
    return _div(a, b, "trunc" if integers else None)


def _clamp(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    x = x if min is None else torch.maximum(*_same(x, min))
    return x if max is None else torch.minimum(*_same(x, max))


def _same(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.result_type(a, b)
    return a.to(dtype), b.to(dtype)


def _maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(*_same(a, b))


def _minimum(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(*_same(a, b))


def _round(x: Tensor, decimals: Tensor | int = 0) -> Tensor:
    return torch.round(x, decimals=int(decimals)) if x.is_floating_point() else x


def _softplus(x: Tensor, beta: Tensor | float = 1.0, threshold: Tensor | float = 20.0) -> Tensor:
    scaled = real(x) * beta
    return torch.where(scaled > threshold, real(x), scaled.exp().log1p() / beta)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


def _leaky_relu(x: Tensor, slope: Tensor | float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def _addcmul(x: Tensor, a: Tensor, b: Tensor, value: Tensor | float = 1) -> Tensor:
    return x + value * a * b


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, value: Tensor | float = 1) -> Tensor:
    return x + value * real(a) / real(b)


def _hardtanh(x: Tensor, low: Tensor | float = -1.0, high: Tensor | float = 1.0) -> Tensor:
    return _clamp(x, torch.as_tensor(low, dtype=x.dtype), torch.as_tensor(high, dtype=x.dtype))


def _log_sigmoid(x: Tensor) -> Tensor:
    return functional.logsigmoid(real(x))


def _nan_to_num(x: Tensor, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Tensor:
    return torch.nan_to_num(x, *(None if v is None else float(v) for v in (nan, posinf, neginf)))


def _lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight.abs() < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))  # as torch does


def _identity(x: Tensor) -> Tensor:
    return x


# targets that share a name in aten and prims: one argument, computed on reals
_UNARY_REAL: dict[str, Function] = {
    name: getattr(torch, name)
    for name in (
        "exp exp2 expm1 log log1p log2 log10 sqrt rsqrt reciprocal erf erfc "
        "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh"
    ).split()
}
_UNARY: dict[str, Function] = {
    "abs": torch.abs,
    "neg": torch.neg,
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "bitwise_not": torch.bitwise_not,
}
_COMPARISONS: dict[str, Function] = {name: getattr(torch, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _pointwise() -> dict[Any, Function]:
    table: dict[Any, Function] = {
        aten.relu.default: torch.relu,
        aten.relu6.default: lambda x: x.clamp(0, 6),
        aten.leaky_relu.default: _leaky_relu,
        aten.hardtanh.default: _hardtanh,
        aten.sigmoid.default: _on_reals(torch.sigmoid),
        aten.silu.default: _on_reals(functional.silu),
        aten.gelu.default: _gelu,
        aten.softplus.default: _softplus,
        aten.square.default: torch.square,
        aten.sgn.default: torch.sign,
        aten.positive.default: _identity,
        aten.frac.default: torch.frac,
        aten.round.default: _round,
        aten.round.decimals: _round,
        prims.round.default: _round,
        aten.isnan.default: torch.isnan,
        aten.isinf.default: torch.isinf,
        aten.isfinite.default: torch.isfinite,
        prims.isfinite.default: torch.isfinite,
        aten.signbit.default: torch.signbit,
        aten.nan_to_num.default: _nan_to_num,
        aten.logical_not.default: torch.logical_not,
        aten.logaddexp.default: _on_reals(torch.logaddexp),
        aten.logaddexp2.default: _on_reals(torch.logaddexp2),
        aten.hypot.default: torch.hypot,
        aten.atan2.default: _on_reals(torch.atan2),
        aten.copysign.Tensor: torch.copysign,
        aten.copysign.Scalar: torch.copysign,
        aten.addcmul.default: _addcmul,
        aten.addcdiv.default: _addcdiv,
        aten.lerp.Tensor: _lerp,
        aten.lerp.Scalar: _lerp,
        aten.where.self: lambda mask, a, b: torch.where(mask.bool(), a, b),
        aten.where.ScalarOther: lambda mask, a, b: torch.where(mask.bool(), a, b),
        aten.where.ScalarSelf: lambda mask, a, b: torch.where(mask.bool(), a, b),
        aten.where.Scalar: lambda mask, a, b: torch.where(mask.bool(), a, b),
        prims.where.default: lambda mask, a, b: torch.where(mask.bool(), a, b),
        aten.masked_fill.Scalar: lambda x, mask, value: torch.where(mask, value.to(x.dtype), x),
        aten.masked_fill.Tensor: lambda x, mask, value: torch.where(mask, value.to(x.dtype), x),
        aten.pow.Tensor_Tensor: torch.pow,
        aten.pow.Tensor_Scalar: torch.pow,
        aten.pow.Scalar: torch.pow,
        prims.pow.default: torch.pow,
        aten.maximum.default: _maximum,
        aten.minimum.default: _minimum,
        prims.maximum.default: _maximum,
        prims.minimum.default: _minimum,
        aten.fmax.default: lambda a, b: torch.fmax(*_same(a, b)),
        aten.fmin.default: lambda a, b: torch.fmin(*_same(a, b)),
        aten.clamp.default: _clamp,
        aten.clamp.Tensor: _clamp,
        aten.clamp_min.default: _maximum,
        aten.clamp_min.Tensor: _maximum,
        aten.clamp_max.default: _minimum,
        aten.clamp_max.Tensor: _minimum,
        aten.rsub.Tensor: _rsub,
        aten.rsub.Scalar: _rsub,
        aten.floor_divide.default: torch.floor_divide,
        prims.add.default: _add,
        prims.sub.default: _sub,
        prims.mul.default: _mul,
        prims.div.default: _prims_div,
        prims.fmod.default: torch.fmod,
        prims.remainder.default: torch.remainder,
        prims.sign.default: torch.sign,
        prims.fma.default: lambda a, b, c: a * b + c,
    }
    for name, function in _UNARY_REAL.items():
        table[getattr(aten, name).default] = table[getattr(prims, name).default] = _on_reals(function)
    for name, function in _UNARY.items():
        table[getattr(aten, name).default] = table[getattr(prims, name).default] = function
    binary: dict[str, Function] = {"add": _add, "sub": _sub, "mul": _mul, "div": _div}
    binary |= {"fmod": torch.fmod, "remainder": torch.remainder}
    for name, function in (binary | _COMPARISONS).items():
        table[getattr(aten, name).Tensor] = table[getattr(aten, name).Scalar] = function
    for name, function in _COMPARISONS.items():
        table[getattr(prims, name).default] = function
    table[aten.div.Tensor_mode] = table[aten.div.Scalar_mode] = _div
    for name in ("logical_and", "logical_or", "logical_xor"):
        table[getattr(aten, name).default] = getattr(torch, name)
    return table | _bitwise()


def _bitwise() -> dict[Any, Function]:
    table: dict[Any, Function] = {}
    for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        packet = getattr(aten, f"bitwise_{name}")
        table |= dict.fromkeys((packet.Tensor, packet.Scalar, getattr(prims, f"bitwise_{name}").default), function)
    for name, function in {"left_shift": operator.lshift, "right_shift": operator.rshift}.items():
        packet = getattr(aten, f"bitwise_{name}")
        table |= dict.fromkeys((packet.Tensor, packet.Tensor_Scalar), function)
    return table


POINTWISE: dict[Any, Function] = _pointwise()

# Pointwise operators that return a tuple: the function of each element that is a plain function of the inputs.
TUPLES: dict[Any, dict[int, Function]] = {aten.log_sigmoid_forward.default: {0: _log_sigmoid}}

# Operators whose value is picked by `where`: (mask, if true, if false) as positions of the arguments.
SELECTIONS: dict[Any, tuple[int, int, int]] = {
    aten.where.self: (0, 1, 2),
    aten.where.ScalarOther: (0, 1, 2),
    aten.where.ScalarSelf: (0, 1, 2),
    aten.where.Scalar: (0, 1, 2),
    prims.where.default: (0, 1, 2),
    aten.masked_fill.Scalar: (1, 2, 0),
    aten.masked_fill.Tensor: (1, 2, 0),
}

# Conversions between dtypes; the dtype is that of the node.
CASTS: frozenset[Any] = frozenset({prims.convert_element_type.default, aten._to_copy.default})

# Same shape, same elements, row-major order kept.
COPIES: frozenset[Any] = frozenset(
    {
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.lift_fresh.default,
        prims.clone.default,
        prims.inductor_force_stride_order.default,
        prims.view_of.default,
    }
)

# Views that keep the row-major index of every element.
RESHAPES: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten._reshape_alias.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        prims.reshape.default,
        prims.squeeze.default,
    }
)

# Operators whose value is a tuple of views.
SPLITS: frozenset[Any] = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.chunk.default,
        aten.split_with_sizes_copy.default,
    }
)

# Each element is one element of the input, or a fill value: pads and triangles.
PADS: frozenset[Any] = frozenset({aten.constant_pad_nd.default, aten.tril.default, aten.triu.default})

# Each element is one element of the first argument or a fill value, at a coordinate that depends on sizes alone.
VIEWS: frozenset[Any] = (
    RESHAPES
    | SPLITS
    | PADS
    | {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.diagonal.default,
        aten.flip.default,
        prims.rev.default,
        aten.roll.default,
        aten.as_strided.default,
        aten.repeat.default,
        aten.unfold.default,
        prims.transpose.default,
        prims.broadcast_in_dim.default,
    }
)

# Uninitialised memory: poison (NaN), unless it is overwritten.
EMPTIES: frozenset[Any] = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.empty_permuted.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        prims.empty_strided.default,
        prims.empty_permuted.default,
    }
)

# The value at every element of a constant tensor: where in `args` it stands, or the value itself.
FILL_ARGUMENT: dict[Any, int] = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
    prims.scalar_tensor.default: 0,
    prims.full.default: 1,
    prims.full_like.default: 1,
}
FILL_VALUE: dict[Any, int] = {
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1),
}
RAMPS: frozenset[Any] = frozenset({prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step})

# Tensors made of no data at all; a tensor argument lends its shape only.
FILLS: frozenset[Any] = frozenset(FILL_ARGUMENT) | frozenset(FILL_VALUE) | RAMPS | EMPTIES

# target -> reduction of the last axis of a matrix
FOLDS: dict[Any, Function] = {
    aten.sum.default: lambda x: x.sum(-1),
    aten.sum.dim_IntList: lambda x: x.sum(-1),
    aten.mean.default: lambda x: x.mean(-1),
    aten.mean.dim: lambda x: x.mean(-1),
    aten.amax.default: lambda x: x.amax(-1),
    aten.amin.default: lambda x: x.amin(-1),
    aten.prod.default: lambda x: x.prod(-1),
    aten.prod.dim_int: lambda x: x.prod(-1),
    aten.any.default: lambda x: x.any(-1),
    aten.any.dim: lambda x: x.any(-1),
    aten.any.dims: lambda x: x.any(-1),
    aten.max.default: lambda x: x.amax(-1),
    aten.min.default: lambda x: x.amin(-1),
}
PRODUCTS: frozenset[Any] = frozenset({aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default})
SCANS: frozenset[Any] = frozenset({aten.cumsum.default})
REDUCTIONS: frozenset[Any] = frozenset(FOLDS) | PRODUCTS | SCANS

# A part of the first argument is replaced by the second.
SCATTERS: frozenset[Any] = frozenset({aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default})


@functools.lru_cache(maxsize=1024)
def _signature(target: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value) for a in target._schema.arguments)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator call by their names in its schema, defaults filled in."""
    signature = _signature(node.target)
    named = dict(signature)
    named.update(zip((name for name, _ in signature), node.args))
    named.update(node.kwargs)
    return named


def fill_of(node: Node) -> bool | int | float | None:
    """The number that a tensor holds at every element, where it is made of one that is known; else None."""
    number: Any = FILL_VALUE.get(node.target)
    if node.target in FILL_ARGUMENT:
        number = node.args[FILL_ARGUMENT[node.target]]
    return number if isinstance(number, (bool, int, float)) else None
