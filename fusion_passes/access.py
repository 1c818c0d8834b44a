"""Which element of a leaf does an element of a node read?

The question is answered by following coordinates through views, pads, casts, copies and (broadcast) pointwise nodes,
so the answer is that of the subgraph and not of its spelling. `fusion_passes.axes` makes axes out of elements.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.axes import Atom, AxisMap, LeafAxis, fit_axes
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import Coords, axis_of, broadcast, concrete_tensors, is_view, ravel, read, unravel

__all__ = ["THROUGH", "Access", "Atom", "AxisMap", "LeafAxis", "factor_axes", "trace_access"]

aten = torch.ops.aten

# Nodes each of whose elements reads at most one element of any operand, at a place that depends on sizes alone.
THROUGH: frozenset[Any] = (
    semantics.VIEWS
    | semantics.COPIES
    | semantics.CASTS
    | frozenset(semantics.POINTWISE)
    | frozenset(semantics.TUPLES)
    | {aten.copy.default, aten.cat.default, aten.stack.default, operator.getitem}
)

_MOST_READS = 8  # different accesses to an inner node that are followed


@dataclasses.dataclass(frozen=True)
class Access:
    """The elements of a leaf that are read: `coords` (one int64 [n] per axis) where `valid` (bool [n])."""

    coords: Coords
    valid: Tensor


def trace_access(
    root: Node,
    leaf: Node,
    coords: Sequence[Tensor],
    sizes: Sizes,
    through: Collection[Any] = THROUGH,
    stop: Collection[Node] = (),
    shape: Sequence[int] | None = None,
) -> Access:
    """Which elements of `leaf` the elements `coords` (one int64 [n] per axis) of `root` read.

    Only nodes between the two are visited, each once per distinct access. Where padding hides the leaf, `valid` is
    False and the coordinates are 0.

    Args:
        through: the targets that may be followed.
        stop: nodes that are not looked into, such as the other leaves of a subgraph.
        shape: what `coords` count: a shape of as many elements as `root`'s, which is taken unless given.

    Raises:
        Unsupported: `root` does not read `leaf`, reads it through another kind of node (named in the message), or at
            two different places.
    """
    with concrete_tensors():
        return _Trace(root, leaf, sizes, through, stop, shape)(coords)


def factor_axes(
    root: Node,
    leaf: Node,
    sizes: Sizes,
    through: Collection[Any] = THROUGH,
    stop: Collection[Node] = (),
    shape: Sequence[int] | None = None,
) -> AxisMap:
    """How the axes of `leaf` are composed of the axes of `root`, for one assignment of sizes.

    `root` is seen in `shape` where that is given, a shape of as many elements as its own.

    Every axis of `root` is walked from end to end (sampled where it is longer than a few thousand), and the result is
    confirmed on random coordinates. Elements hidden by padding do not count against it.

    Raises:
        Unsupported: as for `trace_access`, or the access is not a mixed-radix composition; the message says why.
    """
    with concrete_tensors():
        trace = _Trace(root, leaf, sizes, through, stop, shape)

        def look(coords: Coords) -> tuple[Coords, Tensor]:
            access = trace(coords)
            return access.coords, access.valid

        try:
            return fit_axes(look, trace.shape, sizes.shape(leaf))
        except Unsupported as error:
            raise Unsupported(f"{leaf.name}: {error}") from error


class _Trace:
    """Coordinates carried from `root`, seen in `shape`, back to `leaf`; the nodes in between are found once."""

    def __init__(
        self, root: Node, leaf: Node, sizes: Sizes, through: Collection[Any], stop: Collection[Node],
        shape: Sequence[int] | None,
    ) -> None:  # fmt: skip
        self.root, self.leaf, self.sizes = root, leaf, sizes
        self.own = sizes.shape(root)
        self.shape = self.own if shape is None else tuple(shape)
        self.between = _between(root, leaf, frozenset(stop) - {leaf, root})
        if leaf not in self.between:
            raise Unsupported(f"{root.name} does not read {leaf.name}")
        for node in self.between[: self.between.index(leaf)]:
            if node.op != "call_function" or node.target not in through:
                raise Unsupported(f"{leaf.name} is read through {node.name} ({node.target})")

    def __call__(self, coords: Sequence[Tensor]) -> Access:
        if self.shape != self.own:
            coords = unravel(ravel(coords, self.shape), self.own)
        count = coords[0].shape if coords else torch.Size([1])
        reads: dict[Node, list[Access]] = {node: [] for node in self.between}
        reads[self.root] = [Access(list(coords), torch.ones(count, dtype=torch.bool))]
        for node in self.between:
            if node is self.leaf:
                break
            for access in reads[node]:
                for source, found in _sources(node, access, reads, self.sizes):
                    _merge(reads[source], found)
                    if len(reads[source]) > _MOST_READS:
                        raise Unsupported(f"{source.name} is read at more than {_MOST_READS} different places")
        at_leaf = reads[self.leaf]
        if len(at_leaf) > 1:
            raise Unsupported(f"{self.leaf.name} is read at two different places")
        if not at_leaf:  # it was only overwritten
            raise Unsupported(f"{self.root.name} does not read {self.leaf.name}")
        found = at_leaf[0]
        return Access([c.expand(count) for c in found.coords], found.valid.expand(count))


def _between(root: Node, leaf: Node, stop: Collection[Node]) -> list[Node]:
    """The nodes through which `root` depends on the elements of `leaf`, both included, users before inputs."""
    reaches: dict[Node, bool] = {leaf: True}
    order: list[Node] = [leaf]
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            reaches[node] = any(reaches.get(i, False) for i in node.all_input_nodes)
            if reaches[node]:
                order.append(node)
        elif node not in reaches:
            reaches[node] = False
            if _may_read(node, leaf, stop):
                stack.append((node, True))
                stack += [(i, False) for i in node.all_input_nodes]
    return order[::-1] if reaches.get(root) else []


def _may_read(node: Node, leaf: Node, stop: Collection[Node]) -> bool:
    if node in stop or node < leaf or node.target in semantics.FILLS:  # the graph is in topological order
        return False
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _sources(node: Node, access: Access, wanted: Collection[Node], sizes: Sizes) -> Iterator[tuple[Node, Access]]:
    """What one access to `node` reads of its inputs, as far as they are `wanted`."""
    if is_view(node):
        step = read(node, access.coords, sizes)
        if step.source in wanted:
            yield step.source, _masked(step.coords, access.valid, step.valid)
    elif node.target in (aten.cat.default, aten.stack.default):
        yield from _pieces(node, access, wanted, sizes)
    else:
        for operand in _operands(node):
            if operand in wanted:
                yield operand, Access(broadcast(access.coords, sizes.shape(operand)), access.valid)


def _operands(node: Node) -> list[Node]:
    if node.target is aten.copy.default:
        return [n for n in node.args[1:2] if isinstance(n, Node)]
    if node.target is operator.getitem:
        call = node.args[0]
        if not isinstance(call, Node) or call.target not in semantics.TUPLES:
            raise Unsupported(f"{node.name} is an element of {call}, whose access is not known")
        return call.all_input_nodes
    return [] if node.target in semantics.TUPLES else node.all_input_nodes


def _pieces(node: Node, access: Access, wanted: Collection[Node], sizes: Sizes) -> Iterator[tuple[Node, Access]]:
    call, rank = semantics.arguments(node), len(sizes.shape(node))
    axis, stacked = axis_of(call["dim"], rank), node.target is aten.stack.default
    begin = 0
    for piece in call["tensors"]:
        shape = sizes.shape(piece)
        length = 1 if stacked else shape[axis] if len(shape) == rank else 0
        if piece in wanted:
            moved = access.coords[axis] - begin
            before, after = access.coords[:axis], access.coords[axis + 1 :]
            coords = [*before, *after] if stacked else [*before, moved, *after]
            yield piece, _masked(coords, access.valid, (moved >= 0) & (moved < length))
        begin += length


def _masked(coords: Coords, valid: Tensor, also: Tensor | None) -> Access:
    if also is None:
        return Access(coords, valid)
    valid = valid & also
    return Access([torch.where(valid, c, 0) for c in coords], valid)


def _merge(reads: list[Access], new: Access) -> None:
    """Add an access, joined with a known one that agrees wherever both are valid."""
    for i, old in enumerate(reads):
        if old.valid is new.valid and all(a is b for a, b in zip(old.coords, new.coords, strict=True)):
            return
        both = old.valid & new.valid
        if all(torch.equal(a[both], b[both]) for a, b in _expanded(old, new)):
            coords = [torch.where(old.valid, a, torch.where(new.valid, b, 0)) for a, b in _expanded(old, new)]
            reads[i] = Access(coords, old.valid | new.valid)
            return
    reads.append(new)


def _expanded(old: Access, new: Access) -> Iterator[tuple[Tensor, Tensor]]:
    # coordinates made from those of a rank 0 node have no axis
    for a, b in zip(old.coords, new.coords, strict=True):
        yield a.expand(old.valid.shape), b.expand(old.valid.shape)
