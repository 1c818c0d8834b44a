"""What happens to the scores after the sum over heads: factors, masks, casts.

From the sum on, each node that holds all scores is a candidate for what the op gives; the last one that is a scaled and
masked sum is taken. The mask's role is found by its values: bits that choose between score and a fill value, or a
summand. A mask that is one comparison of positions is a causal one if it hides what lies behind s + offset.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes import cone, premises
from fusion_passes.access import trace_access
from fusion_passes.evaluate import Evaluator, constant, hashed
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._index_operands import MOVES, outside, raised
from fusion_passes.patterns._index_terms import MOST_NODES
from fusion_passes.premises import dependents
from fusion_passes.probe import agree, solve_scale
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import concrete_tensors, ravel

aten, prims = torch.ops.aten, torch.ops.prims

COUNT = 192
SEEDS = (1, 2)
# Summands of a mask: those that show, and those that hide.
SUMMANDS = (0.0, 1.5, -0.7, -1e4, -math.inf, torch.finfo(torch.float32).min)

JOINS = frozenset({aten.cat.default, aten.stack.default})
COMPARISONS = frozenset(
    getattr(getattr(aten, name), kind)
    for name in ("gt", "ge", "lt", "le", "eq", "ne")
    for kind in ("Scalar", "Tensor")
)
# What positions are made of, and what comparisons are combined with.
POSITIONS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar})
LOGIC = frozenset(
    {aten.logical_not.default, aten.bitwise_not.default, aten.logical_and.default, aten.logical_or.default,
     aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.where.self}
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mask:
    """How scores become what the op gives.

    Attributes:
        root: the node that holds the result.
        scale: a positive factor of the sums.
        leaf: the mask, None for none.
        kind: "none", "keep", "drop" or "add".
        fill: what hidden scores become.
        k_after: multiplies the sums, per key.
        nodes: what depends on the sums, up to `root`.
        roundings: casts to narrower floats among them.
    """

    root: Node
    scale: float = 1.0
    leaf: Node | None = None
    kind: str = "none"
    fill: float = -math.inf
    k_after: Node | None = None
    nodes: frozenset[Node] = dataclasses.field(default=frozenset(), compare=False)
    roundings: tuple[Node, ...] = dataclasses.field(default=(), compare=False)


def finishes(base: Node, bottom: Node, sizes: Sizes) -> Iterator[Mask]:
    """What becomes of the sums `base` on the way to `bottom`, the longest way first; `base` as it is at the end."""
    whole = cone.backward(bottom, stop={base}, limit=MOST_NODES)
    after = dependents({base}, whole.interior)
    for root in sorted(after, reverse=True):
        if root is not base and _is_gate(root, after):
            try:
                yield _finish(base, root, sizes)
            except (NearMiss, Unsupported):
                continue
    yield Mask(base)


def _is_gate(node: Node, after: Collection[Node]) -> bool:
    """Does everything behind `node` depend on the sums through it alone?"""
    earlier = [n for n in after if n < node]
    return not any(user in after and user > node for n in earlier for user in n.users)


def _finish(base: Node, root: Node, sizes: Sizes) -> Mask:
    if sizes.numel(root) != sizes.numel(base):
        raise NearMiss("not all scores are there")
    nodes = dependents({base}, cone.backward(root, stop={base}, limit=MOST_NODES).interior)
    premises.check_linear({base}, nodes, choices=True)
    premises.check_even(nodes - {base})
    if any(node.target in JOINS for node in nodes - {base}):
        raise NearMiss("scores are put together from parts")
    leaves = list(dict.fromkeys(_source(leaf, sizes) for leaf in outside(nodes - {base}, {base}, sizes)))
    if len(leaves) > 2:
        raise NearMiss(f"the scores are combined with {len(leaves)} tensors")
    for mask in leaves or (None,):
        rest = [leaf for leaf in leaves if leaf is not mask]
        for form in _forms(root, mask, rest, len(leaves)):
            found = _confirmed(form, base, sizes)
            if found is not None:
                return dataclasses.replace(found, nodes=nodes)
    raise NearMiss("it is no mask")


def _forms(root: Node, mask: Node | None, rest: list[Node], count: int) -> Iterator[Mask]:
    """Roles that the tensors may have."""
    if any(not leaf.meta["val"].dtype.is_floating_point for leaf in rest):
        return
    if mask is None:
        yield Mask(root)
    elif mask.meta["val"].dtype == torch.bool:
        for kind in ("keep", "drop"):
            yield Mask(root, leaf=mask, kind=kind, k_after=rest[0] if rest else None)
    elif mask.meta["val"].dtype.is_floating_point:
        yield Mask(root, leaf=mask, kind="add", k_after=rest[0] if rest else None)
        if count == 1:
            yield Mask(root, k_after=mask)


def _confirmed(form: Mask, base: Node, sizes: Sizes) -> Mask | None:
    """The form with its constants, if it is what `root` does to the sums."""
    found: Mask | None = None
    for seed in SEEDS:
        draws = {base: hashed(seed, -3.0, 3.0)}
        if form.k_after is not None:
            draws[form.k_after] = hashed(10 + seed, -1.5, 1.5)
        if form.leaf is not None:
            draws[form.leaf] = _mask_draw(form.kind, 20 + seed)
        values, read, roundings = _sample(form.root, draws, sizes, seed)
        scores = read[base] * (read[form.k_after] if form.k_after is not None else 1.0)
        mask = read[form.leaf] if form.leaf is not None else None
        solved = found or _solved(form, values, scores, mask)
        if solved is None or not _explains(solved, values, scores, mask):
            return None
        found = dataclasses.replace(solved, roundings=tuple(roundings))
    return found


def _mask_draw(kind: str, seed: int) -> Callable[[Tensor], Tensor]:
    table = torch.tensor(SUMMANDS if kind == "add" else (0.0, 1.0), dtype=torch.float64)
    which = hashed(seed, 0.0, float(len(table)))
    return lambda index: table[which(index).long()] if kind == "add" else table[which(index).long()].bool()


def _sample(
    root: Node, draws: dict[Node, Callable[[Tensor], Tensor]], sizes: Sizes, seed: int
) -> tuple[Tensor, dict[Node, Tensor], list[Node]]:
    generator = torch.Generator().manual_seed(seed)
    with concrete_tensors():
        coords = [torch.randint(max(n, 1), (COUNT,), generator=generator) for n in sizes.shape(root)]
        evaluator = Evaluator(draws, sizes)
        values = evaluator.values(root, ravel(coords, sizes.shape(root)))
        read = {}
        for leaf, draw in draws.items():
            access = trace_access(root, leaf, coords, sizes, stop=draws)
            if not bool(access.valid.all()):
                raise NearMiss(f"some of {leaf.name} is hidden by padding")
            read[leaf] = draw(ravel(access.coords, sizes.shape(leaf))).expand(COUNT)
    return values.double(), read, evaluator.roundings


def _solved(form: Mask, values: Tensor, scores: Tensor, mask: Tensor | None) -> Mask | None:
    if form.kind == "add":
        assert mask is not None
        shown = mask > -1e5
        scale = solve_scale(values[shown] - mask[shown], scores[shown])
    elif form.kind in ("keep", "drop"):
        assert mask is not None
        seen = mask if form.kind == "keep" else ~mask
        scale = solve_scale(values[seen], scores[seen])
        if not bool((~seen).any()):
            return None
        form = dataclasses.replace(form, fill=float(values[~seen][0]))
    else:
        scale = solve_scale(values, scores)
    return dataclasses.replace(form, scale=scale) if scale is not None and scale > 0 else None


def _explains(form: Mask, values: Tensor, scores: Tensor, mask: Tensor | None) -> bool:
    expected = scores * form.scale
    if form.kind == "add":
        assert mask is not None
        expected = expected + mask
    elif mask is not None:
        if math.isnan(form.fill):
            return False
        expected = torch.where(mask if form.kind == "keep" else ~mask, expected, form.fill)
    return agree(values, expected)


def _source(node: Node, sizes: Sizes) -> Node:
    """The bits behind a mask that is made of nothing else: of their negation, or of numbers that they choose."""
    while node.target in semantics.POINTWISE or node.target in semantics.CASTS:
        varying = [
            source for source in map(raised, node.all_input_nodes)
            if isinstance(source.meta.get("val"), torch.Tensor)
            and not (sizes.numel(source) == 1 or source.target in semantics.FILLS - semantics.RAMPS)
        ]  # fmt: skip
        if len(varying) != 1 or varying[0].meta["val"].dtype != torch.bool:
            return node
        node = varying[0]
    return node


# --- causal masks ----------------------------------------------------------------------------------------------------


def causal_offset(
    leaf: Node, kind: str, read: Callable[[Tensor, Tensor], Tensor], queries: int, keys: int, sizes: Sizes
) -> int | None:
    """The offset for which the mask hides just the keys t > s + offset, proven; None if it hides others.

    Args:
        leaf: the mask.
        kind: "keep", "drop" or "add".
        read: row-major indices of the leaf for queries [n] and keys [n].
    """
    if not constant(leaf, sizes) or not _single_comparison(leaf, sizes):
        return None
    with concrete_tensors():
        evaluator = Evaluator({}, sizes)

        def seen(s: Tensor, t: Tensor) -> Tensor:
            values = evaluator.values(leaf, read(s, t))
            if kind == "add":
                bad = (values != 0) & (values != -math.inf)
                return torch.where(bad, torch.nan, (values == 0).double())
            return values.bool().double() if kind == "keep" else (~values.bool()).double()

        return _line(seen, queries, keys)


def _line(seen: Callable[[Tensor, Tensor], Tensor], queries: int, keys: int) -> int | None:
    """The offset of a half plane t <= s + offset; None for other half planes, and where its border cannot be seen."""
    s, t = torch.arange(queries), torch.arange(keys)
    first, last = torch.zeros_like(t), torch.full_like(t, queries - 1)
    right = torch.full_like(s, keys - 1)
    visible = int(seen(last, t).nan_to_num(0.0).sum())
    if visible == 0:
        return None
    above = torch.nonzero(seen(s, right) == 1)
    offset = visible - queries if visible < keys else keys - 1 - int(above[0])
    border = (s + offset).clamp(0, keys - 1), (s + offset + 1).clamp(0, keys - 1)
    generator = torch.Generator().manual_seed(0)
    anywhere = [torch.randint(n, (512,), generator=generator) for n in (queries, keys)]
    places = [(first, t), (last, t), (s, torch.zeros_like(s)), (s, right), (s, border[0]), (s, border[1]), anywhere]
    if all(torch.equal(seen(rows, columns), (columns <= rows + offset).double()) for rows, columns in places):
        return offset
    return None


def _single_comparison(leaf: Node, sizes: Sizes) -> bool:
    """Is the mask made of one comparison of positions, and of constants?

    Such a mask is a half plane: what it is at its border it is everywhere.
    """
    compared: set[Node] = set()
    pending, seen = [leaf], {leaf}
    while pending:
        node = pending.pop()
        if node.target in COMPARISONS and not all(_uniform(source, sizes) for source in node.all_input_nodes):
            compared.add(node)
            if not all(_linear(source, sizes) for source in node.all_input_nodes):
                return False
        elif node.target in MOVES | semantics.COPIES | semantics.CASTS | LOGIC and not _uniform(node, sizes):
            new = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor) and n not in seen]
            pending += new
            seen.update(new)
        elif node.target not in COMPARISONS and not _uniform(node, sizes):
            return False
    return len(compared) == 1


def _linear(node: Node, sizes: Sizes) -> bool:
    """Is `node` a sum of positions and constants, in integers that do not wrap around?"""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    if value.dtype.itemsize < 4:
        return False
    if node.target in semantics.RAMPS or _uniform(node, sizes):
        return True
    if node.target in MOVES | semantics.COPIES | semantics.CASTS | POSITIONS:
        return all(_linear(source, sizes) for source in node.all_input_nodes)
    return False


def _uniform(node: Node, sizes: Sizes) -> bool:
    """Is every element the same number, as sizes alone decide?"""
    return not isinstance(node.meta.get("val"), torch.Tensor) or premises.uniform(raised(node), sizes)
