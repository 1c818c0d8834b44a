"""What a delta rule reads in the end: behind the casts, copies and repetitions of its operands, and before its gates.

The recurrence is proved on tensors that hold the very q, k, v, log decay and beta. The op can do more by itself: repeat
key heads by index, read strided tensors, compute the gate and the sigmoid of beta.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusion_passes import aten as semantics
from fusion_passes import cone, probe
from fusion_passes.access import factor_axes, trace_access
from fusion_passes.evaluate import hashed
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._chunk_assembly import walks
from fusion_passes.patterns._gate import Gate, identify
from fusion_passes.rewrite import call
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import is_view, ravel

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Rows:
    """A tensor [B, T, H, ...] as a view of `node`: its axes in another order where `head_first`, or reshaped."""

    node: Node
    shape: tuple[int, ...]
    head_first: bool = False

    def build(self, graph: Graph, dense: bool) -> Node:
        """The tensor; `dense` asks for stride 1 along the last axis."""
        node = self.node
        if self.head_first:
            order = [0, 2, 1, 3][: len(self.shape)]
            node = call(graph, aten.permute.default, node, order)
        elif tuple(node.meta["val"].shape) != self.shape:
            node = call(graph, aten.reshape.default, node, list(self.shape))
        if dense and node.meta["val"].stride(-1) != 1:
            node = call(graph, aten.clone.default, node, memory_format=torch.contiguous_format)
        return node


@dataclasses.dataclass(frozen=True)
class DecayGate:
    """The gate that the op computes from `rows`: a Gate of `_gate`, with per-head operands as [H] or [H, K]."""

    rows: Rows
    gate: Gate
    shapes: dict[Node, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Strength:
    """beta as `factor` times the sigmoid of `rows`."""

    rows: Rows
    factor: float
    roundings: list[Node]


def sources(node: Node) -> Iterator[Node]:
    """`node` and what it is a view, copy or exact cast of, one after the other."""
    yield node
    while node.op == "call_function":
        if node.target in semantics.CASTS:
            source = node.args[0]
            assert isinstance(source, Node)
            ours, theirs = node.meta["val"].dtype, source.meta["val"].dtype
            if not theirs.is_floating_point or theirs.itemsize > ours.itemsize or 1 == theirs.itemsize:
                return
            if ours != theirs and theirs.itemsize == ours.itemsize:
                return
        elif not is_view(node) or node.target in semantics.PADS:
            return
        else:
            source = node.args[0]
            while isinstance(source, Node) and not isinstance(source.meta.get("val"), Tensor):
                source = source.args[0]  # a split
        if not isinstance(source, Node):
            return
        node = source
        yield node


def rows(leaf: Node, head_first: bool, sizes: Sizes) -> Rows:
    """The furthest source of a leaf [B, T, H, D] that has its elements in the same order; heads may be fewer.

    A copy that makes the last axis dense is kept, if the graph has one.
    """
    shape = _token_first(sizes.shape(leaf), head_first)
    best = Rows(leaf, shape, head_first)
    for node in sources(leaf):
        own = sizes.shape(node)
        for first in (head_first, not head_first):
            if len(own) != len(shape):
                continue
            ours = _token_first(own, first)
            if (ours[:2], ours[3:]) != (shape[:2], shape[3:]) or shape[2] % max(ours[2], 1):
                continue
            if not _reads(leaf, node, shape, ours, (head_first, first), sizes):
                continue
            looser = ours[2] == best.shape[2] and node.meta["val"].dtype == best.node.meta["val"].dtype
            if looser and _dense(best, sizes) and not _dense(Rows(node, ours, first), sizes):
                continue
            best = Rows(node, ours, first)
            break
    return best


def _token_first(shape: Sequence[int], head_first: bool) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[1], *shape[3:]) if head_first else tuple(shape)


def _dense(found: Rows, sizes: Sizes) -> bool:
    return len(found.shape) < 4 or sizes.strides(found.node)[-1] == 1


def _reads(
    leaf: Node, node: Node, shape: Sequence[int], own: Sequence[int], head_first: tuple[bool, bool], sizes: Sizes
) -> bool:
    """Does `leaf` show element (b, t, h // repeats, d) of `node` at (b, t, h, d)?"""
    if node is leaf:
        return tuple(shape) == tuple(own) and head_first[0] == head_first[1]
    coords = walks(shape)
    asked = [coords[i] for i in ((0, 2, 1, 3) if head_first[0] else (0, 1, 2, 3))[: len(shape)]]
    wanted = [*coords[:2], coords[2] // (shape[2] // own[2]), *coords[3:]]
    if head_first[1]:
        wanted[1], wanted[2] = wanted[2], wanted[1]
    try:
        access = trace_access(leaf, node, asked, sizes)
    except Unsupported:
        return False
    return bool(access.valid.all()) and all(torch.equal(a, b) for a, b in zip(access.coords, wanted))


def strength(beta: Node, sizes: Sizes) -> Strength | None:
    """beta [B, T, H] as a constant times a sigmoid, if it is one and nothing else needs what is in between."""
    whole = cone.backward(beta)
    if beta not in whole.interior or len(whole.leaves) != 1:
        return None
    for raw in _row_views(beta, whole, whole.leaves[0], sizes):
        part = cone.backward(beta, stop={raw.node})
        if not private(part.interior, beta):
            continue
        found: float | None = None
        for seed in (1, 2):
            run = probe.sample(beta, {raw.node: hashed(seed, -30.0, 30.0, (0.0, 90.0, -90.0))}, sizes, 256, seed)
            value = torch.sigmoid(run.leaves[raw.node])
            found = probe.solve_scale(run.values, value) if found is None else found
            if not bool(run.valid[raw.node].all()) or found is None or not probe.agree(run.values, found * value):
                return None
        assert found is not None
        return Strength(raw, found, run.roundings)
    return None


def decay_gate(g: Node, sizes: Sizes) -> DecayGate | None:
    """The log decay [B, T, H] or [B, T, H, K] as a gate of the op, if it is one and private to the delta rule."""
    whole = cone.backward(g)
    timed = [leaf for leaf in whole.leaves if _axes_read(g, leaf, sizes) & {0, 1}]
    if g not in whole.interior or len(timed) != 1 or not 2 <= len(whole.leaves) <= 3:
        return None
    for raw in _row_views(g, whole, timed[0], sizes):
        part = cone.backward(g, stop={raw.node})
        small = [leaf for leaf in part.leaves if leaf is not raw.node]
        shapes = {leaf: _per_head(g, leaf, sizes) for leaf in small}
        if not private(part.interior, g) or any(shape is None for shape in shapes.values()):
            continue
        try:
            gate = identify(g, raw.node, small, part.interior, sizes)
        except (NearMiss, Unsupported):
            continue
        usual = gate.lower_bound is not None or (gate.scale, gate.beta, gate.threshold) == (1.0, 1.0, 20.0)
        falls = gate.lower_bound is None or gate.lower_bound <= 0
        if usual and falls:
            return DecayGate(raw, gate, {leaf: shape for leaf, shape in shapes.items() if shape is not None})
    return None


def _axes_read(root: Node, leaf: Node, sizes: Sizes) -> set[int]:
    try:
        return set(range(len(sizes.shape(root)))) - set(factor_axes(root, leaf, sizes).unused)
    except Unsupported:
        return {0}


def _row_views(root: Node, whole: cone.Cone, leaf: Node, sizes: Sizes) -> Iterator[Rows]:
    """Views, copies and casts of `leaf` in which the elements come in the order of `root`, the leaf itself first."""
    shape = sizes.shape(root)
    for node in [leaf, *sorted(n for n in whole.interior if n is not root and cone.carries(n, leaf))]:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        own = sizes.shape(node)
        if math.prod(own) == math.prod(shape) and _viewable(node, shape) and _in_order(root, node, shape, own, sizes):
            yield Rows(node, shape)


def _viewable(node: Node, shape: Sequence[int]) -> bool:
    value = node.meta["val"]
    if not all(isinstance(n, int) for n in value.shape):
        return False
    try:
        torch.empty_strided(value.shape, value.stride(), device="meta").view(list(shape))
    except (RuntimeError, ValueError):
        return False
    return True


def _in_order(root: Node, node: Node, shape: Sequence[int], own: Sequence[int], sizes: Sizes) -> bool:
    coords = walks(shape)
    try:
        access = trace_access(root, node, coords, sizes)
    except Unsupported:
        return False
    return bool(access.valid.all()) and torch.equal(ravel(access.coords, own), ravel(coords, shape))


def _per_head(g: Node, leaf: Node, sizes: Sizes) -> tuple[int, ...] | None:
    """[H] or [H, K] if the elements of a leaf, in their order, are one per head or one per head and channel."""
    shape = sizes.shape(g)
    heads = shape[2:]
    grid = torch.meshgrid(*(torch.arange(n) for n in heads), indexing="ij")
    for kept in {heads[:1], heads}:
        if sizes.numel(leaf) != math.prod(kept) or _axes_read(g, leaf, sizes) & {0, 1} or not _viewable(leaf, kept):
            continue
        coords = [torch.zeros_like(grid[0]).reshape(-1)] * 2 + [axis.reshape(-1) for axis in grid]
        try:
            access = trace_access(g, leaf, coords, sizes)
        except Unsupported:
            return None
        wanted = ravel([axis.reshape(-1) for axis in grid[: len(kept)]], kept)
        read = ravel(access.coords, sizes.shape(leaf)).expand(wanted.shape)
        if bool(access.valid.all()) and torch.equal(read, wanted):
            return kept
    return None


def private(interior: set[Node], root: Node) -> bool:
    """Is nothing of `interior` used but by itself, `root` excepted?"""
    return all(user in interior for node in interior if node is not root for user in node.users)
