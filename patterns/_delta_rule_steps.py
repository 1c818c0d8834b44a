"""The loop over chunks, rolled up again: the state that is handed on, and steps that are the same function.

Where every step is the same graph with the chunk's number moved by one, proving one of them proves all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._parallel_axes import ParallelAxes

aten, prims = torch.ops.aten, torch.ops.prims

# Nodes that show all values of their input, in whatever order.
_REARRANGERS: frozenset[Any] = (
    semantics.RESHAPES
    | semantics.COPIES
    | semantics.CASTS
    | {aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, prims.transpose.default}
)


def states(nodes: Sequence[Node], axes: ParallelAxes) -> list[Node | None]:
    """The state that each chunk starts from; None for the first chunk.

    Raises:
        NearMiss: a step uses several values of earlier steps, or a state other than the one before.
    """
    found: list[dict[Node, None]] = [{} for _ in range(axes.chunks)]
    for node in nodes:
        level = axes.levels[node]
        for source in node.all_input_nodes:
            below = axes.levels.get(source, -1)
            if 0 <= below < level:
                found[level][_origin(source, axes)] = None
    result: list[Node | None] = [None]
    for index in range(1, axes.chunks):
        handed = list(found[index])
        if len(handed) != 1:
            names = ", ".join(node.name for node in handed) or "nothing"
            raise NearMiss(f"chunk {index} uses {names} of earlier chunks; a delta rule hands on one state")
        if axes.levels[handed[0]] != index - 1:
            raise NearMiss(
                f"chunk {index} starts from the state after chunk {axes.levels[handed[0]]} ({handed[0].name}), "
                f"not from the one after chunk {index - 1}"
            )
        result.append(handed[0])
    return result


def _origin(node: Node, axes: ParallelAxes) -> Node:
    """The value that `node` is a rearrangement of, within the same chunk."""
    while node.target in _REARRANGERS:
        source = node.args[0]
        if not isinstance(source, Node) or axes.levels.get(source) != axes.levels[node]:
            return node
        if math.prod(axes.sizes.shape(source)) != math.prod(axes.sizes.shape(node)):
            return node
        node = source
    return node


def same_step(
    a: Node, b: Node, chunk_a: int, chunk_b: int, handed: Sequence[Node | None], axes: ParallelAxes,
    depends: Mapping[Node, int],
) -> bool:  # fmt: skip
    """Is `a` computed from chunk `chunk_a` and its state as `b` is from chunk `chunk_b` and its state?"""
    pending: list[tuple[Any, Any]] = [(a, b)]
    seen: set[tuple[Node, Node]] = set()
    starts = (handed[chunk_a], handed[chunk_b])
    while pending:
        x, y = pending.pop()
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
            if len(x) != len(y):
                return False
            pending += zip(x, y)
        elif not isinstance(x, Node) or not isinstance(y, Node):
            if type(x) is not type(y) or not (x == y or (x != x and y != y)):
                return False
        elif (x, y) not in seen:
            seen.add((x, y))
            if x is starts[0] or y is starts[1]:
                if (x, y) != starts:
                    return False
            elif x in axes.reads or y in axes.reads:
                if not _same_read(x, y, chunk_a, chunk_b, axes):
                    return False
            elif x is y:
                if depends.get(x):
                    return False
            elif not _same_call(x, y, axes):
                return False
            else:
                pending += [(x.args, y.args), (list(x.kwargs.values()), list(y.kwargs.values()))]
    return True


def _same_read(x: Node, y: Node, chunk_x: int, chunk_y: int, axes: ParallelAxes) -> bool:
    reads = axes.reads.get(x), axes.reads.get(y)
    if reads[0] is None or reads[1] is None or reads[0].source is not reads[1].source:
        return False
    return (reads[0].chunk, reads[1].chunk) == (chunk_x, chunk_y) and axes.layouts[x] == axes.layouts[y]


def _same_call(x: Node, y: Node, axes: ParallelAxes) -> bool:
    first, second = x.meta.get("val"), y.meta.get("val")
    if x.op != "call_function" or (x.op, x.target, x.kwargs.keys()) != (y.op, y.target, y.kwargs.keys()):
        return False
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and axes.sizes.shape(x) == axes.sizes.shape(y)
    return isinstance(first, (tuple, list)) and isinstance(second, (tuple, list))
