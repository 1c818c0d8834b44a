"""Where a gate may hold anything else than its operands: in a padded tail, and nowhere else.

Random samples do not see a few masked elements among millions. What decides is therefore the subgraph's structure:
values are hidden by pads, concatenations and triangles alone, and one of them, at the end of the sequence, is all
that a padded gate needs. That the tail is where it should be is walked position by position.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.access import AxisMap, trace_access
from fusion_passes.fusion import NearMiss
from fusion_passes.sizes import Sizes

aten = torch.ops.aten

TRIANGLES = (aten.tril.default, aten.triu.default)
JOINS = (aten.cat.default, aten.stack.default)
# Views that move every element of an axis by the same amount.
SLICES = semantics.SPLITS | semantics.COPIES | {operator.getitem, aten.slice.Tensor, aten.select.int}


def check_hidden(raw: Node, interior: Collection[Node], sizes: Sizes) -> None:
    """Raw is padded once at most, and nothing else depends on the position in the sequence or among the heads.

    Raises:
        NearMiss: some elements may mean something else than the others.
    """
    made_of_raw = {raw}
    padded = 0
    for node in sorted(interior):
        inputs = node.all_input_nodes
        if made_of_raw.intersection(inputs):
            made_of_raw.add(node)
        if node.target in semantics.RAMPS:
            raise NearMiss("its values depend on the position in the sequence itself")
        if node.target in TRIANGLES:
            raise NearMiss("a triangle of its values is masked")
        if node.target is aten.constant_pad_nd.default:
            hides = any(sizes.of(width) > 0 for width in semantics.arguments(node)["pad"])
        elif node.target in JOINS and len(semantics.arguments(node)["tensors"]) > 1:
            hides = _check_join(node, made_of_raw, sizes)
        else:
            continue
        if hides and node not in made_of_raw:
            raise NearMiss("a constant or an operand other than its input is padded")
        padded += hides
    if padded > 1:
        raise NearMiss("it is padded more than once")


def _check_join(node: Node, made_of_raw: Collection[Node], sizes: Sizes) -> bool:
    """Is the last part of a concatenation padding? The others must be slices of one value."""
    parts = [part for part in semantics.arguments(node)["tensors"] if sizes.numel(part)]
    visible = [part for part in parts if part in made_of_raw]
    if parts[: len(visible)] != visible or len(parts) > len(visible) + 1:
        raise NearMiss("other values are concatenated with it before its end")
    if len(visible) > 1 and len({_sliced(part) for part in visible}) > 1:
        raise NearMiss("it is put together from parts that are computed apart")
    return len(parts) > len(visible)


def _sliced(node: Node) -> Node:
    while node.target in SLICES:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def check_read(axis_map: AxisMap, time: int, chunk: int | None, padded: bool) -> int | None:
    """A leaf is read wholly, without gaps and each element once but for whole repetitions.

    Returns:
        The length of the leaf axis that time runs along; None where the leaf does not depend on time.

    Raises:
        NearMiss: a part of the leaf is left out or read several times.
    """
    used = [index for axis in axis_map.axes for index, _ in axis.terms]
    if len(used) > len(set(used)):
        raise NearMiss("a diagonal of an operand is read")
    tokens = None
    for length, axis in zip(axis_map.leaf_shape, axis_map.axes):
        stride = 1
        for index, coefficient in reversed(axis.terms):
            if coefficient != stride:
                raise NearMiss("an operand is read with gaps or overlaps")
            stride *= axis_map.atoms[index].size
        roots = {axis_map.atoms[index].root_axis for index, _ in axis.terms}
        if time in roots:
            tokens = length
        tail = padded and time in roots and roots <= {time, chunk} and stride > length
        if axis.offset:
            raise NearMiss("an operand is shifted against the others")
        if stride != length and not tail:
            raise NearMiss("only a part of an operand is read")
    return tokens


def check_tail(
    root: Node, raw: Node, shape: Sequence[int], walks: Collection[list[int]], time: int, tokens: int, sizes: Sizes
) -> None:
    """Walk all axes: every position before the end of raw is read, and only the tail beyond it is padding.

    The axes are those of `shape`, in which root is seen.

    What a single pad hides is an interval of a sum of coordinates, so it shows at their lowest or highest values.

    Raises:
        NearMiss: padding hides something else.
    """
    clock = next(walk for walk in walks if time in walk)
    for walk in walks:
        count = math.prod(shape[axis] for axis in walk)
        real = torch.arange(count) < tokens if time in walk else torch.ones(count, dtype=torch.bool)
        for highest in (False, True):
            places = torch.arange(count)
            # other axes stay at an end; time at its beginning, where nothing is padded
            ends = [(n - 1) * (highest and (time in walk or axis not in clock)) for axis, n in enumerate(shape)]
            coords = [torch.full((count,), end, dtype=torch.int64) for end in ends]
            for axis in reversed(walk):
                coords[axis] = places % shape[axis]
                places = places // shape[axis]
            if not torch.equal(trace_access(root, raw, coords, sizes, shape=shape).valid, real):
                raise NearMiss("padding hides positions other than those after the last token")
