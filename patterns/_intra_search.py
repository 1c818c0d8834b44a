"""The results of the intra-chunk part of a delta rule, found from its sums of log decays onwards.

A result is a matrix product or a triangular solve with one row per token of every chunk. From there the walk leads back
to rows of k, v and beta, as for the whole delta rule (`_delta_rule_region`), and to the sums.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._delta_rule_region import Leaf, Region, check_arithmetic, leaf_layout, token_leaves, walk
from fusion_passes.patterns._intra_frame import Frame
from fusion_passes.patterns._parallel_axes import ParallelAxes, followed
from fusion_passes.sizes import Sizes

aten = torch.ops.aten

RESULTS = semantics.PRODUCTS | {aten.linalg_solve_triangular.default, aten.sum.dim_IntList}
_MOST_VISITED = 16384
_MOST_CANDIDATES = 48
_MOST_CHOICES = 8
SOLVERS = {aten.linalg_solve_triangular.default, aten.linalg_inv_ex.default}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What may be u and w, or one node with both (`w` is None), and rows of k, v and beta by role."""

    u: Node
    w: Node | None
    leaves: dict[str, Leaf]

    @property
    def results(self) -> list[Node]:
        return [self.u] if self.w is None else [self.u, self.w]


@dataclasses.dataclass
class Parts:
    """A choice, of which nothing is proved yet.

    Attributes:
        region: all nodes between leaves and results; the sums are its last leaf.
        axes: what is parallel in the region.
    """

    frame: Frame
    choice: Choice
    region: Region
    axes: ParallelAxes

    @property
    def results(self) -> list[Node]:
        return self.choice.results

    @property
    def leaves(self) -> dict[str, Leaf]:
        return self.choice.leaves


def below(sums: Node, stop: Collection[Node] = ()) -> Iterator[Node]:
    """Nodes that are computed from the sums and are no rows of a whole sequence, in the order of the graph."""
    seen, queue = {sums}, [sums]
    for _ in range(_MOST_VISITED):
        if not queue:
            return
        node = heapq.heappop(queue)
        if node is not sums:
            yield node
        for user in node.users:
            if user not in seen and user not in stop and followed(user):
                seen.add(user)
                heapq.heappush(queue, user)


def candidates(frame: Frame, sizes: Sizes) -> list[Node]:
    """Matrices with one row per token of every chunk that are products or solutions."""
    length, found = frame.size["c"], []
    for node in below(frame.sums):
        value = node.meta.get("val")
        if node.target not in RESULTS or not isinstance(value, torch.Tensor) or value.dim() < 3:
            continue
        shape = sizes.shape(node)
        if shape[-2] == length and sizes.numel(node) == frame.problems * length * shape[-1]:
            found.append(node)
            if len(found) == _MOST_CANDIDATES:
                break
    return found


class Tokens:
    """Tells the leaves of a frame: the sums, and tensors with one row per token and head."""

    def __init__(self, frame: Frame, sizes: Sizes) -> None:
        size, self.frame = frame.size, frame
        self.sums = Leaf(frame.sums, size["h"], 0, False)
        self._early = token_leaves(size["b"], size["t"], size["h"], sizes, (False,), False)
        self._late = token_leaves(size["b"], size["t"], size["h"], sizes, (False, True), True)

    def stop(self, node: Node) -> Leaf | None:
        return self.sums if node is self.frame.sums else self._early(node)

    def above(self, roots: Sequence[Node]) -> tuple[list[Node], list[Leaf], list[Node]]:
        """Nodes between `roots` and the frontier, its leaves with the sums at the end, and what else it holds."""
        nodes, frontier = walk(roots, self.stop)
        leaves, foreign = [], []
        for node, at in frontier.items():
            leaf = at or self._late(node)
            if leaf is None:
                foreign.append(node)
            elif leaf is not self.sums:
                leaves.append(leaf)
        return nodes, [*leaves, self.sums], foreign


def masks(nodes: Sequence[Node], leaves: Sequence[Leaf]) -> dict[Node, int]:
    """The leaves that every node depends on, as bits by position; 0 for constants."""
    found = {leaf.node: 1 << i for i, leaf in enumerate(leaves)}
    for node in nodes:
        mask = 0
        if node.target not in semantics.FILLS:
            for source in node.all_input_nodes:
                mask |= found.get(source, 0)
        found[node] = mask
    return found


def layouts(frame: Frame, leaves: Sequence[Leaf], sizes: Sizes) -> ParallelAxes:
    """The named axes of the leaves, the sums last; nodes are still to be visited."""
    size = frame.size
    groups = min(leaf.heads for leaf in leaves)
    if any(leaf.heads not in (groups, size["h"]) for leaf in leaves):
        raise NearMiss(f"its operands have {', '.join(str(leaf.heads) for leaf in leaves)} heads")
    single = size["n"] == 1
    found = {leaf.node: leaf_layout(leaf, size["b"], size["t"], groups, size["h"], single) for leaf in leaves[:-1]}
    found[frame.sums] = frame.layout(groups)
    return ParallelAxes(found, size["n"], size["c"], sizes)


def choices(frame: Frame, options: Sequence[Node], tokens: Tokens, sizes: Sizes) -> Iterator[Choice]:
    """What u, w and their operands may be among the candidates, which are given in the order of the graph."""
    return itertools.islice(_choices(frame, options, tokens, sizes), _MOST_CHOICES)


def unlike(options: Sequence[Node], tokens: Tokens) -> str | None:
    """What triangular systems among the candidates read, for those that are no delta rule at first sight."""
    for node in options:
        nodes, leaves, foreign = tokens.above([node])
        if any(n.target in SOLVERS for n in nodes):
            read = ", ".join(n.name for n in (*(leaf.node for leaf in leaves), *foreign))
            return f"the system solved by {node.name} reads {read}; a delta rule reads rows of k, v, beta and one sum"
    return None


def _choices(frame: Frame, options: Sequence[Node], tokens: Tokens, sizes: Sizes) -> Iterator[Choice]:
    reads = {node: tokens.above([node]) for node in options}
    own = {node: read for node, read in reads.items() if not read[2]}
    for u, (nodes, leaves, _) in own.items():
        wide = [leaf for leaf in leaves[:-1] if leaf.width]
        narrow = [leaf for leaf in leaves[:-1] if not leaf.width]
        if len(wide) != 2 or len(narrow) != 1 or frame.sums not in _sources(nodes):
            continue
        inside = set(nodes)
        others = [
            w for w, (_, more, _) in own.items()
            if w not in inside and len(more) == 3 and {leaf.node for leaf in more} < {leaf.node for leaf in leaves}
        ]  # fmt: skip
        for w in (*others, None):
            for k, v in (wide, wide[::-1]):
                if w is not None and k not in own[w][1]:
                    continue
                choice = Choice(u, w, {"k": k, "v": v, "beta": narrow[0]})
                if _widths_fit(frame, choice, sizes):
                    yield choice


def _sources(nodes: Sequence[Node]) -> set[Node]:
    return {source for node in nodes for source in node.all_input_nodes}


def _widths_fit(frame: Frame, choice: Choice, sizes: Sizes) -> bool:
    key, value = choice.leaves["k"].width, choice.leaves["v"].width
    if frame.per_channel and frame.size["k"] != key:
        return False
    widths = [sizes.shape(node)[-1] for node in choice.results]
    return widths == ([key + value] if choice.w is None else [value, key])


def checked(frame: Frame, choice: Choice, tokens: Tokens, sizes: Sizes) -> Parts:
    """The choice with everything that can be told without evaluating it.

    Raises:
        NearMiss: it mixes heads or chunks, or computes by other means than sums and products in float32.
    """
    nodes, leaves, _ = tokens.above(choice.results)
    depends = masks(nodes, leaves)
    axes = layouts(frame, leaves, sizes)
    for node in nodes:
        axes.visit(node)
    roundings = check_arithmetic(nodes, depends, choice.results)
    return Parts(frame, choice, Region(leaves, None, nodes, depends, roundings), axes)
