"""Composed spellings of the gate are found and keep their value; composed graphs that are no gate keep theirs."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes.testing import assert_same, run_fused
from tests.support.properties import profile

NAME = "gate_cumsum"
LOG2E = 1.0 / math.log(2.0)
PROFILE = profile(50)
FOUND: collections.Counter[bool] = collections.Counter()

SOFTPLUS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "log1p": lambda z: torch.where(z > 20, z, z.exp().log1p()),
    "log": lambda z: torch.where(z <= 20.0, torch.log(1.0 + torch.exp(z)), z),
    "logaddexp": lambda z: torch.logaddexp(z, torch.zeros_like(z)),
    "logsigmoid": lambda z: -F.logsigmoid(-z),
    "stable": lambda z: F.relu(z) + torch.log1p(torch.exp(-z.abs())),
    "low threshold": lambda z: F.softplus(z, threshold=2.0),
    "sharp": lambda z: F.softplus(z, beta=2.0),
}
SIGMOID: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "reciprocal": lambda x: 1.0 / (1.0 + torch.exp(-x)),
    "tanh": lambda x: 0.5 * (torch.tanh(0.5 * x) + 1.0),
    "exp of logsigmoid": lambda x: F.logsigmoid(x).exp(),
}
# how raw is stored, as the shape of [B, T, H, K] or a part of something larger
STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "bthk": lambda raw: raw,
    "btd": lambda raw: raw.flatten(2),
    "bhtk": lambda raw: raw.transpose(1, 2).contiguous(),
    "transposed": lambda raw: raw.transpose(0, 1).contiguous().transpose(0, 1),
    "packed": lambda raw: torch.cat([raw.flatten(2) + 1, raw.flatten(2), raw.flatten(2) - 1], -1),
}
BIAS: dict[str, Callable[[Tensor], Tensor]] = {
    "hk": lambda bias: bias,
    "d": lambda bias: bias.flatten(),
    "11hk": lambda bias: bias[None, None],
}
RATE: dict[str, Callable[[Tensor], Tensor]] = {
    "h": lambda rate: rate,
    "h1": lambda rate: rate[:, None],
    "11h1": lambda rate: rate[None, None, :, None],
}
# positions of the axes of [B, N, C, H, K] at the cumsum
ORDERS = ((0, 1, 2, 3, 4), (0, 3, 1, 2, 4), (3, 0, 1, 2, 4), (0, 3, 4, 1, 2), (1, 0, 2, 3, 4), (0, 1, 3, 2, 4))


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One sentence of the grammar; `fused` below reads it as a function of raw, A_log and bias."""

    stored: str
    formula: str
    bias: str | None
    rate: str
    chunk: int
    chunks: int
    missing: int  # tokens that the last chunk lacks
    heads: int
    channels: int
    order: tuple[int, ...]
    dtype: torch.dtype
    cast_late: bool
    copied: bool
    scale_first: bool
    scale: float
    after: float | None

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        shape = (2, self.chunk * self.chunks - self.missing, self.heads, self.channels)
        raw = (torch.randn(shape, generator=generator) * 8).to(self.dtype)
        rate = torch.rand(self.heads, generator=generator) * 2
        bias = torch.randn(shape[2:], generator=generator)
        return [STORED[self.stored](raw), RATE[self.rate](rate), *([BIAS[self.bias](bias)] if self.bias else [])]

    def unstored(self, raw: Tensor) -> Tensor:
        width = self.heads * self.channels
        if self.stored == "packed":
            raw = raw[..., width : 2 * width]
        if self.stored == "bhtk":
            raw = raw.transpose(1, 2)
        return raw.unflatten(-1, (self.heads, self.channels)) if raw.dim() == 3 else raw

    def __call__(self, raw: Tensor, a_log: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.unstored(raw)
        x = x if self.cast_late else x.float()
        if bias is not None:
            x = x + bias.view(-1, self.channels) if self.bias == "d" else x + bias
        rate = a_log.exp().view(-1, 1)
        if self.formula in SIGMOID:
            g = SIGMOID[self.formula](rate * x.float()) * -5.0
        else:
            g = SOFTPLUS[self.formula](x.float())
            g = (-rate * self.scale) * g if self.scale_first else -rate * g * self.scale
        g = F.pad(g, (0, 0, 0, 0, 0, self.missing)) if self.missing else g
        g = g.unflatten(1, (self.chunks, self.chunk)).permute(self.order)
        g = g.contiguous() if self.copied else g
        sums = g.cumsum(self.order.index(2))
        return sums if self.after is None else sums * self.after


@st.composite
def spellings(draw: st.DrawFn) -> Spelling:
    chunk = draw(st.sampled_from((16, 32, 64)))
    return Spelling(
        stored=draw(st.sampled_from(sorted(STORED))),
        formula=draw(st.sampled_from(sorted(SOFTPLUS) + sorted(SIGMOID))),
        bias=draw(st.sampled_from((None, *sorted(BIAS)))),
        rate=draw(st.sampled_from(sorted(RATE))),
        chunk=chunk,
        chunks=draw(st.integers(2, 4)),
        missing=draw(st.sampled_from((0, 0, 1, 7, chunk - 1))),
        heads=draw(st.integers(2, 3)),
        channels=draw(st.sampled_from((1, 4, 6))),
        order=draw(st.sampled_from(ORDERS)),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))),
        cast_late=draw(st.booleans()),
        copied=draw(st.booleans()),
        scale_first=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, LOG2E, -0.5))),
        after=draw(st.sampled_from((None, LOG2E, 3))),
    )


@PROFILE
@given(spellings())
@torch.no_grad()
def composed_gates(spelling: Spelling) -> None:
    args = spelling.inputs()
    # layouts that the op cannot read or write are refused under any settings
    actual, report = run_fused(spelling, *args, always_profitable=True)
    FOUND[report.counts[NAME] == 1] += 1
    tolerance = 1e-5 if spelling.dtype == torch.float32 or not spelling.cast_late else 2e-2
    assert_same(actual, spelling(*args), tolerance, tolerance)


def test_composed_gates_are_found_and_keep_their_value() -> None:
    FOUND.clear()
    composed_gates()
    assert FOUND.total() >= 50 and FOUND[True] >= 0.9 * FOUND.total(), FOUND


# ------------------------------------------------- graphs that are no gate, or a gate only by chance

POINTWISE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add bias": lambda x, a, b: x + b,
    "times rate": lambda x, a, b: x * a.exp()[:, None],
    "minus rate": lambda x, a, b: -a.exp()[:, None] * x,
    "softplus": lambda x, a, b: F.softplus(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "relu": lambda x, a, b: F.relu(x),
    "negative": lambda x, a, b: -x,
    "log sigmoid": lambda x, a, b: F.logsigmoid(x),
    "clamp": lambda x, a, b: x.clamp(-20.0, 2.0),
    "threshold": lambda x, a, b: torch.where(x > 1.0, x, 0.5 * x),
    "half": lambda x, a, b: x * 0.5,
    "bound rate": lambda x, a, b: x * a.clamp(max=1.0).exp()[:, None],
    "round": lambda x, a, b: x.int().float(),
}
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "shift": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "roll": lambda x: x.roll(1, 1),
    "reverse": lambda x: x.flip(1),
    "first half twice": lambda x: torch.cat([x[:, : x.shape[1] // 2]] * 2, 1),
    "halves turned": lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "hole": lambda x: torch.cat([x[:, :5], torch.zeros_like(x[:, 5:6]), x[:, 6:]], 1),
    "tail": lambda x: F.pad(x[:, :-3], (0, 0, 0, 0, 0, 3)),
    "tail of ones": lambda x: F.pad(x[:, :-3], (0, 0, 0, 0, 0, 3), value=1.0),
    "heads turned": lambda x: x.flip(2),
    "channels mixed": lambda x: x.transpose(2, 3).reshape(x.shape),
    "sequences mixed": lambda x: x.transpose(0, 1).reshape(x.shape),
    "copy": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one head": lambda x: x[:, :, :1].expand(x.shape),
}
CHUNKED: dict[str, Callable[[Tensor], Tensor]] = {
    "chunks": lambda x: x.unflatten(1, (4, 16)).cumsum(2),
    "chunks first": lambda x: x.unflatten(1, (4, 16)).transpose(0, 1).cumsum(2),
    "interleaved": lambda x: x.unflatten(1, (16, 4)).cumsum(1),
    "over chunks": lambda x: x.unflatten(1, (16, 4)).transpose(1, 2).cumsum(2),
    "whole": lambda x: x.cumsum(1),
    "windows": lambda x: x.unfold(1, 32, 16).cumsum(-1),
    "heads last": lambda x: x.unflatten(1, (4, 16)).permute(0, 4, 3, 1, 2).cumsum(-1),
}


@PROFILE
@given(
    st.lists(st.sampled_from(sorted(POINTWISE)), max_size=5),
    st.lists(st.sampled_from(sorted(MOVES)), max_size=2),
    st.sampled_from(sorted(CHUNKED)),
    st.booleans(),
)
@torch.no_grad()
def test_any_graph_keeps_its_value(steps: list[str], moves: list[str], ending: str, move_first: bool) -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Any:
        x = raw
        for move in moves if move_first else ():
            x = MOVES[move](x)
        # a gate in the middle makes rewrites likely
        for step in (*steps[:2], "add bias", "softplus", "minus rate", *steps[2:]):
            x = POINTWISE[step](x, a_log, bias)
        for move in () if move_first else moves:
            x = MOVES[move](x)
        return CHUNKED[ending](x)

    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(2, 64, 4, 4, generator=generator) * 12
    args = (raw, torch.rand(4, generator=generator) * 2, torch.randn(4, 4, generator=generator))
    actual, _ = run_fused(f, *args, always_profitable=True)
    assert_same(actual, f(*args), 1e-5, 1e-5)
