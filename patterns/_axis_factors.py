"""Axes of a tensor as products of named and unnamed factors, and how two such axes are combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.fx import Node

from fusion_passes.fusion import NearMiss

ANY, PLAIN, TIME, CHUNKS = "*", "", "t", "n"
SPELLED = {"b": "batch", "g": "head", "r": "head", TIME: "token", CHUNKS: "chunk"}


class Factor(NamedTuple):
    """A part of an axis: a named axis, `PLAIN` (within a chunk or a head) or `ANY`."""

    name: str
    size: int


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


def normal(dim: Sequence[Factor]) -> Dim:
    """Without factors of size 1, and neighbours of no name put together."""
    found: list[Factor] = []
    for factor in dim:
        if factor.size == 1:
            continue
        if found and factor.name == found[-1].name and factor.name in (ANY, PLAIN):
            found[-1] = Factor(factor.name, found[-1].size * factor.size)
        else:
            found.append(factor)
    return tuple(found)


def flat(layout: Sequence[Dim]) -> Dim:
    """All factors in row-major order."""
    return normal([factor for dim in layout for factor in dim])


def plain(dim: Dim) -> bool:
    """Has the axis no named factor?"""
    return all(factor.name in (ANY, PLAIN) for factor in dim)


def unify(a: Dim, b: Dim, node: Node) -> Dim:
    """The factors of an axis along which two operands are combined element by element."""
    found: list[Factor] = []
    left, right = list(a), list(b)
    if not left or not right:  # of size 1
        return tuple(left or right)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size != y.size:  # divide the larger one where that is possible
            small, large, rest = (x, y, right) if x.size < y.size else (y, x, left)
            if large.name not in (ANY, PLAIN) or large.size % small.size:
                raise NearMiss(f"{node.name} combines axes that are divided differently")
            rest.insert(0, Factor(large.name, large.size // small.size))
            x, y = small, Factor(large.name, small.size)
        if x.name != y.name and ANY not in (x.name, y.name):
            spelled = SPELLED.get(x.name) or SPELLED[y.name]
            raise NearMiss(f"the values of {node.name} depend on the position of the {spelled} itself")
        found.append(x if y.name == ANY else y)
    return normal(found)


def broadcast(layouts: Sequence[Layout], node: Node) -> Layout:
    """The layout of an elementwise combination."""
    rank = max(map(len, layouts), default=0)
    dims: list[Dim] = [()] * rank
    for layout in layouts:
        for position, dim in enumerate(layout, rank - len(layout)):
            dims[position] = unify(dims[position], dim, node)
    return tuple(dims)
