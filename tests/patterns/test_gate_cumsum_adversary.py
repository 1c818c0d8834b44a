"""Subgraphs made to deceive the matcher: each is refused with its reason, or fused with its value kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_passes.testing import assert_fuses, assert_refuses, assert_same, run_fused

NAME = "gate_cumsum"
BATCH, TOKENS, HEADS, CHANNELS = 2, 128, 2, 8
APART = "put together from parts that are computed apart"
CONSTANT = "a constant or an operand other than its input is padded"
NOT_A_GATE = "it is neither"


class Trap(NamedTuple):
    function: Callable[..., Any]
    shape: tuple[int, ...]
    reason: str | None
    spread: float


TRAPS: dict[str, Trap] = {}


def trap(
    reason: str | None = None, shape: tuple[int, ...] = (BATCH, TOKENS, HEADS, CHANNELS), spread: float = 8.0
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Refused for this reason; without one, fused or not, equal in value."""

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        TRAPS[function.__name__] = Trap(function, shape, reason, spread)
        return function

    return put


def gate(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return -a_log.exp()[:, None] * F.softplus(raw + bias)


def chunked(g: Tensor, chunk: int = 64) -> Tensor:
    return g.view(g.shape[0], -1, chunk, *g.shape[2:])


def inputs(shape: tuple[int, ...], spread: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(shape, generator=generator) * spread
    a_log = torch.rand(shape[-2], generator=generator) * 3
    return raw, a_log, torch.randn(shape[-2:], generator=generator) * 3


# ------------------------------------------------- values that ordinary draws do not reach


@trap(NOT_A_GATE)
def a_log_clamped(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log.clamp(max=2.0), bias)).cumsum(2)


@trap()
def bias_clamped(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log, bias.clamp(-4, 4))).cumsum(2)


@trap()
def bias_cleaned_of_nan(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log, torch.where(bias > 0, torch.nan, bias).nan_to_num())).cumsum(2)


@trap(NOT_A_GATE, spread=40.0)
def zero_in_a_band(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    z = raw + bias
    return chunked(-a_log.exp()[:, None] * torch.where((z > 50) & (z < 100), 0.0, F.softplus(z))).cumsum(2)


@trap(NOT_A_GATE)
def linear_from_the_threshold_on(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    z = raw.round()
    return chunked(-a_log.exp()[:, None] * torch.where(z >= 1.0, z, z.exp().log1p())).cumsum(2)


@trap(spread=60.0)
def overflow_below_the_threshold(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    z = raw + bias
    return chunked(-a_log.exp()[:, None] * torch.where(z > 100, z, z.exp().log1p())).cumsum(2)


@trap(spread=60.0)
def overflow_without_a_threshold(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(-a_log.exp()[:, None] * torch.log1p(torch.exp(raw + bias))).cumsum(2)


# ------------------------------------------------- few elements that differ


@trap("other values are concatenated with it before its end")
def hole_in_one_head(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    g = gate(raw, a_log, bias)
    last = g[:, :, 1:]
    last = torch.cat([last[:, :77], torch.zeros_like(last[:, 77:78]), last[:, 78:]], 1)
    return chunked(torch.cat([g[:, :, :1], last], 2)).cumsum(2)


@trap(CONSTANT, shape=(1, 4096, HEADS, CHANNELS))
def constant_mask_of_one_token(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    mask = F.pad(torch.zeros(1), (77, 4096 - 78), value=1.0)
    return chunked(gate(raw, a_log, bias) * mask[:, None, None]).cumsum(2)


@trap("other values are concatenated", shape=(1, 4096, HEADS, CHANNELS))
def concatenated_mask_of_one_token(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    mask = torch.cat([torch.ones(77), torch.zeros(1), torch.ones(4096 - 78)])
    return chunked(gate(raw, a_log, bias) * mask[:, None, None]).cumsum(2)


@trap(shape=(1, 64, 32, 128))
def hole_in_the_bias(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    flat = bias.flatten()
    flat = torch.cat([flat[:777], torch.zeros(1), flat[778:]])
    return chunked(gate(raw, a_log, flat.view(32, 128))).cumsum(2)


@trap(APART, shape=(1, 64, 32, 128))
def one_lane_of_relu(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    z = (raw + bias).flatten(2)
    parts = [F.softplus(z[..., :2001]), F.relu(z[..., 2001:2002]), F.softplus(z[..., 2002:])]
    return chunked(-a_log.exp()[:, None] * torch.cat(parts, -1).view(raw.shape)).cumsum(2)


@trap("padded more than once", shape=(1, 4030, HEADS, CHANNELS))
def two_pads_of_different_values(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    g = F.pad(gate(raw, a_log, bias), (0, 0, 0, 0, 0, 1), value=7.0)
    return chunked(F.pad(g, (0, 0, 0, 0, 0, 65))).cumsum(2)


@trap("padded positions hold 7", shape=(1, 4095, HEADS, CHANNELS))
def short_tail_of_sevens(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(F.pad(gate(raw, a_log, bias), (0, 0, 0, 0, 0, 1), value=7.0)).cumsum(2)


@trap(APART, shape=(1, 1024, 4, 4))
def one_chunk_transposed(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    parts = list(F.softplus(raw).split(64, 1))
    parts[7] = parts[7].transpose(2, 3)
    return (torch.stack(parts, 1) * -a_log.exp()[:, None]).cumsum(2)


@trap("depend on the position")
def triangle_of_channels(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log, bias)).triu().cumsum(2)


# ------------------------------------------------- axes in another order


@trap(shape=(1, 8, 8, HEADS, CHANNELS))
def digits_of_time_turned(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return gate(raw.transpose(1, 2).reshape(1, 1, 64, HEADS, CHANNELS), a_log, bias).cumsum(2)


@trap(shape=(8, 8, HEADS, CHANNELS))
def digits_of_time_turned_after_the_gate(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return gate(raw, a_log, bias).transpose(0, 1).reshape(1, 1, 64, HEADS, CHANNELS).cumsum(2)


@trap(shape=(3, 2, 64, HEADS, CHANNELS))
def batch_axes_turned(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return gate(raw, a_log, bias).transpose(0, 1).contiguous().view(2, 3, 1, 64, HEADS, CHANNELS).cumsum(3)


@trap(shape=(1, 256, HEADS, CHANNELS))
def digits_of_the_chunk_turned(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    g = gate(raw, a_log, bias).view(1, 2, 2, 64, HEADS, CHANNELS).transpose(1, 2)
    return g.reshape(1, 4, 64, HEADS, CHANNELS).cumsum(2)


# ------------------------------------------------- operands read in part, repeatedly or per chunk


@trap("only a part of an operand is read", shape=(2, 128, 4, CHANNELS))
def heads_sliced_after_the_gate(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log, bias)[:, :, :2]).cumsum(2)


@trap("only a part of an operand is read", shape=(2, 256, HEADS, CHANNELS))
def tokens_sliced_after_the_gate(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log, bias)[:, :128]).cumsum(2)


@trap("repeated 2 times", shape=(2, 256, HEADS, CHANNELS))
def batch_repeated(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    g = gate(raw, a_log, bias)[:, :128].repeat(2, 1, 1, 1)
    return chunked(F.pad(g, (0, 0, 0, 0, 0, 64))).cumsum(2)


@trap("is another one for every chunk", shape=(2, 256, HEADS, CHANNELS))
def rate_of_the_chunk(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    rate = torch.cat([a_log, a_log + 1]).view(2, 2).softmax(0).repeat(2, 1).softmax(1).mm(torch.ones(2, 2))
    return (-rate.exp()[:, None, :, None] * chunked(F.softplus(raw + bias))).cumsum(2)


@trap()
def bias_repeated_along_channels(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log, bias[0, :4].repeat(2))).cumsum(2)


@trap()
def rate_repeated_along_heads(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log[:1].repeat(2), bias)).cumsum(2)


@trap()
def rate_as_bias(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw, a_log, a_log[:, None])).cumsum(2)


@trap("found: none")
def raw_as_rate_and_bias(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(-raw.exp() * F.softplus(raw + raw)).cumsum(2)


# ------------------------------------------------- windows, mutation, several sites


@trap(shape=(300, HEADS, CHANNELS))
def overlapping_windows(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return gate(raw.unfold(0, 64, 32).movedim(-1, 1), a_log, bias).unsqueeze(1).cumsum(2)


@trap()
def raw_overwritten_before_and_after(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    raw.mul_(2.0)
    result = chunked(gate(raw, a_log, bias)).cumsum(2)
    raw.zero_()
    return result


@trap()
def result_overwritten(raw: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    result = chunked(gate(raw, a_log, bias)).cumsum(2)
    before = result.clone()
    result.mul_(3.0)
    result[0].zero_()
    return result, result.view(-1), before, result


@trap()
def shared_leaves(raw: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return chunked(gate(raw, a_log, bias)).cumsum(2), chunked(gate(raw, a_log, bias), 32).cumsum(2) * 2.0


@trap()
def branches(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    def yes(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(gate(raw, a_log, bias)).cumsum(2)

    def no(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(gate(-raw, a_log, bias)).cumsum(2)

    return torch.cond(raw.sum() > 0, yes, no, (raw, a_log, bias))


@trap()
def mapped_over_the_batch(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return torch.vmap(lambda r: gate(r, a_log, bias).view(2, 64, HEADS, CHANNELS).cumsum(1))(raw)


@trap()
def integers_cast(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    return chunked(gate(raw.int().float(), a_log, bias)).cumsum(2)


@pytest.mark.parametrize("name", TRAPS)
@torch.no_grad()
def test_a_trap_is_refused_or_keeps_its_value(name: str) -> None:
    function, shape, reason, spread = TRAPS[name]
    if reason is not None:
        assert_refuses(function, *inputs(shape, spread), fusion=NAME, reason=reason, always_profitable=True)
    actual, report = run_fused(function, *inputs(shape, spread), always_profitable=True)
    assert_same(actual, function(*inputs(shape, spread)))
    assert report.fused or report.refusals or report.near_misses


@torch.no_grad()
def test_double_precision_is_refused() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(gate(raw.float(), a_log, bias)).cumsum(2)

    raw, a_log, bias = inputs((BATCH, TOKENS, HEADS, CHANNELS), 8.0)
    assert_refuses(f, raw.double(), a_log, bias, fusion=NAME, reason="raw is float64")


@torch.no_grad()
def test_a_bias_repeated_within_the_channels_is_refused() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(gate(raw, a_log, bias.repeat(2))).cumsum(2)

    raw, a_log, bias = inputs((BATCH, TOKENS, HEADS, CHANNELS), 8.0)
    assert_refuses(f, raw, a_log, bias[0, :4].clone(), fusion=NAME, reason="repeated within the heads or channels")


@torch.no_grad()
def test_raw_with_overlapping_rows_and_an_offset() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return gate(raw, a_log, bias).unsqueeze(1).cumsum(2)

    flat, a_log, bias = inputs((300, HEADS, CHANNELS), 8.0)
    rows = HEADS * CHANNELS
    raw = flat.flatten().as_strided((5, 64, HEADS, CHANNELS), (32 * rows, rows, CHANNELS, 1), 3)
    assert_fuses(f, raw, a_log, bias, fusion=NAME)


@pytest.mark.parametrize(("tokens", "heads", "channels"), [(128, 1, 1), (20, 1, 1), (64, 1, 8), (65, 3, 1)])
@torch.no_grad()
def test_axes_of_size_one(tokens: int, heads: int, channels: int) -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(F.pad(gate(raw, a_log, bias), (0, 0, 0, 0, 0, -raw.shape[1] % 64))).cumsum(2)

    assert_fuses(f, *inputs((1, tokens, heads, channels), 8.0), fusion=NAME)


@pytest.mark.parametrize("shape", [(0, 128, 2, 8), (2, 1, 2, 8)], ids=str)
@torch.no_grad()
def test_hardly_any_elements_are_left_alone(shape: tuple[int, ...]) -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        g = F.pad(gate(raw, a_log, bias), (0, 0, 0, 0, 0, -raw.shape[1] % 64))
        return g.view(g.shape[0], g.shape[1] // 64, 64, 2, 8).cumsum(2)

    actual, _ = run_fused(f, *inputs(shape, 8.0))
    assert_same(actual, f(*inputs(shape, 8.0)))


@torch.no_grad()
def test_a_factor_that_is_a_symbolic_size_is_no_constant() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(gate(raw, a_log, bias) * raw.shape[0]).cumsum(2)

    args = inputs((BATCH, TOKENS, HEADS, CHANNELS), 8.0)
    assert_refuses(f, *args, fusion=NAME, reason="for some sizes only", dynamic=True)


@torch.no_grad()
def test_arithmetic_in_bfloat16_counts_as_rounding() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(gate(raw, a_log, bias)).cumsum(2, dtype=torch.float32)

    raw, a_log, bias = (t.bfloat16() for t in inputs((BATCH, TOKENS, HEADS, CHANNELS), 8.0))
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert_refuses(f, raw, a_log, bias, fusion=NAME, reason="emulate_precision_casts")
    assert_fuses(f, raw, a_log, bias, fusion=NAME, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_autocast() -> None:
    def f(x: Tensor, weight: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return chunked(gate((x @ weight).view(1, 128, 2, 8), a_log, bias)).cumsum(2)

    _, a_log, bias = inputs((1, 1, 2, 8), 1.0)
    assert_fuses(f, torch.randn(1, 128, 16), torch.randn(16, 16), a_log, bias, fusion=NAME)
