"""Reading a leaf in the axis order that an op wants, with views alone.

`factor_axes` says how the axes of a leaf are composed of the axes of the node under study. Here that knowledge is
made comparable between leaves (`refine`), and turned into a reshape and a permutation (`arrange`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from fusion_passes import advice
from fusion_passes.access import AxisMap
from fusion_passes.fusion import Refusal
from fusion_passes.rewrite import call, size
from fusion_passes.sizes import Sizes
from fusion_passes.views import is_alias

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, order=True)
class Piece:
    """A factor of an axis: coordinate // stride % size, where `axis` counts the axes of the root.

    `static` tells whether the size is the same for every admissible assignment of sizes.
    """

    axis: int
    stride: int
    size: int
    static: bool


def refine(maps: Sequence[AxisMap], root: Node, sizes: Sizes) -> dict[int, list[Piece]]:
    """The coarsest common factors of every root axis, outermost first, such that each map is made of whole ones.

    Raises:
        Refusal: two leaves cut an axis at places that do not divide one another.
    """
    static = [isinstance(length, int) for length in root.meta["val"].shape]
    return refine_shape(maps, sizes.shape(root), static)


def refine_shape(maps: Sequence[AxisMap], shape: Sequence[int], static: Sequence[bool]) -> dict[int, list[Piece]]:
    """`refine` for axes that need not be those of a node; `static` tells which lengths never change.

    Raises:
        Refusal: as for `refine`.
    """
    pieces: dict[int, list[Piece]] = {}
    for axis, length in enumerate(shape):
        cuts = {1, length} | {a.root_stride for m in maps for a in m.atoms if a.root_axis == axis}
        cuts |= {a.root_stride * a.size for m in maps for a in m.atoms if a.root_axis == axis}
        ordered = sorted(cuts)
        for small, large in zip(ordered, ordered[1:]):
            if large % small:
                raise Refusal(f"its operands divide an axis of size {length} at {small} and at {large}")
        if not static[axis] and len(ordered) > 2:
            raise Refusal("an axis of symbolic size is divided", advice.STATIC)
        inner_first = [Piece(axis, small, large // small, static[axis]) for small, large in zip(ordered, ordered[1:])]
        pieces[axis] = inner_first[::-1]
    return pieces


@dataclasses.dataclass(frozen=True)
class SubAxis:
    """A part of a leaf axis: one piece, or a run of pieces that an op takes as one (`pieces` outermost first)."""

    leaf_axis: int
    pieces: tuple[Piece, ...]
    whole: bool  # it is all of the leaf axis


def sub_axes(axis_map: AxisMap, pieces: dict[int, list[Piece]], runs: Sequence[frozenset[int]] = ()) -> list[SubAxis]:
    """The parts of the leaf's axes in their order, each a single piece or a run over the root axes of `runs`."""
    found: list[SubAxis] = []
    for leaf_axis, composition in enumerate(axis_map.axes):
        parts: list[list[Piece]] = []
        for index, _ in composition.terms:
            atom = axis_map.atoms[index]
            inside = [p for p in pieces[atom.root_axis] if atom.root_stride <= p.stride < atom.root_stride * atom.size]
            for piece in inside:
                joins = any(parts and piece.axis in run and parts[-1][-1].axis in run for run in runs)
                if joins:
                    parts[-1].append(piece)
                else:
                    parts.append([piece])
        found += [SubAxis(leaf_axis, tuple(part), len(parts) == 1) for part in parts]
    return found


def arrange(graph: Graph, leaf: Node, parts: Sequence[SubAxis], groups: Sequence[Sequence[SubAxis]]) -> Node:
    """A view of `leaf` whose axes are `groups`, each the product of the sub-axes it lists (none: size 1).

    Raises:
        Refusal: the groups cannot be had without a copy.
    """
    cut = _split(graph, leaf, parts)
    wanted = [part for group in groups for part in group]
    order = [parts.index(part) for part in wanted]
    node = cut if order == sorted(order) else call(graph, aten.permute.default, cut, order)
    if [len(group) for group in groups] != [1] * len(groups):
        lengths: list[int | Node] = []
        position = 0
        for group in groups:
            here = [node.meta["val"].shape[position + i] for i in range(len(group))]
            if len(group) == 1:
                lengths.append(size(graph, node, position))
            elif all(isinstance(n, int) for n in here):
                lengths.append(int(torch.Size(here).numel()))
            else:
                lengths.append(-1)
            position += len(group)
        node = call(graph, aten.reshape.default, node, lengths)
    if not is_alias(node, leaf):
        raise Refusal(f"the axes of {leaf.name} cannot be regrouped without a copy")
    return node


def _split(graph: Graph, leaf: Node, parts: Sequence[SubAxis]) -> Node:
    """`leaf` with its axes divided into the given parts; axes of size 1 that belong to no part disappear."""
    shape = leaf.meta["val"].shape
    if [part.leaf_axis for part in parts] == list(range(len(shape))):
        return leaf
    lengths: list[int | Node] = []
    for part in parts:
        if part.whole:
            lengths.append(size(graph, leaf, part.leaf_axis))
        elif len(part.pieces) == 1 and part.pieces[0].static:
            lengths.append(part.pieces[0].size)
        else:
            others = [p.pieces[0].size for p in parts if p.leaf_axis == part.leaf_axis and p is not part]
            length = shape[part.leaf_axis]
            lengths.append(length // torch.Size(others).numel() if isinstance(length, int) else -1)
    if sum(isinstance(n, int) and n == -1 for n in lengths) > 1:
        raise Refusal(f"more than one part of {leaf.name} has a size that is not known", advice.STATIC)
    return call(graph, aten.reshape.default, leaf, lengths)
