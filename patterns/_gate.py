"""Which gate a subgraph computes: the formula behind `gate_cumsum`, told from sampled values."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.element_rules import float32_range
from fusion_passes.evaluate import hashed
from fusion_passes.fusion import NearMiss
from fusion_passes.probe import Draw, Samples, agree, choose, sample, solve_scale
from fusion_passes.sizes import Sizes

aten = torch.ops.aten

COUNT = 384
EDGE_COUNT = 48
SEEDS = (1, 2)
MOST_THRESHOLDS = 4
EXTREMES = (0.0, 1e3, -1e3, math.inf, -math.inf, math.nan)
PER_HEAD = (0.0, 4.0, -4.0, 20.0, -20.0, 60.0, -60.0, -math.inf, math.nan)

COMPARISONS = {getattr(getattr(aten, name), kind) for name in ("gt", "ge", "lt", "le") for kind in ("Scalar", "Tensor")}
PRODUCTS = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
ARITHMETIC = PRODUCTS | {getattr(getattr(aten, n), k) for n in ("add", "sub", "rsub") for k in ("Scalar", "Tensor")}


@dataclasses.dataclass(frozen=True)
class Gate:
    """A gate: scale * -exp(a_log) * softplus(raw + bias), or lower_bound * sigmoid(exp(a_log) * (raw + bias)).

    Attributes:
        a_log: leaf with the logarithm of the per-head factor.
        bias: leaf that is added to raw, or None.
        lower_bound: the bound of the bounded gate with all constant factors; None for the softplus gate.
        scale: constant factor of the softplus gate; 1 for the bounded one.
        beta: softplus(z) = log(1 + exp(beta z)) / beta.
        threshold: where beta * z exceeds it, softplus(z) = z; infinite where the graph has no such case.
        pad_gate: padded positions hold the gate of a raw value of 0 rather than 0.
        roundings: casts to narrower floats on the way.
    """

    a_log: Node
    bias: Node | None
    lower_bound: float | None
    scale: float
    beta: float
    threshold: float
    pad_gate: bool
    roundings: list[Node] = dataclasses.field(default_factory=list, compare=False)


def identify(root: Node, raw: Node, leaves: list[Node], interior: set[Node], sizes: Sizes) -> Gate:
    """The gate that `root` computes from `raw` and one or two per-head leaves.

    Raises:
        NearMiss: it computes something else.
        Unsupported: it cannot be evaluated.
    """
    runs = [_sample(root, raw, leaves, sizes, seed) for seed in SEEDS]
    edges: list[Samples] = []
    for a_log in leaves:
        bias = next((leaf for leaf in leaves if leaf is not a_log), None)
        for candidate in _candidates(runs[0], raw, a_log, bias, interior):
            for pad_gate in (False, True):
                gate = dataclasses.replace(candidate, pad_gate=pad_gate)
                if all(_explains(gate, run, raw) for run in runs):
                    edges = edges or list(_edges(root, raw, leaves, interior, sizes))
                    if all(_explains(gate, run, raw) for run in edges):
                        return gate
    raise NearMiss(_difference(runs[0], raw, leaves))


def _sample(root: Node, raw: Node, leaves: list[Node], sizes: Sizes, seed: int) -> Samples:
    draws = {raw: hashed(seed, -30.0, 30.0, special=EXTREMES)}
    for i, leaf in enumerate(leaves):
        draws[leaf] = hashed(100 * seed + i, -1.5, 1.5)
    return sample(root, draws, sizes, COUNT, seed)


def _edges(root: Node, raw: Node, leaves: list[Node], interior: set[Node], sizes: Sizes) -> Iterator[Samples]:
    """Runs on both sides of the subgraph's own thresholds, and with per-head values that no model has.

    Per-head leaves have few elements: each of them takes all values of a table in turn.
    """
    near = [c * s for c in _thresholds(interior) for s in (1.0, 1.001, 0.999, -1.0, -1.001, -0.999)]
    draws = {raw: _picked(3, 0, (*EXTREMES, *near))}
    yield sample(root, {**draws, **{leaf: _picked(0, 0, (0.0,)) for leaf in leaves}}, sizes, COUNT, 3)
    places = choose(root, [raw, *leaves], sizes, EDGE_COUNT, 4)
    table = (*PER_HEAD, *(c for c in near if abs(c) <= 60.0))
    for turn in range(len(table)):
        draws = {raw: hashed(200 + turn, -80.0, 80.0, special=EXTREMES)}
        draws |= {leaf: _picked(300 + i, turn, table) for i, leaf in enumerate(leaves)}
        yield places.sample(draws)


def _picked(seed: int, turn: int, table: tuple[float, ...]) -> Draw:
    """Values of a table by element; every element sees the next one in the next turn."""
    values, places = torch.tensor(table, dtype=torch.float64), hashed(seed, 0.0, 2.0**20)
    return lambda index: values[(places(index).long() + turn) % len(values)]


def _thresholds(interior: set[Node]) -> list[float]:
    """Numbers that values may be compared with: those of all nodes but arithmetic."""
    found = {
        float(arg)
        for node in interior
        if (node.target in semantics.POINTWISE and node.target not in ARITHMETIC) or node.target in semantics.FILLS
        for arg in (*node.args, *node.kwargs.values())
        if isinstance(arg, (int, float)) and not isinstance(arg, bool) and 0 < abs(arg) < 1e6
    }
    return sorted(found, key=abs)[:MOST_THRESHOLDS]


def _candidates(run: Samples, raw: Node, a_log: Node, bias: Node | None, interior: set[Node]) -> Iterator[Gate]:
    """Gates with the constants solved for on one run; they are still to be confirmed on every run."""
    read = run.valid[raw]
    z = run.leaves[raw] + (run.leaves[bias] if bias is not None else 0.0)
    rate = run.leaves[a_log].exp()
    bound = solve_scale(run.values[read], torch.sigmoid(rate * z)[read])
    if bound is not None:
        yield Gate(a_log, bias, bound, 1.0, 1.0, 20.0, False, run.roundings)
    betas, thresholds = _constants(interior)
    for beta, threshold in itertools.product(betas, thresholds):
        scale = solve_scale(run.values[read], (-rate * softplus(z, beta, threshold))[read])
        if scale is not None:
            yield Gate(a_log, bias, None, scale, beta, threshold, False, run.roundings)


def _constants(interior: set[Node]) -> tuple[list[float], list[float]]:
    """Values that softplus' beta and threshold may have, read off the subgraph's own constants."""
    scalars: dict[bool, set[float]] = {True: set(), False: set()}
    for node in interior:
        if node.target in COMPARISONS or node.target in PRODUCTS:
            for arg in node.args:
                if isinstance(arg, (int, float)) and not isinstance(arg, bool) and 1e-3 < abs(arg) < 1e3:
                    scalars[node.target in COMPARISONS].add(abs(float(arg)))
    betas = {1.0} | {b for s in scalars[False] for b in (s, 1.0 / s)}
    thresholds = {20.0, math.inf} | {b * t for t in scalars[True] for b in betas}
    return sorted(betas, key=lambda b: (b != 1.0, b))[:6], sorted(thresholds, key=lambda t: (t != 20.0, t))[:12]


def softplus(z: Tensor, beta: float, threshold: float) -> Tensor:
    """log(1 + exp(beta z)) / beta, and z itself where beta z is above the threshold."""
    return torch.where(beta * z > threshold, z, torch.log1p(float32_range(torch.exp(beta * z))) / beta)


def _formula(gate: Gate, run: Samples, raw: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's values for given raw values, and the magnitude of the terms it is made of."""
    z = raw + (run.leaves[gate.bias] if gate.bias is not None else 0.0)
    rate = run.leaves[gate.a_log].exp()
    if gate.lower_bound is not None:
        return gate.lower_bound * torch.sigmoid(rate * z), torch.full_like(rate, abs(gate.lower_bound))
    factor = gate.scale * rate
    return -factor * softplus(z, gate.beta, gate.threshold), factor.abs() / gate.beta


def _explains(gate: Gate, run: Samples, raw: Node) -> bool:
    read = run.valid[raw]
    padding = torch.zeros_like(run.leaves[raw])
    tail, magnitude = _formula(gate, run, padding) if gate.pad_gate else (padding, torch.ones_like(padding))
    value, size = _formula(gate, run, run.leaves[raw])
    return agree(run.values, torch.where(read, value, tail), torch.where(read, size, magnitude))


def _difference(run: Samples, raw: Node, leaves: list[Node]) -> str:
    """Where the likeness ends, in words."""
    read = run.valid[raw]
    if not bool(run.values[read].isfinite().any()):
        return "it has no finite value where its input is drawn from -30 to 30"
    plain = read & run.values.isfinite() & run.leaves[raw].isfinite()
    if bool((run.values[~read] != 0).any()):
        return f"padded positions hold {float(run.values[~read][0]):.4g} instead of 0"
    at = int(torch.nonzero(plain)[0])
    operands = ", ".join(f"{leaf.name} = {float(run.leaves[leaf][at]):.4g}" for leaf in (raw, *leaves))
    return (
        "it is neither s * exp(A_log) * softplus(raw + bias) nor s * sigmoid(exp(A_log) * (raw + bias)): for "
        f"{operands} it is {float(run.values[at]):.6g}"
    )
