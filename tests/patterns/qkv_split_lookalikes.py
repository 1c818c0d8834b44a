"""Copies of parts of a tensor that are no split into queries, keys and values, or one that does not pay.

Each comes with a part of the reason that is reported, "" where the graph holds nothing to report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.patterns.qkv_split_spellings import B, D, H, K, T, W, numbers

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Lookalike:
    """A function, its arguments, and a part of the reason why it is left alone."""

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    reason: str


LOOKALIKES: dict[str, Lookalike] = {}


def lookalike(
    reason: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        make = lambda: tuple(numbers(*shape, dtype=dtype) for shape in shapes)  # noqa: E731
        LOOKALIKES[function.__name__] = Lookalike(function, make, reason)
        return function

    return enter


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.split([W, W, 2 * W], dim=-1)
    return q, k, v


# --- not a partition into windows ---------------------------------------------------------------------------------


@lookalike("overlap", (B, T, D))
def overlapping(x: Tensor) -> tuple[Tensor, ...]:
    return x[..., :W].contiguous(), x[..., W - 8 : 2 * W].contiguous(), x[..., 2 * W :].contiguous()


@lookalike("overlap", (B, T, D))
def one_window_within_another(x: Tensor) -> tuple[Tensor, ...]:
    return x[..., : 2 * W].contiguous(), x[..., W : 2 * W].contiguous()


@lookalike("leave gaps", (B, T, D))
def gap(x: Tensor) -> tuple[Tensor, ...]:
    return x[..., :W].contiguous(), x[..., W + 8 : 2 * W].contiguous()


@lookalike("", (B, T, D))
def other_tokens(x: Tensor) -> tuple[Tensor, ...]:
    return x[:, :3, :W].contiguous(), x[:, 1:, W:].contiguous()


@lookalike("", (T + 1, D))
def shifted_by_one(x: Tensor) -> tuple[Tensor, ...]:
    """Current and previous tokens, as a token shift takes them."""
    return x[1:, :W].contiguous(), x[:-2, W:].contiguous()


@lookalike("overlap", (T, D))
def sliding_windows(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(w.contiguous() for w in x.unfold(1, W, W // 2).unbind(1))


@lookalike("no rows of channels", (B, T, W, 2))
def even_and_odd_channels(x: Tensor) -> tuple[Tensor, ...]:
    return x[..., 0].contiguous(), x[..., 1].contiguous()


@lookalike("", (3, B, T, W))
def planes(x: Tensor) -> tuple[Tensor, ...]:
    """Each is contiguous as it is: no copy is made."""
    return tuple(p.contiguous() * 1 for p in x.unbind(0))


@lookalike("contiguous already", (3, B, T, W))
def planes_cloned(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.clone() for p in x.unbind(0))


@lookalike("contiguous already", (1, 1, D))
def single_token_cloned(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.clone() for p in split(x))


@lookalike("", (1, 1, D))
def single_token(x: Tensor) -> tuple[Tensor, ...]:
    """contiguous() returns the window itself."""
    return tuple(p.contiguous() for p in split(x))


@lookalike("", (B, T, D))
def single_window(x: Tensor) -> Tensor:
    return x[..., :W].contiguous()


@lookalike("", (B, T, D))
def windows_of_two_tensors(x: Tensor) -> tuple[Tensor, ...]:
    return x[..., :W].contiguous(), (x @ x.mT)[..., : T // 2].contiguous()


@lookalike("", (B, D, T))
def a_layout_change_of_everything(x: Tensor) -> Tensor:
    return x.mT.contiguous()


@lookalike("", (B, T, D))
def flipped(x: Tensor) -> tuple[Tensor, ...]:
    """Flipping copies: there is no window to read through strides."""
    return tuple(p.flip(1).contiguous() for p in split(x))


# --- windows, but of another form ---------------------------------------------------------------------------------


@lookalike("runs of 2 channels", (B, T, 3 * W))
def channels_before_heads(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.unflatten(-1, (H, K)).transpose(2, 3).contiguous() for p in x.chunk(3, -1))


@lookalike("channels by tokens", (B, T, 3 * W))
def keys_transposed(x: Tensor) -> tuple[Tensor, ...]:
    """Every window turned to [B, H, K, T]."""
    return tuple(p.unflatten(-1, (H, K)).permute(0, 2, 3, 1).contiguous() for p in x.chunk(3, -1))


@lookalike("some windows have their heads before", (B, T, D))
def mixed_orders(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (p.unflatten(-1, (-1, K)) for p in split(x))
    return q.transpose(1, 2).contiguous(), k.repeat_interleave(2, dim=2), v.transpose(1, 2).contiguous()


@lookalike("not contiguous", (B, T, D))
def in_another_memory_format(x: Tensor) -> tuple[Tensor, ...]:
    """Copies that keep channels outermost."""
    return tuple(p.unflatten(-1, (-1, K)).clone(memory_format=torch.channels_last) for p in split(x))


@lookalike("runs of 20 channels", (B, T, 60))
def heads_of_twenty(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.contiguous() for p in x.split([20, 40], dim=-1))


@lookalike("runs of 12 channels", (B, T, 48))
def short_heads_first(x: Tensor) -> tuple[Tensor, ...]:
    """24 channels are moved together where heads stay, but not where they move."""
    return tuple(p.unflatten(-1, (2, 12)).transpose(1, 2).contiguous() for p in x.chunk(2, dim=-1))


@lookalike("heads before the batch and others behind", (B, T, 2 * W))
def heads_outermost_once(x: Tensor) -> tuple[Tensor, ...]:
    """[B, H, T, K] and [H, B, T, K]."""
    q, k = (p.unflatten(-1, (H, K)) for p in x.chunk(2, dim=-1))
    return q.permute(0, 2, 1, 3).contiguous(), k.permute(2, 0, 1, 3).contiguous()


@lookalike("repeats its heads as a whole", (B, T, 2 * W))
def heads_tiled_first(x: Tensor) -> tuple[Tensor, ...]:
    """All heads, and all heads again, before the tokens."""
    return tuple(
        p.view(B, T, 1, H, K).expand(B, T, 2, H, K).permute(0, 2, 3, 1, 4).clone(memory_format=torch.contiguous_format)
        for p in x.chunk(2, dim=-1)
    )


@lookalike("in an order", (B, T, 3 * W))
def tokens_between_heads_and_repeats(x: Tensor) -> tuple[Tensor, ...]:
    """[B, H, T, R, K]."""
    return tuple(
        p.view(B, T, H, 1, K).expand(B, T, H, 2, K).transpose(1, 2).clone(memory_format=torch.contiguous_format)
        for p in x.chunk(3, dim=-1)
    )


@lookalike("neither neighbouring channels nor neighbouring tokens", (B, T, W, 2, 2))
def every_fourth_channel(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x[..., i, 0].transpose(1, 2).contiguous() for i in range(2))


@lookalike("", (B, T, D))
def cast_on_the_way(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.to(torch.float64).contiguous() for p in split(x))


@lookalike("x is float64", (B, T, D), dtype=torch.float64)
def double_precision(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.contiguous() for p in split(x))


# --- windows that Inductor serves better ---------------------------------------------------------------------------


@lookalike("computed by mul", (B, T, D))
def computed_by_pointwise_work(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.contiguous() for p in split(x * 2))


@lookalike("computed by div", (B, D, T), (D, 1, 4))
def activated_convolution(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """silu behind the convolution, which stock Inductor fuses with the copies."""
    mixed = torch.nn.functional.silu(torch.nn.functional.conv1d(x, weight, groups=D, padding=3)[..., :T])
    return tuple(p.contiguous() for p in split(mixed.mT))


@lookalike("computed by sum", (B, T, D, 3))
def computed_by_a_reduction(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.contiguous() for p in split(x.sum(-1)))


@lookalike("computed by cat", (B, T, W), (B, T, 3 * W))
def computed_by_a_concatenation(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.contiguous() for p in split(torch.cat([x, y], -1)))


@lookalike("consumes a window", (B, T, D))
def normalised_afterwards(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (p.unflatten(-1, (-1, K)).contiguous() for p in split(x))
    return torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1), v


@lookalike("mul (", (B, T, D))
def scaled_behind_views(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (p.contiguous() for p in split(x))
    return q.view(B, T, H, K).transpose(1, 2) * 0.25, k, v


@lookalike("consumes a window", (B, T, D), (B, 2 * T, W))
def written_into_a_cache(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (p.contiguous() for p in split(x))
    cache[:, T:] = k
    return q, v


@lookalike("takes strides", (1, 64, 4 * 16))
def read_by_an_op_that_takes_strides(x: Tensor) -> tuple[Tensor, ...]:
    gate, v = (p.unflatten(-1, (1, 2, 16)).contiguous() for p in x.chunk(2, dim=-1))
    a_log = torch.zeros(1, 2, 16)
    op = torch.ops.fusion_passes.gate_cumsum
    return op(gate, a_log, None, 1, 64, None, 1.0, 1.0, 20.0, False, "bnchk", None, None), v


