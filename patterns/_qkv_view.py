"""The view [B, T, D] of a tensor whose columns are some adjacent windows of it, made of reshapes, permutes and slices.

No `as_strided`: the view means the same whatever layout Inductor gives to the tensor in the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from fusion_passes import advice
from fusion_passes.fusion import Refusal
from fusion_passes.patterns._qkv_windows import Axis, Window, head_major, rows_of, source_of_copy
from fusion_passes.rewrite import call, known_size, size
from fusion_passes.sizes import Sizes
from fusion_passes.views import is_alias

aten = torch.ops.aten

TO_THE_END = 2**63 - 1


@dataclasses.dataclass
class Part:
    """A piece of an axis of the tensor; `length` is its size as an argument of a node, -1 if unknown."""

    size: int
    stride: int
    length: int | Node


@dataclasses.dataclass
class Group:
    """Consecutive parts, outermost first, that make up an axis of the view; `start` and `size` say what is read."""

    parts: list[Part]
    size: int
    start: int = 0

    @property
    def extent(self) -> int:
        extent = 1
        for part in self.parts:
            extent *= part.size
        return extent


def columns_view(graph: Graph, root: Node, leaf: Node, proofs: Sequence[tuple[Sizes, Sequence[Window]]]) -> Node:
    """`leaf` as [B, T, D], D the columns of adjacent windows.

    Rows that are one axis for the windows are one for the result too (B = 1), unless heads stay behind them: then
    they are told apart where the tensor does.

    Args:
        graph: new nodes go to its insertion point.
        root: the tensor that the windows are views of.
        leaf: the same values with the same axes, in this memory or in another.
        proofs: the windows under each admissible assignment of sizes.

    Raises:
        Refusal: this takes a copy, or sizes that are not known.
    """
    sizes, run = proofs[0]
    wanted: list[Axis] = [*rows_of(run), (sum(w.width for w in run), run[0].step)]
    groups, others, order = _divide(graph, root, leaf, wanted, sizes)
    if len(groups) == 2 and len(groups[0].parts) == 2 and not head_major(run):
        groups[:1] = _told_apart(groups[0])
    in_memory = sorted([*groups, *others], key=lambda g: -g.parts[-1].stride)
    # The first window's place, digit by digit: how far each axis is entered.
    offset = run[0].offset
    for group in in_memory:
        stride = group.parts[-1].stride
        group.start, offset = offset // stride, offset % stride
        if group.start + group.size > group.extent:
            raise Refusal("the windows run over the end of an axis of their tensor")
    if offset:
        raise Refusal("the windows begin between two elements of their tensor's innermost axis")
    # Memory order, then one axis per group, then what is read of each.
    node = leaf if order == sorted(order) else call(graph, aten.permute.default, leaf, order)
    node = _reshaped(graph, node, [_length(group) for group in in_memory])
    for group in others:
        node = call(graph, aten.select.int, node, in_memory.index(group), group.start)
        in_memory.remove(group)
    axes = [in_memory.index(group) for group in groups]
    node = node if axes == sorted(axes) else call(graph, aten.permute.default, node, axes)
    for axis, group in enumerate(groups):
        node = _sliced(graph, node, axis, group, run, sizes)
    node = node if len(groups) == 3 else call(graph, aten.unsqueeze.default, node, 0)
    _check(node, root, leaf, proofs)
    return node


def _check(view: Node, root: Node, leaf: Node, proofs: Sequence[tuple[Sizes, Sequence[Window]]]) -> None:
    """The view shows the windows under every assignment of sizes, and costs no copy."""
    if not is_alias(view, leaf):
        raise Refusal(f"the windows of {leaf.name} cannot be read as rows of columns without a copy")
    for sizes, run in proofs:
        rows, columns = rows_of(run), (sum(w.width for w in run), run[0].step)
        (batch, tokens, last), strides = sizes.shape(view), sizes.strides(view)
        # [B, T, D] may tell batch and tokens apart where the windows do not.
        if len(rows) == 1:
            ((together, stride),) = rows
            rows = ((batch, tokens * stride), (tokens, stride)) if batch * tokens == together else ()
        wanted = [*rows, columns]
        same = [batch, tokens, last] == [n for n, _ in wanted]
        if leaf is root:
            same = same and all(n == 1 or a == b for (n, a), b in zip(wanted, strides))
            same = same and sizes.offset(view) - sizes.offset(root) == run[0].offset
        if not same:
            raise Refusal("the windows lie elsewhere for other sizes", advice.STATIC)


def _told_apart(rows: Group) -> list[Group]:
    """Two groups for rows made of two parts, where all of the inner one is read."""
    outer, inner = rows.parts
    if rows.size % inner.size:
        return [rows]
    return [Group([outer], rows.size // inner.size), Group([inner], inner.size)]


def _divide(
    graph: Graph, root: Node, leaf: Node, wanted: Sequence[Axis], sizes: Sizes
) -> tuple[list[Group], list[Group], list[int]]:
    """The parts of `root` that make up each wanted axis, those that do not, and the order of its axes in memory."""
    shape, strides = sizes.shape(root), sizes.strides(root)
    order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], -shape[axis]))
    parts: list[Part] = []
    for axis in order:
        if shape[axis] > 1:
            cuts = sorted({p for _, p in wanted if strides[axis] < p < strides[axis] * shape[axis]}, reverse=True)
            parts += _cut(graph, leaf, axis, shape[axis], strides[axis], cuts)
    groups = []
    for length, stride in wanted:
        # An axis of the view begins at the part with its stride and takes in what continues it outwards.
        inner = next((i for i, part in enumerate(parts) if part.stride == stride), None)
        if inner is None:
            raise Refusal(f"no axis of {root.name} has the stride {stride} of the windows' rows or columns")
        group = Group([parts[inner]], length)
        while group.extent < length:
            outer = parts.index(group.parts[0]) - 1
            if outer < 0 or parts[outer].stride != group.parts[0].stride * group.parts[0].size:
                raise Refusal(f"the windows read across the rows of {root.name}")
            group.parts.insert(0, parts[outer])
        groups.append(group)
    # Parts are equal where their numbers are: identity tells them apart.
    taken = [id(part) for group in groups for part in group.parts]
    if len(set(taken)) < len(taken):
        raise Refusal(f"rows and columns of the windows lie on one axis of {root.name}")
    others = [Group([part], 1) for part in parts if id(part) not in taken]
    return groups, others, order


def _cut(graph: Graph, leaf: Node, axis: int, length: int, stride: int, cuts: Sequence[int]) -> list[Part]:
    """An axis divided where the windows have strides inside of it, outermost part first."""
    whole = leaf.meta["val"].shape[axis]
    if not cuts:
        return [Part(length, stride, whole if isinstance(whole, int) else size(graph, leaf, axis))]
    found: list[Part] = []
    outer = length * stride
    for cut in [*cuts, stride]:
        if outer % cut:
            raise Refusal(f"an axis of {leaf.name} cannot be divided into rows and columns")
        # Only the outermost part of a symbolic axis is symbolic.
        known = isinstance(whole, int) or found
        found.append(Part(outer // cut, cut, outer // cut if known else -1))
        outer = cut
    return found


def _length(group: Group) -> int | Node:
    lengths = [part.length for part in group.parts]
    if len(lengths) == 1:
        return lengths[0]
    return group.extent if all(isinstance(n, int) and n > 0 for n in lengths) else -1


def _reshaped(graph: Graph, node: Node, lengths: Sequence[int | Node]) -> Node:
    shape = node.meta["val"].shape
    if len(shape) == len(lengths):
        return node
    if sum(isinstance(n, int) and n < 0 for n in lengths) > 1:
        raise Refusal(f"more than one axis of {node.name} has a size that is not known", advice.STATIC)
    return call(graph, aten.reshape.default, node, list(lengths))


def _sliced(
    graph: Graph, node: Node, axis: int, group: Group, run: Sequence[Window], sizes: Sizes
) -> Node:
    if group.size == group.extent:
        return node
    # An open end needs no symbol.
    if group.start + group.size == group.extent:
        return call(graph, aten.slice.Tensor, node, axis, group.start, TO_THE_END)
    end = _size_of_rows(graph, run, group.size, group.parts[-1].stride, sizes)
    if end is None:
        return call(graph, aten.slice.Tensor, node, axis, group.start, group.start + group.size)
    if group.start:
        raise Refusal("the windows begin and end in the middle of an axis of symbolic size", advice.STATIC)
    return call(graph, aten.slice.Tensor, node, axis, 0, end)


def _size_of_rows(graph: Graph, run: Sequence[Window], length: int, stride: int, sizes: Sizes) -> Node | None:
    """A node with the size of the windows' axis of the given stride, None where the size is a number."""
    first = min(w.copy for w in run)
    source = source_of_copy(first)
    assert source is not None
    for axis, found in enumerate(zip(sizes.shape(source), sizes.strides(source))):
        if found == (length, stride):
            symbolic = known_size(graph, source, axis)
            return symbolic if isinstance(symbolic, Node) else None
    if all(isinstance(n, int) for n in source.meta["val"].shape):
        return None
    raise Refusal("the windows read a part of several axes of symbolic size", advice.STATIC)
