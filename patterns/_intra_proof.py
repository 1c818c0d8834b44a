"""The proof that a subgraph is the intra-chunk part of a delta rule, whatever its spelling.

Batches, heads and chunks are treated in parallel (`_parallel_axes`), and the subgraph is analytic in its data
(`_delta_rule_region`, `_delta_rule_bends`). A chunk of one batch and head, and the last one, which padding may reach,
are evaluated in float64 on random operands; all values of the results equal those of the definition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes.evaluate import Evaluator, hashed
from fusion_passes.evaluate import Leaf as Values
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns import _delta_rule_region as regions
from fusion_passes.patterns._axis_factors import CHUNKS, PLAIN, Factor, flat, normal
from fusion_passes.patterns._delta_rule_bends import check_bends
from fusion_passes.patterns._delta_rule_proof import _equal
from fusion_passes.patterns._delta_rule_region import Leaf
from fusion_passes.patterns._delta_rule_values import BUDGET, _draw, _fills, _small_constants, _takes_root
from fusion_passes.patterns._intra_frame import Frame
from fusion_passes.patterns._intra_search import Parts
from fusion_passes.patterns._proofs import Proofs
from fusion_passes.sizes import Sizes
from fusion_passes.views import ravel

LEADING = ("bhn", "bnh", "hbn", "hnb", "nbh", "nhb")


@dataclasses.dataclass(frozen=True)
class Meaning:
    """The constants of a proved subgraph.

    Attributes:
        norm_eps: k is x / sqrt(sum x^2 + norm_eps) if it is a number.
        orders: for u and w the order of batch, head and chunk in their memory, as one of `LEADING`.
        results: "u,w", or "uw" or "wu" for both side by side.
    """

    norm_eps: float | None
    orders: tuple[str, ...]
    results: str


proofs: Proofs[Meaning] = Proofs()


def prove(found: Parts, sizes: Sizes, briefly: bool) -> Meaning:
    """What the parts compute; `briefly` looks at the last chunk alone, for further assignments of sizes.

    Subgraphs that are the same, such as those of the layers of a model, are proved once.

    Raises:
        NearMiss: it is something else; the message says where the likeness ends.
        Unsupported: it cannot be evaluated.
    """
    roles = [found.region.leaves.index(leaf) for leaf in found.leaves.values()]
    frame = found.frame
    key = regions.fingerprint(
        found.results, found.region, sizes, roles, frame.order, sorted(frame.size.items()), briefly
    )
    return proofs.of(key, lambda: _meaning(found, sizes, briefly))


def _meaning(found: Parts, sizes: Sizes, briefly: bool) -> Meaning:
    orders = tuple(order_of(node, found, sizes) for node in found.results)
    values = Chunks(found.frame, found.leaves, found.region.nodes, found.region.depends, sizes)
    epsilons, forms = values.epsilons, ["u,w"] if found.choice.w is not None else ["uw", "wu"]
    chunks = found.frame.size["n"]
    for chunk in sorted({chunks - 1} if briefly else {0, chunks - 1}):
        actual = [
            values.rows_of(node, order, chunk, sizes.shape(node)[-1]) for node, order in zip(found.results, orders)
        ]
        epsilons = [eps for eps in epsilons if _explained(values, eps, forms, chunk, actual)]
        if epsilons:
            forms = [form for form in forms if _explained(values, epsilons[0], [form], chunk, actual)]
        else:
            names = ", ".join(f"{role} = {leaf.node.name}" for role, leaf in found.leaves.items())
            what = " and ".join(node.name for node in found.results)
            raise NearMiss(f"{what}: chunk {chunk} is not (I + L)^-1 (beta v) and (I + L)^-1 (beta k exp G), {names}")
    depends = found.region.depends
    check_bends(found.region.nodes, depends, depends[found.frame.sums], [depends[found.leaves["k"].node]])
    return Meaning(epsilons[0], orders, forms[0])


def _explained(values: Chunks, eps: float | None, forms: Sequence[str], chunk: int, actual: Sequence[Tensor]) -> bool:
    u, w = definition(values, eps, chunk)
    joined = {"u,w": [u, w], "uw": [torch.cat([u, w], -1)], "wu": [torch.cat([w, u], -1)]}
    return any(all(_equal(x, y) for x, y in zip(actual, joined[form])) for form in forms)


def definition(values: Chunks, eps: float | None, chunk: int) -> tuple[Tensor, Tensor]:
    """u [C, V] and w [C, K] of one chunk, row by row."""
    k, v, beta = (values.drawn(role, chunk) for role in ("k", "v", "beta"))
    k, sums = normalised(k, eps), values.sums(chunk)
    u, w = torch.zeros_like(v), torch.zeros_like(k)
    for i in range(len(k)):
        system = ((k[i] * k[:i] * (sums[i] - sums[:i]).exp()).sum(-1))[:, None]
        u[i] = beta[i] * (v[i] - (system * u[:i]).sum(0))
        w[i] = beta[i] * (k[i] * sums[i].exp() - (system * w[:i]).sum(0))
    return u, w


def normalised(x: Tensor, eps: float | None) -> Tensor:
    return x if eps is None else x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def order_of(node: Node, found: Parts, sizes: Sizes) -> str:
    """The order of batch, head and chunk in a result [.., C, D].

    Raises:
        NearMiss: it holds something else.
    """
    layout = found.axes.layouts[node]
    for order in LEADING:
        if found.axes.levels[node] < 0 and flat(layout) == expected(order, found, sizes.shape(node)[-1]):
            return order
    raise NearMiss(f"{node.name} does not hold one row per token of every batch, head and chunk")


def expected(order: str, found: Parts, width: int) -> tuple[Factor, ...]:
    """The factors of a tensor with these leading axes, rows of a chunk, and `width` columns."""
    size, axes = found.frame.size, found.axes
    groups = next((f.size for dim in axes.layouts[found.frame.sums] for f in dim if f.name == "g"), 1)
    names = {
        "b": [Factor("b", size["b"])],
        "h": [Factor("g", groups), Factor("r", size["h"] // groups)],
        "n": [Factor(CHUNKS, size["n"])],
    }
    return normal([factor for letter in order for factor in names[letter]] + [Factor(PLAIN, size["c"] * width)])


class Chunks:
    """Single chunks of one batch and head, evaluated on leaves that are drawn.

    Attributes:
        epsilons: what the epsilon of a normalisation of k may be; None for no normalisation.
    """

    def __init__(
        self, frame: Frame, leaves: Mapping[str, Leaf], nodes: Sequence[Node], depends: Mapping[Node, int], sizes: Sizes
    ) -> None:
        self.frame, self.leaves, self.own_sizes = frame, leaves, sizes
        small = _small_constants([node for node in nodes if depends[node] or _fills(node)])
        rooted = any(_takes_root(node) and depends[node] for node in nodes)
        self.epsilons: list[float | None] = [*small, 0.0, None] if rooted else [None]
        short = max(small, default=1e-6) if rooted else None
        self.draws: dict[Node, Values] = {
            leaf.node: _draw(leaf, role, 10 * i, short) for i, (role, leaf) in enumerate(leaves.items())
        }
        self.draws[frame.sums] = hashed(500, -0.7, 0.3)
        self.evaluator = Evaluator(self.draws, sizes, BUDGET)

    def _place(self, chunk: int) -> dict[str, Tensor]:
        """One batch and head, another one for every chunk."""
        generator = torch.Generator().manual_seed(chunk)
        place = {x: torch.randint(self.frame.size[x], (), generator=generator) for x in "bh"}
        return {**place, "n": torch.tensor(chunk)}

    def drawn(self, role: str, chunk: int) -> Tensor:
        """Rows [C, D] of a leaf, [C] of a narrow one; zero behind the last token."""
        leaf, size, place = self.leaves[role], self.frame.size, self._place(chunk)
        times = chunk * size["c"] + torch.arange(size["c"])
        real = times < size["t"]
        own = place["h"] // (size["h"] // leaf.heads)
        inside = times.clamp(max=size["t"] - 1)
        rows = ravel(
            [place["b"], *((own, inside) if leaf.head_first else (inside, own))], self.own_sizes.shape(leaf.node)[:3]
        )
        if not leaf.width:
            return self.draws[leaf.node](rows) * real
        return self.draws[leaf.node](rows[:, None] * leaf.width + torch.arange(leaf.width)) * real[:, None]

    def sums(self, chunk: int) -> Tensor:
        """[C, K], or [C, 1] with one sum per head."""
        size, order, place = self.frame.size, self.frame.order, self._place(chunk)
        place |= {"c": torch.arange(size["c"])[:, None], "k": torch.arange(size["k"])}
        index = ravel([place[letter] for letter in order], [size[letter] for letter in order])
        return self.draws[self.frame.sums](index)

    def rows_of(self, node: Node, order: str, chunk: int, width: int) -> Tensor:
        """[C, width] of a result with leading axes of that order; those of one chunk have no n."""
        size, place = self.frame.size, self._place(chunk)
        start = ravel([place[letter] for letter in order], [size[letter] for letter in order])
        index = start * size["c"] * width + torch.arange(size["c"] * width)
        return self.evaluator.values(node, index).double().reshape(size["c"], width)
