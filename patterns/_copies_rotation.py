"""Writes that rotate pairs of the tensor they go into: rotary embedding, written back in place.

Which elements make a pair, and where the cosines and sines come from, is found out by evaluating the written values at
random places: every way of pairing is tried with every pair of factors that the values are computed from.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx import Graph, Node

from fusion_passes import cone, premises, probe
from fusion_passes.evaluate import Evaluator, hashed
from fusion_passes.fusion import NearMiss, Refusal
from fusion_passes.ops import rotate_pairs as op
from fusion_passes.patterns._copies_values import Write
from fusion_passes.patterns._copies_windows import Size, View, Window, known
from fusion_passes.rewrite import call, size
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import concrete_tensors, is_alias, ravel

aten = torch.ops.aten

SPECIAL = (0.0, 1e4, -1e4)
SAMPLES = 256
MOST_NODES, MOST_FACTORS = 60, 6
MOST_AXES = 3  # of rows, for the op
PRODUCTS = (aten.mul.Tensor, aten.addcmul.default)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Where the pairs of the written elements lie.

    Attributes:
        window: [*rows, 2, N], the pairs in the tensor that is written.
        region: all of the written channels, [*rows, 2 N].
        neighbours: a pair is two neighbouring channels; else one of each half.
        writes: one write of the region, or one of the first and one of the second numbers of all pairs.
    """

    window: Window
    region: Window
    neighbours: bool
    writes: tuple[Write, ...]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A rotation of `pairs` with these factors, which are nodes of the graph; `gone` is computed for nothing else."""

    pairs: Pairs
    cos: Node
    sin: Node
    inverse: bool
    gone: frozenset[Node]


def find(origin: Node, writes: Sequence[Write], assignments: Sequence[Sizes]) -> Rotation | None:
    """The rotation that one or two writes into `origin` are; None where they are something else."""
    with concrete_tensors():
        return _find(origin, writes, assignments)


def _find(origin: Node, writes: Sequence[Write], assignments: Sequence[Sizes]) -> Rotation | None:
    if inductor_config.emulate_precision_casts or origin.meta["val"].dtype not in op.FLOATS:
        return None
    layouts = [pairs for pairs in _layouts(writes) if len(pairs.window.shape) - 2 <= MOST_AXES]
    if not layouts:
        return None
    try:
        cones = [cone.backward(write.source, stop={origin}, limit=MOST_NODES) for write in writes]
        interior = {node for found in cones for node in found.interior}
        factors = _factors(origin, interior)
        _check_premises(origin, interior, factors, assignments)
    except NearMiss:
        return None
    wide = any(node.meta["val"].dtype == torch.float64 for node in interior if hasattr(node.meta.get("val"), "dtype"))
    if wide or not 1 <= len(factors) <= MOST_FACTORS:
        return None
    gone = _only_for(writes, interior)
    if any(write.source not in gone for write in writes):
        return None
    for pairs in layouts:
        for cos, sin in itertools.permutations(factors, 2):
            if not all(_form(node, pairs) for node in (cos, sin)):
                continue
            for inverse in (False, True):
                try:
                    if all(_agrees(origin, pairs, cos, sin, inverse, factors, sizes) for sizes in assignments):
                        return Rotation(pairs, cos, sin, inverse, gone)
                except (NearMiss, Unsupported):
                    return None
    return None


def _layouts(writes: Sequence[Write]) -> list[Pairs]:
    """The ways in which the written elements may be pairs."""
    if not 1 <= len(writes) <= 2 or any(write.indexed or write.window.repeats for write in writes):
        return []
    ordered = tuple(sorted(writes, key=lambda write: _number(write.window.offset)))
    first, last = ordered[0].window, ordered[-1].window
    if len(ordered) == 1:
        return _layouts_of_region(first, ordered)
    same = Window(last.shape, last.strides, first.offset).same(first)
    axis, length = len(first.shape) - 1, first.shape[-1] if first.shape else 0
    if not same or not isinstance(length, int) or not first.path or not last.path:
        return []
    start = _start_of_slice(first.path[-1], axis)
    between, stride = last.offset - first.offset, first.strides[-1]
    if start is None or first.path[-1].target is not last.path[-1].target or len(first.path) != len(last.path):
        return []
    for neighbours, apart in ((True, stride // 2 if isinstance(stride, int) else 0), (False, stride * length)):
        if known(between == apart):
            step = between if neighbours else stride
            path = (*first.path[:-1], View(aten.slice.Tensor, (axis, start, start + 2 * length, 1)))
            region = Window((*first.shape[:-1], 2 * length), (*first.strides[:-1], step), first.offset, path)
            return [pairs for pairs in _layouts_of_region(region, ordered) if pairs.neighbours == neighbours]
    return []


def _number(offset: Size) -> int:
    return offset if isinstance(offset, int) else -1


def _start_of_slice(view: View, axis: int) -> int | None:
    if view.target is not aten.slice.Tensor or view.args[0] != axis:
        return None
    start = view.args[1] or 0
    return start if isinstance(start, int) and start >= 0 else None


def _layouts_of_region(region: Window, writes: tuple[Write, ...]) -> list[Pairs]:
    width = region.shape[-1] if region.shape else 1
    if not isinstance(width, int) or width % 2 or not width:
        return []
    *rows, step = region.strides
    shape = (*region.shape[:-1], 2, width // 2)
    halves = Window(shape, (*rows, width // 2 * step, step), region.offset)
    neighbours = Window(shape, (*rows, step, 2 * step), region.offset)
    return [Pairs(halves, region, False, writes), Pairs(neighbours, region, True, writes)]


def _check_premises(
    origin: Node, interior: set[Node], factors: Sequence[Node], assignments: Sequence[Sizes]
) -> None:
    """Every element and every value of `origin` is treated like the others, so that samples speak for all.

    Raises:
        NearMiss: some may not be.
    """
    ours = premises.dependents({origin}, interior)
    premises.check_linear({origin}, interior)
    premises.check_even(ours - {origin})
    premises.check_constants(ours, factors, assignments)


def _factors(origin: Node, interior: set[Node]) -> list[Node]:
    """The tensors, independent of `origin`, that something which depends on it is multiplied by."""
    dependent = premises.dependents({origin}, interior)
    found: dict[Node, None] = {}
    for node in sorted(dependent - {origin}):
        if node.target in PRODUCTS:
            found.update(dict.fromkeys(n for n in node.all_input_nodes if n not in dependent))
    return [node for node in found if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dtype in op.FLOATS]


def _only_for(writes: Sequence[Write], interior: set[Node]) -> frozenset[Node]:
    """The nodes that nothing but the writes needs."""
    gone: set[Node] = set()
    consumers = {write.node for write in writes}
    for node in sorted(interior | {n for write in writes for n in write.operands}, reverse=True):
        if all(user in gone or user in consumers for user in node.users):
            gone.add(node)
    return frozenset(gone)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a factor is shown as [*rows, 2 or 1, N].

    Attributes:
        rows: which of its axes are rows, the last ones of the pairs' rows.
        width: 2 N, or N where both numbers of a pair share it.
        trailing: is there an axis of size 1 behind the channels?
    """

    rows: tuple[int, ...]
    width: int
    trailing: bool


def _form(factor: Node, pairs: Pairs) -> _Form | None:
    shape = list(factor.meta["val"].shape)
    *rows, _, half = pairs.window.shape
    trailing = len(shape) > 1 and known(shape[-1] == 1) and half != 1
    if trailing:
        shape.pop()
    if not shape or not isinstance(shape[-1], int) or shape[-1] not in (half, 2 * half):
        return None
    width = shape.pop()
    axes = list(range(len(shape)))
    while len(axes) > len(rows) and known(shape[axes[0]] == 1):
        axes.pop(0)
    aligned = zip(reversed(axes), reversed(rows))
    if len(axes) > len(rows) or any(not known(shape[axis] == 1) and not known(shape[axis] == n) for axis, n in aligned):
        return None
    return _Form(tuple(axes), width, trailing)


def _agrees(
    origin: Node, pairs: Pairs, cos: Node, sin: Node, inverse: bool, factors: Sequence[Node], sizes: Sizes
) -> bool:
    """Are the written values those of the rotation, at random places?"""
    shape, strides = [sizes.of(n) for n in pairs.window.shape], [sizes.of(n) for n in pairs.window.strides]
    *rows, lane = _places((*shape[:-2], shape[-1]))
    for seed in (1, 2):
        draws = {node: hashed(seed * 100 + i, -8.0, 8.0, SPECIAL) for i, node in enumerate((origin, *factors))}
        evaluator = Evaluator(draws, sizes)
        numbers, factor = [], []
        for half in (0, 1):
            place = [*rows, torch.full_like(lane, half), lane]
            element = sizes.of(pairs.window.offset) + sum(c * s for c, s in zip(place, strides))
            numbers.append(draws[origin](element).double())
            factor.append([_factor_at(node, pairs, place, draws[node], sizes) for node in (cos, sin)])
        (a, b), ((c1, s1), (c2, s2)) = numbers, factor
        sign = -1.0 if inverse else 1.0
        for half, wanted in ((0, a * c1 - sign * b * s1), (1, b * c2 + sign * a * s2)):
            write, index = _source_at(pairs, half, rows, lane, shape)
            values = evaluator.values(write.source, _broadcast_index(write, index, sizes)).double()
            magnitude = (a * c1).abs() + (b * s1).abs() + (b * c2).abs() + (a * s2).abs()
            if not probe.agree(values, wanted, magnitude):
                return False
        for write in pairs.writes:
            premises.check_read(evaluator, write.source)
    return True


def _places(shape: Sequence[int]) -> list[Tensor]:
    """Random coordinates, and every position along each axis: what one row does, another may not do."""
    generator = torch.Generator().manual_seed(1)
    runs = []
    for walked, count in ((None, SAMPLES), *enumerate(shape)):
        drawn = [torch.randint(0, max(n, 1), (count,), generator=generator) for n in shape]
        runs.append([torch.arange(count) if axis == walked else c for axis, c in enumerate(drawn)])
    return [torch.cat(coords) for coords in zip(*runs)]


def _factor_at(node: Node, pairs: Pairs, place: Sequence[Tensor], draw: object, sizes: Sizes) -> Tensor:
    form = _form(node, pairs)
    assert form is not None and callable(draw)
    *rows, half, lane = place
    shape = sizes.shape(node)
    coords = [torch.zeros_like(lane)] * len(shape)
    for axis, row in zip(reversed(form.rows), reversed(rows)):
        coords[axis] = row if shape[axis] > 1 else coords[axis]
    count = pairs.window.shape[-1]
    channel = lane if form.width == count else 2 * lane + half if pairs.neighbours else half * count + lane
    coords[-2 if form.trailing else -1] = channel
    value = draw(ravel(coords, shape))
    assert isinstance(value, Tensor)
    return value.double()


def _source_at(
    pairs: Pairs, half: int, rows: Sequence[Tensor], lane: Tensor, shape: Sequence[int]
) -> tuple[Write, list[Tensor]]:
    """The write that holds a number of a pair, and where in its source."""
    if len(pairs.writes) == 2:
        return pairs.writes[half], [*rows, lane]
    channel = 2 * lane + half if pairs.neighbours else half * shape[-1] + lane
    return pairs.writes[0], [*rows, channel]


def _broadcast_index(write: Write, coords: list[Tensor], sizes: Sizes) -> Tensor:
    """The row-major index in a source that may have to be broadcast to what is written."""
    shape = sizes.shape(write.source)
    tail = coords[len(coords) - len(shape) :]
    return ravel([c if n != 1 else torch.zeros_like(c) for c, n in zip(tail, shape)], shape)


def emit(graph: Graph, origin: Node, rotation: Rotation) -> None:
    """Rotate in place, at the graph's insertion point.

    Raises:
        Refusal: the pairs cannot be shown as views, or the factors are computed later.
    """
    pairs = rotation.pairs
    node = origin
    for view in pairs.region.path:
        node = call(graph, view.target, node, *view.args)
    shown = _paired(graph, node, pairs, node.meta["val"].dim() - 1)
    if not is_alias(shown, origin):
        raise Refusal(f"the rotated part of {origin.name} cannot be shown as pairs without a copy")
    factors = [_as_factor(graph, factor, pairs) for factor in (rotation.cos, rotation.sin)]
    call(graph, op.OP, shown, *factors, rotation.inverse)


def _paired(graph: Graph, node: Node, pairs: Pairs, axes: int) -> Node:
    """[*rows, 2 N] as [A, B, C, 2, N]."""
    half = pairs.window.shape[-1]
    rows = [size(graph, node, axis) for axis in range(axes)]
    node = call(graph, aten.reshape.default, node, [*rows, half, 2] if pairs.neighbours else [*rows, 2, half])
    if pairs.neighbours:
        node = call(graph, aten.permute.default, node, [*range(axes), axes + 1, axes])
    return _with_leading(graph, node)


def _with_leading(graph: Graph, node: Node) -> Node:
    while node.meta["val"].dim() < MOST_AXES + 2:
        node = call(graph, aten.unsqueeze.default, node, 0)
    return node


def _as_factor(graph: Graph, node: Node, pairs: Pairs) -> Node:
    form = _form(node, pairs)
    assert form is not None
    if form.trailing:
        node = call(graph, aten.squeeze.dim, node, -1)
    for _ in range(node.meta["val"].dim() - 1 - len(form.rows)):
        node = call(graph, aten.squeeze.dim, node, 0)
    if form.width == pairs.window.shape[-1]:
        return _with_leading(graph, call(graph, aten.unsqueeze.default, node, -2))
    return _paired(graph, node, pairs, node.meta["val"].dim() - 1)
