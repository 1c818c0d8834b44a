"""View algebra by coordinates: which element of its source does an element of a view show?

Coordinates are lists with one int64 tensor per axis, all of equal length: one entry per element asked for. Only the
sizes in the FakeTensor metadata and the arguments of the call are read, so the answer holds for views that copy
(`repeat`, `clone`, a reshape of a transposed tensor) as well as for those that share memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from fusion_passes.aten import COPIES, PADS, RESHAPES, SPLITS, arguments
from fusion_passes.sizes import Sizes, Unsupported

aten, prims = torch.ops.aten, torch.ops.prims

Coords = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Step:
    """Where the elements of a view come from.

    Attributes:
        source: the node that is viewed.
        coords: coordinates in `source`; meaningless where `valid` is False.
        valid: where the element exists in `source`; None means everywhere.
        fill: the value where `valid` is False; None where nothing is filled.
    """

    source: Node
    coords: Coords
    valid: Tensor | None = None
    fill: float | None = None


def step(node: Node, coords: Sequence[Tensor], sizes: Sizes) -> Step:
    """What the elements `coords` of a view, pad or copy show, one node further back.

    Raises:
        Unsupported: `node` is not a view, or its arguments depend on data.
    """
    with concrete_tensors():
        return read(node, coords, sizes)


def read(node: Node, coords: Sequence[Tensor], sizes: Sizes) -> Step:
    """`step` for callers that are inside `concrete_tensors` already."""
    coords = list(coords)
    if node.target is operator.getitem:
        return _split(node, coords, sizes)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or node.op != "call_function" or node.target in SPLITS:
        raise Unsupported(f"{node.name} ({node.target}) is not a view")
    if node.target in COPIES:
        return Step(source, coords)
    if node.target in RESHAPES:
        return Step(source, unravel(ravel(coords, sizes.shape(node)), sizes.shape(source)))
    call = arguments(node)
    if node.target in PADS:
        moved, valid = _PAD_RULES[node.target](call, coords, sizes.shape(source), sizes)
        return Step(source, moved, valid, sizes.of(call.get("value", 0)))
    rule = _RULES.get(node.target)
    if rule is None:
        raise Unsupported(f"{node.name} ({node.target}) is not a view")
    return Step(source, rule(call, coords, sizes.shape(source), sizes))


def is_view(node: Node) -> bool:
    """Can `step` go through this node?"""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and node.args[0].target in SPLITS
    return node.target in COPIES or node.target in RESHAPES or node.target in PADS or node.target in _RULES


def is_alias(node: Node, other: Node) -> bool:
    """Do the FakeTensors of both nodes share one storage, so that reading one costs no copy of the other?"""
    a, b = node.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def ravel(coords: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Row-major index of coordinates; for rank 0 a zero without axes, which broadcasts."""
    index = torch.zeros((), dtype=torch.int64)
    for coordinate, size in zip(coords, shape, strict=True):
        index = index * size + coordinate
    return index


def unravel(index: Tensor, shape: Sequence[int]) -> Coords:
    """Coordinates of row-major indices."""
    coords: Coords = []
    for size in reversed(shape):
        coords.append(index % size if size else index)
        index = index // size if size else index
    return coords[::-1]


def broadcast(coords: Sequence[Tensor], shape: Sequence[int]) -> Coords:
    """Coordinates in an operand of the given shape, from coordinates in the result it is broadcast to."""
    tail = coords[len(coords) - len(shape) :]
    return [c if size != 1 else torch.zeros_like(c) for c, size in zip(tail, shape, strict=True)]


@contextlib.contextmanager
def concrete_tensors() -> Iterator[None]:
    """Real CPU tensors inside, also while Inductor runs its passes under a FakeTensorMode or a default device."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def axis_of(dim: int, rank: int) -> int:
    """A possibly negative axis as one counted from the front."""
    return dim + rank if dim < 0 else dim


def slice_start(start: Any, size: int, sizes: Sizes) -> int:
    """The first position of a slice `start:` of an axis, with the clamping that Python and ATen agree on."""
    first = 0 if start is None else sizes.of(start)
    return min(max(first + size, 0) if first < 0 else first, size)


def _constant(value: int, coords: Coords) -> Tensor:
    return torch.full_like(coords[0], value) if coords else torch.tensor(value)


def _split(node: Node, coords: Coords, sizes: Sizes) -> Step:
    parts, which = node.args
    if not isinstance(parts, Node) or parts.target not in SPLITS or not isinstance(which, int):
        raise Unsupported(f"{node.name} is an element of {parts}, which is not a split")
    source = parts.args[0]
    assert isinstance(source, Node)
    axis = axis_of(arguments(parts)["dim"], len(sizes.shape(source)))
    values = parts.meta["val"]
    which = which % len(values)
    if parts.target is aten.unbind.int:
        return Step(source, coords[:axis] + [_constant(which, coords)] + coords[axis:])
    begin = sum(sizes.of(v.shape[axis]) for v in values[:which])
    return Step(source, coords[:axis] + [coords[axis] + begin] + coords[axis + 1 :])


def _permute(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    order = [axis_of(d, len(shape)) for d in call.get("dims", call.get("permutation", ()))]
    return [coords[order.index(axis)] for axis in range(len(shape))]


def _transpose(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    if shape:
        a, b = axis_of(call["dim0"], len(shape)), axis_of(call["dim1"], len(shape))
        coords[a], coords[b] = coords[b], coords[a]
    return coords


def _expand(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    return broadcast(coords, shape)


def _broadcast_in_dim(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    return broadcast([coords[d] for d in call["broadcast_dimensions"]], shape)


def _slice(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    axis = axis_of(call["dim"], len(shape))
    coords[axis] = slice_start(call["start"], shape[axis], sizes) + sizes.of(call["step"]) * coords[axis]
    return coords


def _select(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    axis = axis_of(call["dim"], len(shape))
    position = axis_of(sizes.of(call["index"]), shape[axis])
    return coords[:axis] + [_constant(position, coords)] + coords[axis:]


def _diagonal(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    rows, columns = axis_of(call["dim1"], len(shape)), axis_of(call["dim2"], len(shape))
    *others, along = coords
    moved = {rows: along + max(-call["offset"], 0), columns: along + max(call["offset"], 0)}
    rest = iter(others)
    return [moved[axis] if axis in moved else next(rest) for axis in range(len(shape))]


def _flip(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    flipped = {axis_of(d, len(shape)) for d in call["dims"]}
    return [size - 1 - c if axis in flipped else c for axis, (c, size) in enumerate(zip(coords, shape))]


def _roll(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    shifts, dims = call["shifts"], call["dims"]
    shifts = [sizes.of(s) for s in (shifts if isinstance(shifts, (list, tuple)) else [shifts])]
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if not dims:  # the tensor is rolled as if it were flat
        return unravel((ravel(coords, shape) - shifts[0]) % max(math.prod(shape), 1), shape)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = axis_of(dim, len(shape))
        coords[axis] = (coords[axis] - shift) % max(shape[axis], 1)
    return coords


def _repeat(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    tail = coords[len(coords) - len(shape) :]
    return [c % max(size, 1) for c, size in zip(tail, shape)]


def _unfold(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    *outer, within = coords
    if not shape:
        return []
    axis = axis_of(call["dimension"], len(shape))
    outer[axis] = outer[axis] * call["step"] + within
    return outer


def _as_strided(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> Coords:
    source = call["self"]
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(n > 1 and have != want for n, have, want in zip(shape, sizes.strides(source), expected)):
        raise Unsupported(f"as_strided reads {source.name}, which is not contiguous")
    offset = call["storage_offset"]
    index = torch.tensor(0 if offset is None else sizes.of(offset) - sizes.offset(source))
    for coordinate, stride in zip(coords, call["stride"], strict=True):
        index = index + coordinate * sizes.of(stride)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < math.prod(shape):
        raise Unsupported(f"as_strided reads memory outside of {source.name}")
    return unravel(index, shape)


def _pad(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> tuple[Coords, Tensor]:
    valid = _constant(1, coords).bool()
    for i, before in enumerate(call["pad"][::2]):  # (before, after) pairs, the last axis first
        axis = len(shape) - 1 - i
        coords[axis] = coords[axis] - sizes.of(before)
        valid = valid & (coords[axis] >= 0) & (coords[axis] < shape[axis])
    return coords, valid


def _tril(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> tuple[Coords, Tensor]:
    return coords, coords[-1] - coords[-2] <= sizes.of(call["diagonal"])


def _triu(call: dict[str, Any], coords: Coords, shape: Sequence[int], sizes: Sizes) -> tuple[Coords, Tensor]:
    return coords, coords[-1] - coords[-2] >= sizes.of(call["diagonal"])


_RULES: dict[Any, Callable[[dict[str, Any], Coords, Sequence[int], Sizes], Coords]] = {
    aten.permute.default: _permute,
    prims.transpose.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda call, coords, shape, sizes: coords[::-1],
    aten.expand.default: _expand,
    prims.broadcast_in_dim.default: _broadcast_in_dim,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.diagonal.default: _diagonal,
    aten.flip.default: _flip,
    prims.rev.default: _flip,
    aten.roll.default: _roll,
    aten.repeat.default: _repeat,
    aten.unfold.default: _unfold,
    aten.as_strided.default: _as_strided,
}
_PAD_RULES: dict[Any, Callable[[dict[str, Any], Coords, Sequence[int], Sizes], tuple[Coords, Tensor]]] = {
    aten.constant_pad_nd.default: _pad,
    aten.tril.default: _tril,
    aten.triu.default: _triu,
}
