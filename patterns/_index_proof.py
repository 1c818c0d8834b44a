"""The meaning of an index score: sums over heads of weighted, activated products, at random places.

The products are tried as leaves, where every regime of the activation is drawn, NaN included; then once more from
queries and keys on. Constants are solved for on one set of draws and confirmed on others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes import premises
from fusion_passes.evaluate import Evaluator, hashed
from fusion_passes.fusion import NearMiss, Refusal
from fusion_passes.patterns._index_operands import Reader, outside
from fusion_passes.patterns._index_roles import Roles, assign
from fusion_passes.patterns._index_terms import ADDITIONS, SCALINGS, Structure
from fusion_passes.probe import agree, solve_scale
from fusion_passes.sizes import Sizes
from fusion_passes.views import Coords, concrete_tensors, ravel

Draw = Callable[[Tensor], Tensor]

COUNT = 96
WHOLE_COUNT = 16
SEEDS = (1, 2)
# Products that tell activations apart; in a run of their own, one in every other sum on average.
EXTREMES = (math.nan, math.inf, -math.inf, 0.0, 1e-3, -1e-3, 1e-6, 7.0, -7.0, 100.0, -100.0, 1e30, -1e30)
EXTREME_COUNT = 768
MOST_LEAVES = 4
MOST_THRESHOLDS = 6


@dataclasses.dataclass(frozen=True)
class Sum:
    """What the sum over heads is made of.

    Attributes:
        scale: a positive factor.
        keep_nan: the activation passes NaN.
        weights: tensors whose product weighs the heads.
        q_scale, k_scale: tensors that multiply the products before the activation.
        k_after: multiplies the sums, per key.
        roundings: casts to narrower floats on the way.
    """

    scale: float
    keep_nan: bool
    weights: tuple[Node, ...]
    q_scale: Node | None
    k_scale: Node | None
    k_after: Node | None
    roundings: tuple[Node, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass
class _Run:
    """One evaluation: sums [n], products and other tensors as the sums read them [n, heads]."""

    sums: Tensor
    products: Tensor
    others: dict[Node, Tensor]
    roundings: list[Node]


def prove(structure: Structure, sizes: Sizes) -> tuple[Sum, Roles]:
    """The sum that `structure.base` is, and the roles of its axes.

    Raises:
        NearMiss: it is no index score.
        Refusal: its scale is negative.
    """
    reader = Reader(structure, structure.base, sizes)
    if reader.heads < 2:
        raise NearMiss("it has a single head")
    premises.check_even(structure.nodes - {*structure.products})
    leaves = outside(structure.nodes - {*structure.products}, structure.products, sizes)
    if len(leaves) > MOST_LEAVES:
        raise NearMiss(f"its sum over heads reads {len(leaves)} tensors beside the products")
    roles = assign(reader, {leaf: reader.map(reader.weight(leaf), leaf) for leaf in leaves}, dividing=True)
    found = _identify(reader, roles, leaves)
    _check_whole(reader, roles, found)
    return found, roles


def _identify(reader: Reader, roles: Roles, leaves: Sequence[Node]) -> Sum:
    plain = [_run(reader, roles, leaves, seed) for seed in SEEDS]
    extreme: list[_Run] = []
    for candidate in _candidates(roles, leaves):
        scale = solve_scale(plain[0].sums, _formula(candidate, plain[0])[0])
        if scale is None:
            continue
        scaled = dataclasses.replace(candidate, scale=scale)
        if not all(_explains(scaled, run) for run in plain):
            continue
        if scale < 0:
            raise Refusal(f"the scores are multiplied by {scale:.6g}: an index score has a positive scale")
        extreme = extreme or [_run(reader, roles, leaves, 3, (*EXTREMES, *_near_thresholds(reader.structure)))]
        for keep_nan in (True, False):
            final = dataclasses.replace(scaled, keep_nan=keep_nan, roundings=_roundings(reader, plain[0]))
            if all(_explains(final, run) for run in extreme):
                return final
    raise NearMiss(_difference(plain[0]))


def _near_thresholds(structure: Structure) -> list[float]:
    """Values on both sides of the numbers that products may be compared with: those of all nodes but arithmetic."""
    numbers = set()
    for node in structure.nodes:
        if node.target in SCALINGS | ADDITIONS or node.target not in semantics.POINTWISE:
            continue
        for source in (*node.args, *node.kwargs.values()):
            number = semantics.fill_of(source) if isinstance(source, Node) else source
            if isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < abs(number) < 1e37:
                numbers.add(float(number))
    return [x * near for x in sorted(numbers, key=abs)[:MOST_THRESHOLDS] for near in (0.99, 1.01, -1.01)]


def _roundings(reader: Reader, run: _Run) -> tuple[Node, ...]:
    narrow = [p for p in reader.structure.products if p.meta["val"].dtype.itemsize < 4]
    return tuple(dict.fromkeys((*narrow, *run.roundings)))


def _candidates(roles: Roles, leaves: Sequence[Node]) -> Iterator[Sum]:
    """Every way to take the tensors beside the products, with a scale of 1."""
    per_key = [leaf for leaf in leaves if roles.used(leaf).intersection(roles.keys)]
    per_head = [leaf for leaf in leaves if leaf not in per_key]
    if any(roles.used(leaf).intersection(roles.channels) for leaf in leaves):
        raise NearMiss("something beside its products depends on the channel")
    if any(not roles.used(leaf) <= {*roles.batch, *roles.keys} for leaf in per_key) or len(per_key) > 1:
        raise NearMiss("its weights depend on the key")
    if not any(roles.used(leaf).issuperset(roles.heads) for leaf in per_head):
        raise NearMiss("it has no weight per head")
    key_scale = per_key[0] if per_key else None
    scalings = [None, *per_head] if roles.query.scale is None else [None]
    for q_scale, after in itertools.product(scalings, (False, True) if key_scale is not None else (False,)):
        weights = tuple(leaf for leaf in per_head if leaf is not q_scale)
        if key_scale is not None and not after and roles.key.scale is not None:
            continue
        if any(roles.used(leaf).issuperset(roles.heads) for leaf in weights):
            yield Sum(1.0, True, weights, q_scale, None if after else key_scale, key_scale if after else None)


def _formula(form: Sum, run: _Run) -> tuple[Tensor, Tensor]:
    """The sums by the formula, and the sum of the absolute values of their terms."""
    x = run.products
    for scale in (form.q_scale, form.k_scale):
        x = x if scale is None else x * run.others[scale]
    activated = x.relu() if form.keep_nan else torch.where(x > 0, x, 0.0)
    for weight in form.weights:
        activated = activated * run.others[weight]
    factor = form.scale if form.k_after is None else form.scale * run.others[form.k_after][:, 0]
    return activated.sum(1) * factor, (activated.abs().sum(1) * factor).abs()


def _explains(form: Sum, run: _Run) -> bool:
    reference, magnitude = _formula(form, run)
    return agree(run.sums, reference, magnitude.nan_to_num(0.0, 0.0, 0.0) + 1e-3)


def _run(
    reader: Reader, roles: Roles, leaves: Sequence[Node], seed: int, extremes: Sequence[float] = ()
) -> _Run:  # fmt: skip
    """The sums at random places, each product and tensor drawn by element."""
    draws: dict[Node, Draw] = {leaf: hashed(100 * seed + i, -1.5, 1.5) for i, leaf in enumerate(leaves)}
    for i, product in enumerate(reader.structure.products):
        draws[product] = _product_draw(1000 * seed + i, extremes, 0.5 / reader.heads)
    with concrete_tensors():
        coords, virtual = _places(reader, EXTREME_COUNT if extremes else COUNT, seed)
        evaluator = Evaluator(draws, reader.sizes)
        sums = evaluator.values(reader.root, ravel(coords, reader.sizes.shape(reader.root)))
        products = torch.zeros(virtual[0].shape, dtype=torch.float64)
        for chosen, product, places in reader.products(virtual):
            products[chosen] = draws[product](ravel(places, reader.sizes.shape(product)))
        others = {leaf: _read(roles, leaf, draws[leaf], virtual) for leaf in leaves}
        shape = (len(coords[0]), reader.heads)
        shaped = {leaf: drawn.reshape(shape) for leaf, drawn in others.items()}
        return _Run(sums.double(), products.reshape(shape), shaped, evaluator.roundings)


def _product_draw(seed: int, extremes: Sequence[float], rate: float) -> Draw:
    plain = hashed(seed, -3.0, 3.0)
    if not extremes:
        return plain
    chance, which = hashed(seed + 500, 0.0, 1.0), hashed(seed + 600, 0.0, float(len(extremes)))
    table = torch.tensor(list(extremes), dtype=torch.float64)

    def draw(index: Tensor) -> Tensor:
        return torch.where(chance(index) < rate, table[which(index).long()], plain(index))

    return draw


def _places(reader: Reader, count: int, seed: int) -> tuple[Coords, Coords]:
    """Random coordinates of the scores, an eighth at the ends of the axes, and for each those of all its heads."""
    generator = torch.Generator().manual_seed(seed)
    coords = []
    for length in reader.sizes.shape(reader.root):
        places = torch.randint(max(length, 1), (count,), generator=generator)
        places[: count // 8] = torch.randint(2, (count // 8,), generator=generator) * (length - 1)
        coords.append(places)
    head = torch.arange(reader.heads).repeat(count)
    virtual = [c.repeat_interleave(reader.heads) for c in coords]
    return coords, [*virtual, head, torch.zeros_like(head)]


def _read(roles: Roles, leaf: Node, draw: Draw, virtual: Coords) -> Tensor:
    axis_map = roles.maps[leaf]
    return draw(ravel(axis_map.read(virtual), axis_map.leaf_shape)).double().expand(virtual[0].shape)


def _check_whole(reader: Reader, roles: Roles, form: Sum) -> None:
    """Once more from queries and keys on: the products are those of all channels.

    Raises:
        NearMiss: they are not.
    """
    tensors = [roles.query.leaf, roles.key.leaf, *(s for s in (roles.query.scale, roles.key.scale) if s is not None)]
    beside = [leaf for leaf in roles.maps if leaf not in tensors]
    draws: dict[Node, Draw] = {leaf: hashed(50 + i, -1.5, 1.5) for i, leaf in enumerate((*tensors, *beside))}
    with concrete_tensors():
        coords, virtual = _places(reader, WHOLE_COUNT, 7)
        evaluator = Evaluator(draws, reader.sizes)
        sums = evaluator.values(reader.root, ravel(coords, reader.sizes.shape(reader.root))).double()
        wide = [c.repeat_interleave(reader.width) for c in virtual[:-1]]
        wide.append(torch.arange(reader.width).repeat(len(virtual[0])))
        factors = [_read(roles, leaf, draws[leaf], wide) for leaf in tensors]
        shape = (len(coords[0]), reader.heads)
        products = torch.stack(factors).prod(0).reshape(*shape, reader.width).sum(-1)
        others = {leaf: _read(roles, leaf, draws[leaf], virtual).reshape(shape) for leaf in beside}
    if not _explains(form, _Run(sums, products, others, [])):
        raise NearMiss("its products are not those of all channels of queries and keys")
    premises.check_read(evaluator, reader.root)


def _difference(run: _Run) -> str:
    """Where the likeness ends, in words."""
    if not bool(run.sums.isfinite().any()):
        return "it has no finite value where its products are drawn from -3 to 3"
    at = int(torch.nonzero(run.sums.isfinite())[0])
    products = ", ".join(f"{float(x):.3g}" for x in run.products[at, :3])
    return (
        "it is not scale * sum of w * relu(q . k) over the heads: for products of "
        f"{products}{', ...' if run.products.shape[1] > 3 else ''} it is {float(run.sums[at]):.6g}"
    )


