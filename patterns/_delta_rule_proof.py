"""The proof that a subgraph is the delta rule, whatever its spelling.

1. Batches, heads and chunks are treated in parallel (`_parallel_axes`) up to one state that each chunk hands on to the
   next, and steps are the same graph with the chunk's number moved by one (`_delta_rule_steps`).
2. The subgraph is analytic in its data (`_delta_rule_region`), and bends where a delta rule does (`_delta_rule_bends`).
3. One chunk of each kind of step, of one batch and head, is evaluated in float64 on random operands and a random state.
   All its outputs and the whole state after it equal those of the recurrence, token by token.

Some rows of q and k are drawn short enough for the epsilon of their normalisation to matter.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes.fusion import NearMiss
from fusion_passes.patterns import _delta_rule_region as regions
from fusion_passes.patterns._axis_factors import PLAIN, Dim, Factor, Layout, flat, normal
from fusion_passes.patterns._chunk_assembly import Assembly
from fusion_passes.patterns._delta_rule_bends import check_bends
from fusion_passes.patterns._delta_rule_region import Region
from fusion_passes.patterns._delta_rule_steps import same_step, states
from fusion_passes.patterns._delta_rule_values import ChunkValues, Loop, Step
from fusion_passes.patterns._parallel_axes import ParallelAxes
from fusion_passes.patterns._proofs import Proofs
from fusion_passes.probe import solve_scale
from fusion_passes.sizes import Sizes

aten, prims = torch.ops.aten, torch.ops.prims

ROLES = ("q", "k", "v", "g", "beta")
EXPONENTIALS = (aten.exp.default, aten.exp2.default, prims.exp.default)
MOST_STEPS = 6  # steps that are evaluated because they differ from the others


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What the leaves of a region are, by position, and the constants.

    Attributes:
        roles: positions of q, k, v, the gate and beta among the leaves.
        scale: factor of q.
        norm_eps: q and k are x / sqrt(sum x^2 + norm_eps) if it is a number.
        turned: the states between chunks are [V, K] rather than [K, V].
        final: position of the final state among the candidates, or None.
    """

    roles: tuple[int, ...]
    scale: float
    norm_eps: float | None
    turned: bool
    final: int | None


proofs: Proofs[Meaning] = Proofs()


def prove(assembly: Assembly, tokens: int, region: Region, candidates: Sequence[Node], sizes: Sizes) -> Meaning:
    """What the region computes; `candidates` may be the final state.

    Regions that are the same graph, such as those of the layers of a model, are proved once.

    Raises:
        NearMiss: it is no delta rule; the message says where the likeness ends.
        Unsupported: it cannot be evaluated.
    """
    key = regions.fingerprint(
        [*assembly.pieces, *candidates], region, sizes, assembly.order, sorted(assembly.sizes.items()), tokens
    )
    return proofs.of(key, lambda: _Proof(_loop(assembly, tokens, region, sizes), candidates).meaning())


def _loop(assembly: Assembly, tokens: int, region: Region, sizes: Sizes) -> Loop:
    """The loop with what is parallel in it and the states that it hands on."""
    batch, heads, chunk = (assembly.sizes[letter] for letter in "bhc")
    groups = min((leaf.heads for leaf in region.leaves), default=heads)
    if any(leaf.heads not in (groups, heads) for leaf in region.leaves):
        raise NearMiss(f"its operands have {', '.join(str(leaf.heads) for leaf in region.leaves)} heads")
    single = len(assembly.pieces) == 1
    layouts: dict[Node, Layout] = {
        leaf.node: regions.leaf_layout(leaf, batch, tokens, groups, heads, single) for leaf in region.leaves
    }
    if region.state is not None:
        rest = [(Factor(PLAIN, n),) for n in sizes.shape(region.state)[2:]]
        layouts[region.state] = ((Factor("b", batch),), _head(groups, heads), *rest)
    axes = ParallelAxes(layouts, len(assembly.pieces), chunk, sizes)
    for node in region.nodes:
        axes.visit(node)
    for index, piece in enumerate(assembly.pieces):
        token = (Factor(PLAIN, assembly.tokens(index)),)
        value = (Factor(PLAIN, assembly.sizes["v"]),)
        dims = {"b": (Factor("b", batch),), "h": _head(groups, heads), "c": token, "t": token, "v": value}
        if flat(axes.layouts[piece]) != flat([dims[letter] for letter in assembly.order if letter != "n"]):
            raise NearMiss(f"the results of chunk {index} ({piece.name}) are not in the order of batch and head")
        if axes.levels[piece] != (-1 if single else index):
            raise NearMiss(f"place {index} of the results does not hold those of chunk {index}")
    return Loop(assembly, tokens, region, axes, states(region.nodes, axes), groups, sizes)


def _head(groups: int, heads: int) -> Dim:
    return (Factor("g", groups), Factor("r", heads // groups))


class _Proof:
    def __init__(self, loop: Loop, candidates: Sequence[Node]) -> None:
        self.loop, self.candidates = loop, candidates
        self.leaves, self.depends = loop.region.leaves, loop.region.depends
        self.wide = [i for i, leaf in enumerate(self.leaves) if leaf.width]
        self.narrow = [i for i, leaf in enumerate(self.leaves) if not leaf.width]
        self.value = loop.assembly.sizes["v"]
        self.key = self._key_width()

    def _key_width(self) -> int:
        counts = len(self.wide), len(self.narrow)
        if counts not in ((3, 2), (4, 1)):
            names = ", ".join(leaf.node.name for leaf in self.leaves)
            ungated = ": it has no decay" if counts == (3, 1) else ""
            raise NearMiss(
                "a gated delta rule reads q, k, v, a gate and beta, with one row per token and head; found "
                f"{counts[0]} tensors with channels and {counts[1]} without ({names}){ungated}"
            )
        widths = [self.leaves[i].width for i in self.wide]
        keys = {width for width in widths if width != self.value}
        if len(keys) > 1 or self.value not in widths:
            raise NearMiss(f"q, k and v have {', '.join(map(str, widths))} channels, the result {self.value}")
        return next(iter(keys), self.value)

    def meaning(self) -> Meaning:
        """The roles and constants that hold for every step."""
        found: Meaning | None = None
        steps = self._steps()
        if len(steps) > MOST_STEPS:
            raise NearMiss(f"its steps differ: chunk {steps[MOST_STEPS - 1]} is not computed as those before")
        roles = self._roles()
        values = ChunkValues(self.loop, roles)
        for index in steps:
            step = values.step(index, self.loop.after(index))
            if found is None:
                found = next(self._explanations(step, roles, values.epsilons), None)
                if found is None:
                    names = ", ".join(leaf.node.name for leaf in self.leaves)
                    raise NearMiss(f"chunk {index} is no step of a delta rule over {names}")
            elif self._scale(found, step, found.scale) is None:
                raise NearMiss(f"chunk {index} is not computed by the rule of chunk {steps[0]}")
        assert found is not None
        q, k, _, g, _ = (1 << position for position in found.roles)
        check_bends(self.loop.region.nodes, self.depends, g, (q, k))
        return dataclasses.replace(found, final=self._final(found, values))

    def _steps(self) -> list[int]:
        """The chunks to evaluate: the first, the second, the last where it is short, and those that differ."""
        pieces = self.loop.assembly.pieces
        chosen = [0, 1][: len(pieces)]
        for index in range(2, len(pieces)):
            after, model = self.loop.after(index), self.loop.after(1)
            alike = self._alike(pieces[index], pieces[1], index, 1)
            if alike and after is not None:
                alike = model is not None and self._alike(after, model, index, 1)
            if not alike or (index == len(pieces) - 1 and self.loop.tokens % self.loop.chunk):
                chosen.append(index)
        return chosen

    def _alike(self, a: Node, b: Node, chunk_a: int, chunk_b: int) -> bool:
        return same_step(a, b, chunk_a, chunk_b, self.loop.handed, self.loop.axes, self.depends)

    def _final(self, found: Meaning, values: ChunkValues) -> int | None:
        """Which candidate is the state after the last chunk."""
        loop, last = self.loop, len(self.loop.handed) - 1
        even = last >= 2 and loop.tokens % loop.chunk == 0 and not found.turned
        model = loop.handed[last] if even else None
        head = normal([Factor("b", loop.assembly.sizes["b"]), *_head(loop.groups, loop.heads)])
        for position, node in enumerate(self.candidates):
            if flat(loop.axes.layouts[node])[: len(head)] != head:
                continue
            if model is not None and self._alike(node, model, last, last - 1):
                return position
            if self._scale(found, values.step(last, node), found.scale) is not None:
                return position
        return None

    # --- which leaf is which -----------------------------------------------------------------------------------------

    def _roles(self) -> dict[int, str]:
        """Roles by position, as far as the structure tells them; the draws follow them.

        The gate alone is exponentiated, no state depends on q, and q meets k without v but not v without k.
        """
        found: dict[int, str] = {}
        raised = {self.depends[n] for n in self.loop.region.nodes if n.target in EXPONENTIALS}
        gates = [i for i in (self.narrow if len(self.narrow) == 2 else self.wide) if 1 << i in raised]
        found |= {gates[0]: "g"} if gates else {}
        found |= {i: "beta" for i in self.narrow if i not in found and (gates or len(self.narrow) == 1)}
        rest = [i for i in self.wide if i not in found]
        after = self.loop.after(0) or next(iter(self.candidates), None)
        unused = [i for i in rest if after is not None and not self.depends[after] >> i & 1]
        if len(unused) == 1 and len(rest) == 3:
            query, (a, b) = unused[0], [i for i in rest if i not in unused]
            found[query] = "q"
            met = {(m >> a & 1, m >> b & 1) for m in self.depends.values() if m >> query & 1}
            if ((1, 0) in met) != ((0, 1) in met):
                found |= {a: "k", b: "v"} if (1, 0) in met else {a: "v", b: "k"}
        return found

    def _explanations(self, step: Step, roles: dict[int, str], epsilons: Sequence[float | None]) -> Iterator[Meaning]:
        """Every meaning that gives the step's values."""
        for q, k, v, *more in itertools.permutations(self.wide):
            for rest in [(*more, *self.narrow)] if more else itertools.permutations(self.narrow):
                option = (q, k, v, *rest)
                widths = [self.leaves[i].width for i in option]
                if widths[:3] != [self.key, self.key, self.value] or widths[3] not in (0, self.key):
                    continue
                if any(roles.get(i, role) != role for i, role in zip(option, ROLES)):
                    continue
                for eps, turned in itertools.product(epsilons, (False, True)):
                    candidate = Meaning(option, 1.0, eps, turned, None)
                    scale = self._scale(candidate, step, None)
                    if scale is not None:
                        yield dataclasses.replace(candidate, scale=scale)

    def _scale(self, meaning: Meaning, step: Step, scale: float | None) -> float | None:
        """The scale with which the recurrence gives the step's values, or None."""
        q, k, v, g, beta = (step.rows[i] for i in meaning.roles)
        if meaning.norm_eps is not None:
            q, k = (x / (x.square().sum(-1, keepdim=True) + meaning.norm_eps).sqrt() for x in (q, k))
        before = torch.zeros(self.key, self.value, dtype=torch.float64)
        if step.state is not None:
            before = step.state.mT if meaning.turned and step.state_handed else step.state
        shown = step.after
        if shown is not None and meaning.turned and step.after_handed:
            shown = shown.mT
        if before.shape != (self.key, self.value) or (shown is not None and shown.shape != before.shape):
            return None
        out, after = recurrence(q, k, v, g, beta, before)
        factor = solve_scale(step.out, out) if scale is None else scale
        if factor is None or not _equal(step.out, factor * out):
            return None
        return factor if shown is None or _equal(shown, after) else None


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [T, V] and the state after rows [T, K], [T, V], [T] or [T, K] (the gate) and [T], from `state` [K, V]."""
    decay = g.exp() if g.dim() == 2 else g.exp()[:, None]
    out = torch.empty_like(v)
    for t in range(len(v)):
        state = state * decay[t][:, None]
        state = state + torch.outer(k[t], beta[t] * (v[t] - k[t] @ state))
        out[t] = q[t] @ state
    return out, state


def _equal(values: Tensor, reference: Tensor) -> bool:
    if not bool(values.isfinite().all() and reference.isfinite().all()):
        return False
    bound = 1e-8 * reference.abs() + 1e-10 * reference.abs().max()
    return bool(((values - reference).abs() <= bound).all())
