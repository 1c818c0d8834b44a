"""The chunked delta rule as different authors would write it: each takes q, k, v, g, beta with tokens before heads.

What is written is the same for all: S <- diag(e^g) S, S <- S + beta k (v - S^T k)^T, o = scale S^T q, chunk by chunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.delta_rule import operands

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A function, the sizes of its operands, and what it does beside the recurrence."""

    function: Function
    tokens: int = 64
    batch: int = 1
    key_heads: int = 2
    value_heads: int = 2
    key: int = 64
    value: int = 64
    per_channel: bool = False
    scale: float = 64**-0.5
    norm_eps: float | None = None
    state: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """q, k, v, g, beta, and an initial state if there is one."""
        drawn = operands(
            self.batch, self.tokens, self.key_heads, self.value_heads, self.key, self.value,
            per_channel=self.per_channel, dtype=dtype,
        )  # fmt: skip
        extra: tuple[Tensor, ...] = ()
        if self.state:
            extra = (torch.randn(self.batch, self.value_heads, self.key, self.value, generator=torch.Generator()),)
        return (*drawn.values(), *extra)


SPELLINGS: dict[str, Spelling] = {}


def spelling(**about: Any) -> Callable[[Function], Function]:
    def put(function: Function) -> Function:
        SPELLINGS[function.__name__] = Spelling(function, **about)
        return function

    return put


# --- parts that several spellings share ------------------------------------------------------------------------------


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2).contiguous().float() for t in tensors]


def chunked(t: Tensor, size: int) -> Tensor:
    """[B, H, T, ...] in chunks, padded with zeros at the end."""
    tail = -t.shape[2] % size
    widths = (0, tail) if t.dim() == 3 else (0, 0, 0, tail)
    return F.pad(t, widths).unflatten(2, (-1, size))


def lower(size: int, diagonal: int = 0) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril(diagonal)


def decays(sums: Tensor) -> Tensor:
    """e^(G_i - G_j) for j <= i, else 0; one per head."""
    difference = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    return difference.masked_fill(~lower(sums.shape[-1]), -math.inf).exp()


def substituted(system: Tensor) -> Tensor:
    """(I + L)^-1 row by row, for the strictly lower L."""
    inverse = -system
    for i in range(1, system.shape[-1]):
        row = inverse[..., i, :i].clone()
        inverse[..., i, :i] = row + (row.unsqueeze(-1) * inverse[..., :i, :i].clone()).sum(-2)
    return inverse + torch.eye(system.shape[-1])


def scan(parts: Sequence[Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Outputs of all chunks and the last state; sums [B, H, N, C] or [B, H, N, C, K]."""
    q, k, u, w, within, sums = parts
    sums = sums if sums.dim() == 5 else sums.unsqueeze(-1)
    outputs = []
    for i in range(q.shape[2]):
        written = u[:, :, i] - w[:, :, i] @ state
        outputs.append((q[:, :, i] * sums[:, :, i].exp()) @ state + within[:, :, i] @ written)
        last = sums[:, :, i, -1:]
        state = state * last.exp().mT + (k[:, :, i] * (last - sums[:, :, i]).exp()).mT @ written
    return outputs, state


def per_head(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, size: int, invert: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """What `scan` takes but for the state, with an inverse given by `invert`."""
    q, k, v, g, beta = heads_first(q, k, v, g, beta)
    q, k, v, g, beta = (chunked(t, size) for t in (q * 64**-0.5, k, v, g, beta))
    sums = g.cumsum(-1)
    between = decays(sums)
    inverse = invert(((k * beta[..., None]) @ k.mT * between).tril(-1))
    u = inverse @ (v * beta[..., None])
    w = inverse @ (k * (beta * sums.exp())[..., None])
    return q, k, u, w, q @ k.mT * between, sums


def zeros(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], q.shape[1], q.shape[-1], v.shape[-1])


def merged(outputs: list[Tensor], tokens: int) -> Tensor:
    return torch.stack(outputs, 2).flatten(2, 3)[:, :, :tokens].transpose(1, 2)


# --- one decay per head ----------------------------------------------------------------------------------------------


def _with(invert: Callable[[Tensor], Tensor], size: int = 32) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        parts = per_head(q, k, v, g, beta, size, invert)
        outputs, _ = scan(parts, zeros(parts[0], parts[2]))
        return merged(outputs, q.shape[1])

    return run


def _doubled(system: Tensor) -> Tensor:
    power, inverse = -system, torch.eye(system.shape[-1]) - system
    for _ in range(4):
        power = power @ power
        inverse = inverse + inverse @ power
    return inverse


def _solved(system: Tensor) -> Tensor:
    eye = torch.eye(system.shape[-1]).expand_as(system)
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def _blocked(system: Tensor) -> Tensor:
    """The inverse of 2 x 2 blocks."""
    half = system.shape[-1] // 2
    first, last = _solved(system[..., :half, :half]), _solved(system[..., half:, half:])
    corner = -last @ system[..., half:, :half] @ first
    top = torch.cat([first, torch.zeros_like(corner)], -1)
    return torch.cat([top, torch.cat([corner, last], -1)], -2)


SPELLINGS |= {
    "solve_against_identity": Spelling(_with(_solved)),
    "forward_substitution": Spelling(_with(substituted, 16), 48),
    "forward_substitution_ragged": Spelling(_with(substituted, 16), 40, batch=2),
    "log_doubling": Spelling(_with(_doubled)),
    "two_by_two_blocks": Spelling(_with(_blocked), 96),
    "chunks_of_128": Spelling(_with(_solved, 128), 256),
    "other_widths": Spelling(_with(_solved), key=96, value=192),
}


@spelling(tokens=80, norm_eps=1e-6)
def solved_together(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """u and w from one solve with the right-hand sides side by side; q and k normalised."""
    q, k, v, g, beta = heads_first(q, k, v, g, beta)
    q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k, v, g, beta = (chunked(t, 32) for t in (q, k, v, g, beta))
    sums = g.cumsum(-1)
    between = decays(sums)
    beta = beta[..., None]
    system = beta * (k @ k.mT) * between
    right = torch.cat([beta * v, beta * sums.exp()[..., None] * k], -1)
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split([64, 64], -1)
    outputs, _ = scan((q * 0.125, k, u, w, 0.125 * q @ k.mT * between, sums), zeros(k, u))
    return merged(outputs, 80)


@spelling(tokens=70, state=True)
def state_in_and_out(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    parts = per_head(q, k, v, g, beta, 32, _solved)
    outputs, state = scan(parts, start.float())
    return merged(outputs, 70), state


@spelling(tokens=64, state=True)
def as_many_tokens_as_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, start: Tensor) -> Tensor:
    """The state has the shape of operands with heads first."""
    parts = per_head(q, k, v, g, beta, 32, _solved)
    return merged(scan(parts, start.float())[0], 64)


@spelling(tokens=50)
def one_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    parts = per_head(q, k, v, g, beta, 64, _solved)
    out = torch.zeros(1, 2, 1, 64, 64)
    out[:, :, 0] = scan(parts, zeros(parts[0], parts[2]))[0][0]
    return out.flatten(2, 3)[:, :, :50].transpose(1, 2).contiguous()


@spelling(tokens=96)
def written_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Outputs are written into a tensor by chunk number."""
    parts = per_head(q, k, v, g, beta, 32, _solved)
    out = torch.empty(1, 2, 3, 32, 64)
    for i, piece in enumerate(scan(parts, zeros(parts[0], parts[2]))[0]):
        out[:, :, i] = piece
    return out.reshape(1, 2, 96, 64).transpose(1, 2).contiguous()


@spelling(tokens=80)
def written_to_slices(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Outputs are written by slices of the sequence, heads after tokens; the last slice is short."""
    parts = per_head(q, k, v, g, beta, 32, _solved)
    out = torch.zeros(1, 80, 2, 64)
    for i, piece in enumerate(scan(parts, zeros(parts[0], parts[2]))[0]):
        here = out[:, 32 * i : 32 * i + 32]
        here.copy_(piece[:, :, : here.shape[1]].transpose(1, 2))
    return out


@spelling(tokens=80, batch=2, key_heads=1, value_heads=2)
def all_in_the_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Every chunk cut from the sequence in the loop, the last one short; key heads repeated; outputs concatenated."""
    q, k = (x.float().repeat_interleave(2, 2) for x in (q, k))
    state = torch.zeros(2, 2, 64, 64)
    outputs = []
    for start in range(0, 80, 32):
        here = slice(start, min(start + 32, 80))
        qi, ki, vi = (x[:, here].float().transpose(1, 2) for x in (q, k, v))
        bi, gi = beta[:, here].float().mT, g[:, here].float().mT.cumsum(-1)
        between = decays(gi)
        system = (bi[..., None] * ki @ ki.mT * between).tril(-1) + torch.eye(ki.shape[2])
        right = bi[..., None] * (vi - (gi.exp()[..., None] * ki) @ state)
        written = torch.linalg.solve_triangular(system, right, upper=False)
        outputs.append(0.125 * ((gi.exp()[..., None] * qi) @ state + (qi @ ki.mT * between) @ written))
        state = gi[..., -1:, None].exp() * state + (ki * (gi[..., -1:] - gi).exp()[..., None]).mT @ written
    return torch.cat(outputs, 2).transpose(1, 2)


@spelling(tokens=64)
def einsums(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Contractions as einsums on [B, N, C, H, ...]; tokens before heads throughout."""
    q, k, v = (x.float().view(1, 2, 32, 2, 64) for x in (q, k, v))
    sums = g.float().view(1, 2, 32, 2).cumsum(2)
    beta = beta.float().view(1, 2, 32, 2)
    difference = (sums.unsqueeze(3) - sums.unsqueeze(2)).permute(0, 1, 4, 2, 3)
    between = torch.where(lower(32), difference, -math.inf).exp()
    products = torch.einsum("bnihk,bnjhk->bnhij", k, k) * between * beta.permute(0, 1, 3, 2)[..., None]
    inverse = _solved(products.tril(-1))
    u = torch.einsum("bnhij,bnjh,bnjhv->bnihv", inverse, beta, v)
    w = torch.einsum("bnhij,bnjh,bnjhk->bnihk", inverse, beta * sums.exp(), k)
    within = torch.einsum("bnihk,bnjhk->bnhij", q, k) * between
    state, outputs = torch.zeros(1, 2, 64, 64), []
    for n in range(2):
        written = u[:, n] - torch.einsum("bchk,bhkv->bchv", w[:, n], state)
        read = torch.einsum("bchk,bhkv->bchv", q[:, n] * sums[:, n, ..., None].exp(), state)
        outputs.append((read + torch.einsum("bhij,bjhv->bihv", within[:, n], written)) / 8)
        left = (sums[:, n, -1:] - sums[:, n]).exp()[..., None]
        state = sums[:, n, -1, :, None, None].exp() * state + torch.einsum("bchk,bchv->bhkv", k[:, n] * left, written)
    return torch.cat(outputs, 1)


@spelling(tokens=96, value=128)
def state_turned(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The state is kept as [V, K], on the left of its products."""
    q, k, u, w, within, sums = per_head(q, k, v, g, beta, 32, _solved)
    state, outputs = torch.zeros(1, 2, 128, 64), []
    for qi, ki, ui, wi, ai, gi in zip(*(t.unbind(2) for t in (q, k, u, w, within, sums))):
        written = ui.mT - state @ wi.mT
        outputs.append(((state @ qi.mT) * gi.exp().unsqueeze(-2) + written @ ai.mT).mT)
        state = state * gi[..., -1:, None].exp() + written @ (ki * (gi[..., -1:] - gi).exp()[..., None])
    return merged(outputs, 96)


@spelling(tokens=64)
def powers_of_two(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Decays as powers of two, and one product for what reads the state."""
    q, k, v, g, beta = (chunked(t, 32) for t in heads_first(q, k, v, g, beta))
    sums = (g / math.log(2)).cumsum(-1)
    between = torch.exp2((sums[..., None] - sums[..., None, :]).masked_fill(~lower(32), -math.inf))
    grown = torch.exp2(sums)[..., None]
    inverse = _solved((beta[..., None] * (k @ k.mT) * between).tril(-1)) * beta[..., None, :]
    u, w = inverse @ v, inverse @ (k * grown)
    state, outputs = zeros(q, v), []
    for i in range(2):
        read = torch.cat([w[:, :, i], q[:, :, i] * grown[:, :, i]], -2) @ state
        written = u[:, :, i] - read[:, :, :32]
        outputs.append((read[:, :, 32:] + (q[:, :, i] @ k[:, :, i].mT * between[:, :, i]) @ written) * 0.125)
        last = sums[:, :, i, -1:]
        state = torch.exp2(last)[..., None] * state
        state = state + (k[:, :, i] * torch.exp2(last - sums[:, :, i])[..., None]).mT @ written
    return merged(outputs, 64)


@spelling(tokens=64)
def divided_decays(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q e^G and k e^-G, whose product has the decay between them."""
    q, k, v, g, beta = (chunked(t, 32) for t in heads_first(q, k, v, g, beta))
    sums = g.cumsum(-1)[..., None]
    q, kept, lost = q * sums.exp() * 0.125, k * sums.exp(), k * (-sums).exp()
    inverse = _solved((beta[..., None] * kept @ lost.mT).tril(-1))
    u, w = inverse @ (beta[..., None] * v), inverse @ (beta[..., None] * kept)
    state, outputs = zeros(q, v), []
    for i in range(2):
        written = u[:, :, i] - w[:, :, i] @ state
        outputs.append(q[:, :, i] @ state + (q[:, :, i] @ lost[:, :, i].mT).tril() @ written)
        state = sums[:, :, i, -1:].exp() * (state + lost[:, :, i].mT @ written)
    return merged(outputs, 64)


@spelling(tokens=64, key_heads=1, value_heads=2)
def head_first_operands(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Operands that come heads first from opaque producers, and a result that stays so."""
    q, k, v = (torch.sort(x.transpose(1, 2).contiguous(), dim=-1)[0] for x in (q, k, v))
    g, beta = (torch.sort(x.mT.contiguous(), dim=1)[0] for x in (g, beta))
    q, k = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(1, 2, 64, 64) for x in (q / 8, k))
    q, k, v, g, beta = (chunked(t.float(), 32) for t in (q, k, v, g, beta))
    sums = g.cumsum(-1)
    between = decays(sums)
    inverse = _solved(((k * beta[..., None]) @ k.mT * between).tril(-1))
    u, w = inverse @ (v * beta[..., None]), inverse @ (k * (beta * sums.exp())[..., None])
    outputs, _ = scan((q, k, u, w, q @ k.mT * between, sums), zeros(q, v))
    return torch.stack(outputs, 2).flatten(2, 3)


# --- one decay per channel -------------------------------------------------------------------------------------------


def per_channel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, g, beta = (chunked(t, size) for t in heads_first(q * 64**-0.5, k, v, g, beta))
    sums = g.cumsum(-2)
    difference = sums.unsqueeze(-2) - sums.unsqueeze(-3)
    between = difference.masked_fill(~lower(size)[..., None], -math.inf).exp()
    return q, k, v, sums, beta, between, (k.unsqueeze(-2) * k.unsqueeze(-3) * between).sum(-1)


@spelling(tokens=40, per_channel=True, batch=2)
def channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Broadcast sums, and the substitution spelled out."""
    q, k, v, sums, beta, between, products = per_channel(q, k, v, g, beta, 16)
    inverse = substituted((beta[..., None] * products).tril(-1))
    u, w = inverse @ (beta[..., None] * v), inverse @ (beta[..., None] * k * sums.exp())
    within = (q.unsqueeze(-2) * k.unsqueeze(-3) * between).sum(-1)
    return merged(scan((q, k, u, w, within, sums), zeros(q, v))[0], 40)


@spelling(tokens=24, per_channel=True, state=True)
def channels_by_column(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The matrix of products column by column, beta folded into the inverse, products of q within the loop."""
    q, k, v, g, beta = (chunked(t, 16) for t in heads_first(q * 64**-0.5, k, v, g, beta))
    sums = g.cumsum(-2)
    system = torch.zeros(*q.shape[:-1], 16)
    for j in range(16):
        column = (sums - sums[..., j : j + 1, :]).exp()
        system[..., j] = torch.einsum("bhnck,bhnk->bhnc", k * column, k[..., j, :])
    inverse = substituted((system * beta[..., None]).tril(-1)) * beta[..., None, :]
    u, w = inverse @ v, inverse @ (sums.exp() * k)
    state, out = start, torch.zeros_like(v)
    for i in range(q.shape[2]):
        qi, ki, gi = q[:, :, i], k[:, :, i], sums[:, :, i]
        within = torch.zeros(1, 2, 16, 16)
        for j in range(16):
            within[..., j] = torch.einsum("bhck,bhk->bhc", qi * (gi - gi[:, :, j : j + 1]).exp(), ki[:, :, j])
        written = u[:, :, i] - w[:, :, i] @ state
        out[:, :, i] = (qi * gi.exp()) @ state + within.tril() @ written
        state = gi[:, :, -1, :, None].exp() * state + ((gi[:, :, -1:] - gi).exp() * ki).mT @ written
    return out.flatten(2, 3)[:, :, :24].transpose(1, 2), state
