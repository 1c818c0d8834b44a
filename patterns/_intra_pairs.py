"""The pairs of queries and keys of the chunks, scale sum_k q_i k_j exp(G_i - G_j), where a graph computes them.

They share the decays between tokens with u and w: only where both are replaced the decays need not be formed. There is
either one tensor for all chunks, or one per chunk in a loop that was unrolled when the model was traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._axis_factors import flat
from fusion_passes.patterns._delta_rule_bends import check_bends
from fusion_passes.patterns._delta_rule_proof import _equal
from fusion_passes.patterns._delta_rule_region import Leaf, check_arithmetic
from fusion_passes.patterns._delta_rule_steps import same_step
from fusion_passes.patterns._intra_proof import LEADING, Chunks, Meaning, expected, normalised
from fusion_passes.patterns._intra_search import Parts, Tokens, below, layouts, masks
from fusion_passes.probe import solve_scale
from fusion_passes.sizes import Sizes, Unsupported

aten = torch.ops.aten

_MOVERS = semantics.VIEWS - {aten.tril.default, aten.triu.default} | semantics.COPIES | semantics.CASTS
MOST_CHUNKS = 4  # chunks that are evaluated because they differ from the others


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of queries and keys.

    Attributes:
        query: rows of q.
        scale: factor of q.
        nodes: one tensor for all chunks, or one for every chunk.
        order: the leading axes of the one tensor as one of `LEADING`, or of those per chunk without n.
        interior: what they are computed from, constants and leaves excepted.
        roundings: casts to a narrower float on the way.
    """

    query: Leaf
    scale: float
    nodes: tuple[Node, ...]
    order: str
    interior: frozenset[Node]
    roundings: tuple[Node, ...]


def pairs_of(found: Parts, meaning: Meaning, sizes: Sizes) -> Pairs | None:
    """The pairs that are computed beside u and w, if there are any and they are those of the same keys."""
    tokens = Tokens(found.frame, sizes)
    ends = _ends(found, tokens, sizes)
    if not ends:
        return None
    try:
        return _proved(ends, found, tokens, meaning, sizes)
    except (NearMiss, Unsupported):
        return None  # u and w are worth having without


def _ends(found: Parts, tokens: Tokens, sizes: Sizes) -> list[Node]:
    """The last nodes [.., C, C] that are computed from q, k and the sums alone."""
    length, key = found.frame.size["c"], found.leaves["k"]
    inside = {*found.region.nodes, *found.results}
    known: dict[Node, bool] = {}
    for node in below(found.frame.sums, stop=set(found.results)):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or node in inside or node.target in _MOVERS or value.dim() < 3:
            continue
        if sizes.shape(node)[-2:] != (length, length):
            continue
        _, leaves, foreign = tokens.above([node])
        others = [leaf for leaf in leaves[:-1] if leaf != key]
        known[node] = not foreign and key in leaves and len(others) == 1 and others[0].width == key.width
    wanted = [node for node, fits in known.items() if fits]
    return [node for node in wanted if not any(known.get(user) for user in _arithmetic_users(node))]


def _arithmetic_users(node: Node) -> list[Node]:
    """What computes with the values of `node`, moved or not."""
    found: list[Node] = []
    queue = [node]
    for at in queue:
        for user in at.users:
            (queue if user.target in _MOVERS else found).append(user)
    return found


def _proved(ends: Sequence[Node], found: Parts, tokens: Tokens, meaning: Meaning, sizes: Sizes) -> Pairs | None:
    frame, key = found.frame, found.leaves["k"]
    nodes, leaves, _ = tokens.above(ends)
    queries = [leaf for leaf in leaves[:-1] if leaf != key]
    if len(queries) != 1 or (queries[0].heads, queries[0].width) != (key.heads, key.width):
        return None
    depends = masks(nodes, leaves)
    axes = layouts(frame, leaves, sizes)
    for node in nodes:
        axes.visit(node)
    roundings = check_arithmetic(nodes, depends, ends)
    chunks, length = frame.size["n"], frame.size["c"]
    by_chunk = {axes.levels[node]: node for node in ends}
    here = dataclasses.replace(found, axes=axes)
    if len(ends) == 1 and (-1 in by_chunk):
        order, which = _order(ends[0], here, LEADING, length), sorted({0, chunks - 1})
    elif sorted(by_chunk) == list(range(chunks)) and len(ends) == chunks:
        order = _order(by_chunk[0], here, ("bh", "hb"), length)
        if any(_order(node, here, (order,), length) != order for node in ends):
            return None
        which = [
            i for i in range(chunks)
            if i < 2 or not same_step(by_chunk[i], by_chunk[1], i, 1, [None] * chunks, axes, depends)
        ]  # fmt: skip
        which = sorted({*which, chunks - 1})
    else:
        return None
    if len(which) > MOST_CHUNKS:
        return None
    values = Chunks(frame, {"q": queries[0], "k": key}, nodes, depends, sizes)
    scale: float | None = None
    for chunk in which:
        actual = values.rows_of(by_chunk.get(-1) or by_chunk[chunk], order, chunk, length)
        wanted = _definition(values, meaning.norm_eps, chunk)
        scale = solve_scale(actual, wanted) if scale is None else scale
        if scale is None or not _equal(actual, scale * wanted):
            return None
    assert scale is not None
    check_bends(nodes, depends, depends[frame.sums], [depends[leaf.node] for leaf in (queries[0], key)])
    ordered = tuple(by_chunk[chunk] for chunk in sorted(by_chunk))
    inside = frozenset(node for node in nodes if depends[node])
    return Pairs(queries[0], scale, ordered, order, inside, tuple(roundings))


def _order(node: Node, found: Parts, orders: Sequence[str], width: int) -> str:
    for order in orders:
        if flat(found.axes.layouts[node]) == expected(order, found, width):
            return order
    raise NearMiss(f"{node.name} does not hold pairs of tokens of every batch and head")


def _definition(values: Chunks, eps: float | None, chunk: int) -> torch.Tensor:
    """Pairs [C, C] of one chunk without their scale, zero above the diagonal."""
    q, k = (normalised(values.drawn(role, chunk), eps) for role in ("q", "k"))
    sums = values.sums(chunk)
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()[:, :, None]
    decay = (sums[:, None] - sums[None]).masked_fill(~causal, -torch.inf).exp()
    return (q[:, None] * k[None] * decay).sum(-1)
