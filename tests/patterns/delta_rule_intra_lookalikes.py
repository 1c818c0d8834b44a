"""Functions that resemble the systems of a delta rule and are something else, each with a part of the reason given.

They share one function, `systems`, in which a single place is changed by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.chunk_delta_rule_spellings import chunked, decays, heads_first
from tests.patterns.delta_rule_intra_spellings import CHUNK, channel_products, right_sides

Change = Callable[..., Any]
TOKENS = 64
NAMES = ("k", "v", "g", "beta", "q")


def systems(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor, **changes: Change) -> Any:
    """u and w of chunks of 16, one decay per head; `changes` act on the value that they are named after."""

    def at(name: str, value: Any, *more: Any) -> Any:
        return changes[name](value, *more) if name in changes else value

    k, v, g, beta, q = at("rows", (k, v, g, beta, q))
    k, v, g, beta, q = at("chunks", [chunked(t, CHUNK) for t in at("heads_first", heads_first(k, v, g, beta, q))])
    sums = at("sums", g.cumsum(-1), g)
    between = at("between", decays(sums))
    system = at("system", (at("strong", k * beta[..., None]) @ at("keys", k).mT * between).tril(-1), k, beta, sums)
    right, left = at("right", right_sides(k, v, sums, beta), k, v, sums, beta)
    solve = at("solve", _solve)
    u, w = at("solution", (solve(system, right), solve(system, left)))
    return at("result", (u, w), k, sums, between, system)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def _upper(system: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(system.mT, right, upper=True, unitriangular=True)


def _diagonal(system: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(system + 1.01 * torch.eye(CHUNK), right, upper=False)


def _first_terms(system: Tensor, right: Tensor) -> Tensor:
    """The series of the inverse, cut off."""
    term, total = right, right
    for _ in range(CHUNK // 2):
        term = -(system @ term)
        total = total + term
    return total


def _in_bfloat16(system: Tensor, right: Tensor) -> Tensor:
    return (_solve(system, torch.eye(CHUNK).expand_as(system)).bfloat16() @ right.bfloat16()).float()


def _short_loop(system: Tensor, right: Tensor) -> Tensor:
    """Forward substitution that leaves out the last row."""
    inverse = -system
    for i in range(1, CHUNK - 1):
        row = inverse[..., i, :i].clone()
        inverse[..., i, :i] = row + (row.unsqueeze(-1) * inverse[..., :i, :i].clone()).sum(-2)
    return (inverse + torch.eye(CHUNK)) @ right


def _of(**changed: Change) -> Change:
    """A change of some of the operands."""

    def change(parts: Any) -> list[Tensor]:
        return [changed[name](t) if name in changed else t for name, t in zip(NAMES, parts)]

    return change


def _except_at(axis: int, position: int, factor: float = 1.01) -> Change:
    """Another factor at one position of an axis."""

    def change(value: Tensor, *more: Any) -> Tensor:
        shape = [1] * value.dim()
        shape[axis] = -1
        return torch.where((torch.arange(value.shape[axis]) == position).view(shape), factor * value, value)

    return change


def _unit(eps: float) -> Change:
    return lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


NOT = "is not (I + L)^-1 (beta v) and (I + L)^-1 (beta k exp G)"
BENT = "is of something else than in a delta rule"
CHANGES: dict[str, tuple[dict[str, Change], str]] = {
    "sums_over_the_sequence": ({"sums": lambda s, g: g.flatten(2).cumsum(-1).unflatten(2, (-1, CHUNK))}, ""),
    "sums_of_later_tokens": ({"sums": lambda s, g: s[..., -1:] - s}, NOT),
    "sums_without_the_token": ({"sums": lambda s, g: s - g}, "one sum"),
    "decays_of_the_other_sign": ({"between": lambda b: b.mT}, NOT),
    "no_decay_between": ({"between": lambda b: torch.ones_like(b)}, "one sum"),
    "decay_squared": ({"between": lambda b: b * b}, NOT),
    "one_plus_decay": ({"between": lambda b: 1.0 + b}, NOT),
    "one_entry_of_the_system": (
        {"system": lambda s, *more: s * (1 + 0.01 * (torch.arange(CHUNK**2) == 5 * CHUNK + 2).view(CHUNK, CHUNK))},
        NOT,
    ),
    "one_row_of_the_system": ({"system": _except_at(-2, 5)}, NOT),
    "two_diagonals_left_out": ({"system": lambda s, *more: s.tril(-2)}, NOT),
    "system_negated": ({"system": lambda s, *more: -s}, NOT),
    "system_halved": ({"system": lambda s, *more: 0.5 * s}, NOT),
    "beta_twice_in_the_system": ({"system": lambda s, k, beta, sums: s * beta[..., None]}, NOT),
    "beta_of_the_columns": ({"system": lambda s, k, beta, sums: s * beta[..., None, :] / beta[..., None]}, NOT),
    "no_beta_at_the_values": ({"right": lambda r, k, v, sums, beta: (v, r[1])}, NOT),
    "no_decay_at_the_keys": ({"right": lambda r, k, v, sums, beta: (r[0], k * beta[..., None])}, NOT),
    "decay_to_the_end_at_the_keys": (
        {"right": lambda r, k, v, sums, beta: (r[0], k * (beta * (sums[..., -1:] - sums).exp())[..., None])}, NOT
    ),
    "keys_of_the_token_before": ({"keys": lambda k: F.pad(k, (0, 0, 1, -1))}, NOT),
    "keys_rolled": ({"keys": lambda k: k.roll(1, 3)}, "one sum"),
    "solved_from_above": ({"solve": lambda s: _upper}, NOT),
    "another_diagonal": ({"solve": lambda s: _diagonal}, NOT),
    "a_series_cut_off": ({"solve": lambda s: _first_terms}, NOT),
    "a_loop_that_ends_early": ({"solve": lambda s: _short_loop}, NOT),
    "no_solve_at_all": ({"solve": lambda s: lambda system, right: right - system @ right}, NOT),
    "one_head_by_mask": ({"system": _except_at(1, 1)}, "depend on the position of the head itself"),
    "one_batch_by_mask": ({"between": _except_at(0, 1)}, "depend on the position of the batch itself"),
    "one_chunk_by_mask": ({"system": _except_at(2, 2)}, "depend on the position of the chunk itself"),
    "one_token_by_mask": ({"heads_first": _of(k=_except_at(2, 37))}, "depend on the position of the token itself"),
    "heads_in_reverse": ({"chunks": _of(v=lambda x: x.flip(1))}, "adds up over the axis of the head"),
    "chunks_put_together": (
        {"chunks": _of(k=lambda x: torch.cat([x[:, :, :2] * 1.01, x[:, :, 2:]], 2))}, "of the axis of the chunk"
    ),
    "decay_is_clamped": ({"between": lambda b: b.clamp(min=1e-3)}, "is no part of a delta rule"),
    "keys_by_their_value": ({"chunks": _of(k=lambda x: torch.where(x > 9, 0.0, x))}, "is no part of a delta rule"),
    "beta_rounded": ({"chunks": _of(beta=torch.round)}, "is no part of a delta rule"),
    "beta_without_its_sign": ({"chunks": _of(beta=lambda b: (b * b).sqrt())}, BENT),
    "beta_without_its_sign_by_powers": ({"chunks": _of(beta=lambda b: b.pow(2).pow(0.5))}, BENT),
    "keys_bounded_far_away": ({"chunks": _of(k=lambda k: (k + 100).square().sqrt() - 100)}, BENT),
    "values_hidden_far_away": ({"chunks": _of(v=lambda v: v * torch.sigmoid(1e4 * (v + 3)))}, BENT),
    "large_values_that_grow": ({"chunks": _of(v=lambda v: v + torch.exp(20 * v - 500))}, BENT),
    "epsilon_beside_the_root": (
        {"chunks": _of(k=lambda x: x / ((x * x).sum(-1, keepdim=True).sqrt() + 1e-6))}, NOT
    ),
    "keys_normalised_twice_differently": (
        {"strong": lambda k: _unit(1e-5)(k), "keys": lambda k: _unit(1e-3)(k)}, NOT
    ),
    "products_in_bfloat16": (
        {"solve": lambda s: _in_bfloat16}, "is rounded to bfloat16 around a sum or matrix product"
    ),
    "sums_in_float64": ({"sums": lambda s, g: g.double().cumsum(-1).float()}, ""),
    "system_returned": ({"result": lambda r, k, sums, between, system: (*r, system)}, "is returned by the graph"),
    "system_used_elsewhere": (
        {"result": lambda r, k, sums, between, system: (*r, system.sin())}, "is used elsewhere"
    ),
}  # fmt: skip


def changed(name: str) -> Callable[..., Any]:
    """The systems with the change of that name."""
    changes, _ = CHANGES[name]

    def run(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> Any:
        return systems(k, v, g, beta, q, **changes)

    return run


def channels(change: str) -> Callable[..., Any]:
    """The same with one decay per channel."""

    def run(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> Any:
        k, v, g, beta = (chunked(t, CHUNK) for t in heads_first(k, v, g, beta))
        sums = g.cumsum(-2)
        decayed = sums.flip(-1) if change == "channels_in_reverse" else sums
        system = channel_products(k * beta[..., None], k, decayed, -1)
        right, left = right_sides(k, v, sums, beta)
        if change == "mean_decay_at_the_keys":
            left = k * beta[..., None] * sums.mean(-1, keepdim=True).exp()
        return _solve(system, right), _solve(system, left)

    return run


CHANNELS = ("channels_in_reverse", "mean_decay_at_the_keys")


def without_decay(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> Any:
    """The delta rule without a gate; it still has sums, which nothing reads."""
    k, v, g, beta = (chunked(t, CHUNK) for t in heads_first(k, v, g, beta))
    system = (k * beta[..., None]) @ k.mT * torch.ones(CHUNK, CHUNK).tril().log().exp()
    return _solve(system, v * beta[..., None]), _solve(system, k * beta[..., None]), g.cumsum(-1)


def attention(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> Tensor:
    """Gated linear attention within chunks."""
    k, v, g, beta, q = (chunked(t, CHUNK) for t in heads_first(k, v, g, beta, q))
    between = decays(g.cumsum(-1)).masked_fill(torch.zeros((), dtype=torch.bool), -math.inf)
    return (q @ k.mT * between) @ (v * beta[..., None])
