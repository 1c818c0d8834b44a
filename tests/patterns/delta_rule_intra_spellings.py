"""The systems of a chunked delta rule as different authors would write them, from k, v, g, beta and q, tokens first.

All give (I + L)^-1 (beta v) and (I + L)^-1 (beta k e^G), L_ij = beta_i (k_i . k_j e^(G_i - G_j)) for j < i, per chunk;
some the pairs q_i . k_j e^(G_i - G_j) as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.chunk_delta_rule_spellings import chunked, decays, heads_first, lower, substituted
from tests.support.delta_rule import operands

Function = Callable[..., Any]
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A function, the sizes of its operands, and what it computes beside u and w."""

    function: Function
    chunk: int = CHUNK
    tokens: int = 40
    batch: int = 2
    key_heads: int = 2
    value_heads: int = 2
    key: int = 32
    value: int = 48
    per_channel: bool = False
    norm_eps: float | None = None
    pairs: float | None = None  # their scale, if they are results

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> tuple[Tensor, ...]:
        """k, v, g, beta, q."""
        drawn = operands(
            **{"batch": self.batch, "tokens": self.tokens, "key_heads": self.key_heads, "value": self.value,
               "value_heads": self.value_heads, "key": self.key, **sizes},
            per_channel=self.per_channel, dtype=dtype, seed=seed,
        )  # fmt: skip
        return tuple(drawn[name] for name in ("k", "v", "g", "beta", "q"))


SPELLINGS: dict[str, Spelling] = {}


def spelling(**about: Any) -> Callable[[Function], Function]:
    def put(function: Function) -> Function:
        SPELLINGS[function.__name__] = Spelling(function, **about)
        return function

    return put


# --- parts that several spellings share ------------------------------------------------------------------------------


def prepared(*tensors: Tensor, size: int = CHUNK) -> list[Tensor]:
    """Float32 tensors in chunks, heads first."""
    return [chunked(t, size) for t in heads_first(*tensors)]


def right_sides(k: Tensor, v: Tensor, sums: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    sums = sums if sums.dim() == 5 else sums[..., None]
    return v * beta[..., None], k * beta[..., None] * sums.exp()


def inverted(invert: Callable[[Tensor], Tensor], size: int = CHUNK) -> Function:
    """u and w as products with an inverse."""

    def run(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        k, v, g, beta = prepared(k, v, g, beta, size=size)
        sums = g.cumsum(-1)
        inverse = invert(((k * beta[..., None]) @ k.mT * decays(sums)).tril(-1))
        u, w = (inverse @ right for right in right_sides(k, v, sums, beta))
        return u, w

    return run


def solved(system: Tensor) -> Tensor:
    eye = torch.eye(system.shape[-1]).expand_as(system)
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def _integer_identity(system: Tensor) -> Tensor:
    eye = torch.eye(system.shape[-1], dtype=torch.int64).expand_as(system)
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def _full_rows(system: Tensor) -> Tensor:
    """Forward substitution with whole rows, later columns being zero."""
    inverse = -system
    for i in range(1, system.shape[-1]):
        inverse[..., i, :] = inverse[..., i, :].clone() + (inverse[..., i, :, None].clone() * inverse.clone()).sum(-2)
    return inverse + torch.eye(system.shape[-1])


def _by_columns(system: Tensor) -> Tensor:
    """The inverse as a product of eliminations, one per column."""
    eye = torch.eye(system.shape[-1])
    inverse = eye.expand_as(system)
    for j in range(system.shape[-1] - 1):
        inverse = inverse - (system[..., :, j : j + 1] * eye[j]) @ inverse
    return inverse


def _doubled(system: Tensor) -> Tensor:
    power, inverse = -system, torch.eye(system.shape[-1]) - system
    for _ in range(3):
        power = power @ power
        inverse = inverse @ (torch.eye(system.shape[-1]) + power)
    return inverse


def _blocked(system: Tensor) -> Tensor:
    half = system.shape[-1] // 2
    first, last = solved(system[..., :half, :half]), solved(system[..., half:, half:])
    top = torch.cat([first, torch.zeros_like(first)], -1)
    return torch.cat([top, torch.cat([-last @ system[..., half:, :half] @ first, last], -1)], -2)


SPELLINGS |= {
    "identity_right_hand_side": Spelling(inverted(solved)),
    "integer_right_hand_side": Spelling(inverted(_integer_identity)),
    "forward_substitution": Spelling(inverted(substituted)),
    "whole_rows": Spelling(inverted(_full_rows)),
    "eliminated_by_columns": Spelling(inverted(_by_columns)),
    "log_doubling": Spelling(inverted(_doubled)),
    "two_by_two_blocks": Spelling(inverted(_blocked)),
    "library_inverse": Spelling(inverted(lambda s: torch.linalg.inv(s + torch.eye(s.shape[-1])))),
    "unmasked_system_of_64": Spelling(inverted(solved, 64), 64, 70, key=64, value=64),
    "chunks_of_32": Spelling(inverted(solved, 32), 32, 64, batch=1, key=96, value=192),
    "one_chunk": Spelling(inverted(solved, 64), 64, 50, key=16, value=16),
}


# --- one decay per head ----------------------------------------------------------------------------------------------


@spelling(norm_eps=1e-6, pairs=32**-0.5)
def solved_apart(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """Two solves of an unmasked system, k and q normalised, the pairs of all chunks."""
    k, v, g, beta, q = heads_first(k, v, g, beta, q)
    k, q = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (k, q))
    k, v, g, beta, q = (chunked(t, CHUNK) for t in (k, v, g, beta, q * 32**-0.5))
    sums = g.cumsum(-1)
    between = decays(sums)
    right, left = right_sides(k, v, sums, beta)
    system = (k * beta[..., None]) @ k.mT * between
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    w = torch.linalg.solve_triangular(system, left, upper=False, unitriangular=True)
    return u, w, q @ k.mT * between


def _together(swapped: bool) -> Function:
    def run(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        k, v, g, beta = prepared(k, v, g, beta)
        sums = g.cumsum(-1)
        system = beta[..., None] * (k @ k.mT) * decays(sums)
        right, left = right_sides(k, v, sums, beta)
        both = torch.cat([left, right] if swapped else [right, left], -1)
        solution = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
        if swapped:
            return solution[..., 32:], solution[..., :32]
        return solution[..., :48], solution[..., 48:]

    return run


SPELLINGS |= {"solved_together": Spelling(_together(False)), "solved_together_keys_first": Spelling(_together(True))}


@spelling()
def ones_on_the_diagonal(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Beta before the product with the keys, an einsum, and a system with its diagonal."""
    k, v, g, beta = prepared(k, v, g, beta)
    sums = torch.cumsum(g, dim=3)
    products = torch.einsum("bhnik,bhnjk->bhnij", k * beta.unsqueeze(-1), k)
    system = torch.where(lower(CHUNK, -1), products * (sums[..., :, None] - sums[..., None, :]).exp(), 0.0)
    system = system + torch.eye(CHUNK)
    right, left = right_sides(k, v, sums, beta)
    return torch.linalg.solve_triangular(system, right, upper=False), torch.linalg.solve_triangular(
        system, left, upper=False
    )


@spelling(pairs=1.0)
def tokens_before_heads(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """Chunks are cut first: [B, N, H, C, ...]."""

    def cut(t: Tensor) -> Tensor:
        t = F.pad(t.float(), (*(0, 0) * (t.dim() - 2), 0, -t.shape[1] % CHUNK))
        return t.unflatten(1, (-1, CHUNK)).transpose(2, 3)

    k, v, g, beta, q = (cut(t) for t in (k, v, g, beta, q))
    sums = g.cumsum(-1)
    between = decays(sums)
    inverse = solved(beta[..., None] * (k @ k.mT) * between)
    u, w = (inverse @ right for right in right_sides(k, v, sums, beta))
    return u.transpose(1, 2), w.transpose(1, 2), (q @ k.mT * between).transpose(1, 2)


@spelling(key_heads=1, value_heads=4, pairs=0.5)
def repeated_key_heads(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    k, q = (x.repeat_interleave(4, dim=2) for x in (k, q))
    k, v, g, beta, q = prepared(k, v, g, beta, q)
    sums = g.cumsum(-1)
    between = decays(sums)
    inverse = solved((k * beta[..., None]) @ k.mT * between)
    u, w = (inverse @ right for right in right_sides(k, v, sums, beta))
    return u, w, (0.5 * q) @ k.mT * between


@spelling(pairs=1.0, norm_eps=1e-5)
def pairs_chunk_by_chunk(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """The decays are shared with a loop over chunks, which was unrolled."""
    k, v, g, beta, q = heads_first(k, v, g, beta, q)
    k, q = (x / ((x * x).sum(-1, keepdim=True) + 1e-5).sqrt() for x in (k, q))
    k, v, g, beta, q = (chunked(t, CHUNK) for t in (k, v, g, beta, q))
    sums = g.cumsum(-1)
    between = decays(sums)
    inverse = solved((k * beta[..., None]) @ k.mT * between)
    u, w = (inverse @ right for right in right_sides(k, v, sums, beta))
    pairs = [(q[:, :, i] @ k[:, :, i].mT * between[:, :, i]) @ torch.eye(CHUNK) for i in range(k.shape[2])]
    return u, w, torch.stack(pairs, 2)


@spelling()
def powers_of_two(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Decays as powers of two, from sums scaled afterwards."""
    k, v, g, beta = prepared(k, v, g, beta)
    sums = g.cumsum(-1)
    scaled = sums / math.log(2.0)
    between = torch.exp2((scaled[..., :, None] - scaled[..., None, :]).masked_fill(~lower(CHUNK), -math.inf))
    inverse = solved((k @ k.mT) * between * beta[..., None])
    return inverse @ (v * beta[..., None]), inverse @ (k * (beta * torch.exp2(scaled))[..., None])


@spelling()
def beta_in_the_inverse(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Beta is a factor of the columns of the inverse."""
    k, v, g, beta = prepared(k, v, g, beta)
    sums = g.cumsum(-1)
    inverse = solved((k @ k.mT) * decays(sums) * beta[..., None]) * beta[..., None, :]
    return inverse @ v, inverse @ (k * sums.exp()[..., None])


@spelling()
def head_first_operands(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Products of tensors that have heads before tokens from the start."""
    k, v, g, beta = (t.transpose(1, 2).contiguous().sort(2).values for t in (k, v, g, beta))
    k, v, g, beta = (chunked(t, CHUNK) for t in (k, v, g, beta))
    sums = g.cumsum(-1)
    inverse = solved((k * beta[..., None]) @ k.mT * decays(sums))
    u, w = (inverse @ right for right in right_sides(k, v, sums, beta))
    return u, w


# --- one decay per channel -------------------------------------------------------------------------------------------


def channel_products(q: Tensor, k: Tensor, sums: Tensor, diagonal: int) -> Tensor:
    """sum_k q_i k_j e^(G_i - G_j) for j <= i + diagonal, else 0."""
    difference = (sums.unsqueeze(-2) - sums.unsqueeze(-3)).masked_fill(~lower(CHUNK)[..., None], -math.inf)
    return (q.unsqueeze(-2) * k.unsqueeze(-3) * difference.exp()).sum(-1).tril(diagonal)


def _channels(invert: Callable[[Tensor], Tensor]) -> Function:
    def run(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        k, v, g, beta = prepared(k, v, g, beta)
        sums = g.cumsum(-2)
        inverse = invert(channel_products(k * beta[..., None], k, sums, -1))
        u, w = (inverse @ right for right in right_sides(k, v, sums, beta))
        return u, w

    return run


SPELLINGS |= {
    "channels_forward_substitution": Spelling(_channels(substituted), per_channel=True),
    "channels_log_doubling": Spelling(_channels(_doubled), per_channel=True, key=16, value=16),
}


@spelling(per_channel=True, pairs=0.25)
def channels_with_pairs(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """The pairs in a loop over chunks, with the decays of all of them."""
    k, v, g, beta, q = prepared(k, v, g, beta, 0.25 * q)
    sums = g.cumsum(-2)
    difference = (sums.unsqueeze(-2) - sums.unsqueeze(-3)).masked_fill(~lower(CHUNK)[..., None], -math.inf)
    between = difference.exp()
    system = ((k * beta[..., None]).unsqueeze(-2) * k.unsqueeze(-3) * between).sum(-1)
    right, left = right_sides(k, v, sums, beta)
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    w = torch.linalg.solve_triangular(system, left, upper=False, unitriangular=True)
    pairs = [(q[:, :, i, :, None] * k[:, :, i, None] * between[:, :, i]).sum(-1) for i in range(k.shape[2])]
    return u, w, torch.stack([pair.tril() @ torch.eye(CHUNK) for pair in pairs], 2)


@spelling(per_channel=True)
def channels_column_by_column(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The system one column at a time, w before u, beta in the columns of the inverse."""
    k, v, g, beta = prepared(k, v, g, beta)
    sums = g.cumsum(-2)
    system = torch.zeros(*k.shape[:-1], CHUNK)
    for j in range(CHUNK):
        system[..., j] = torch.einsum("...ck,...k->...c", k * (sums - sums[..., j : j + 1, :]).exp(), k[..., j, :])
    inverse = _full_rows((system * beta[..., None]).tril(-1)) * beta[..., None, :]
    w = inverse @ (sums.exp() * k)
    return inverse @ v, w
