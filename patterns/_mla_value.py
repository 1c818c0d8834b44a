"""The value beside an MLA key: a float8 cast of another window of the projection that the key is read from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Graph, Node

from fusion_passes import aten as semantics
from fusion_passes.access import AxisMap, factor_axes
from fusion_passes.fusion import NearMiss, Refusal
from fusion_passes.layout import Piece, refine
from fusion_passes.patterns._mla_chain import FLOAT8, check_dtypes, read_from, text, walk
from fusion_passes.patterns._mla_proof import check_values
from fusion_passes.patterns._mla_views import memory_steps
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import is_alias

aten, prims = torch.ops.aten, torch.ops.prims

CASTS = (prims.convert_element_type.default, aten._to_copy.default, aten.copy.default)

# Size and step in memory of a factor of an axis: what tells tokens and heads of one tensor from each other.
Stride = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Value:
    """A cast window.

    Attributes:
        root: the float8 tensor.
        leaf: the view of the projection that it is read from.
        interior: the nodes from the leaf to the root.
        steps, scale: what happens before the cast.
        axes: how the leaf's axes are composed of the root's.
        pieces: the factors of the root's axes.
        tokens, heads, column: which of them are which.
    """

    root: Node
    leaf: Node
    interior: frozenset[Node]
    steps: str
    scale: Node | None
    axes: AxisMap
    pieces: dict[int, list[Piece]]
    tokens: tuple[Piece, ...]
    heads: tuple[Piece, ...]
    column: Piece
    roundings: tuple[Node, ...]

    def lengths(self) -> dict[Hashable, Any]:
        """The length of every factor: an integer, or a symbol."""
        shape = self.root.meta["val"].shape
        found: dict[Hashable, Any] = {}
        for axis, pieces in self.pieces.items():
            inner = math.prod(p.size for p in pieces if p.static)
            found |= {p: p.size if p.static else shape[axis] // inner for p in pieces}
        return found


def find(
    graph: Graph,
    key_leaf: Node,
    taken: set[Node],
    tokens: list[list[Stride]],
    heads: list[list[Stride]],
    assignments: list[Sizes],
) -> Value | None:
    """The first float8 cast of another window of what `key_leaf` shows, with the key's tokens and heads.

    Args:
        taken: nodes of the key.
        tokens, heads: the key's factors in the memory of `key_leaf`, under every assignment of sizes.
        assignments: of sizes.
    """
    for target in CASTS:
        for root in graph.find_nodes(op="call_function", target=target):
            if root in taken or root.meta["val"].dtype not in FLOAT8:
                continue
            try:
                chain = walk(root, assignments[0])
                leaf = read_from(chain)
                if not is_alias(leaf, key_leaf) or leaf.meta["val"].dtype != key_leaf.meta["val"].dtype:
                    continue
                found = [_prove(root, leaf, *given) for given in zip(tokens, heads, assignments)]
            except (NearMiss, Unsupported, Refusal):
                continue
            if all(_same(value, found[0]) for value in found):
                return found[0]
    return None


def _prove(root: Node, leaf: Node, tokens: list[Stride], heads: list[Stride], sizes: Sizes) -> Value:
    """The value under one assignment of sizes."""
    chain = walk(root, sizes)
    dtype = check_dtypes(chain.nodes[: chain.nodes.index(leaf) + 1])
    steps, scale = text(chain.steps, dtype)
    axes = factor_axes(root, leaf, sizes, stop=(scale,) if scale is not None else ())
    pieces = _divided(refine([axes], root, sizes), leaf, axes, heads, sizes)
    moves = memory_steps(leaf, axes, pieces, sizes)
    flat = [p for axis in sorted(pieces) for p in pieces[axis] if p.size > 1]
    if any(p not in moves for p in flat):
        raise NearMiss("it repeats elements")
    named = {(p.size, moves[p]): p for p in flat}
    columns = [p for p in flat if moves[p] == 1]
    if len(columns) != 1 or len(named) < len(flat):
        raise NearMiss("its columns are not neighbours in memory")
    (column,) = columns
    rows = {stride for stride, p in named.items() if p is not column}
    if rows != {*tokens, *heads} or column.axis != flat[-1].axis or column.stride != 1:
        raise NearMiss("it has other tokens or heads than the key")

    def look(coords: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        return axes.read(coords), torch.ones_like(coords[0], dtype=torch.bool)

    roundings = check_values(root, column.size, [(leaf, look)], steps, scale, sizes)
    inner = set(chain.nodes[: chain.nodes.index(leaf)])
    inner |= {n for node in chain.nodes if node.target is aten.copy.default for n in _emptied(node)}
    return Value(
        root, leaf, frozenset(inner), steps, scale, axes, pieces, tuple(named[s] for s in tokens),
        tuple(named[s] for s in heads), column, tuple(roundings),
    )  # fmt: skip


def _divided(
    pieces: dict[int, list[Piece]], leaf: Node, axes: AxisMap, heads: list[Stride], sizes: Sizes
) -> dict[int, list[Piece]]:
    """The factors with tokens and heads apart where one factor runs over both."""
    moves = memory_steps(leaf, axes, pieces, sizes)
    found: dict[int, list[Piece]] = {}
    for axis, known in pieces.items():
        found[axis] = []
        for p in known:
            count = next((n for n, step in heads if moves.get(p) == step and p.size > n and p.size % n == 0), None)
            if count is None:
                found[axis].append(p)
            else:
                rest = Piece(axis, p.stride * count, p.size // count, p.static)
                found[axis] += [rest, Piece(axis, p.stride, count, True)]
    return found


def _emptied(copy: Node) -> list[Node]:
    """The uninitialised tensor that a copy fills."""
    target = copy.args[0]
    return [target] if isinstance(target, Node) and target.target in semantics.FILLS else []


def _same(a: Value, b: Value) -> bool:
    same = (a.leaf, a.steps, a.scale) == (b.leaf, b.steps, b.scale)
    return same and all(
        [(p.axis, p.static) for p in x] == [(p.axis, p.static) for p in y]
        for x, y in ((a.tokens, b.tokens), (a.heads, b.heads), ((a.column,), (b.column,)))
    )
