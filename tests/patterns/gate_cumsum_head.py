"""Spellings of the softplus gate with one value per head, and of the bounded sigmoid gate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.gate_cumsum_cases import Case, Table, entry
from tests.patterns.gate_cumsum_channel import BF16, FP16, LOG2E, chunked, heads

HEAD: Table = {}
BOUNDED: Table = {}


def head_case(**changes: object) -> Case:
    values: dict[str, object] = {"channels": 1, "heads": 4, "bias": "h", "raw": "bth", "out": "bhnc", **changes}
    return Case(**values)  # type: ignore[arg-type]


def bounded_case(**changes: object) -> Case:
    return Case(**{"lower": -5.0, **changes})  # type: ignore[arg-type]


def per_head(gate: Tensor, chunk: int = 64) -> Tensor:
    """[B, T, H] as [B, H, N, C]."""
    return gate.transpose(1, 2).reshape(gate.shape[0], gate.shape[2], -1, chunk)


def _group(raw: Tensor) -> Tensor:
    """Two groups of [b | a] with two value heads each, as a grouped projection lays them out."""
    a = raw.reshape(raw.shape[0], raw.shape[1], 2, 2)
    return torch.cat([a.flip(-1) + 1, a], -1).flatten(2)


@entry(HEAD, head_case(dtype=BF16, parameter_dtype=BF16, pack=_group))
def grouped_projection(ba: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """a is split from groups of [b | a], reshaped to heads; bf16 bias added to fp32."""
    _, a = torch.split(ba.view(2, -1, 2, 4), [2, 2], dim=3)
    a = a.reshape(2, -1, 4)
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias)
    g = g.transpose(1, 2).contiguous().to(torch.float32)
    return g.reshape(2, 4, -1, 64).cumsum(dim=-1)


@entry(HEAD, head_case(tokens=200))
def padded_per_head(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Head-major, zeros at the tail."""
    g = (-A_log.exp() * F.softplus(raw + bias)).transpose(1, 2)
    return F.pad(g, (0, 56)).view(2, 4, -1, 64).cumsum(-1)


@entry(HEAD, head_case(tokens=70, chunk=32, out="bnch"))
def padded_token_major(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Token-major with a pad on the second axis."""
    g = F.pad(-A_log.exp() * F.softplus(raw + bias), (0, 0, 0, 26))
    return g.reshape(2, 3, 32, 4).cumsum(2)


@entry(HEAD, head_case(out="bth", dtype=FP16))
def token_major_per_head(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """[B, T, H] in and out, dtype given to the cumsum."""
    g = A_log.exp() * F.softplus(raw.float() + bias) * -1
    return g.view(2, 2, 64, 4).cumsum(2, dtype=torch.float32).view(2, 128, 4)


@entry(HEAD, head_case(out="bhnc"))
def step_size_times_rate(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """State-space naming: dt = softplus, A = -exp(A_log), chunk first, heads to the front later."""
    dt = F.softplus(raw + bias)
    A = -torch.exp(A_log)
    dA = (dt * A).view(2, 2, 64, 4)
    return torch.cumsum(dA.permute(0, 3, 1, 2), dim=-1)


@entry(HEAD, head_case(scale=LOG2E, chunk=128))
def per_head_base_two(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Chunk of 128 tokens, log2 units folded in the rate."""
    return per_head(F.softplus(raw + bias) * (A_log.exp() * -LOG2E), 128).cumsum(-1)


@entry(HEAD, head_case(bias=None, batch=1))
def per_head_without_bias(raw: Tensor, A_log: Tensor) -> Tensor:
    """No bias, one sequence, logsigmoid."""
    return per_head(A_log.exp() * F.logsigmoid(raw.neg())).cumsum(3)


@entry(HEAD, head_case(rate="11h", bias="11h"))
def parameters_stored_broadcast(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Parameters of shape [1, 1, H], threshold by hand, log1p."""
    z = raw + bias
    g = torch.exp(A_log).mul(torch.where(z > 20.0, z, z.exp().log1p())).neg()
    return per_head(g).cumsum(-1)


@entry(HEAD, head_case(dtype=BF16, pack=lambda raw: torch.cat([raw.flatten(2)] * 3, -1)))
def narrow_of_a_projection(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Columns 4..8 of a wide projection by narrow."""
    a = torch.narrow(raw, -1, 4, 4).float()
    return per_head(-A_log.exp() * F.softplus(a + bias)).cumsum(-1)


@entry(HEAD, head_case(out="bhn1c"))
def keepdim_for_broadcast(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A unit axis put in before the cumsum."""
    return per_head(-A_log.exp() * F.softplus(raw + bias)).unsqueeze(3).cumsum(-1)



@entry(HEAD, head_case(out="wc", dtype=BF16))
def rows_of_chunks(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Batch rows, heads and chunks as the rows of a matrix."""
    return per_head(-A_log.exp() * F.softplus(raw.float() + bias)).reshape(-1, 64).cumsum(-1)


@entry(HEAD, head_case(out="bxc", tokens=200))
def chunks_of_heads_in_a_row(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Heads and chunks along one axis, the last chunk padded."""
    g = F.pad((-A_log.exp() * F.softplus(raw + bias)).transpose(1, 2), (0, 56))
    return g.reshape(2, -1, 64).cumsum(2)


@entry(HEAD, head_case(out="bnch"))
def chunks_as_batch_rows_and_back(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Chunks are folded into the batch for the sum alone."""
    g = -A_log.exp() * F.softplus(raw + bias)
    return g.view(4, 64, 4).cumsum(1).view(2, 2, 64, 4)


@entry(BOUNDED, bounded_case(dtype=BF16, parameter_dtype=BF16))
def bounded_as_released(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """lower * sigmoid(exp(A_log) * (raw + bias)), cast first."""
    z = (raw.float() + bias.float().view(1, 1, -1)).view(2, -1, 2, 64)
    g = -5.0 * torch.sigmoid(torch.exp(A_log.float().view(1, 1, 2, 1)) * z)
    return chunked(g).cumsum(-2)


@entry(BOUNDED, bounded_case(lower=-8.0))
def bounded_reciprocal(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) written out."""
    x = A_log.exp()[:, None] * heads(raw + bias)
    return chunked(-8.0 * (1.0 / (1.0 + torch.exp(-x)))).cumsum(-2)


@entry(BOUNDED, bounded_case())
def bounded_division(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """lower / (1 + exp(-x)): the bound is the numerator."""
    x = heads(raw + bias) * A_log.exp()[:, None]
    return chunked(-5.0 / (1.0 + x.neg().exp())).cumsum(-2)


@entry(BOUNDED, bounded_case())
def bounded_tanh_half(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """0.5 * (tanh(x / 2) + 1)."""
    x = heads(raw + bias) * A_log.exp()[:, None]
    return chunked(-5.0 * (0.5 * (torch.tanh(0.5 * x) + 1.0))).cumsum(-2)


@entry(BOUNDED, bounded_case())
def bounded_exp_of_logsigmoid(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """exp(logsigmoid(x)), bound applied after the cumsum."""
    x = heads(raw + bias) * A_log.exp()[:, None]
    return chunked(F.logsigmoid(x).exp()).cumsum(-2) * -5.0


@entry(BOUNDED, bounded_case())
def bounded_lerp(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Interpolation from 0 to the bound by the sigmoid."""
    share = torch.sigmoid(heads(raw + bias) * A_log.exp()[:, None])
    return chunked(torch.lerp(torch.zeros_like(share), torch.full_like(share, -5.0), share)).cumsum(-2)


@entry(BOUNDED, bounded_case(scale=LOG2E, out="bthk"))
def bounded_base_two(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Token-major, log2 units in the bound, expit."""
    x = A_log.exp()[:, None] * heads(raw + bias)
    g = (-5.0 * LOG2E) * torch.special.expit(x)
    return g.view(2, 2, 64, 2, 64).cumsum(2).flatten(1, 2)


@entry(BOUNDED, bounded_case(bias=None, tokens=80, chunk=32))
def bounded_padded_without_bias(raw: Tensor, A_log: Tensor) -> Tensor:
    """No bias, tail padding, chunk 32."""
    g = torch.sigmoid(heads(raw) * torch.exp(A_log)[:, None]).mul(-5.0).transpose(1, 2)
    return F.pad(g, (0, 0, 0, 16)).view(2, 2, 3, 32, 64).cumsum(3)


@entry(BOUNDED, head_case(lower=-2.0))
def bounded_per_head(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """One gate per head, one minus sigmoid of the negative."""
    share = 1.0 - torch.sigmoid(-(A_log.exp() * (raw + bias)))
    return per_head(-2.0 * share).cumsum(-1)


@entry(BOUNDED, bounded_case(lower=-math.e, bias="hk", dtype=BF16))
def bounded_rate_distributed(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """exp(A_log) multiplied into raw and bias separately."""
    rate = A_log.exp()[:, None]
    g = -math.e * torch.sigmoid(rate * heads(raw).float() + rate * bias)
    return chunked(g).cumsum(-2)
