"""Views between the tensors of a graph and the axes [B, T, H, columns] of `mla_kv_pack`."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fusion_passes import advice, rewrite
from fusion_passes.access import AxisMap
from fusion_passes.fusion import Refusal
from fusion_passes.layout import Piece
from fusion_passes.sizes import Sizes
from fusion_passes.views import is_alias

aten = torch.ops.aten

Labels = Sequence[Sequence[Any]]

_NO_WINDOW = "an operand is read in steps that are no window of it"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The length of every label, an integer or a symbol, and the tensors at which nodes for symbols can be had."""

    known: Mapping[Hashable, Any]
    leaves: Sequence[Node]

    def node(self, graph: Graph, label: Hashable) -> Node:
        """A node for the length of a label.

        Raises:
            Refusal: no leaf has an axis of that length.
        """
        size = self.known[label]
        for leaf in self.leaves:
            for axis, other in enumerate(leaf.meta["val"].shape):
                if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                    found = rewrite.size(graph, leaf, axis)
                    assert isinstance(found, Node)
                    return found
        raise Refusal(f"the size {size} is no size of an operand", advice.STATIC)


def relabel(graph: Graph, node: Node, have: Labels, want: Labels, length: Lengths) -> Node:
    """A view of `node`, the axes of which are products of labels as in `have`, with those in `want`.

    Raises:
        Refusal: it would take a copy, or more than one size that is not known.
    """
    source = node
    flat = [label for axis in have for label in axis]
    if [[label] for label in flat] != [list(axis) for axis in have]:
        node = _reshape(graph, node, [[label] for label in flat], length)
    wanted = [label for axis in want for label in axis]
    order = [flat.index(label) for label in wanted]
    if order != sorted(order):
        node = rewrite.call(graph, aten.permute.default, node, order)
    if [[label] for label in wanted] != [list(axis) for axis in want]:
        node = _reshape(graph, node, want, length)
    if not is_alias(node, source):
        raise Refusal(f"the axes of {source.name} cannot be regrouped without a copy")
    return node


def _reshape(graph: Graph, node: Node, axes: Labels, length: Lengths) -> Node:
    symbolic = [i for i, axis in enumerate(axes) if not all(isinstance(length.known[label], int) for label in axis)]
    if any(len(axes[i]) > 1 for i in symbolic[1:]) or (len(symbolic) > 1 and len(axes[symbolic[0]]) > 1):
        raise Refusal(f"more than one size of {node.name} is not known", advice.STATIC)
    lengths: list[int | Node] = []
    for i, axis in enumerate(axes):
        if i not in symbolic:
            lengths.append(torch.Size([length.known[label] for label in axis]).numel())
        else:
            lengths.append(-1 if len(symbolic) == 1 else length.node(graph, axis[0]))
    return rewrite.call(graph, aten.reshape.default, node, lengths)


def window(
    graph: Graph, leaf: Node, axes: AxisMap, pieces: Mapping[int, Sequence[Piece]], groups: Sequence[Sequence[Piece]],
    length: Lengths,
) -> Node:  # fmt: skip
    """A view of `leaf` whose axes are `groups` of pieces of the frame's axes (none: size 1).

    Raises:
        Refusal: the leaf is read in steps that views do not express.
    """
    node, have = leaf, []
    axis = 0
    for leaf_axis, composition in enumerate(axes.axes):
        terms = _terms(axes, leaf_axis, pieces)
        if not terms:
            node = rewrite.call(graph, aten.select.int, node, axis, composition.offset)
            continue
        node = _cut(graph, node, axis, terms, composition.offset, axes.leaf_shape[leaf_axis])
        have += [[piece] for piece, _ in terms]
        axis += len(terms)
    return relabel(graph, node, have, groups, length)


def _terms(axes: AxisMap, leaf_axis: int, pieces: Mapping[int, Sequence[Piece]]) -> list[tuple[Piece, int]]:
    """The pieces that a leaf axis is composed of, outermost first, with their steps."""
    found = []
    for index, coefficient in axes.axes[leaf_axis].terms:
        atom = axes.atoms[index]
        for piece in pieces[atom.root_axis]:
            if atom.root_stride <= piece.stride < atom.root_stride * atom.size:
                found.append((piece, coefficient * (piece.stride // atom.root_stride)))
    return sorted(found, key=lambda term: -term[1])


def _cut(graph: Graph, node: Node, axis: int, terms: list[tuple[Piece, int]], offset: int, total: int) -> Node:
    """`node` with an axis of `total` replaced by one axis for each term, a window of it where it is longer."""
    steps = [step for _, step in terms]
    if steps == [1] and offset == 0 and total == terms[0][0].size:
        return node
    if steps[-1] < 1 or any(a % b for a, b in zip(steps, steps[1:])) or total % steps[0]:
        raise Refusal(_NO_WINDOW)
    inner = [steps[-1]] if steps[-1] > 1 else []
    radices = [total // steps[0], *(a // b for a, b in zip(steps, steps[1:])), *inner]
    if not isinstance(node.meta["val"].shape[axis], int):
        if terms[0][0].size != radices[0]:
            raise Refusal(_NO_WINDOW)
        outer: list[int] = [-1]
    else:
        outer = radices[:1]
    rank = len(node.meta["val"].shape)
    if len(radices) > 1:
        before = [rewrite.size(graph, node, i) for i in range(axis)]
        behind = [rewrite.size(graph, node, i) for i in range(axis + 1, rank)]
        node = rewrite.call(graph, aten.reshape.default, node, [*before, *outer, *radices[1:], *behind])
    for i, (piece, step) in enumerate(terms):
        first, offset = divmod(offset, step)
        if first + piece.size > radices[i]:
            raise Refusal(_NO_WINDOW)
        if piece.size < radices[i]:
            node = rewrite.call(graph, aten.slice.Tensor, node, axis + i, first, first + piece.size)
    if inner:
        node = rewrite.call(graph, aten.select.int, node, axis + len(terms), offset)
    return node


def memory_steps(leaf: Node, axes: AxisMap, pieces: Mapping[int, Sequence[Piece]], sizes: Sizes) -> dict[Piece, int]:
    """How far, in elements of memory, one step of each piece moves what is read in the leaf."""
    found: dict[Piece, int] = {}
    for leaf_axis, stride in enumerate(sizes.strides(leaf)):
        for piece, step in _terms(axes, leaf_axis, pieces):
            found[piece] = found.get(piece, 0) + step * stride
    return found


def composed(axes: AxisMap) -> list[list[int]] | None:
    """The digits of each leaf axis by their index, outermost first; None unless all of the leaf is read in order."""
    found: list[list[int]] = []
    for total, composition in zip(axes.leaf_shape, axes.axes):
        expected = 1
        for index, coefficient in reversed(composition.terms):
            if coefficient != expected:
                return None
            expected *= axes.atoms[index].size
        if expected != total or composition.offset:
            return None
        found.append([index for index, _ in composition.terms])
    flat = [index for axis in found for index in axis]
    return found if sorted(flat) == list(range(len(axes.atoms))) else None


def per_root_axis(axes: AxisMap) -> list[list[int]]:
    """The digits of each root axis by their index, outermost first."""
    return [[i for i, atom in enumerate(axes.atoms) if atom.root_axis == axis] for axis in range(len(axes.root_shape))]
