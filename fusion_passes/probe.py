"""The meaning check: evaluate a subgraph at random places and compare it with what a kernel computes.

What agreement establishes. Leaves are filled with values drawn by coordinate, every leaf with a seed of its own, so
that a value tells which element of which leaf was read: draws are independent, even of leaves that share memory or of
one tensor that is read as two operands. A subgraph and a formula that agree at some hundreds of random places, on two
sets of draws and under every admissible assignment of sizes, read the same elements there and combine these values in
the same way. All arithmetic is float64, so that a disagreement of 1e-9 already counts; float32 kernels round a hundred
times more coarsely.

What it does not establish, and what closes the gap:

- Values that no draw has. A polynomial that agrees on random draws agrees everywhere; a comparison, a bound or a
  `nan_to_num` may act on other values only. Either the subgraph has none (`premises.check_linear`, and the region of a
  delta rule, which must be analytic), or it is tried on both sides of every number that it compares with, at zero, at
  large values of either sign, at infinities and NaN (`gate_cumsum`, the activation of `index_score`), or its steps are
  read off the graph and drawn beyond their bounds (`mla_kv_pack`).
- Places that no sample reads. What tells elements apart must be absent: positions, triangles, pads and writes
  (`premises.check_even`), constants that differ from place to place (`premises.check_constants`), parts that were never
  evaluated (`premises.check_read`). Where padding belongs to the meaning, axes are walked from end to end
  (`access.factor_axes`, `_gate_places`, `_copies_rotation`), or whole chunks are evaluated (`_intra_proof`). Masks are
  leaves: they are read by the kernel, or proved to be a half plane by walking its border.
- Rounding. Casts to narrower floats are identities here; they are reported, and `guards.roundings` decides. Casts to
  integers and to float8 are carried out and show up as disagreement, and integers wrap around as their dtype does.
- Other sizes than those tried. Sizes enter only through views, whose structure must be the same under every
  assignment. An axis of size zero is no place to sample: such a subgraph is left alone.
- Memory. Values know nothing of writes between reads, nor of who else uses an intermediate: that is for `guards`.
- Cost. Cones are bounded in nodes and evaluators in elements; what exceeds them is a near miss, never a guess. Chains
  of writes are cut by the pattern or computed in whole blocks (`Evaluator._block`), not element by element.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes.access import Access, trace_access
from fusion_passes.evaluate import Evaluator
from fusion_passes.sizes import Sizes
from fusion_passes.views import Coords, ravel

Draw = Callable[[Tensor], Tensor]

RELATIVE = 1e-9


@dataclasses.dataclass
class Samples:
    """A subgraph evaluated at random places.

    Attributes:
        values: value of the root at each place, float64.
        leaves: the value of each leaf that the place reads, float64; undefined where `valid` is False.
        valid: whether the place reads the leaf at all, or only padding.
        roundings: casts to narrower floats that were treated as identities.
    """

    values: Tensor
    leaves: dict[Node, Tensor]
    valid: dict[Node, Tensor]
    roundings: list[Node]


@dataclasses.dataclass
class Places:
    """Chosen elements of `root` (`coords`, one int64 [n] per axis), and which element of every leaf each reads."""

    root: Node
    sizes: Sizes
    coords: Coords
    reads: dict[Node, Access]

    def sample(self, draws: Mapping[Node, Draw]) -> Samples:
        """Evaluate the root here, with each leaf filled by its draw.

        Raises:
            Unsupported: a node cannot be evaluated.
        """
        evaluator = Evaluator(draws, self.sizes)
        values = evaluator.values(self.root, ravel(self.coords, self.sizes.shape(self.root))).to(torch.float64)
        # A leaf without axes has one value for all places.
        leaves = {
            leaf: draw(ravel(self.reads[leaf].coords, self.sizes.shape(leaf))).to(torch.float64).expand(values.shape)
            for leaf, draw in draws.items()
        }
        return Samples(values, leaves, {leaf: a.valid for leaf, a in self.reads.items()}, list(evaluator.roundings))


def choose(root: Node, leaves: Sequence[Node], sizes: Sizes, count: int, seed: int) -> Places:
    """Up to `count` random places of `root`, an eighth of them at the ends of the axes.

    Three quarters of the places read the first leaf, where padding leaves that many; the others may be padding.

    Raises:
        Unsupported: a leaf cannot be traced, or is read at two different places for one result.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = sizes.shape(root)
    coords = [torch.randint(0, max(n, 1), (8 * count,), generator=generator) for n in shape]
    for c, n in zip(coords, shape):
        for ends in (c[: count // 8], c[7 * count :]):  # of those that read the leaf, and the shortest padding
            ends.copy_(torch.randint(2, ends.shape, generator=generator) * (n - 1))
    valid = trace_access(root, leaves[0], coords, sizes, stop=leaves).valid
    chosen = torch.cat([torch.nonzero(valid)[: 3 * count // 4], torch.nonzero(~valid)[: count // 4]])[:, 0]
    coords = [c[chosen] for c in coords]
    return Places(root, sizes, coords, {leaf: trace_access(root, leaf, coords, sizes, stop=leaves) for leaf in leaves})


def sample(root: Node, draws: Mapping[Node, Draw], sizes: Sizes, count: int, seed: int) -> Samples:
    """`choose` places with this seed and evaluate `root` there, with each leaf filled by its draw."""
    return choose(root, list(draws), sizes, count, seed).sample(draws)


def solve_scale(values: Tensor, reference: Tensor) -> float | None:
    """The number s for which values = s * reference, to 12 digits, or None where there is no telling."""
    usable = values.isfinite() & reference.isfinite() & (reference.abs() > 1e-3)
    if int(usable.sum()) < 8:
        return None
    scale = float((values[usable] / reference[usable]).median())
    return float(f"{scale:.12g}") if math.isfinite(scale) and scale != 0 else None


def agree(
    values: Tensor, reference: Tensor, magnitude: Tensor | float = 1.0, relative: float = RELATIVE
) -> bool:
    """Are two sets of values the same up to float64 rounding?

    NaN agrees with NaN and an infinity with itself. `magnitude` is the size of the terms that cancel in either
    spelling: differences of 1e-12 of it do not count.
    """
    special = ~(values.isfinite() & reference.isfinite())
    same = (values == reference) | (values.isnan() & reference.isnan())
    if not bool(same[special].all()):
        return False
    bound = relative * reference.abs() + 1e-12 * torch.as_tensor(magnitude, dtype=torch.float64)
    return bool(((values - reference).abs() <= bound)[~special].all())
