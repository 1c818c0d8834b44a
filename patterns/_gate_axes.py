"""The roles of the axes of a gate: batch, chunk, time, head and channel.

The sums may have fewer axes than roles: `reshape(B * N, C, H)` counts batch rows and chunks along one. Such an axis is
divided into its factors first (`Frame`); what follows sees each role on axes of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from fusion_passes.access import AxisMap
from fusion_passes.advice import listed
from fusion_passes.fusion import NearMiss, Refusal
from fusion_passes.layout import Piece, refine
from fusion_passes.ops.gate_cumsum import CHUNK_SIZES
from fusion_passes.patterns._gate import Gate
from fusion_passes.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class Frame:
    """The axes in which a gate is looked at: those of the sums, some of them divided into factors.

    Attributes:
        divided: for an axis of the sums the lengths of its factors, outermost first.
    """

    divided: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def lengths(self, own: Sequence[Any]) -> list[Any]:
        """The lengths of the frame's axes, numbers or symbols."""
        return [n for axis, length in enumerate(own) for n in self.divided.get(axis, (length,))]

    def strides(self, own: Sequence[int]) -> list[int]:
        """The strides of the frame's axes."""
        found: list[int] = []
        for axis, stride in enumerate(own):
            factors = self.divided.get(axis, (1,))
            inner = itertools.accumulate(factors[:0:-1], lambda a, b: a * b, initial=1)
            found += [stride * count for count in inner][::-1]
        return found

    def first(self, axis: int) -> int:
        """The frame's first axis that belongs to an axis of the sums."""
        return axis + sum(len(factors) - 1 for other, factors in self.divided.items() if other < axis)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The roles of the axes of a frame; each lists positions, outermost first."""

    batch: tuple[int, ...]
    chunk: int | None  # None where there is a single chunk and its axis of size 1 is not told from others
    time: int
    head: tuple[int, ...]
    channel: tuple[int, ...]


def divide(root: Node, raw: Node, gate: Gate, maps: Mapping[Node, AxisMap], time: int, sizes: Sizes) -> Frame:
    """Divide every axis that counts chunks or heads beside something else."""
    raw_map = maps[raw]
    read = [{raw_map.atoms[i] for i, _ in axis.terms} for axis in raw_map.axes]
    counted = next((atoms for atoms in read if any(atom.root_axis == time for atom in atoms)), set())
    factor = maps[gate.a_log]
    readers = (counted, {factor.atoms[i] for i in factor.used()})

    def role(piece: Piece) -> tuple[bool, ...]:
        return tuple(
            any(a.root_axis == piece.axis and a.root_stride <= piece.stride < a.root_stride * a.size for a in atoms)
            for atoms in readers
        )

    try:
        pieces = refine(list(maps.values()), root, sizes)
    except Refusal:  # what cannot be divided is left as it is
        return Frame()
    divided = {}
    for axis, parts in pieces.items():
        runs = [list(run) for _, run in itertools.groupby(parts, role)]
        if axis != time and len(runs) > 1:
            divided[axis] = tuple(_count(run) for run in runs)
    return Frame(divided)


def _count(run: Sequence[Piece]) -> int:
    return run[0].size * run[0].stride // run[-1].stride


def roles(
    raw: Node, gate: Gate, maps: dict[Node, AxisMap], time: int, chunk_size: int, sizes: Sizes
) -> Axes:
    """Tell batch, chunk, time, head and channel axes apart by who reads them and how."""
    raw_map, factor_map = maps[raw], maps[gate.a_log]
    shape = raw_map.root_shape
    chunk = _chunk_axis(raw_map, time, chunk_size)
    used = {axis for axis in range(len(shape)) if shape[axis] > 1 and axis not in raw_map.unused}
    idle = [axis for axis in range(len(shape)) if shape[axis] > 1 and axis in raw_map.unused and axis != time]
    if idle:
        raise NearMiss(f"its input is repeated along an axis of {shape[idle[0]]}")
    free = sorted(used - {time, chunk})
    head = tuple(axis for axis in free if axis not in factor_map.unused)
    biased = {axis for axis in free if gate.bias is not None and axis not in maps[gate.bias].unused}
    innermost = _innermost(raw, raw_map, sizes)
    channel = tuple(axis for axis in free if axis not in head and (axis in biased or axis == innermost))
    batch = tuple(axis for axis in free if axis not in head and axis not in channel)
    if chunk is None and shape.count(1) < (1 if batch else 2):
        hint = f"a gate is summed within chunks: unflatten its tokens into chunks of {listed(CHUNK_SIZES)}"
        raise NearMiss(f"the cumsum runs over the whole sequence of {shape[time]}, not over chunks of it", hint)
    return Axes(batch, chunk, time, head, channel)


def _chunk_axis(raw_map: AxisMap, time: int, chunk_size: int) -> int | None:
    """The root axis that counts chunks: one step of it is `chunk_size` positions on raw's own axis of time."""
    for composition in raw_map.axes:
        terms = [(raw_map.atoms[index], coefficient) for index, coefficient in composition.terms]
        steps = [coefficient for atom, coefficient in terms if atom.root_axis == time]
        if steps and (steps != [1] or any(atom.root_stride != 1 for atom, _ in terms if atom.root_axis == time)):
            raise NearMiss("time is not read in steps of one")
        if steps:
            outer = [atom.root_axis for atom, step in terms if step == chunk_size and atom.root_stride == 1]
            return outer[0] if outer else None
    raise NearMiss("its input does not depend on the position in the chunk")


def _innermost(raw: Node, axis_map: AxisMap, sizes: Sizes) -> int | None:
    """The root axis whose steps are next to one another in raw's memory."""
    strides = sizes.strides(raw)
    for composition, stride in zip(axis_map.axes, strides):
        for index, coefficient in composition.terms:
            if stride * coefficient == 1:
                return axis_map.atoms[index].root_axis
    return None
