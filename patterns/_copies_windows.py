"""Windows: which elements of a tensor a chain of views shows, in the tensor's own row-major coordinates.

Coordinates are those of values, not of memory: they mean the same whatever layout the tensor has, and however stale the
storage is that torch's fake tensors record. Sizes may be symbolic; what cannot be proven counts as unknown.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes.aten import RESHAPES, arguments
from fusion_passes.lowering import contiguous_strides
from fusion_passes.views import axis_of

aten = torch.ops.aten

# An integer or a SymInt.
Size = Any


@dataclasses.dataclass(frozen=True)
class View:
    """One view operator and its arguments after the tensor; `args` may hold nodes of symbolic sizes."""

    target: Any
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """Elements `offset + sum(i * stride)` of a tensor read as one row, and the views that lead to them."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size
    path: tuple[View, ...] = ()

    @staticmethod
    def whole(shape: Sequence[Size]) -> Window:
        """All of a tensor of that shape."""
        return Window(tuple(shape), contiguous_strides(shape), 0)

    @property
    def is_shown(self) -> bool:
        """Do views alone lead to it? A window that is the sum of others has none."""
        return all(view.target is not aten.cat.default for view in self.path)

    @property
    def repeats(self) -> bool:
        """May it show an element more than once, as `expand` does?"""
        return any(not known(n == 1) and not known(s > 0) for n, s in zip(self.shape, self.strides))

    def same(self, other: Window) -> bool:
        """Do both show the same elements at the same coordinates, provably?"""
        if len(self.shape) != len(other.shape) or not known(self.offset == other.offset):
            return False
        axes = zip(self.shape, other.shape, self.strides, other.strides)
        return all(known(n == m) and (known(n == 1) or known(s == t)) for n, m, s, t in axes)


def known(condition: Any) -> bool:
    """Is a condition on sizes true whatever they are? Adds no guard."""
    return bool(statically_known_true(condition))


def through(node: Node, window: Window) -> Window | None:
    """The window that the view `node` shows, where its source shows `window`; None where that is not provable."""
    if node.target is operator.getitem:
        return _piece(node, window)
    shape = tuple(node.meta["val"].shape)
    if node.target in RESHAPES:
        strides = reshaped_strides(window.shape, window.strides, shape)
        lengths = node.args[1] if _is_reshape(node) else _lengths(shape)
        if strides is None or lengths is None:
            return None
        # Of several reshapes in a row the last one says it all.
        before = window.path[:-1] if window.path and window.path[-1].target is aten.reshape.default else window.path
        path = (*before, View(aten.reshape.default, (lengths,)))
        return dataclasses.replace(window, shape=shape, strides=strides, path=path)
    rule = _RULES.get(node.target)
    return None if rule is None else apply(node.target, arguments(node), window, shape)


def apply(target: Any, call: dict[str, Any], window: Window, shape: Sequence[Size]) -> Window | None:
    """The window behind a view operator with the arguments `call`, whose result has the given shape."""
    moved = _RULES[target](call, window, shape)
    if moved is None:
        return None
    strides, offset, args = moved
    return Window(tuple(shape), tuple(strides), offset, (*window.path, View(target, args)))


def _is_reshape(node: Node) -> bool:
    return len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) and node.target in _WITH_SIZES


_WITH_SIZES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def _lengths(shape: Sequence[Size]) -> list[int] | None:
    """A shape as an argument: at most one symbolic size, which follows from the others."""
    lengths = [n if isinstance(n, int) else -1 for n in shape]
    return lengths if lengths.count(-1) <= 1 else None


def reshaped_strides(shape: Sequence[Size], strides: Sequence[Size], new: Sequence[Size]) -> tuple[Size, ...] | None:
    """Strides of the same elements with another shape; None where one stride per axis cannot say it."""
    axes = [(n, s) for n, s in zip(shape, strides) if not known(n == 1)]
    result: list[Size] = []
    lengths = list(new)
    while axes or lengths:
        if not lengths or (not axes and not known(lengths[0] == 1)):
            return None
        if known(lengths[0] == 1):
            result.append(1)
            lengths.pop(0)
            continue
        # The shortest runs of axes on either side with as many elements.
        old_run, new_run = [axes.pop(0)], [lengths.pop(0)]
        while not known((have := _product(old_run)) == (want := math.prod(new_run))):
            if known(have < want) and axes:
                old_run.append(axes.pop(0))
            elif known(want < have) and lengths:
                new_run.append(lengths.pop(0))
            else:
                return None
        if any(not known(a == n * b) for (_, a), (n, b) in zip(old_run, old_run[1:])):
            return None
        step = old_run[-1][1]
        result += [step * inner for inner in contiguous_strides(new_run)]
    return tuple(result)


def _product(axes: Sequence[tuple[Size, Size]]) -> Size:
    return math.prod(n for n, _ in axes)


def _value(argument: Any) -> Size:
    return argument.meta["val"] if isinstance(argument, Node) else argument


def _start(first: Any, length: Size) -> Size | None:
    """Where a slice begins, as Python clamps it; None where that depends on a symbol."""
    start = 0 if first is None else _value(first)
    if known(start < 0):
        return start + length if known(start + length >= 0) else 0 if known(start + length <= 0) else None
    if known(start >= length):
        return length
    return start if known(start >= 0) and known(start <= length) else None


Moved = tuple[Sequence[Size], Size, tuple[Any, ...]]


def _slice(call: dict[str, Any], window: Window, shape: Sequence[Size]) -> Moved | None:
    axis = axis_of(call["dim"], len(window.shape))
    start, step = _start(call["start"], window.shape[axis]), _value(call["step"])
    if start is None:
        return None
    stride = window.strides[axis]
    strides = (*window.strides[:axis], stride * step, *window.strides[axis + 1 :])
    return strides, window.offset + start * stride, (axis, call["start"], call["end"], call["step"])


def _select(call: dict[str, Any], window: Window, shape: Sequence[Size]) -> Moved | None:
    axis, index = axis_of(call["dim"], len(window.shape)), _value(call["index"])
    if known(index < 0):
        index = index + window.shape[axis]
    elif not known(index >= 0):
        return None
    strides = (*window.strides[:axis], *window.strides[axis + 1 :])
    return strides, window.offset + index * window.strides[axis], (axis, call["index"])


def _permute(call: dict[str, Any], window: Window, shape: Sequence[Size]) -> Moved:
    order = [axis_of(d, len(window.shape)) for d in call["dims"]]
    return [window.strides[axis] for axis in order], window.offset, (order,)


def _transpose(call: dict[str, Any], window: Window, shape: Sequence[Size]) -> Moved:
    strides = list(window.strides)
    if strides:
        a, b = axis_of(call["dim0"], len(strides)), axis_of(call["dim1"], len(strides))
        strides[a], strides[b] = strides[b], strides[a]
    return strides, window.offset, (call["dim0"], call["dim1"])


def _expand(call: dict[str, Any], window: Window, shape: Sequence[Size]) -> Moved:
    added = len(shape) - len(window.shape)
    pairs = zip(window.shape, window.strides, shape[added:])
    strides = [stride if known(have == want) else 0 for have, stride, want in pairs]
    return [0] * added + strides, window.offset, (list(call["size"]),)


def _diagonal(call: dict[str, Any], window: Window, shape: Sequence[Size]) -> Moved:
    rows, columns = (axis_of(call[d], len(window.shape)) for d in ("dim1", "dim2"))
    rest = [stride for axis, stride in enumerate(window.strides) if axis not in (rows, columns)]
    shift = max(-call["offset"], 0) * window.strides[rows] + max(call["offset"], 0) * window.strides[columns]
    strides = [*rest, window.strides[rows] + window.strides[columns]]
    return strides, window.offset + shift, (call["offset"], call["dim1"], call["dim2"])


_RULES: dict[Any, Callable[[dict[str, Any], Window, Sequence[Size]], Moved | None]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda call, window, shape: (window.strides[::-1], window.offset, ()),
    aten.expand.default: _expand,
    aten.diagonal.default: _diagonal,
}


def _piece(node: Node, window: Window) -> Window | None:
    """One element of a split, as the slice or selection that it is."""
    parts, which = node.args
    if not isinstance(parts, Node) or not isinstance(which, int):
        return None
    call, values = arguments(parts), parts.meta["val"]
    axis, shape = axis_of(call["dim"], len(window.shape)), tuple(values[which].shape)
    which = which % len(values)
    if parts.target is aten.unbind.int:
        return apply(aten.select.int, {"dim": axis, "index": which}, window, shape)
    start = sum(value.shape[axis] for value in values[:which])
    if not isinstance(start, int) or not isinstance(shape[axis], int):
        return None
    return apply(aten.slice.Tensor, {"dim": axis, "start": start, "end": start + shape[axis], "step": 1}, window, shape)


def union(parts: Sequence[Window], axis: int) -> Window | None:
    """The window that adjacent windows make up along an axis; None if they are not adjacent."""
    parts = [part for part in parts if not known(part.shape[axis] == 0)]
    first = parts[0]
    steps = [part.strides[axis] for part in parts if not known(part.shape[axis] == 1)]
    step = steps[0] if steps else parts[1].offset - first.offset if len(parts) > 1 else 1
    end, length = first.offset, 0
    strides = _with(first.strides, axis, step)
    for part in parts:
        if not part.same(Window(_with(first.shape, axis, part.shape[axis]), strides, end)):
            return None
        end, length = end + step * part.shape[axis], length + part.shape[axis]
    return Window(_with(first.shape, axis, length), strides, first.offset, (View(aten.cat.default, ()),))


def _with(values: tuple[Size, ...], axis: int, value: Size) -> tuple[Size, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def disjoint(a: Window, b: Window) -> bool:
    """Do two windows of one tensor have no element in common, provably?"""
    if any(known(n == 0) for n in (*a.shape, *b.shape)):
        return True
    if known(_last(a) < b.offset) or known(_last(b) < a.offset):
        return True
    numbers = (*a.shape, *a.strides, a.offset, *b.shape, *b.strides, b.offset)
    if not all(isinstance(n, int) for n in numbers):
        return False
    # Mixed radix: one digit for every stride that occurs. Boxes of digits that are apart in one digit are disjoint.
    radices = sorted({1, *(s for w in (a, b) for n, s in zip(w.shape, w.strides) if n > 1 and s)}, reverse=True)
    if any(big % small for big, small in zip(radices, radices[1:])):
        return False
    boxes = [_box(window, radices) for window in (a, b)]
    if boxes[0] is None or boxes[1] is None:
        return False
    return any(high < bottom or top < low for (low, high), (bottom, top) in zip(*boxes))


def _last(window: Window) -> Size:
    return window.offset + sum((n - 1) * s for n, s in zip(window.shape, window.strides))


def _box(window: Window, radices: Sequence[int]) -> list[tuple[int, int]] | None:
    """The range of every digit over a window; None where an axis carries from one digit into the next."""
    digits, rest = [], window.offset
    for radix in radices:
        digits.append((rest // radix, rest // radix))
        rest %= radix
    for length, stride in zip(window.shape, window.strides):
        if length == 1 or stride == 0:
            continue
        place = radices.index(stride)
        # A long axis goes on in the digits above, where it fills its own from the start.
        while length > 1:
            low, high = digits[place]
            room = radices[place - 1] // radices[place] if place else None
            if room is None or high + length - 1 < room:
                digits[place] = (low, high + length - 1)
                break
            if high or length % room:
                return None
            digits[place] = (0, room - 1)
            place, length = place - 1, length // room
    return digits
