"""Random graphs that have no target, with all fusions at work: whatever fires keeps results and arguments.

A program is a list of steps on a pool of tensors [B, T, H, D]: pointwise work, views, writes, products, sums over
chunks and selections, with pieces of what the fusions look for strewn in, so that many graphs come close to a target.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tests.support.adversary import assert_kept

B, T, H, D = 2, 32, 8, 16
SHAPE = (B, T, H, D)
CHUNK = 16
FUSED: collections.Counter[str] = collections.Counter()

Binary = Callable[[Tensor, Tensor, int], Tensor]


def indexer(x: Tensor, y: Tensor, n: int) -> Tensor:
    """[B, T, T] scores of heads, or of something like it."""
    act = (torch.relu, torch.abs, functional.silu, lambda p: p.clamp(0, 3.0), lambda p: p.clamp_min(0.0))[n % 5]
    products = act(torch.einsum("bshd,btd->bsht", x, y[:, :, n % H]))
    return (products * (x[..., n % D, None].sigmoid() - 0.5)).sum(2)


def gate(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Sums within chunks of a gate, or of something like it."""
    soft = (functional.softplus, torch.relu, functional.elu)[n % 3](x + y[:1, :1])
    return (-y[0, 0, :, :1].exp() * soft).view(B, T // CHUNK, CHUNK, H, D).cumsum(2).view(SHAPE)


def head_weights(x: Tensor, y: Tensor, n: int) -> Tensor:
    """A projection to heads, scaled, bounded or shifted."""
    out = functional.linear(x.reshape(B, T, H * D), y[0, :H].reshape(H, H * D)) * 0.25
    changed = (out, out.clamp(max=2.0), out + 1, out * x[..., 0], torch.where(out > 1, 0.0, out))
    return changed[n % 5]


def rotated(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Rotary embedding in place, or something like it."""
    a, b, c, s = x[..., :8].clone(), x[..., 8:].clone(), y[:1, :, :1, :8], y[:1, :, :1, 8:]
    x[..., :8] = a * c - b * s
    x[..., 8:] = (b * c + a * s, b * c - a * s, b * s + a * c, (b * c + a * s).clamp(-2, 2))[n % 4]
    return x


def assigned(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Slices written one after the other."""
    y = y.clone()  # eager copies between overlapping parts of one tensor in an order of its own
    x[:, n : n + 8] = y[:, :8]
    x[:, n % 4 :: 4, 1] = y[:, n % 4 :: 4, 2] * 2
    return x


def padded_key(x: Tensor, y: Tensor, n: int) -> Tensor:
    """A key of two parts in float8, and back."""
    key = torch.cat([x[..., :8], y[:, :, :1, 8:].expand(B, T, H, 8)], -1) * (0.5 if n % 2 else 1.0)
    return key.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def hidden(diagonal: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(diagonal)


UNARY: tuple[Callable[[Tensor, int], Tensor], ...] = (
    lambda x, n: x.sin(),
    lambda x, n: x.relu(),
    lambda x, n: x * (n + 1) / 8,
    lambda x, n: x.roll(n, 1),
    lambda x, n: functional.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)),
    lambda x, n: torch.where(torch.arange(T)[:, None, None] == n, 0.0, x),
    lambda x, n: x.view(B, T, D, H).transpose(2, 3).contiguous(),
    lambda x, n: torch.cat([x[:, :n], x[:, n:]], 1),
    lambda x, n: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
    lambda x, n: x.tril(n - 8),
    lambda x, n: x.clone().index_fill_(1, torch.tensor([n]), 0.5),
    lambda x, n: x.view(B, T // CHUNK, CHUNK, H, D).cumsum(2).view(SHAPE) / CHUNK,
    lambda x, n: torch.nan_to_num(x.clamp(max=n / 4.0)),
    lambda x, n: x.view(B, T, -1).split(H * D // 2, -1)[n % 2].repeat(1, 1, 2).reshape(SHAPE),
)
BINARY: tuple[Binary, ...] = (
    lambda x, y, n: x + y,
    lambda x, y, n: x * y,
    lambda x, y, n: torch.where(y > n / 8, x, y),
    lambda x, y, n: torch.maximum(x, y * 0.5),
    lambda x, y, n: x @ y.mT @ x / T,
    lambda x, y, n: x.copy_(y.roll(1, 1)) if n % 2 else x,
    gate,
    assigned,
    rotated,
    padded_key,
)
RESULTS: tuple[Binary, ...] = (
    lambda x, y, n: indexer(x, y, n).topk(5).values,
    lambda x, y, n: indexer(x, y, n).masked_fill(hidden(1 + n % 2), -math.inf).topk(T).values,
    lambda x, y, n: torch.nan_to_num(indexer(x, y, n)).topk(3).values,
    head_weights,
    lambda x, y, n: x[:, :n].sum(1) - y.mean(),
    lambda x, y, n: torch.stack([part.contiguous() * 1.0 for part in x.view(B, T, -1).split(D * H // 4, -1)]),
    lambda x, y, n: x.reshape(B * T, -1)[n:],
)  # fmt: skip

PLACES = st.integers(0, 2)
STEPS = st.lists(
    st.tuples(st.sampled_from("u u b b b r".split()), st.integers(0, 100), PLACES, PLACES, st.integers(1, 15)),
    min_size=2, max_size=7,
)  # fmt: skip
Step = tuple[str, int, int, int, int]


def program(steps: list[Step]) -> Callable[..., list[Tensor]]:
    """A function of two tensors that runs the steps on them and on one of its own."""

    def run(a: Tensor, b: Tensor) -> list[Tensor]:
        pool, results = [a, b, a * 0.5 + b], []
        for kind, which, i, j, n in steps:
            if kind == "u":
                pool[i] = UNARY[which % len(UNARY)](pool[j], n)
            elif kind == "b":
                pool[i] = BINARY[which % len(BINARY)](pool[i], pool[j], n)
            else:
                results.append(RESULTS[which % len(RESULTS)](pool[i], pool[j], n))
        return [*results, pool[0] * 1, pool[2] + 1]

    return run


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(SHAPE), torch.randn(SHAPE)


def check(steps: list[Step]) -> None:
    with torch.no_grad():
        report = assert_kept(program(steps), inputs, 1e-3)
    FUSED.update(record.fusion for record in report.fused)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_random_graphs_keep_their_results(steps: list[Step]) -> None:
    check(steps)


def test_graphs_came_close() -> None:
    """Pieces that are a target fire: the graphs above are no walk past everything."""
    for steps in ([("r", 0, 0, 1, 5)], [("b", 8, 0, 1, 4)], [("b", 6, 0, 1, 3)]):
        check(steps)
    assert {"index_score", "redundant_copy"} <= set(FUSED), FUSED
