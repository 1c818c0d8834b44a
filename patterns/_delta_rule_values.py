"""Single chunks of an unrolled loop evaluated in float64, on operands and states that are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.evaluate import Evaluator, hashed
from fusion_passes.evaluate import Leaf as Values
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._axis_factors import PLAIN
from fusion_passes.patterns._chunk_assembly import Assembly
from fusion_passes.patterns._delta_rule_region import Leaf, Region
from fusion_passes.patterns._parallel_axes import ParallelAxes
from fusion_passes.sizes import Sizes
from fusion_passes.views import ravel

aten, prims = torch.ops.aten, torch.ops.prims

BUDGET = 2**26
ROOTS = {getattr(ns, name).default for ns in (aten, prims) for name in ("sqrt", "rsqrt")}
POWERS = (aten.pow.Tensor_Scalar, prims.pow.default)


@dataclasses.dataclass
class Loop:
    """A loop over chunks that treats batches and heads in parallel.

    Attributes:
        tokens: number of tokens; the assembly may hold padding after them.
        handed: the state that each chunk starts from; None for the first chunk.
        groups: number of key heads.
    """

    assembly: Assembly
    tokens: int
    region: Region
    axes: ParallelAxes
    handed: list[Node | None]
    groups: int
    sizes: Sizes

    @property
    def chunk(self) -> int:
        return self.assembly.sizes["c"]

    @property
    def heads(self) -> int:
        return self.assembly.sizes["h"]

    def after(self, index: int) -> Node | None:
        """The state that a chunk hands on; None for the last chunk."""
        return self.handed[index + 1] if index + 1 < len(self.handed) else None


@dataclasses.dataclass
class Step:
    """One evaluated chunk: rows of the leaves by position, the state before it, outputs, the state after it.

    The initial and the final state are [K, V]; those that are `handed` on may be in another order.
    """

    rows: list[Tensor]
    state: Tensor | None
    state_handed: bool
    out: Tensor
    after: Tensor | None
    after_handed: bool


class ChunkValues:
    """Chunks of a loop evaluated on drawn leaves; states are drawn too, whatever computes them.

    Attributes:
        epsilons: what the epsilon of a normalisation of q and k may be; None for no normalisation.
    """

    def __init__(self, loop: Loop, roles: Mapping[int, str]) -> None:
        """`roles` of the leaves by position decide how they are drawn; they may be unknown."""
        self.loop, region = loop, loop.region
        small = _small_constants([node for node in region.nodes if region.depends[node] or _fills(node)])
        rooted = any(_takes_root(node) and region.depends[node] for node in region.nodes)
        self.epsilons: list[float | None] = [*small, 0.0, None] if rooted else [None]
        short = max(small, default=1e-6) if rooted else None
        self.draws: dict[Node, Values] = {
            leaf.node: _draw(leaf, roles.get(i, ""), 10 * i, short) for i, leaf in enumerate(region.leaves)
        }
        cuts = [node for node in (*loop.handed, region.state) if node is not None]
        self.draws |= {node: hashed(1000 + i, -1.0, 1.0) for i, node in enumerate(cuts)}
        self.evaluator = Evaluator(self.draws, loop.sizes, BUDGET)

    def step(self, index: int, after: Node | None) -> Step:
        """Everything about one chunk of one batch and head, others for every chunk; `after` is the state it leaves."""
        loop, assembly = self.loop, self.loop.assembly
        # The first two chunks are of one head: the evaluator then computes what they share once.
        generator = torch.Generator().manual_seed(index // 2)
        batch, head = (int(torch.randint(assembly.sizes[x], (), generator=generator)) for x in "bh")
        held = assembly.tokens(index)
        length, width = min(held, loop.tokens - index * loop.chunk), assembly.sizes["v"]
        token = torch.arange(length)[:, None]
        place = {"b": torch.tensor(batch), "h": torch.tensor(head), "c": token, "t": token, "v": torch.arange(width)}
        letters = [letter for letter in assembly.order if letter != "n"]
        where = ravel([place[x] for x in letters], [held if x in "ct" else assembly.sizes[x] for x in letters])
        before = loop.handed[index] if index else loop.region.state
        times = torch.arange(index * loop.chunk, index * loop.chunk + length)
        return Step(
            [self._rows(leaf, batch, head, times) for leaf in loop.region.leaves],
            self.draws[before](self._places(before, batch, head)) if before is not None else None,
            index > 0,
            self.evaluator.values(assembly.pieces[index], where.expand(length, width)).double(),
            self._computed(after, batch, head) if after is not None else None,
            after in loop.handed,
        )

    def _rows(self, leaf: Leaf, batch: int, head: int, times: Tensor) -> Tensor:
        own = torch.tensor(head // (self.loop.heads // leaf.heads))
        order = [own, times] if leaf.head_first else [times, own]
        rows = ravel([torch.tensor(batch), *order], self.loop.sizes.shape(leaf.node)[:3])
        if leaf.width:
            rows = rows[:, None] * leaf.width + torch.arange(leaf.width)
        return self.draws[leaf.node](rows)

    def _computed(self, state: Node, batch: int, head: int) -> Tensor:
        # a state is drawn wherever it is used, and computed here
        drawn = self.evaluator.leaves.pop(state, None)
        try:
            return self.evaluator.values(state, self._places(state, batch, head)).double()
        finally:
            if drawn is not None:
                self.evaluator.leaves[state] = drawn

    def _places(self, state: Node, batch: int, head: int) -> Tensor:
        """Row-major indices of the matrix of one batch and head."""
        per_group = self.loop.heads // self.loop.groups
        fixed = {"b": batch, "g": head // per_group, "r": head % per_group}
        factors = [factor for dim in self.loop.axes.layouts[state] for factor in dim]
        within = [factor for factor in factors if factor.name not in fixed]
        if [factor.name for factor in within] != [PLAIN, PLAIN]:
            raise NearMiss(f"the state {state.name} is no matrix per head")
        matrix = iter((torch.arange(within[0].size)[:, None], torch.arange(within[1].size)))
        coords = [torch.tensor(fixed[f.name]) if f.name in fixed else next(matrix) for f in factors]
        return ravel(coords, [factor.size for factor in factors]).expand(within[0].size, within[1].size)


def _takes_root(node: Node) -> bool:
    return node.target in ROOTS or (node.target in POWERS and node.args[1] in (0.5, -0.5))


def _fills(node: Node) -> bool:
    return node.target in semantics.FILLS


def _small_constants(nodes: Sequence[Node]) -> list[float]:
    """Numbers that may be the epsilon of a normalisation."""
    found = {
        abs(float(argument))
        for node in nodes
        if node.target in semantics.POINTWISE or _fills(node)
        for argument in node.args
        if isinstance(argument, float) and 0 < abs(argument) < 1e-2
    }
    return sorted(found)


def _draw(leaf: Leaf, role: str, seed: int, short: float | None) -> Values:
    """Random values for a leaf of a guessed role; `short` is the epsilon under a root, None without normalisation.

    All are of a size at which every term matters: a strong decay or a beta of zero would hide what stands behind it.
    """
    width = max(leaf.width, 1)
    fine, kind = hashed(seed, -1.0, 1.0), hashed(seed + 1, 0.0, 1.0)

    def draw(index: Tensor) -> Tensor:
        values = fine(index)
        if role in ("q", "k") and short is not None:
            row = kind(index // width)
            return values * torch.where(row < 1 / 4, (3 * short / width) ** 0.5, torch.where(row < 1 / 2, 30.0, 1.0))
        if role == "v":
            return values
        if role == "g":
            return 0.1 * values - 0.08
        if role == "beta":
            return 0.7 + 0.5 * values
        return values * (1.5 / width) ** 0.5 if leaf.width else 0.4 * values

    return draw
