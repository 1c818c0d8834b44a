"""Which axes of the scores are batch, queries and keys, told apart by who reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch.fx import Node

from fusion_passes.access import AxisMap
from fusion_passes.fusion import NearMiss
from fusion_passes.layout import Piece, refine_shape
from fusion_passes.patterns._index_operands import Operand, Reader, operands

Pieces = dict[int, list[Piece]]


@dataclasses.dataclass(frozen=True)
class Roles:
    """The two sides of the products, and the factors of the virtual root's axes that each role consists of.

    Attributes:
        query, key: the sides.
        maps: how the axes of each tensor are composed of those of the virtual root.
        pieces: the factors of every axis of the virtual root.
        batch, queries, keys, heads, channels: those of each role, outermost first.
    """

    query: Operand
    key: Operand
    maps: dict[Node, AxisMap]
    pieces: Pieces
    batch: tuple[Piece, ...]
    queries: tuple[Piece, ...]
    keys: tuple[Piece, ...]
    heads: tuple[Piece, ...]
    channels: tuple[Piece, ...]

    def used(self, leaf: Node) -> set[Piece]:
        return used(self.maps[leaf], self.pieces)


def used(axis_map: AxisMap, pieces: Pieces) -> set[Piece]:
    """The factors on which some axis of a tensor depends."""
    atoms = [axis_map.atoms[index] for index in axis_map.used()]
    return {p for atom in atoms for p in pieces[atom.root_axis]
            if atom.root_stride <= p.stride < atom.root_stride * atom.size}  # fmt: skip


def assign(reader: Reader, others: Mapping[Node, AxisMap], dividing: bool = False) -> Roles:
    """The roles of all axes; `others` are the maps of the tensors beside the products.

    `dividing` axes of symbolic size is allowed where nobody is going to build views of them.

    Raises:
        NearMiss: the axes are not those of an index score.
    """
    sides = operands(reader.structure)
    maps = dict(others)
    for side in sides:
        for leaf in (side.leaf, side.scale):
            if leaf is not None:
                found = reader.map(reader.operand(side, leaf), leaf)
                if maps.setdefault(leaf, found) != found:
                    raise NearMiss(f"{leaf.name} is read in two ways")
    head, channel = len(reader.shape) - 2, len(reader.shape) - 1
    static = [dividing or isinstance(n, int) for n in reader.root.meta["val"].shape]
    pieces = refine_shape(list(maps.values()), reader.shape, [*static, True, True])
    reads = [used(maps[side.leaf], pieces) for side in sides]
    with_heads = [any(p.axis == head for p in found) for found in reads]
    if all(with_heads):
        raise NearMiss("its keys differ from head to head; those of an index score are shared by all heads")
    if not any(with_heads):
        raise NearMiss("neither side of its products depends on the head")
    first = 0 if with_heads[0] else 1
    (query, key), (of_query, of_key) = (sides[first], sides[1 - first]), (reads[first], reads[1 - first])
    for what, axis, read in (("heads", head, of_query), ("channels", channel, of_query), ("channels", channel, of_key)):
        if not read.issuperset(pieces[axis]):
            raise NearMiss(f"its products do not read all {what}")
    rest = [p for axis in range(head) for p in pieces[axis]]
    if idle := [p for p in rest if p not in of_query | of_key]:
        raise NearMiss(f"an axis of {idle[0].size} scores is neither one of queries nor one of keys")
    return Roles(
        query, key, maps, pieces,
        batch=tuple(p for p in rest if p in of_query & of_key),
        queries=tuple(p for p in rest if p in of_query - of_key),
        keys=tuple(p for p in rest if p in of_key - of_query),
        heads=tuple(pieces[head]),
        channels=tuple(pieces[channel]),
    )  # fmt: skip
