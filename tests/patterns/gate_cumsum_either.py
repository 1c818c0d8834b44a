"""Functions that may be replaced where the replacement is exact, and are refused otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.gate_cumsum_cases import Case, Table, entry
from tests.patterns.gate_cumsum_channel import BF16, LOG2E, chunked, heads
from tests.patterns.gate_cumsum_head import head_case
from tests.patterns.gate_cumsum_lookalikes import gate, softplus_replaced

EITHER: Table = {}


@entry(EITHER, Case(), "value")
def low_threshold(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """softplus that turns linear at 1.0: legal only if the threshold is kept."""
    return softplus_replaced(raw, A_log, F.softplus(heads(raw + bias), threshold=1.0))


@entry(EITHER, Case(), "value")
def sharper_softplus(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """beta = 2."""
    return softplus_replaced(raw, A_log, F.softplus(heads(raw + bias), beta=2.0))


@entry(EITHER, Case(scale=-LOG2E))
def growth_in_place_of_decay(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A positive gate: the scale is negative."""
    return chunked(A_log.exp()[:, None] * F.softplus(heads(raw + bias))).cumsum(-2) * LOG2E


@entry(EITHER, Case())
def rate_after_the_cumsum(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The rate does not depend on the token, so it may stand outside of the cumsum."""
    return -A_log.exp().view(1, 2, 1, 1, 1) * chunked(F.softplus(heads(raw + bias))).cumsum(-2)


@entry(EITHER, Case())
def one_cumsum_per_chunk(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A Python loop over chunks, results stacked."""
    g = gate(raw, A_log, bias).transpose(1, 2)
    return torch.stack([part.cumsum(2) for part in g.split(64, dim=2)], dim=2)


@entry(EITHER, Case(dtype=BF16, parameter_dtype=BF16), "rounding")
def bias_added_in_bfloat16(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw + bias rounded to bf16 before the cast, a rounding that Inductor drops when it fuses."""
    return softplus_replaced(raw, A_log.float(), F.softplus(heads(raw + bias).float()))


@entry(EITHER, Case(), "rounding")
def gate_through_bfloat16(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The gate rounded to bf16 and cast back: Inductor's joint passes drop such a pair of casts."""
    return chunked(gate(raw, A_log, bias).to(BF16).float()).cumsum(-2)


@entry(EITHER, Case())
def two_results_of_one_cumsum(raw: Tensor, A_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both the natural and the base-two sums are outputs."""
    c = chunked(gate(raw, A_log, bias)).cumsum(-2)
    return c, c * LOG2E


@entry(EITHER, Case())
def raw_overwritten_afterwards(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The buffer of raw is zeroed after the gate has read it."""
    c = chunked(gate(raw, A_log, bias)).cumsum(-2)
    raw.zero_()
    return c


@entry(EITHER, head_case(raw="bht", out="zt", tokens=64))
def one_chunk_head_major(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """raw [B, H, T] with T equal to the chunk: the chunk axis has size one."""
    g = -A_log.exp()[None, :, None] * F.softplus(raw + bias[None, :, None])
    return g.reshape(8, 1, 64).cumsum(-1).reshape(8, 64)
