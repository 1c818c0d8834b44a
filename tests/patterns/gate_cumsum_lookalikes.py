"""Look-alikes of a gate and its chunk cumsum: they mean something else, or are used in a way that forbids it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.gate_cumsum_cases import Case, Table, entry
from tests.patterns.gate_cumsum_channel import BF16, chunked, heads
from tests.patterns.gate_cumsum_head import bounded_case, head_case, per_head

LOOKALIKES: Table = {}


def gate(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The plain gate, [B, T, H, K]."""
    return -A_log.exp()[:, None] * F.softplus(heads(raw + bias))


def softplus_replaced(raw: Tensor, A_log: Tensor, activated: Tensor) -> Tensor:
    return chunked(-A_log.exp()[:, None] * activated).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def relu_for_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """relu agrees with softplus only far from zero."""
    return softplus_replaced(raw, A_log, F.relu(heads(raw + bias)))


@entry(LOOKALIKES, Case(), "value")
def elu_for_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """elu + 1."""
    return softplus_replaced(raw, A_log, F.elu(heads(raw + bias)) + 1.0)


@entry(LOOKALIKES, Case(), "value")
def mish_for_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """mish holds a softplus inside."""
    return softplus_replaced(raw, A_log, F.mish(heads(raw + bias)))


@entry(LOOKALIKES, Case(), "value")
def silu_for_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """silu."""
    return softplus_replaced(raw, A_log, F.silu(heads(raw + bias)))


@entry(LOOKALIKES, Case(), "value")
def leaky_relu_for_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """leaky_relu: linear on both sides."""
    return softplus_replaced(raw, A_log, F.leaky_relu(heads(raw + bias), 0.1))


@entry(LOOKALIKES, Case(), "value")
def softplus_of_absolute(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Right for positive z only."""
    return softplus_replaced(raw, A_log, F.softplus(heads(raw + bias).abs()))


@entry(LOOKALIKES, Case(), "value")
def softplus_in_base_two(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """log2(1 + 2^z) with no constants: softplus of z * ln 2."""
    return softplus_replaced(raw, A_log, torch.log2(1.0 + torch.exp2(heads(raw + bias))))


@entry(LOOKALIKES, Case(), "value")
def softplus_with_wrong_constant(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """log(1.1 + exp(z))."""
    return softplus_replaced(raw, A_log, torch.log(1.1 + torch.exp(heads(raw + bias))))


@entry(LOOKALIKES, Case(), "value")
def softplus_squared(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Square of the softplus."""
    return softplus_replaced(raw, A_log, F.softplus(heads(raw + bias)).square())


@entry(LOOKALIKES, Case(), "value")
def zero_above_the_threshold(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Differs only where z > 20."""
    z = heads(raw + bias)
    return softplus_replaced(raw, A_log, torch.where(z > 20.0, 0.0, F.softplus(z)))


@entry(LOOKALIKES, Case(), "value")
def offset_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A floor of 0.05 added to the softplus."""
    return softplus_replaced(raw, A_log, F.softplus(heads(raw + bias)) + 0.05)


@entry(LOOKALIKES, Case(), "value")
def exponential_missing(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A_log used as the rate itself."""
    return chunked(-A_log[:, None] * F.softplus(heads(raw + bias))).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def rate_added(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """exp(A_log) added in place of multiplied."""
    return chunked(-(A_log.exp()[:, None] + F.softplus(heads(raw + bias)))).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def rate_inside_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """softplus(exp(A_log) * z): the bounded form's place for the rate."""
    return chunked(-F.softplus(A_log.exp()[:, None] * heads(raw + bias))).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def raw_doubled(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """softplus(2 * raw + bias)."""
    return softplus_replaced(raw, A_log, F.softplus(heads(2.0 * raw + bias)))


@entry(LOOKALIKES, Case(), "value")
def bias_multiplied(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw * bias."""
    return softplus_replaced(raw, A_log, F.softplus(heads(raw * bias)))


@entry(LOOKALIKES, Case(), "value")
def bias_subtracted(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw - bias."""
    return softplus_replaced(raw, A_log, F.softplus(heads(raw - bias)))


@entry(LOOKALIKES, Case(), "value")
def bias_outside(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """softplus(raw) + bias."""
    return softplus_replaced(raw, A_log, heads(F.softplus(raw) + bias))


@entry(LOOKALIKES, Case(extra=lambda: (torch.linspace(0, 1, 128)[:, None],)), "value")
def bias_of_the_token(raw: Tensor, A_log: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """A second bias that depends on the token."""
    return softplus_replaced(raw, A_log, F.softplus(heads(raw + bias + position)))


@entry(LOOKALIKES, Case(extra=lambda: (torch.linspace(0, 1, 128).view(1, 128, 1, 1),)), "value")
def rate_of_the_token(raw: Tensor, A_log: Tensor, bias: Tensor, drift: Tensor) -> Tensor:
    """A_log drifts with the token."""
    rate = torch.exp(A_log.view(1, 1, 2, 1) + drift)
    return chunked(-rate * F.softplus(heads(raw + bias))).cumsum(-2)


@entry(LOOKALIKES, Case(extra=lambda: (torch.tensor([0.0, 0.7]).view(2, 1, 1, 1),)), "value")
def rate_of_the_sequence(raw: Tensor, A_log: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """A_log differs between the sequences of the batch."""
    rate = torch.exp(A_log.view(1, 1, 2, 1) + shift)
    return chunked(-rate * F.softplus(heads(raw + bias))).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def scale_from_the_data(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The scale is computed from raw."""
    return chunked(gate(raw, A_log, bias)).cumsum(-2) * raw.abs().mean()


@entry(LOOKALIKES, Case(), "value")
def gate_clamped(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A floor of -5 on the gate."""
    return chunked(gate(raw, A_log, bias).clamp(min=-5.0)).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def raw_clamped(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw clamped before the bias, at a bound that few values reach."""
    return chunked(gate(raw.clamp(max=22.0), A_log, bias)).cumsum(-2)


@entry(LOOKALIKES, Case(extra=lambda: ((torch.arange(256) % 5 != 0).view(2, 128, 1, 1),)), "value")
def tokens_masked(raw: Tensor, A_log: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """Gate zeroed by a mask over tokens."""
    return chunked(gate(raw, A_log, bias) * keep).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def two_tokens_mixed(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw[t] + raw[t - 1]."""
    return chunked(gate(raw + F.pad(raw, (0, 0, 1, -1)), A_log, bias)).cumsum(-2)


@entry(LOOKALIKES, Case(extra=lambda: (torch.full((2, 128, 128), 0.3),)), "value")
def two_raw_inputs(raw: Tensor, A_log: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """softplus of the product of two large inputs."""
    return chunked(gate(raw * other, A_log, bias)).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def first_token_exempt(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The gate of the first token is zeroed: one element in 128."""
    g = gate(raw, A_log, bias)
    return chunked(torch.cat([torch.zeros_like(g[:, :1]), g[:, 1:]], 1)).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def cumsum_over_heads(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Axis of the heads."""
    return chunked(gate(raw, A_log, bias)).cumsum(1)


@entry(LOOKALIKES, Case(), "value")
def cumsum_over_channels(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Axis of the channels, as long as the chunk."""
    return chunked(gate(raw, A_log, bias)).cumsum(-1)


@entry(LOOKALIKES, Case(), "value")
def cumsum_over_chunks(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Axis of the chunks."""
    return chunked(gate(raw, A_log, bias)).cumsum(2)


@entry(LOOKALIKES, Case(batch=2), "value")
def cumsum_over_batch(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Axis of the batch."""
    return chunked(gate(raw, A_log, bias)).cumsum(0)


@entry(LOOKALIKES, Case(), "value")
def cumsum_over_the_sequence(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Running over all tokens, split into chunks afterwards."""
    return chunked(gate(raw, A_log, bias).cumsum(1))


@entry(LOOKALIKES, Case(), "value")
def interleaved_chunks(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Token t goes to chunk t % N: the split is the other way round."""
    return gate(raw, A_log, bias).view(2, 64, 2, 2, 64).permute(0, 3, 2, 1, 4).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def reversed_cumsum(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Sum from the end of the chunk."""
    return chunked(gate(raw, A_log, bias)).flip(-2).cumsum(-2).flip(-2)


@entry(LOOKALIKES, Case(), "value")
def exclusive_cumsum(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Gate shifted by one token in the chunk before the cumsum."""
    return F.pad(chunked(gate(raw, A_log, bias)), (0, 0, 1, -1)).cumsum(-2)


@entry(LOOKALIKES, Case(), "value")
def cumprod_of_gate(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Running product of exp(g), the decay itself."""
    return chunked(gate(raw, A_log, bias)).exp().cumprod(-2)


@entry(LOOKALIKES, Case(), "value")
def logcumsumexp_of_gate(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """logcumsumexp along the right axis."""
    return chunked(gate(raw, A_log, bias)).logcumsumexp(-2)


@entry(LOOKALIKES, Case(), "value")
def cummin_of_gate(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Running minimum."""
    return chunked(gate(raw, A_log, bias)).cummin(-2).values


@entry(LOOKALIKES, Case(), "dtype")
def integer_cumsum(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Gate truncated to int64 before the cumsum."""
    return chunked(gate(raw, A_log, bias)).to(torch.int64).cumsum(-2)


@entry(LOOKALIKES, Case(), "dtype")
def double_cumsum(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Accumulated and returned in float64."""
    return chunked(gate(raw, A_log, bias)).cumsum(-2, dtype=torch.float64)


@entry(LOOKALIKES, Case(), "dtype")
def bfloat16_cumsum(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Accumulated and returned in bf16."""
    return chunked(gate(raw, A_log, bias)).to(BF16).cumsum(-2)


@entry(LOOKALIKES, Case(outliers=False), "rounding")
def half_cumsum_cast_back(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Accumulated in fp16, cast to fp32 afterwards."""
    return chunked(gate(raw, A_log, bias)).cumsum(-2, dtype=torch.float16).float()


@entry(LOOKALIKES, Case(), "rounding")
def gate_rounded_to_integers(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """round() on the gate."""
    return chunked(gate(raw, A_log, bias).round()).cumsum(-2)


@entry(LOOKALIKES, Case(outliers=False), "rounding")
def gate_through_fp8(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Softplus stored as float8_e4m3fn and read back."""
    stored = F.softplus(heads(raw + bias)).to(torch.float8_e4m3fn).float()
    return chunked(-A_log.exp()[:, None] * stored).cumsum(-2)


@entry(LOOKALIKES, Case(tokens=144, chunk=48), "size")
def chunk_of_48(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A chunk that is no power of two."""
    return chunked(gate(raw, A_log, bias), 48).cumsum(-2)


@entry(LOOKALIKES, head_case(tokens=120, chunk=60), "size")
def chunk_of_60(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The same per head."""
    return per_head(-A_log.exp() * F.softplus(raw + bias), 60).cumsum(-1)


@entry(LOOKALIKES, Case(), "shape")
def overlapping_windows(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Windows of 64 tokens that start every 32."""
    return gate(raw, A_log, bias).unfold(1, 64, 32).cumsum(-1)


@entry(LOOKALIKES, Case(tokens=100), "value")
def padded_at_the_front(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Zeros before the first token."""
    return chunked(F.pad(gate(raw, A_log, bias), (0, 0, 0, 0, 28, 0))).cumsum(-2)


@entry(LOOKALIKES, Case(tokens=100), "value")
def padded_with_ones(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Tail gate of 1.0: only rows past the last token differ."""
    return chunked(F.pad(gate(raw, A_log, bias), (0, 0, 0, 0, 0, 28), value=1.0)).cumsum(-2)


@entry(LOOKALIKES, Case(tokens=100), "value")
def raw_padded(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw padded with zeros: the tail gate is softplus(bias), not 0."""
    return chunked(gate(F.pad(raw, (0, 0, 0, 28)), A_log, bias)).cumsum(-2)


@entry(LOOKALIKES, bounded_case(), "value")
def bounded_bias_outside_rate(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(rate * raw + bias)."""
    x = A_log.exp()[:, None] * heads(raw) + bias.view(2, 64)
    return chunked(-5.0 * torch.sigmoid(x)).cumsum(-2)


@entry(LOOKALIKES, bounded_case(), "value")
def bounded_with_offset(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A constant added to the bounded gate."""
    x = A_log.exp()[:, None] * heads(raw + bias)
    return chunked(-5.0 * torch.sigmoid(x) - 0.1).cumsum(-2)


@entry(LOOKALIKES, bounded_case(), "value")
def bounded_by_hard_sigmoid(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Piecewise linear sigmoid."""
    return chunked(-5.0 * F.hardsigmoid(A_log.exp()[:, None] * heads(raw + bias))).cumsum(-2)


@entry(LOOKALIKES, bounded_case(), "value")
def bounded_rate_outside(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """-exp(A_log) * sigmoid(z): the rate where the softplus form has it."""
    return chunked(-A_log.exp()[:, None] * torch.sigmoid(heads(raw + bias))).cumsum(-2)


@entry(LOOKALIKES, Case(), "escape")
def gate_returned(raw: Tensor, A_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gate itself is a second output."""
    g = gate(raw, A_log, bias)
    return chunked(g).cumsum(-2), g


@entry(LOOKALIKES, Case(), "escape")
def softplus_used_elsewhere(raw: Tensor, A_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The step size also scales another tensor, as state-space models do."""
    dt = F.softplus(heads(raw + bias))
    return chunked(-A_log.exp()[:, None] * dt).cumsum(-2), dt * heads(raw)


@entry(LOOKALIKES, Case(), "escape")
def decay_of_the_gate_used(raw: Tensor, A_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the chunked gate is used beside the cumsum."""
    g = chunked(gate(raw, A_log, bias))
    return g.cumsum(-2), g.exp().sum(-1)


@entry(LOOKALIKES, Case(), "escape")
def summed_twice(raw: Tensor, A_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gate also feeds a sum over the whole sequence."""
    g = gate(raw, A_log, bias)
    return chunked(g).cumsum(-2), g.sum(1)


@entry(LOOKALIKES, Case(heads=4, out="ychk"), "value")
def a_rate_for_every_chunk(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The factor belongs to a row of the merged axis of batch rows and chunks, not to a head."""
    return (F.softplus(raw + bias).view(4, 64, 4, 64) * -A_log.exp()[:, None, None, None]).cumsum(1)


@entry(LOOKALIKES, Case(out="ychk"), "value")
def chunks_that_start_in_another(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Folded into the batch after a roll: every chunk holds the end of another."""
    return gate(raw, A_log, bias).roll(32, 1).reshape(4, 64, 2, 64).cumsum(1)
