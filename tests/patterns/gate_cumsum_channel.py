"""Spellings of the softplus gate with one value per key channel, as written by engineers who never met."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.gate_cumsum_cases import Case, Table, entry

CHANNEL: Table = {}
LN2 = math.log(2.0)
LOG2E = 1.0 / LN2
BF16, FP16 = torch.bfloat16, torch.float16


def heads(value: Tensor, count: int = 2) -> Tensor:
    """[B, T, H*K] as [B, T, H, K]."""
    return value.unflatten(-1, (count, -1))


def chunked(gate: Tensor, chunk: int = 64) -> Tensor:
    """[B, T, H, K] as [B, H, N, C, K]."""
    gate = gate.transpose(1, 2).contiguous()
    return gate.view(gate.shape[0], gate.shape[1], -1, chunk, gate.shape[-1])


@entry(CHANNEL, Case(dtype=BF16, parameter_dtype=BF16, rate="11h1", channels=128))
def cast_first_log_of_one_plus_exp(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Everything cast at once, threshold by hand, log(1 + exp) without log1p."""
    z = (raw.float() + bias.float().view(1, 1, -1)).view(raw.shape[0], raw.shape[1], -1, 128)
    softplus = torch.where(z > 20.0, z, torch.log(1.0 + torch.exp(z)))
    g = -torch.exp(A_log.float()) * softplus
    g = g.transpose(1, 2).contiguous().to(torch.float32)
    return g.reshape(g.shape[0], g.shape[1], -1, 64, 128).cumsum(dim=-2)


@entry(CHANNEL, Case())
def library_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """F.softplus, channel bias added flat, rate viewed to heads."""
    g = -A_log.exp().view(1, 1, -1, 1) * heads(F.softplus(raw + bias))
    return chunked(g).cumsum(-2)


@entry(CHANNEL, Case(bias="hk", dtype=FP16))
def softplus_module_and_head_bias(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """nn.Softplus, fp16 input, bias [H, K] added after the head split."""
    z = nn.Softplus()(heads(raw).to(torch.float32) + bias)
    return chunked(z * A_log.exp().neg()[:, None]).cumsum(3)


@entry(CHANNEL, Case(bias="11hk", rate="11h1"))
def log1p_of_exp(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """log1p(exp(z)) with no threshold at all; parameters broadcast as stored."""
    z = heads(raw) + bias
    return torch.cumsum(chunked(-(A_log.exp() * torch.log1p(torch.exp(z)))), dim=3)


@entry(CHANNEL, Case(bias=None))
def logaddexp_without_bias(raw: Tensor, A_log: Tensor) -> Tensor:
    """logaddexp(x, 0), no bias."""
    x = heads(raw)
    softplus = torch.logaddexp(x, torch.zeros_like(x))
    return chunked(softplus.mul(-A_log.exp().unsqueeze(-1))).cumsum(-2)


@entry(CHANNEL, Case())
def logsigmoid_of_negative(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """softplus(z) = -logsigmoid(-z): the two minus signs cancel, so no neg is left."""
    g = torch.exp(A_log)[:, None] * F.logsigmoid(-heads(raw + bias))
    return chunked(g).cumsum(-2)


@entry(CHANNEL, Case(bias="hk"))
def log_of_sigmoid(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """log(sigmoid(-z)) in two steps."""
    g = A_log.exp()[:, None] * torch.log(torch.sigmoid(-(heads(raw) + bias)))
    return chunked(g).cumsum(-2)


@entry(CHANNEL, Case())
def stable_max_plus_log1p(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """max(z, 0) + log1p(exp(-|z|))."""
    z = heads(raw + bias)
    softplus = torch.maximum(z, z.new_zeros(())) + torch.log1p(torch.exp(-torch.abs(z)))
    return chunked(-A_log.exp()[None, None, :, None] * softplus).cumsum(-2)


@entry(CHANNEL, Case(out="bthk"))
def stable_relu_token_major(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """relu(z) plus the correction; the result goes back to [B, T, H, K]."""
    z = heads(raw + bias)
    g = -A_log.exp()[:, None] * (F.relu(z) + z.abs().neg().exp().log1p())
    return g.view(2, -1, 64, 2, 64).cumsum(2).view_as(g)


@entry(CHANNEL, Case())
def clamp_min_form(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """z.clamp(min=0) with the correction first."""
    z = heads(raw + bias)
    softplus = (-z.abs()).exp().log1p() + z.clamp(min=0.0)
    return chunked(A_log.exp().neg()[:, None] * softplus).cumsum(-2)


@entry(CHANNEL, Case())
def split_at_zero(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """where(z < 0): one side from below, the other shifted by z."""
    z = heads(raw + bias)
    softplus = torch.where(z < 0, torch.log1p(torch.exp(z)), z + torch.log1p(torch.exp(-z)))
    return chunked(softplus * -A_log.exp()[:, None]).cumsum(-2)


@entry(CHANNEL, Case())
def threshold_from_below(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The same threshold with branches swapped: z <= 20 first."""
    z = heads(raw + bias)
    softplus = torch.where(z <= 20, z.exp().log1p(), z)
    return chunked(softplus * -A_log.exp()[:, None]).cumsum(-2)


@entry(CHANNEL, Case())
def log_of_two_plus_expm1(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """log(2 + expm1(z)) = log(1 + exp(z))."""
    z = heads(raw + bias)
    return chunked(-A_log.exp()[:, None] * torch.log(2.0 + torch.expm1(z))).cumsum(-2)


@entry(CHANNEL, Case())
def base_two_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """exp2 and log2 with the constants written out."""
    z = heads(raw + bias) * LOG2E
    softplus = LN2 * torch.log2(1.0 + torch.exp2(z))
    return chunked(-torch.exp2(A_log * LOG2E)[:, None] * softplus).cumsum(-2)


@entry(CHANNEL, Case(scale=LOG2E))
def scale_after(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """1/ln 2 multiplied after the cumsum, for exp2 later on."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    return chunked(g).cumsum(-2) * LOG2E


@entry(CHANNEL, Case(scale=LOG2E))
def divided_after(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The same scale as a division by ln 2."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    return chunked(g).cumsum(-2) / math.log(2)


@entry(CHANNEL, Case(scale=LOG2E))
def scale_before(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Scale on the gate, before the cumsum."""
    g = F.softplus(heads(raw + bias)) * A_log.exp()[:, None]
    return (chunked(g) * -LOG2E).cumsum(-2)


@entry(CHANNEL, Case(scale=LOG2E, rate="11h1"))
def scale_inside_the_rate(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Scale folded in exp(A_log)."""
    rate = A_log.exp() * (-1.0 / LN2)
    return chunked(rate * F.softplus(heads(raw + bias))).cumsum(-2)


@entry(CHANNEL, Case(scale=LOG2E))
def scale_inside_the_exponent(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Scale folded in A_log itself: exp(A_log + ln(1/ln 2))."""
    rate = torch.exp(A_log + math.log(LOG2E))
    return chunked(-rate[:, None] * F.softplus(heads(raw + bias))).cumsum(-2)


@entry(CHANNEL, Case(scale=0.5))
def constant_tensor_scale(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The constant made as a tensor by torch.full."""
    scale = torch.full((1,), 0.5, device=raw.device)
    return chunked(-A_log.exp()[:, None] * F.softplus(heads(raw + bias)) * scale).cumsum(-2)


@entry(CHANNEL, Case())
def negated_after(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Minus sign outside of the cumsum."""
    return chunked(A_log.exp()[:, None] * F.softplus(heads(raw + bias))).cumsum(-2).neg()


@entry(CHANNEL, Case())
def subtracted_from_zero(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """0 - x in place of -x."""
    return chunked(0.0 - torch.exp(A_log)[:, None] * F.softplus(heads(raw + bias))).cumsum(-2)


@entry(CHANNEL, Case())
def three_factors(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The -1.0 as a third factor, on the softplus."""
    g = (F.softplus(heads(raw + bias), beta=1, threshold=20) * -1.0) * A_log.exp().reshape(2, 1)
    return chunked(g).cumsum(-2)


@entry(CHANNEL, Case())
def addcmul_from_zero(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """0 + (-1) * rate * softplus in one addcmul."""
    softplus = F.softplus(heads(raw + bias))
    g = torch.addcmul(torch.zeros_like(softplus), A_log.exp()[:, None], softplus, value=-1)
    return chunked(g).cumsum(-2)


@entry(CHANNEL, Case())
def einsum_product(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Broadcast product as einsum."""
    g = torch.einsum("bthk,h->bhtk", F.softplus(heads(raw + bias)), -A_log.exp())
    return g.reshape(2, 2, -1, 64, 64).cumsum(-2)


@entry(CHANNEL, Case(dtype=BF16))
def in_place(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """add_, mul_ and neg_ on fresh fp32 buffers."""
    z = raw.float().add_(bias)
    g = F.softplus(heads(z)).mul_(A_log.exp()[:, None]).neg_()
    return chunked(g).cumsum_(-2)


@entry(CHANNEL, Case(dtype=BF16))
def layout_before_cast(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Head-major copy in bf16 first, cast and gate last."""
    x = raw.view(2, 2, 64, 2, 64).permute(0, 3, 1, 2, 4).contiguous()
    z = x.float() + bias.view(1, 2, 1, 1, 64)
    return (-A_log.exp().view(1, 2, 1, 1, 1) * F.softplus(z)).cumsum(-2)


@entry(CHANNEL, Case(dtype=BF16, parameter_dtype=BF16))
def mixed_dtype_add(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """fp32 raw plus bf16 bias: promotion does the cast."""
    g = -A_log.to(torch.float32).exp()[:, None] * F.softplus(heads(raw.to(torch.float32) + bias))
    return chunked(g).cumsum(-2)


@entry(CHANNEL, Case(out="bnchk"))
def token_major_no_permute(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """No permute: chunks split from the token axis in place."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    return g.unflatten(1, (-1, 64)).cumsum(2)


@entry(CHANNEL, Case(out="btd", chunk=32))
def flat_channels_all_along(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Never splits heads: the rate is repeated over channels; result [B, T, H*K]."""
    rate = A_log.exp().repeat_interleave(64)
    g = -rate * F.softplus(raw + bias)
    return g.view(2, -1, 32, 128).cumsum(-2).reshape(2, -1, 128)


@entry(CHANNEL, Case(out="bhtk"))
def head_major_flat_result(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Cumsum in chunks, result folded back to [B, H, T, K]."""
    g = (-A_log.exp()[:, None] * F.softplus(heads(raw + bias))).transpose(1, 2)
    return torch.cumsum(g.unflatten(2, (2, 64)), dim=-2).flatten(2, 3)


@entry(CHANNEL, Case(out="bhnck"))
def permuted_after(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Cumsum token-major, permute afterwards."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    return g.view(2, 2, 64, 2, 64).cumsum(2).permute(0, 3, 1, 2, 4)


@entry(CHANNEL, Case(raw="bhtk", bias="hk"))
def head_major_input(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw arrives as [B, H, T, K]."""
    g = -A_log.exp()[:, None, None] * F.softplus(raw + bias[:, None])
    return g.reshape(2, 2, -1, 64, 64).cumsum(-2)


@entry(CHANNEL, Case(out="znck"))
def batch_and_heads_merged(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """(B H) merged before the chunk split."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    return g.transpose(1, 2).flatten(0, 1).view(4, -1, 64, 64).cumsum(2)


@entry(CHANNEL, Case(out="nbchk"))
def stack_of_slices(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Chunk axis made by stacking the pieces of split."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    return torch.stack(g.split(64, dim=1)).cumsum(2)


@entry(CHANNEL, Case(tokens=256, chunk=128, out="bhnkc"))
def channels_before_tokens(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Token axis moved last; chunk 128."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    return g.permute(0, 2, 3, 1).reshape(2, 2, 64, 2, 128).movedim(3, 2).cumsum(-1)


@entry(CHANNEL, Case(chunk=16, tokens=64, channels=32, heads=4))
def small_chunk(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Chunk 16, four heads of 32 channels."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias, 4))
    return chunked(g, 16).cumsum(-2)


@entry(CHANNEL, Case(batch=1, out="hnck"))
def batch_squeezed(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Batch 1 dropped at the door."""
    x = raw.squeeze(0).view(-1, 2, 64) + bias.view(2, 64)
    g = -A_log.exp()[:, None] * F.softplus(x)
    return g.transpose(0, 1).reshape(2, -1, 64, 64).cumsum(2)


@entry(CHANNEL, Case(tokens=100))
def tail_padded(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Gate padded with zeros at the tail, head-major."""
    g = (-A_log.exp()[:, None] * F.softplus(heads(raw + bias))).transpose(1, 2).contiguous()
    g = F.pad(g, (0, 0, 0, (64 - g.shape[2] % 64) % 64))
    return g.reshape(2, 2, -1, 64, 64).cumsum(-2)


@entry(CHANNEL, Case(tokens=128))
def pad_of_nothing(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The same pad where T is a multiple of the chunk: zero rows."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    g = F.pad(g, (0, 0, 0, 0, 0, -g.shape[1] % 64))
    return chunked(g).cumsum(-2)


@entry(CHANNEL, Case(tokens=96, chunk=64, out="bnchk"))
def tail_by_cat(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Tail filled by concatenating zeros."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw + bias))
    g = torch.cat([g, g.new_zeros(2, 32, 2, 64)], dim=1)
    return g.view(2, 2, 64, 2, 64).cumsum(2)


@entry(CHANNEL, Case(dtype=BF16, pack=lambda raw: torch.cat([raw.flatten(2).neg(), raw.flatten(2)], -1)))
def half_of_a_projection(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Second half of a packed projection, by chunk."""
    _, x = raw.chunk(2, dim=-1)
    g = -A_log.exp()[:, None] * F.softplus(heads(x.float() + bias))
    return chunked(g).cumsum(-2)


@entry(CHANNEL, Case(pack=lambda raw: raw.repeat_interleave(2, 1)))
def every_second_token(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw read with a step of two tokens: a strided view of a larger buffer."""
    x = raw[:, ::2]
    return chunked(-A_log.exp()[:, None] * F.softplus(x + bias.view(2, 64))).cumsum(-2)


@entry(CHANNEL, Case())
def as_strided_chunks(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """All views at once by as_strided."""
    x = (raw + bias).as_strided((2, 2, 2, 64, 64), (128 * 128, 64, 64 * 128, 128, 1))
    return (-A_log.exp().view(2, 1, 1, 1) * F.softplus(x)).cumsum(3)


@entry(CHANNEL, Case(out="ychk", tokens=200))
def chunks_as_batch_rows(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Chunks are folded into the batch, the last one padded; token-major."""
    g = F.pad(heads(F.softplus(raw + bias)) * -A_log.exp()[:, None], (0, 0, 0, 0, 0, 56))
    return g.reshape(-1, 64, 2, 64).cumsum(1)


@entry(CHANNEL, Case(out="wck", dtype=BF16))
def matrices_of_chunks(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """One batch of matrices [C, K] over batch rows, heads and chunks."""
    g = heads(-F.softplus(raw.float() + bias)) * A_log.exp().unsqueeze(-1)
    return g.permute(0, 2, 1, 3).reshape(-1, 64, 64).cumsum(1)
