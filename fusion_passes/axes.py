"""Axes of one tensor expressed in axes of another, found by looking at where elements come from.

An axis of the root is a number in mixed radix: h = 2 g + r, say. Each of its digits (an `Atom`) moves the place that is
read in the leaf by a fixed amount, and the place is the sum over all digits. Splitting, merging, repeating, permuting,
flipping and padding of axes are all of this form.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusion_passes.sizes import Unsupported
from fusion_passes.views import Coords

# root coordinates (one int64 [n] per axis) -> leaf coordinates (likewise) and where they are valid (bool [n])
Look = Callable[[Coords], tuple[Coords, Tensor]]

_LONGEST_WALK = 4096
_CHECKS = 256
_ENOUGH = 16  # of the checks must not be hidden by padding


@dataclasses.dataclass(frozen=True)
class Atom:
    """A digit of a root axis: coordinate // root_stride % size."""

    root_axis: int
    size: int
    root_stride: int


@dataclasses.dataclass(frozen=True)
class LeafAxis:
    """A coordinate of the leaf: offset + sum of coefficient * digit over `terms`, outermost (largest) first.

    Attributes:
        terms: pairs (index into the atoms of the map, coefficient).
    """

    terms: tuple[tuple[int, int], ...]
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """How each axis of a leaf is composed of root axes, under one assignment of sizes.

    Attributes:
        root_shape, leaf_shape: the shapes that the map is about.
        atoms: digits of the root axes, by axis and then from outer to inner. A digit in no leaf axis is a repetition.
        axes: one composition per leaf axis.
        unused: root axes on which the leaf does not depend, those of size 1 among them; they have no atoms.
    """

    root_shape: tuple[int, ...]
    leaf_shape: tuple[int, ...]
    atoms: tuple[Atom, ...]
    axes: tuple[LeafAxis, ...]
    unused: tuple[int, ...]

    def used(self) -> list[int]:
        """Indices of the atoms on which some leaf axis depends, once per such axis."""
        return [index for axis in self.axes for index, _ in axis.terms]

    def read(self, coords: Sequence[Tensor]) -> Coords:
        """Leaf coordinates (int64 [n] per leaf axis) of root coordinates (int64 [n] per root axis)."""
        digits = [coords[a.root_axis] // a.root_stride % a.size for a in self.atoms]
        count = coords[0].shape if coords else torch.Size([1])
        return [
            sum((c * digits[i] for i, c in axis.terms), torch.full(count, axis.offset, dtype=torch.int64))
            for axis in self.axes
        ]


# an atom and how far each leaf coordinate moves per step of it
_Move = tuple[Atom, Tensor]


def fit_axes(look: Look, root_shape: Sequence[int], leaf_shape: Sequence[int], seed: int = 0) -> AxisMap:
    """The axis map of an access, confirmed at random coordinates.

    Raises:
        Unsupported: the access is not of this form, or too little of it is visible.
    """
    if not all(root_shape):
        raise Unsupported("there is nothing to read, because an axis is empty")
    generator = torch.Generator().manual_seed(seed)
    base = _base(look, root_shape, generator)
    moves: list[_Move] = []
    unused: list[int] = []
    for axis, size in enumerate(root_shape):
        found = _walk(look, base, axis, size, generator) if size > 1 else []
        if any(bool(move.any()) for _, move in found):
            moves += found
        else:
            unused.append(axis)
    start = torch.stack([c.expand(1) for c in look([b.reshape(1) for b in base])[0]]) if leaf_shape else None
    axes: list[LeafAxis] = []
    for leaf_axis in range(len(leaf_shape)):
        terms = [(i, int(move[leaf_axis])) for i, (_, move) in enumerate(moves) if move[leaf_axis] != 0]
        terms.sort(key=lambda term: -abs(term[1]))
        there = sum(c * (int(base[a.root_axis]) // a.root_stride % a.size) for a, c in _resolved(moves, terms))
        assert start is not None
        axes.append(LeafAxis(tuple(terms), int(start[leaf_axis]) - there))
    atoms = tuple(atom for atom, _ in moves)
    result = AxisMap(tuple(root_shape), tuple(leaf_shape), atoms, tuple(axes), tuple(unused))
    _confirm(look, result, generator)
    return result


def _resolved(moves: Sequence[_Move], terms: Sequence[tuple[int, int]]) -> list[tuple[Atom, int]]:
    return [(moves[i][0], coefficient) for i, coefficient in terms]


def _base(look: Look, shape: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """A coordinate from which the leaf is visible: the origin if possible."""
    tries = [torch.randint(n, (_CHECKS,), generator=generator).index_fill_(0, torch.tensor(0), 0) for n in shape]
    _, valid = look(tries)
    if not valid.any():
        raise Unsupported("padding hides it everywhere")
    first = int(valid.nonzero()[0])
    return [t[first] for t in tries]


def _walk(look: Look, base: Sequence[Tensor], axis: int, size: int, generator: torch.Generator) -> list[_Move]:
    """The digits of one root axis, outer to inner, from a walk along it."""

    def at(positions: Tensor) -> tuple[Tensor, Tensor]:
        coords = [positions if a == axis else b.expand(positions.shape) for a, b in enumerate(base)]
        places, valid = look(coords)
        expanded = [p.expand(positions.shape) for p in places]
        return (torch.stack(expanded, 1) if expanded else torch.zeros(len(positions), 0, dtype=torch.int64)), valid

    moves: list[_Move] = []
    stride = 1
    while stride < size:
        digits = _positions(size // stride, generator)
        places, valid = at(digits * stride)
        length, move = _first_digit(digits[valid], places[valid], size // stride, axis)
        moves.insert(0, (Atom(axis, length, stride), move))
        stride *= length
    positions = _positions(size, generator)
    places, valid = at(positions)
    steps = sum((p // a.root_stride % a.size)[:, None] * move for a, move in moves for p in [positions])
    origin = (places - steps)[valid]
    if not torch.equal(origin, origin[:1].expand_as(origin)):
        raise Unsupported(f"axis {axis} of size {size} is not read in regular steps")
    return moves


def _first_digit(digits: Tensor, places: Tensor, size: int, axis: int) -> tuple[int, Tensor]:
    """The innermost digit of a number below `size`: its length, and the move per step.

    `digits` [n] are the visible values in increasing order, `places` [n, leaf rank] what is read there.
    """
    if len(digits) < 2:
        raise Unsupported(f"padding hides all but one position of axis {axis}")
    gap = digits[1] - digits[0]
    move = torch.div(places[1] - places[0], gap, rounding_mode="floor")
    off = (places != places[0] + (digits - digits[0])[:, None] * move).any(1).nonzero()[:, 0]
    if not len(off):
        return size, move
    inside, outside = int(digits[off[0] - 1]), int(digits[off[0]])
    lengths = [d for d in _divisors(size) if inside < d <= outside]
    if digits[0] != 0 or gap != 1 or len(lengths) != 1:
        raise Unsupported(f"axis {axis} is not read in regular steps: they change at position {outside} of {size}")
    return lengths[0], move


def _positions(size: int, generator: torch.Generator) -> Tensor:
    """All of range(size), or where it is long its beginning, its end, what lies around its divisors, and others."""
    if size <= _LONGEST_WALK:
        return torch.arange(size)
    near = [d + shift for d in _divisors(size) for shift in (-1, 0, 1)]
    special = torch.tensor([p for p in near if 0 <= p < size])
    others = torch.randint(size, (_LONGEST_WALK // 4,), generator=generator)
    return torch.unique(torch.cat([torch.arange(_LONGEST_WALK // 2), special, others]))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _confirm(look: Look, result: AxisMap, generator: torch.Generator) -> None:
    """Compare with the access at random coordinates, a quarter of them at the ends of the axes."""
    for count in (_CHECKS, 16 * _CHECKS):
        coords = [torch.randint(n, (count,), generator=generator) for n in result.root_shape]
        for c, n in zip(coords, result.root_shape):
            ends = torch.randint(2, (count // 4,), generator=generator) * (n - 1)
            c[: count // 4] = ends
        places, valid = look(coords)
        for axis, (expected, actual) in enumerate(zip(result.read(coords), places, strict=True)):
            if not torch.equal(expected[valid], actual.expand(valid.shape)[valid]):
                raise Unsupported(f"axis {axis} is not a sum over the axes of the result")
        if int(valid.sum()) >= _ENOUGH or not coords:
            return
    raise Unsupported("padding hides it nearly everywhere")
