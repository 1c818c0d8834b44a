"""What is done to one tensor on its way into an MLA key or value: views, copies, casts, and steps with single numbers.

Everything else ends a chain: its last node is the tensor that is read.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from fusion_passes import advice
from fusion_passes import aten as semantics
from fusion_passes.evaluate import Evaluator, constant
from fusion_passes.fusion import NearMiss, dtype_name
from fusion_passes.ops._mla_kv_pack_steps import UNBOUNDED
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import is_alias

aten = torch.ops.aten

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# What puts a tensor together from parts along an axis.
BUILDS = (aten.cat.default, aten.slice_scatter.default)

_VIEWS = (semantics.VIEWS - semantics.PADS - semantics.SPLITS) | semantics.COPIES
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
_LOWER = (aten.clamp_min.default, aten.clamp_min.Tensor, aten.maximum.default)
_UPPER = (aten.clamp_max.default, aten.clamp_max.Tensor, aten.minimum.default)
_BOTH = (aten.clamp.default, aten.hardtanh.default)
ARITHMETIC = frozenset(_PRODUCTS + _QUOTIENTS + _LOWER + _UPPER + _BOTH)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: `kind` is "*s", "/s" or "*1/s" with a scale, "*" with `low`, or "clamp" with both numbers."""

    kind: str
    low: float = 0.0
    high: float = 0.0
    scale: Node | None = None

    def __str__(self) -> str:
        if self.kind == "clamp":
            return f"clamp({self.low!r},{self.high!r})"
        return f"*{self.low!r}" if self.kind == "*" else self.kind


@dataclasses.dataclass(frozen=True)
class Chain:
    """The way from `nodes[-1]`, which is read, to `nodes[0]`, the result, and the steps in the order they are taken."""

    nodes: tuple[Node, ...]
    steps: tuple[Step, ...]

    @property
    def end(self) -> Node:
        return self.nodes[-1]


def walk(result: Node, sizes: Sizes) -> Chain:
    """Back from `result` to the first node that is no view, copy, cast or step. Builds end the chain too.

    Raises:
        NearMiss: a tensor of several elements takes part in the arithmetic.
    """
    nodes, steps = [result], list[Step]()
    while True:
        found = _before(nodes[-1], sizes)
        if found is None:
            return Chain(tuple(nodes), tuple(reversed(steps)))
        source, step = found
        steps += [step] if step is not None else []
        if nodes[-1].target is operator.getitem:
            call = nodes[-1].args[0]
            assert isinstance(call, Node)
            nodes.append(call)
        nodes.append(source)


def _before(node: Node, sizes: Sizes) -> tuple[Node, Step | None] | None:
    """The tensor that `node` is made of, and the step it takes; None where a chain ends."""
    if node.op != "call_function" or node.target in BUILDS:
        return None
    source: object = None
    if node.target is operator.getitem:
        call = node.args[0]
        source = call.args[0] if isinstance(call, Node) and call.target in semantics.SPLITS else None
    elif node.target in _VIEWS or (node.target in semantics.CASTS and _is_float(node.args[0])):
        source = node.args[0]
    elif node.target is aten.copy.default and _is_float(node.args[1]):
        source = node.args[1]
    elif node.target in ARITHMETIC:
        return _step(node, sizes)
    return (source, None) if isinstance(source, Node) else None


def _is_float(node: object) -> bool:
    return isinstance(node, Node) and node.meta["val"].dtype.is_floating_point


def is_single(node: object) -> bool:
    """Is `node` a tensor of one element, whatever the sizes?"""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and all(isinstance(n, int) and n == 1 for n in value.shape)


def _step(node: Node, sizes: Sizes) -> tuple[Node, Step | None] | None:
    """A step of one large operand and single numbers; None where it has no large operand or several."""
    call = semantics.arguments(node)
    operands = list(call.values())
    large = [arg for arg in operands if isinstance(arg, Node) and not is_single(arg)]
    if is_single(node) or not large:
        return None
    if len(large) > 1:
        scaled = large if node.target in _PRODUCTS + _QUOTIENTS else []
        small = min(scaled, key=sizes.numel, default=None)
        if small is not None and sizes.numel(small) * 8 <= sizes.numel(node):
            raise NearMiss(
                f"it is scaled by {small.name}, a tensor of shape {list(small.meta['val'].shape)}; the kernel takes "
                "one scale for the whole tensor",
                "quantize the whole tensor with one scale, of one element",
            )
        return None
    numbers = [number_or_node(arg, sizes) for arg in operands]
    others = [x for arg, x in zip(operands, numbers) if arg is not large[0]]
    if node.target in _PRODUCTS + _QUOTIENTS:
        divides = node.target in _QUOTIENTS
        if divides and operands[0] is not large[0]:
            return None
        return large[0], _factor(others[0], divides)
    low, high = _bounds(node, others)
    return (large[0], Step("clamp", low, high)) if low is not None and high is not None else None


def number_or_node(argument: object, sizes: Sizes) -> object:
    """A tensor of one element that is the same in every run as a Python number; anything else as it is."""
    if isinstance(argument, Node) and is_single(argument) and constant(argument, sizes):
        return float(Evaluator({}, sizes).values(argument, torch.zeros(1, dtype=torch.int64)))
    return argument


def _factor(other: object, divides: bool) -> Step | None:
    if isinstance(other, Node):
        base, inverted = scale_source(other)
        if inverted and divides:
            base, inverted = other, False  # x / (1 / s): the reciprocal itself is the scale
        return Step("/s" if divides else "*1/s" if inverted else "*s", scale=base)
    if not isinstance(other, (int, float)):
        raise Unsupported(f"{other} is no scale")
    # Inductor multiplies by the reciprocal of a constant divisor, and so does eager PyTorch on a GPU.
    value = float(other) if not divides else 1.0 / other if other else math.copysign(math.inf, other)
    if not math.isfinite(value):
        raise NearMiss(f"it is scaled by {value}")
    return Step("*", value) if value != 1.0 else None


def scale_source(node: Node) -> tuple[Node, bool]:
    """The tensor of one element behind views, float casts and at most one reciprocal, and whether there is one."""
    inverted = False
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        if not is_single(source) or not _is_float(source):
            break
        if node.target is aten.reciprocal.default or (node.target in _QUOTIENTS and _is_one(node.args[0])):
            if inverted:
                break
            inverted = True
        elif not (node.target in _VIEWS or node.target in semantics.CASTS or _is_times_one(node)):
            break
        node = source
    return node, inverted


def _is_one(argument: object) -> bool:
    return isinstance(argument, (int, float)) and argument == 1


def _is_times_one(node: Node) -> bool:
    return (node.target in _PRODUCTS and any(map(_is_one, node.args[:2]))) or (
        node.target in _QUOTIENTS and _is_one(node.args[1])
    )


def _bounds(node: Node, others: list[object]) -> tuple[float | None, float | None]:
    given = [x for x in others if x is not None]
    if any(isinstance(x, Node) for x in given):
        return None, None
    low, high = -UNBOUNDED, UNBOUNDED
    if node.target in _BOTH:
        call = semantics.arguments(node)
        names = ("min", "max") if node.target is aten.clamp.default else ("min_val", "max_val")
        bounds = [call[name] for name in names]
        low = low if bounds[0] is None else max(low, float(bounds[0]))
        high = high if bounds[1] is None else min(high, float(bounds[1]))
    elif node.target in _LOWER:
        low = max(low, float(given[0]))  # type: ignore[arg-type]
    else:
        high = min(high, float(given[0]))  # type: ignore[arg-type]
    return low, high


def text(steps: tuple[Step, ...], dtype: torch.dtype) -> tuple[str, Node | None]:
    """The steps as `mla_kv_pack` spells them, and their scale. A clamp that the cast implies is left out.

    Raises:
        NearMiss: more steps than the op takes.
    """
    merged: list[Step] = []
    for step in steps:
        last = merged[-1] if merged else None
        if last is not None and last.kind == step.kind == "clamp":
            low, high = max(last.low, step.low), min(last.high, step.high)
            if low > high:
                raise NearMiss(f"its bounds exclude one another: {last}, {step}")
            merged[-1] = Step("clamp", low, high)
        else:
            merged.append(step)
    if merged and merged[-1].kind == "clamp" and dtype in FLOAT8:
        largest = torch.finfo(dtype).max
        if merged[-1].low <= -largest and merged[-1].high >= largest:
            merged.pop()
    kinds = ["scale" if step.scale is not None else step.kind for step in merged]
    if len(set(kinds)) < len(kinds):
        names = ", ".join(map(str, merged))
        hint = "multiply factors with each other before they meet the key, outside of what is compiled"
        raise NearMiss(f"it takes the steps {names}; the kernel takes one scale, number and clamp", hint)
    scale = next((step.scale for step in merged if step.scale is not None), None)
    return " ".join(map(str, merged)), scale


def check_dtypes(chain: tuple[Node, ...]) -> torch.dtype:
    """The dtype of the result of a chain (first node), given that it is cast to float8 once at most, and last.

    Raises:
        NearMiss: another float8 type or a wide type on the way, or arithmetic behind the cast.
    """
    result = chain[0].meta["val"].dtype
    behind = True
    for node in chain:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            continue
        if value.dtype in FLOAT8:
            if not behind or value.dtype != result:
                raise NearMiss(f"it passes through {dtype_name(value.dtype)} before its cast to {dtype_name(result)}")
        elif value.dtype not in FLOATS:
            hint = f"compute it in {advice.listed(FLOATS)}"
            raise NearMiss(f"it is computed in {dtype_name(value.dtype)}; the kernel computes in float32", hint)
        else:
            behind = False
    return result


def aliases(chain: Chain) -> Iterator[Node]:
    """The views of what a chain reads, the last one first, the tensor itself at the end."""
    views = []
    for node in reversed(chain.nodes):
        if isinstance(node.meta["val"], torch.Tensor):
            if not is_alias(node, chain.end):
                break
            views.append(node)
    yield from reversed(views)


def repeats(node: Node) -> list[int]:
    """Axes along which all elements share their memory."""
    value = node.meta["val"]
    known = [(n, s) if isinstance(s, int) else (n, 1) for n, s in zip(value.shape, value.stride())]
    return [axis for axis, (n, stride) in enumerate(known) if stride == 0 and not (isinstance(n, int) and n == 1)]


def read_from(chain: Chain) -> Node:
    """The tensor that a kernel reads for a chain: the last view that does not repeat elements."""
    return next((node for node in aliases(chain) if not repeats(node)), chain.end)
