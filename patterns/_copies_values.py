"""What a node's value is: a window of some tensor after some writes into that tensor.

Functionalisation turns `x[a:b] = y` into a new tensor for every write, and every later view of `x` into the same chain
of views of that new tensor. `Values` folds both back into one form, so that equal content has equal descriptions.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fusion_passes.aten import arguments
from fusion_passes.patterns import _copies_windows as windows
from fusion_passes.patterns._copies_windows import Window, disjoint, known
from fusion_passes.views import axis_of, is_view

aten = torch.ops.aten

# The view that each scatter writes through.
SCATTERS: dict[Any, Any] = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
    aten.diagonal_scatter.default: aten.diagonal.default,
}
INDEX_PUTS = (aten.index_put.default, aten._unsafe_index_put.default)
CLONES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def is_write(node: object) -> bool:
    """Is it a functional write: a tensor with a part of it replaced?"""
    return isinstance(node, Node) and (node.target in SCATTERS or node.target in INDEX_PUTS)


@dataclasses.dataclass(frozen=True, eq=False)
class Write:
    """One write into a tensor.

    Attributes:
        node: the scatter or `index_put` of the graph that the write comes from.
        window: what is written, or where the indices of an `index_put` point into.
    """

    node: Node
    window: Window

    @property
    def indexed(self) -> bool:
        return self.node.target in INDEX_PUTS

    @property
    def operands(self) -> list[Node]:
        """What the write reads beside the tensor that it writes into."""
        into = self.node.args[0]
        return [node for node in self.node.all_input_nodes if node is not into]

    @property
    def source(self) -> Node:
        """The tensor that is written, without a `copy` that casts and broadcasts it as the write does."""
        source = self.node.args[2 if self.indexed else 1]
        assert isinstance(source, Node)
        behind = source.args[1] if source.target is aten.copy.default and not self.indexed else None
        same_dtype = source.meta["val"].dtype == self.node.meta["val"].dtype
        return behind if isinstance(behind, Node) and same_dtype else source


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """The content of a node: `window` of `origin`, after `writes` into `origin` in that order."""

    origin: Node
    window: Window
    writes: tuple[Write, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.window.same(Window.whole(self.origin.meta["val"].shape))


class Values:
    """The values of a graph's nodes, computed on demand and remembered until the graph changes."""

    def __init__(self) -> None:
        self._known: dict[Node, Value] = {}
        # Views that are not understood, by what they do: the same view of the same tensor is the same value.
        self._views: dict[tuple[Any, str, str], Node] = {}

    def of(self, node: Node) -> Value:
        """The value of a tensor node."""
        stack = [node]
        while stack:
            last = stack[-1]
            missing = [n for n in _operands(last) if n not in self._known] if last not in self._known else []
            if missing:
                stack += missing
                continue
            self._known.setdefault(stack.pop(), self._evaluate(last))
        return self._known[node]

    def _evaluate(self, node: Node) -> Value:
        if node in self._known:
            return self._known[node]
        value = None
        operands = [self._known[n] for n in _operands(node)]
        if node.target in SCATTERS:
            value = _scatter(node, *operands)
        elif node.target in INDEX_PUTS and operands:
            (into,) = operands
            value = dataclasses.replace(into, writes=(*into.writes, Write(node, into.window)))
        elif node.target in CLONES and operands:
            value = operands[0]
        elif node.target is aten.copy.default and operands:
            value = operands[0] if _same_form(node, node.args[1]) else None
        elif node.target is aten.cat.default and operands:
            value = _joined(node, operands)
        elif operands:
            window = windows.through(node, operands[0].window)
            value = None if window is None else dataclasses.replace(operands[0], window=window)
        return value or self._opaque(node)

    def _opaque(self, node: Node) -> Value:
        origin = node
        if node.op == "call_function" and is_view(node):
            origin = self._views.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        return _all_of(origin)


def _all_of(node: Node) -> Value:
    value = node.meta.get("val")
    return Value(node, Window.whole(value.shape if isinstance(value, torch.Tensor) else ()))


def _operands(node: Node) -> list[Node]:
    """The nodes whose values the value of `node` follows from."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return []
    found: Sequence[Any]
    if node.target in SCATTERS:
        found = node.args[:2]
    elif node.target is aten.copy.default:
        found = node.args[1:2]
    elif node.target is aten.cat.default:
        found = parts_of(node)
    elif node.target in INDEX_PUTS or node.target in CLONES:
        found = node.args[:1]
    elif is_view(node):
        source = node.args[0]
        # An element of a split is a view of what is split.
        found = [source.args[0] if node.target is operator.getitem and isinstance(source, Node) else source]
    else:
        return []
    tensors = [n for n in found if isinstance(n, Node) and isinstance(n.meta.get("val"), torch.Tensor)]
    return tensors if len(tensors) == len(found) else []


def parts_of(cat: Node) -> list[Node]:
    """The tensors that `cat` joins, without empty ones."""
    tensors, rank = arguments(cat)["tensors"], cat.meta["val"].dim()
    axis = axis_of(arguments(cat)["dim"], rank)
    return [n for n in tensors if n.meta["val"].dim() == rank and not known(n.meta["val"].shape[axis] == 0)]


def _joined(cat: Node, parts: Sequence[Value]) -> Value | None:
    first = parts[0]
    if any(part.origin is not first.origin or not _extends(part.writes, first.writes) for part in parts):
        return None
    if any(len(part.writes) != len(first.writes) for part in parts):
        return None
    window = windows.union([part.window for part in parts], axis_of(arguments(cat)["dim"], cat.meta["val"].dim()))
    return None if window is None else dataclasses.replace(first, window=window)


def _same_form(node: Node, source: Any) -> bool:
    """Does `copy` neither cast nor broadcast?"""
    a, b = node.meta["val"], source.meta["val"]
    return a.dtype == b.dtype and len(a.shape) == len(b.shape) and all(known(x == y) for x, y in zip(a.shape, b.shape))


def _scatter(node: Node, into: Value, source: Value) -> Value | None:
    call = arguments(node)
    region = windows.apply(SCATTERS[node.target], call, into.window, tuple(call["src"].meta["val"].shape))
    if region is None:
        return None
    written = Value(into.origin, region, into.writes)
    if source.origin is into.origin and source.window.same(region) and _extends(source.writes, into.writes):
        # The source is the region itself, perhaps after further writes into it.
        if all(_inside(write, written) for write in source.writes[len(into.writes) :]):
            return dataclasses.replace(into, writes=source.writes)
    if same_content(source, written):
        return into
    return dataclasses.replace(into, writes=(*into.writes, Write(node, region)))


def _extends(longer: Sequence[Write], shorter: Sequence[Write]) -> bool:
    return len(longer) >= len(shorter) and all(a is b for a, b in zip(longer, shorter))


def _inside(write: Write, region: Value) -> bool:
    """Was the write made through a view of the region, so that nothing around it changed?"""
    base = region.window.path
    return len(write.window.path) >= len(base) and all(
        a.target is b.target and _equal(a.args, b.args) for a, b in zip(base, write.window.path)
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (isinstance(a, (int, bool, type(None))) and a == b)


def same_content(a: Value, b: Value) -> bool:
    """Do two values hold the same elements, provably? Writes that miss the window do not count."""
    if a.origin is not b.origin or not a.window.same(b.window):
        return False
    longer, shorter = (a, b) if len(a.writes) >= len(b.writes) else (b, a)
    if not _extends(longer.writes, shorter.writes):
        return False
    return all(disjoint(write.window, a.window) for write in longer.writes[len(shorter.writes) :])
